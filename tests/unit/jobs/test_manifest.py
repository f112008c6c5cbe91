"""Manifests: what a crash leaves, who may write, and what others read."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from fletcher.errors import ConfigError
from fletcher.jobs.manifest import MANIFEST, Manifest, read_manifest, running_process
from fletcher.jobs.records import (
    FileRecord,
    Fragment,
    JobRecord,
    Record,
    StampsRecord,
    StateRecord,
)
from tests.unit.code_shape import ROOT


def fragment(number: int, **changes: object) -> Fragment:
    fields = {"files": (FileRecord("/a", 1, 2),), "content": "c", "reading": {"text": "text"}}
    return Fragment(id=number, upload_id=f"u{number}", **(fields | changes))  # type: ignore[arg-type]


def filled(folder: Path) -> None:
    with Manifest(folder) as manifest:
        manifest.append(JobRecord(job="j", dataset="d", options={"dims": 3}))
        manifest.append(fragment(0), fragment(1))
        manifest.set_state(manifest.state.fragments[0], "done", rows=5, rows_stored=5)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    filled(tmp_path)
    state = read_manifest(tmp_path)
    assert state.job is not None
    assert (state.job.dataset, state.job.options) == ("d", {"dims": 3})
    assert [state.state(one) for one in state.current()] == ["done", "pending"]
    assert state.states[0].rows == 5


def test_a_line_that_a_crash_cut_is_no_line(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[:-cut])
        assert read_manifest(tmp_path).state(fragment(0)) == "pending"
        with Manifest(tmp_path) as manifest:
            assert manifest.state.state(fragment(0)) == "pending"
            manifest.append(StateRecord(fragment=1, state="done"))
        state = read_manifest(tmp_path)
        assert (state.state(fragment(0)), state.state(fragment(1))) == ("pending", "done")


def test_another_damaged_line_is_named_and_kept(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / MANIFEST
    lines = path.read_text().splitlines(keepends=True)
    for damage in ("{\n", "[]\n", '{"type": "unknown"}\n', '{"type": "state", "fragment": 9}\n'):
        path.write_text("".join([lines[0], damage, *lines[2:]]))
        before = path.read_bytes()
        for call in (read_manifest, Manifest):
            with pytest.raises(ConfigError, match=f"{MANIFEST}: line 2 cannot be read"):
                call(tmp_path)
        assert path.read_bytes() == before


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"type":"job","version":2,"job":"j","dataset":"d"}\n')
    with pytest.raises(ConfigError, match="version 2, expected at most 1"):
        Manifest(tmp_path)


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    assert running_process(tmp_path / "none") is None
    with Manifest(tmp_path) as manifest:
        with pytest.raises(ConfigError, match="running in another process"):
            Manifest(tmp_path)
        assert running_process(tmp_path) is not None
        manifest.close()
    assert running_process(tmp_path) is None
    filled(tmp_path)


def test_a_long_manifest_is_rewritten_without_what_no_longer_counts(tmp_path: Path) -> None:
    filled(tmp_path)
    with Manifest(tmp_path) as manifest:
        stamps = StampsRecord(fragment=1, files=(FileRecord("/b", 3, 4),))
        manifest.append(*[StateRecord(fragment=1, state="running")] * 1500, stamps)
    before = read_manifest(tmp_path)
    with Manifest(tmp_path):
        pass
    lines = (tmp_path / MANIFEST).read_text().splitlines()
    assert len(lines) == 5
    after = read_manifest(tmp_path)
    assert after.job == before.job
    assert after.fragments == before.fragments
    assert after.states == before.states
    assert after.fragments[1].files == (FileRecord("/b", 3, 4),)


def test_a_program_without_fletcher_reads_it(tmp_path: Path) -> None:
    filled(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    states = {one["fragment"]: one["state"] for one in lines if one["type"] == "state"}
    files = {one["id"]: one["files"][0]["path"] for one in lines if one["type"] == "fragment"}
    assert lines[0]["version"] == 1
    assert {files[number]: state for number, state in states.items()} == {"/a": "done"}


def test_the_documented_schema_is_that_of_the_records() -> None:
    documented = json.loads((ROOT / "docs/jobs.schema.json").read_text())
    assert documented.pop("title") == "A line of a job's manifest"
    assert documented == json.loads(json.dumps(msgspec.json.schema(Record)))


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        manifest._file.close()
        manifest._file = open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115
        with pytest.raises(ConfigError, match="cannot be used: No space left"):
            manifest.append(fragment(0))
        assert manifest.state.fragments == {}
