"""`fletcher ingest` from an S3 server: a job that is repeated after objects changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fletcher.cli import main
from tests.doubles import s3_server
from tests.doubles.s3_server import serve_s3
from tests.integration.conftest import StartServer


def test_objects_that_changed_take_the_place_of_their_former_selves(
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    served = start_server()
    with serve_s3(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)

        def put(key: str, *texts: str) -> None:
            path = server.folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f'{{"id": "{one}", "text": "{one}"}}\n' for one in texts))

        def ingest() -> dict[str, int]:
            where = ["--server", served.address, "--dataset", "d", "--columns", "year"]
            job = ["--job", str(tmp_path / "job"), "--json"]
            code = main(["ingest", "s3://bucket/**/*.jsonl", *where, *job])
            out = capfd.readouterr()
            assert code == 0, out.err
            return dict(json.loads(out.out))

        put("year=2024/a.jsonl", "a1", "a2")
        put("year=2025/b.jsonl", "b1")
        assert ingest()["rows_stored"] == 3
        assert ingest()["rows_skipped"] == 3
        put("year=2025/b.jsonl", "b2", "b3")
        os.utime(server.folder / "year=2025/b.jsonl", (10**9, 10**9))
        assert ingest()["rows_deleted"] == 1
    assert served._service is not None
    _, store = served._service.delivery.store(None)
    rows = store.scan("d", columns=["id", "year"]).read_all().to_pylist()
    assert sorted((row["id"], row["year"]) for row in rows) == [
        *(("a1", 2024), ("a2", 2024)),
        *(("b2", 2025), ("b3", 2025)),
    ]
    for path in (tmp_path / "job").rglob("*"):
        assert path.is_dir() or s3_server.SECRET_KEY.encode() not in path.read_bytes()
