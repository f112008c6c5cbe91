"""Files at HTTP addresses: ranges, throttling, broken connections, and changes."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.errors import InvalidCommandError
from fletcher.readers import http_files, open_source
from fletcher.readers.sources import list_files


class Site:
    """One file at every path.

    Attributes:
        content: The file's bytes.
        version: Its ETag; None: the answers have none.
        ranges: Whether ranges are understood.
        sized: Whether the length is told.
        failures: Statuses of the next answers.
        breaks: Number of answers that end in the middle.
        asked: The ranges that were asked for.
    """

    def __init__(self, content: bytes, *, ranges: bool = True, sized: bool = True) -> None:
        self.content, self.ranges, self.sized = content, ranges, sized
        self.version: str | None = '"v1"'
        self.failures: list[int] = []
        self.breaks = 0
        self.asked: list[str | None] = []
        self.url = ""


@contextlib.contextmanager
def serve(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.asked.append(asked)
            if site.failures:
                self.send_response(site.failures.pop(0))
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body, first = site.content, 0
            if asked and site.ranges:
                first, last = map(int, re.findall(r"\d+", asked))
                body = body[first : last + 1]
                if not body:
                    self.send_error(416)
                    return
            self.send_response(206 if asked and site.ranges else 200)
            if asked and site.ranges:
                ends = f"{first}-{first + len(body) - 1}/{len(site.content)}"
                self.send_header("Content-Range", f"bytes {ends}")
            if site.version is not None:
                self.send_header("ETag", site.version)
            if site.sized:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if site.breaks and len(body) > 1:
                site.breaks -= 1
                body = body[: len(body) // 2]
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}/a.txt"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_files.time, "sleep", lambda _: None)


def lines(count: int) -> bytes:
    return b"".join(b"line %d\n" % number for number in range(count))


def read(url: str) -> list[str]:
    batches = open_source(url).batches()
    return [text for batch in batches for text in batch["text"].to_pylist()]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_is_opened_at_any_place(ranges: bool) -> None:
    with serve(Site(b"0123456789", ranges=ranges)) as site:
        (file,) = list_files(site.url)
        assert (file.name, file.size, file.version) == (site.url, 10, '"v1"')
        for offset, length, expected in ((0, None, b"0123456789"), (3, 4, b"3456"), (40, 2, b"")):
            with file.open(offset, length) as stream:
                assert stream.read() == expected


@pytest.mark.parametrize("ranges", [True, False])
def test_throttling_and_broken_connections_are_survived(
    ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_files, "RANGE_BYTES", 100_000)
    content = lines(50_000)
    with serve(Site(content, ranges=ranges)) as site:
        site.failures, site.breaks = [503, 429], 2
        assert read(site.url) == content.decode().splitlines()
        assert (site.failures, site.breaks) == ([], 0)


def test_a_server_that_stays_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Site(b"one\n")) as site:
        site.failures = [503] * http_files.MAX_ATTEMPTS
        with pytest.raises(InvalidCommandError, match=r"a\.txt: the server answered 503"):
            list_files(site.url)
        site.failures = [404]
        with pytest.raises(InvalidCommandError, match=r"a\.txt: the server answered 404"):
            list_files(site.url)
        assert site.failures == []


@pytest.mark.parametrize("url", ["http://host.invalid/a.txt", "http://127.0.0.1:x/a.txt"])
def test_a_wrong_address_is_named_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: float) -> None:
        raise AssertionError("it is tried again")

    monkeypatch.setattr(http_files.time, "sleep", fail)
    with pytest.raises(InvalidCommandError, match="cannot read http://"):
        list_files(url)


def test_a_name_may_have_spaces_and_other_letters() -> None:
    with serve(Site(b"one\n")) as site:
        url = site.url.replace("a.txt", "a b/\u00e4%20x.txt")
        assert read(url) == ["one"]
        assert list_files(url)[0].name == url


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_while_it_is_read_fails_by_name(ranges: bool) -> None:
    with serve(Site(lines(10), ranges=ranges)) as site:
        source = open_source(site.url)
        site.version = '"v2"'
        with pytest.raises(InvalidCommandError, match=r"a\.txt changed while it was read"):
            list(source.batches())


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_has_no_rows(ranges: bool) -> None:
    with serve(Site(b"", ranges=ranges)) as site:
        assert read(site.url) == []


def test_a_file_of_unknown_size_is_read_once_as_a_pipe() -> None:
    with serve(Site(b"one\ntwo\n", ranges=False, sized=False)) as site:
        source = open_source(site.url)
        assert not source.reiterable
        assert [row for one in source.batches() for row in one["text"].to_pylist()] == [
            *("one", "two")
        ]


def test_parquet_is_read_by_ranges(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {number}" * 30 for number in range(20_000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    with serve(Site((tmp_path / "a.parquet").read_bytes())) as site:
        assert read(site.url.replace(".txt", ".parquet")) == table["text"].to_pylist()
        assert len(site.asked) > 5
        assert None not in site.asked


def test_a_signature_is_in_no_name_and_no_error() -> None:
    with serve(Site(lines(3))) as site:
        url = f"{site.url}?X-Amz-Signature=hidden#part"
        (file,) = list_files(url)
        assert file.name == site.url
        site.failures = [403]
        with pytest.raises(InvalidCommandError) as caught:
            list_files(url)
        assert "hidden" not in str(caught.value)
        assert "hidden" not in str(file.name)
