"""`fletcher verify`, after rows were altered with LanceDB's own tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
import pytest

from fletcher.cli import main

TEXTS = [f"text number {number}" for number in range(50)]


@pytest.fixture(scope="module")
def filled(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with input, and a store that a job filled from it."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "in").mkdir()
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        lines = [json.dumps({"id": text[12:], "text": text}) for text in texts]
        (folder / "in" / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    options = ["--model", "tiny", "--home", str(tiny_home), "--backend", "onnxruntime"]
    store = ["--dataset", "d", "--store", f"lance:{folder / 'vectors'}"]
    assert main(["ingest", str(folder / "in"), *store, *options]) == 0
    return folder


@pytest.fixture
def verify(
    filled: Path, tiny_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Alters a copy of the store, and verifies it."""
    shutil.copytree(filled / "vectors", tmp_path / "vectors")

    def run(alter: Callable[[Any], object], canaries: int = 0) -> tuple[int, dict[str, Any]]:
        alter(lancedb.connect(str(tmp_path / "vectors")).open_table("d"))
        options = ["--home", str(tiny_home), "--backend", "onnxruntime", "--model", "tiny"]
        store = ["--store", f"lance:{tmp_path / 'vectors'}"]
        capsys.readouterr()
        code = main(["verify", "d", *store, *options, "--canaries", str(canaries), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def swap_vectors(table: Any) -> None:
    rows = table.search().where("id IN ('3', '4')").to_arrow()
    one, other = rows.column("vector").to_pylist()
    swapped = pa.array([other, one], rows.schema.field("vector").type)
    rows = rows.set_column(rows.schema.get_field_index("vector"), "vector", swapped)
    table.delete("id IN ('3', '4')")
    table.add(rows.select(table.schema.names))


def double(table: Any) -> None:
    table.add(table.search().where("id = '7'").to_arrow().select(table.schema.names))


@pytest.mark.parametrize(
    ("alter", "fault"),
    [
        (lambda table: table.delete("id = '9'"), "a.jsonl: 1 of 30 rows are missing"),
        (lambda table: table.delete("id = '49'"), "b.jsonl: 1 of 20 rows are missing"),
        (double, "a.jsonl: 1 of 30 rows are there too often"),
        (
            lambda table: table.update("id = '2'", {"text": "other"}),
            "a.jsonl: an id or a text has changed",
        ),
        (
            lambda table: table.update("id = '2'", {"id": "x"}),
            "a.jsonl: an id or a text has changed",
        ),
        (swap_vectors, "a.jsonl: a vector has changed"),
    ],
)
def test_what_was_altered_is_found(
    verify: Callable[..., tuple[int, dict[str, Any]]],
    alter: Callable[[Any], object],
    fault: str,
) -> None:
    code, report = verify(alter)
    assert code == 1
    assert any(fault in one for one in report["faults"]), report


def test_a_sound_dataset_has_no_fault(verify: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    code, report = verify(lambda table: table.optimize(), canaries=20)
    assert (code, report["faults"], report["canaries"], report["rows"]) == (0, [], 20, 50)
    assert report["fragments_without_checksums"] == 0


def test_a_store_that_was_moved_goes_on(
    filled: Path, tiny_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(filled / "in", tmp_path / "in")
    shutil.copytree(filled / "vectors", tmp_path / "moved")
    manifest = tmp_path / "moved" / ".jobs" / "d" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(str(filled / "in"), str(tmp_path / "in")))
    (tmp_path / "in" / "c.jsonl").write_text('{"id": "c", "text": "more"}\n')
    options = ["--model", "tiny", "--home", str(tiny_home), "--backend", "onnxruntime", "--json"]
    store = ["--dataset", "d", "--store", f"lance:{tmp_path / 'moved'}"]
    for skipped in (50, 51):
        assert main(["ingest", str(tmp_path / "in"), *store, *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["rows_received"], report["rows_skipped"]) == (51, skipped)


def test_vectors_are_computed_again(verify: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    code, report = verify(swap_vectors, canaries=50)
    assert code == 1
    assert sum("its vector is not that of its text" in one for one in report["faults"]) == 2
