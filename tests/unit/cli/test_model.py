from __future__ import annotations

import json
from pathlib import Path

import pytest

from fletcher.cli import main

TINY = str(Path(__file__).parents[2] / "golden" / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path))
    return tmp_path


def test_the_life_of_a_model(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert main(["model", "list"]) == 0
    assert "no models yet" in capsys.readouterr().out

    assert main(["model", "add", TINY, "--json"]) == 0
    captured = capsys.readouterr()
    added = json.loads(captured.out)
    assert "is ready" in captured.err
    assert (added["name"], added["dim"], added["source"]) == ("tiny", 32, "folder:tiny")

    assert main(["model", "show", "tiny"]) == 0
    assert ["hash", added["hash"]] in map(str.split, capsys.readouterr().out.splitlines())
    assert main(["model", "list"]) == 0
    assert f"tiny@{added['hash']}" in capsys.readouterr().out
    assert main(["model", "verify"]) == 0
    assert capsys.readouterr().out == f"tiny: whole ({added['hash']})\n"

    weights = home / "models" / "tiny" / "model.weights"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert main(["model", "verify", "tiny", "--json"]) == 1
    [row] = json.loads(capsys.readouterr().out)
    assert not row["ok"]
    assert "model.weights has a wrong SHA-256" in row["error"]

    weights.unlink()
    assert main(["model", "list", "--json"]) == 1
    assert "model.weights is missing" in capsys.readouterr().out
    assert main(["model", "remove", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": "tiny"}
    assert main(["model", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_models_of_another_home(
    capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server with `home` in its file served others than these commands showed.
    file = home / "fletcher.toml"
    file.write_text(f'home = "{home / "other"}"\n')
    assert main(["model", "add", TINY, "--home", str(home / "other")]) == 0
    capsys.readouterr()
    assert main(["model", "list"]) == 0
    assert "no models yet" in capsys.readouterr().out
    monkeypatch.delenv("FLETCHER_HOME")
    for place in (["--home", str(home / "other")], ["--config", str(file)]):
        assert main(["model", "list", *place]) == 0
        assert capsys.readouterr().out.startswith("tiny@")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["show", "absent"], 1, "known: none"),
        (["remove", "absent"], 1, "known: none"),
        (["add", "/no/such/folder"], 1, "is no folder"),
        (["add", "org/name"], 1, "did you mean hub:org/name?"),
        (["add"], 2, "'SOURCE'"),
        ([], 2, "Missing command"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    assert main(["model", *argv]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
