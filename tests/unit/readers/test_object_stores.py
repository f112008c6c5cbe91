"""Files in S3: listed, read and watched, with a server that throttles, breaks and is killed."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from fletcher.errors import ConfigError, InvalidCommandError
from fletcher.readers import open_source
from fletcher.readers.object_stores import glob_regex
from fletcher.readers.sources import list_files
from tests.doubles import s3_server
from tests.doubles.proxy import Proxy
from tests.doubles.s3_server import S3Server, serve_s3

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow</Message></Error>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as started:
        put(started, "a.jsonl", b'{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
        put(started, "year=2024/b.txt", b"three\n")
        put(started, "year=2025/c.txt", b"four\n")
        put(started, "year=2025/.hidden.txt", b"no\n")
        put(started, "year=2025/picture.png", b"no\n")
        yield started


@pytest.fixture(autouse=True)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    if "server" in request.fixturenames:
        point_at(monkeypatch, request.getfixturevalue("server").port)


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


def put(server: S3Server, key: str, content: bytes) -> None:
    path = server.folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def texts(*uris: str) -> list[str]:
    batches = open_source(list(uris)).batches()
    return [text for batch in batches for text in batch["text"].to_pylist()]


def test_objects_folders_and_patterns_are_listed(server: S3Server) -> None:
    (one,) = list_files("s3://bucket/a.jsonl")
    assert (one.name, one.size) == ("s3://bucket/a.jsonl", 54)
    assert one.stamp() == (one.size, one.version)
    with one.open(8, 7) as stream:
        assert stream.read() == b'a", "te'
    notices: list[str] = []
    found = [file.name for file in list_files("s3://bucket/year=2025/", notice=notices.append)]
    assert found == ["s3://bucket/year=2025/c.txt"]
    assert notices == [
        "2 hidden files and files of unknown kind in s3://bucket/year=2025/ are skipped"
    ]
    for pattern in ("year=*/*.txt", "**/[bc].txt", "year=202?/**"):
        found = [file.name.rpartition("/")[2] for file in list_files(f"s3://bucket/{pattern}")]
        assert found[:2] == ["b.txt", "c.txt"]
    assert texts("s3://bucket/year=*/*.txt") == ["three", "four"]
    assert texts("s3://bucket/a.jsonl") == ["one", "two"]


@pytest.mark.parametrize("key", ["none.txt", "none/", "none*.txt", "year=2026/*.txt"])
def test_a_missing_object_is_named(server: S3Server, key: str) -> None:
    with pytest.raises(InvalidCommandError, match="s3://bucket/"):
        list_files(f"s3://bucket/{key}")


def test_tables_are_read_as_from_disk(server: S3Server, tmp_path: Path) -> None:
    table = pa.table({"id": range(5000), "text": [f"text {n}" * 20 for n in range(5000)]})
    pq.write_table(table, server.folder / "t.parquet", row_group_size=700)
    feather.write_feather(table, server.folder / "t.arrow", compression="zstd")
    for name in ("t.parquet", "t.arrow"):
        assert texts(f"s3://bucket/{name}") == table["text"].to_pylist()
        source = open_source(f"s3://bucket/{name}", limit=10)
        assert source.content_hash() == open_source(server.folder / name).content_hash()


def test_an_object_that_changes_while_it_is_read_fails_by_name(server: S3Server) -> None:
    put(server, "changing.txt", b"a line\n" * 2_000_000)
    batches = open_source("s3://bucket/changing.txt").batches()
    next(batches)
    put(server, "changing.txt", b"a line\n" * 2_000_001)
    with pytest.raises(InvalidCommandError, match=r"s3://bucket/changing\.txt changed"):
        list(batches)


def test_throttling_and_broken_connections_are_survived(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server, "big.txt", b"".join(b"line %d\n" % n for n in range(900_000)))
    with slow_down(server.port, 3) as port:
        point_at(monkeypatch, port)
        assert texts("s3://bucket/a.jsonl") == ["one", "two"]
    with Proxy(server.port) as proxy:
        point_at(monkeypatch, proxy.port)
        rows = 0
        for number, batch in enumerate(open_source("s3://bucket/big.txt").batches()):
            rows += batch.num_rows
            if number % 50 == 1:
                proxy.cut()
        assert rows == 900_000


def test_a_server_that_was_killed_has_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_s3(tmp_path) as first:
        put(first, "a.txt", b"one\n")
        point_at(monkeypatch, first.port)
        assert texts("s3://bucket/a.txt") == ["one"]
        first.kill()
    with serve_s3(tmp_path) as second:
        point_at(monkeypatch, second.port)
        assert texts("s3://bucket/a.txt") == ["one"]


def test_credentials_are_in_no_error(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(InvalidCommandError, match="s3://bucket/") as caught:
        list_files("s3://bucket/a.jsonl")
    assert "another-secret" not in str(caught.value)
    assert s3_server.ACCESS_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hidden@bucket/a.txt",
        "s3://bucket/a.txt?secret_key=hidden",
        "https://user:hidden@127.0.0.1/a.txt",
        "gs://hidden@bucket/a.txt",
    ],
)
def test_credentials_in_a_uri_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="credentials") as caught:
        list_files(uri)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3:///a.txt", "https:///a.txt", "http://[::1/a.txt"])
def test_a_uri_without_a_host_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected the name of a"):
        list_files(uri)


def test_an_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"ftp://.*s3://"):
        list_files("ftp://host/a.txt")


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("b/*.txt", ["b/a.txt"], ["b/.a.txt", "b/c/a.txt", "b/a.csv"]),
        ("b/**/*.txt", ["b/a.txt", "b/c/a.txt", "b/c/d/a.txt"], ["b/.c/a.txt", "c/a.txt"]),
        ("b/**", ["b/a", "b/c/a"], ["b/.a", "b/c/.a", "b"]),
        ("b/[a-c]?", ["b/a1"], ["b/d1", "b/a", "b/a/1"]),
        ("b/[!a].x", ["b/c.x"], ["b/a.x", "b/cc.x"]),
        ("b/a[1", ["b/a[1"], ["b/a1"]),
        ("b/.*", ["b/.a"], ["b/a"]),
    ],
)
def test_patterns_match_as_on_disk(pattern: str, matching: list[str], others: list[str]) -> None:
    regex = re.compile(glob_regex(pattern))
    assert [one for one in matching + others if regex.fullmatch(one)] == matching


class slow_down:  # noqa: N801 - used as a function
    """Answers the first connections with 503 SlowDown, and forwards the others."""

    def __init__(self, port: int, number: int) -> None:
        self._proxy = Proxy(port)
        self._left = number
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> int:
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        assert self._left == 0
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        self._listener.close()
        self._proxy.__exit__()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._left:
                self._left -= 1
                with client:
                    client.recv(1 << 16)
                    head = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\n"
                    length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(SLOW_DOWN)
                    client.sendall(head + length + SLOW_DOWN)
            else:
                thread = threading.Thread(target=self._proxy._forward, args=(client,), daemon=True)
                thread.start()
