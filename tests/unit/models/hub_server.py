"""A stand-in for the Hugging Face hub: one repository at one commit, over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
REPOSITORY = "org/tiny"


class HubServer:
    """Serves a folder as REPOSITORY; `requests` lists what was asked, `damage` spoils a file."""

    def __init__(self, folder: Path) -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.requests: list[str] = []
        self.damage = ""
        self.url = ""

    def describe(self) -> dict[str, Any]:
        return {"_id": "1", "id": REPOSITORY, "sha": COMMIT, "siblings": self._siblings()}

    def _siblings(self) -> list[dict[str, Any]]:
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            one = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(one)
        return siblings


@contextlib.contextmanager
def serve(hub: HubServer) -> Iterator[HubServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if self.command == "GET":
                hub.requests.append(path)
            prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
            if path in (
                f"/api/models/{REPOSITORY}",
                f"/api/models/{REPOSITORY}/revision/{COMMIT}",
                f"/api/models/{REPOSITORY}/revision/v1",
            ):
                self._answer(200, json.dumps(hub.describe()).encode())
            elif path.startswith(prefix) and path.removeprefix(prefix) in hub.files:
                name = path.removeprefix(prefix)
                content = hub.files[name]
                etag = hashlib.sha256(content).hexdigest()
                if name == hub.damage:
                    content = content[:-1] + b"X"
                self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815  (named by http.server)

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
