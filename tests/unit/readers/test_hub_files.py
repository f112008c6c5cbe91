"""Files of datasets on the Hugging Face hub, with a stand-in for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fletcher.errors import InvalidCommandError
from fletcher.readers import object_stores, open_source
from fletcher.readers.sources import list_files

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "a" * 40
FILES = {
    "README.md": b"about\n",
    "data/a.jsonl": b'{"id": "a", "text": "one"}\n',
    "data/b.jsonl": b'{"id": "b", "text": "two"}\n',
}


def describe(name: str) -> dict[str, object]:
    content = FILES[name]
    return {"type": "file", "path": name, "size": len(content), "oid": oid(content)}


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api, tree = "/api/datasets/org/data", "/api/datasets/org/data/tree/main"
        content = FILES.get(path.removeprefix("/datasets/org/data/resolve/main/"))
        if path in (api, f"{api}/revision/main"):
            self.answer(200, {"_id": "1", "id": "org/data", "sha": COMMIT, "siblings": []})
        elif path.startswith(tree):
            below = path.removeprefix(tree).strip("/")
            top = f"{below}/" if below else ""
            found = [describe(name) for name in FILES if name.startswith(top)]
            if not below:
                found.append({"type": "directory", "path": "data", "size": 0, "oid": "d"})
            self.answer(200, found) if found else self.answer(404, {})
        elif content is None:
            self.answer(404, {})
        else:
            first, last = 0, len(content) - 1
            asked = (self.headers.get("Range") or "").removeprefix("bytes=")
            if asked:
                first, last = (int(one) for one in asked.split("-"))
            self.send(206 if asked else 200, content[first : last + 1], oid(content))

    do_HEAD = do_GET  # noqa: N815  (named by http.server)

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = (
            json.loads(asked)["paths"]
            if asked.startswith("{")
            else [part.partition("=")[2].replace("%2F", "/") for part in asked.split("&")]
        )
        self.answer(200, [describe(name) for name in names if name in FILES])

    def answer(self, status: int, body: object) -> None:
        self.send(status, json.dumps(body).encode(), "x")

    def send(self, status: int, body: bytes, etag: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            object_stores,
            "_hub",
            lambda: huggingface_hub.HfFileSystem(endpoint=url, skip_instance_cache=True),
        )
        yield
        server.shutdown()
        thread.join()


def test_files_folders_and_patterns_are_read() -> None:
    (one,) = list_files("hf://datasets/org/data/data/a.jsonl")
    assert one.name == "hf://datasets/org/data/data/a.jsonl"
    assert (one.size, one.version) == (27, oid(FILES["data/a.jsonl"]))
    assert one.stamp() == (one.size, one.version)
    for uri in ("hf://datasets/org/data/data", "hf://datasets/org/data/**/*.jsonl"):
        rows = [row for batch in open_source(uri).batches() for row in batch.to_pylist()]
        assert rows == [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}]


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InvalidCommandError, match=r"hf://datasets/org/data/none\.jsonl"):
        list_files("hf://datasets/org/data/none.jsonl")


def test_errors_of_the_hubs_client_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def invalidate_cache(self) -> None: ...

        def info(self, _: str) -> None:
            raise RuntimeError("no connection")

    monkeypatch.setattr(object_stores, "_hub", Broken)
    with pytest.raises(InvalidCommandError, match=r"cannot read hf://datasets/.*no connection"):
        list_files("hf://datasets/org/data/a.jsonl")
