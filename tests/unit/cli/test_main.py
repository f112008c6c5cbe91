"""What every command shares: help, exit codes, one-line errors, completions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

import fletcher.cli
from fletcher.cli import COMMANDS, SECTIONS, main, root
from fletcher.cli.command_line import Context
from fletcher.config.server import OPTIONS
from fletcher.errors import ConfigError, InvalidCommandError, StoreUnavailableError

BUG = "fletcher doctor: unexpected ZeroDivisionError: by zero; FLETCHER_LOG_LEVEL=debug shows where"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("FLETCHER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLETCHER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "90")


def replace_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    module = types.ModuleType("fletcher.cli.doctor")
    module.cli = click.command("doctor")(run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fletcher.cli.doctor", module)


def test_no_arguments_print_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "Examples:" in out
    headings = [f"\n{heading}:\n" for heading in SECTIONS]
    assert [out.index(one) for one in headings] == sorted(out.index(one) for one in headings)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: fletcher {command}")
    assert "fletcher " + command in out.split("Example")[-1]
    words = [command] if command != "help" else ["help", "help"]
    for argv in (["help", *words[-1:]], [command, "-h"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_argument_has_help(command: str) -> None:
    found = root.get_command(Context(root), command)
    assert found is not None
    commands = found.commands.values() if isinstance(found, click.Group) else [found]
    without = [
        param.name
        for one in commands
        for param in one.params
        if isinstance(param, (click.Option, click.Argument)) and not param.help
    ]
    assert without == []


def test_help_keeps_the_lines_of_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "add", "--help"]) == 0
    assert "\n    hub:ORG/NAME[@REVISION]  " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--version"], ["version"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.startswith("fletcher 0.")


def test_serve_has_a_flag_for_every_option() -> None:
    serve = root.get_command(Context(root), "serve")
    assert serve is not None
    flags = {flag for param in serve.params for flag in param.opts}
    assert {option.flag for option in OPTIONS.values()} <= flags


def test_help_shows_the_variable_and_the_default_of_each_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    for option in OPTIONS.values():
        assert f"[env: {option.variable}]" in out
    assert "[default: 2GiB] [env: FLETCHER_MAX_MEMORY]" in " ".join(out.split())
    assert "\x1b" not in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["serve", "--help"]) == 0
    assert "\x1b[1mNetwork:\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["serve", "--help"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_options_of_servers_are_not_offered_by_other_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in (["embed"], ["ingest"], ["search"], ["similar"], ["stats"], ["model", "list"]):
        assert main([*command, "--help"]) == 0
        out = capsys.readouterr().out
        for name in ("port", "max_streams", "drain_timeout", "tls_key", "max_journal"):
            assert OPTIONS[name].flag not in out.replace("grpc://HOST:PORT", "")


def test_help_of_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "model", "ad"]) == 2
    assert "'ad' is not a command; did you mean add?" in capsys.readouterr().err
    assert main(["help", "serve", "x"]) == 2
    assert "'serve' has no commands" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sevre"], "'sevre' is not a command; did you mean serve?"),
        (["xyz"], "'xyz' is not a command; commands: ingest, embed"),
        (["serve", "--max-stream", "3"], "'--max-stream' is not understood; did you mean --max-st"),
        (
            ["ingest", "x", "--dataset", "d", "--store-retry", "3"],
            "not understood; set FLETCHER_STORE_RETRY, or store_retry in the file of --config",
        ),
        (
            ["search", "x", "--dataset", "d", "--max-streams", "3"],
            "not understood; it is an option of fletcher serve",
        ),
        (["stats"], "--server"),
        (["serve", "--hosst=x"], "'--hosst' is not understood; did you mean --host?"),
        (["model", "list", "--exits", "3"], "'--exits' is not understood here; see"),
        (["serve", "--port"], "Option '--port' requires an argument; see fletcher serve --help"),
        (["completion", "bsh"], "did you mean bash?"),
        (["search", "x"], "--dataset"),
        (
            ["store", "--path", "x", "--port", "http"],
            "Invalid value for '--port': 'http' is not a valid integer range",
        ),
        (["--nonsense"], "'--nonsense' is not understood"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_wrong_value_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "http"]) == 2
    assert capsys.readouterr().err == (
        "fletcher serve: `port` is 'http' (from --port), expected a whole number, from 0 to 65535\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("`x` is bad"), 2, "fletcher doctor: `x` is bad\n"),
        (InvalidCommandError("`dims` is 0"), 2, "fletcher doctor: `dims` is 0\n"),
        (StoreUnavailableError("the store\nis away"), 1, "fletcher doctor: the store is away\n"),
        (StoreUnavailableError("\x1b[2J gone"), 1, "fletcher doctor: [2J gone\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ZeroDivisionError("by zero"),
            1,
            BUG + "\n",
        ),
    ],
)
def test_errors_become_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def run() -> int:
        raise error

    replace_command(monkeypatch, run)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == text


def test_the_traceback_of_a_bug_is_there_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_command(monkeypatch, lambda: 1 / 0)
    monkeypatch.setenv("FLETCHER_LOG_LEVEL", "debug")
    assert main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, types\n"
        "module = types.ModuleType('fletcher.cli.doctor')\n"
        "import click\n"
        "@click.command('doctor')\n"
        "def cli():\n"
        "    sys.stdin.readline()\n"
        "    print('x' * 1000000)\n"
        "    return 0\n"
        "module.cli = cli\n"
        "sys.modules['fletcher.cli.doctor'] = module\n"
        "from fletcher.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_imports_no_engine_and_no_arrow() -> None:
    code = (
        "import sys\n"
        "from fletcher.cli import main\n"
        "from fletcher.cli import COMMANDS\n"
        "main(['--help'])\n"
        "assert not [name for name in sys.modules if name.startswith('fletcher.config')]\n"
        "for command in COMMANDS:\n"
        "    main([command, '--help'])\n"
        "engines = {'lancedb', 'onnxruntime', 'openvino', 'opentelemetry'}\n"
        "heavy = {'pyarrow', 'numpy', 'rich', *engines}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr == ""


def test_print_config_shows_the_source_of_each_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "some.toml"
    file.write_text("max_streams = 9\n", encoding="utf-8")
    monkeypatch.setenv("FLETCHER_DEVICE", "cpu")
    monkeypatch.setenv("FLETCHER_MAX_STREEMS", "8")
    argv = ["serve", "--print-config", "--port", "0", "--config", str(file), "--insecure"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "FLETCHER_MAX_STREEMS is not an option; did you mean" in captured.err
    out = captured.out.splitlines()
    assert "port = 0  # --port" in out
    assert 'device = "cpu"  # FLETCHER_DEVICE' in out
    assert f"max_streams = 9  # {file}" in out
    assert "insecure = true  # --insecure" in out
    assert 'host = "127.0.0.1"  # default' in out


def test_repeated_stores_keep_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "--print-config", "--store", "a=lance:/x,y", "--store", "b=parquet:/z"]
    assert main(argv) == 0
    assert 'store = ["a=lance:/x,y", "b=parquet:/z"]  # --store' in capsys.readouterr().out


def complete(script: Path, *words: str) -> set[str]:
    """Words that bash offers for the last of `words`."""
    line = " ".join(f"'{word}'" for word in words)
    function = f"_{words[0].replace('-', '_')}_completion"
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        f"{function} {words[0]}; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completion_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    for program, function in (("fletcher", "main"), ("fletcher-serve", "serve_main")):
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        code = f"import sys; from fletcher.cli import {function}; sys.exit({function}())"
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("bge", "bge@0123456789ab", "other"):
        (tmp_path / "home" / "models" / name).mkdir(parents=True)
    (tmp_path / "home" / "vectors" / "articles.lance").mkdir(parents=True)
    for words, expected in (
        ("s", {"serve", "search", "similar", "stats", "store"}),
        ("serve --max-s", {"--max-streams"}),
        ("serve --compression l", {"lz4"}),
        ("completion ", {"bash", "zsh", "fish"}),
        ("ingest x --mode ", {"append", "upsert", "overwrite", "delta"}),
        ("model a", {"add", "alias"}),
        ("model list --j", {"--json"}),
        ("model show b", {"bge", "bge@0123456789ab"}),
        ("embed x --model o", {"other"}),
        ("search x --dataset ", {"articles"}),
        ("help model re", {"remove"}),
    ):
        offered = complete(script, "fletcher", *words.split(" "))
        assert {one.partition(",")[2] or one for one in offered} == expected, words
    assert complete(script, "fletcher-serve", "--max-s") == {"--max-streams"}


@pytest.mark.parametrize(("shell", "sign"), [("zsh", "#compdef fletcher"), ("fish", "complete --")])
def test_other_shells(shell: str, sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert out.count(sign) == 2
    assert "_FLETCHER_SERVE_COMPLETE=" in out


def test_serve_main_is_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fletcher-serve", "--print-config"])
    assert fletcher.cli.serve_main() == 0
    assert "port = 8815" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["embed", "ok", "\udcff"],
        ["search", "\udcff", "--dataset", "d"],
        ["similar", "a", "\udcff"],
        ["ingest", "x.csv", "--dataset", "d", "--prompt", "\udcff"],
    ],
)
def test_arguments_that_are_not_utf8_are_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "expected UTF-8, it holds other bytes" in err
    assert "unexpected" not in err


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_output_fits_any_encoding(encoding: str) -> None:
    value = {"file": "\udcff.csv", "text": "é 雪"}
    script = (
        "import sys; from fletcher.cli import main; from fletcher.cli.terminal import print_json\n"
        f"main(['version']); print_json({value!a}); print('雪')"
    )
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    _, line, plain = done.stdout.decode(encoding).splitlines()
    assert json.loads(line) == value
    assert plain == ("雪" if encoding == "utf-8" else r"\u96ea")
