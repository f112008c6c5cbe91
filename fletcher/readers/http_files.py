"""Files at `https://` and `http://` addresses, read in ranges."""

from __future__ import annotations

import contextlib
import http.client
import io
import random
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

from fletcher.errors import InvalidCommandError
from fletcher.readers.source_files import SourceFile, Version
from fletcher.util.backoff import Backoff

TIMEOUT_S = 60.0
# Bytes of one request, so that a reader that seeks asks for little more than it reads.
RANGE_BYTES = 8 << 20
MAX_ATTEMPTS = 8
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_MAX_RETRY_AFTER_S = 60
_BACKOFF = Backoff(first_s=0.5, longest_s=20.0)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class HttpFile(SourceFile):
    """A file at an address. The name lacks the query, which may have a signature."""

    url: str
    has_ranges: bool

    @classmethod
    def at_url(cls, url: str) -> HttpFile:
        """Ask a server about a file. Raises InvalidCommandError if it cannot be read."""
        name = shown_url(url)
        url = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        try:
            with retried(lambda: _request(url, {"Range": "bytes=0-0"})) as answer:
                return cls(name, *_described(answer), url, has_ranges=answer.status == 206)
        except (OSError, http.client.InvalidURL) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            if getattr(error, "code", None) == 416:  # an empty file has no byte 0
                return cls(name, 0, None, url, has_ranges=False)
            raise InvalidCommandError(f"cannot read {name}: {reason_of(error)}") from None

    def stamp(self) -> tuple[int | None, Version]:
        now = HttpFile.at_url(self.url)
        return now.size, now.version

    def _open_raw(self) -> BinaryIO:
        return cast("BinaryIO", _HttpStream(self))


class _HttpStream(io.RawIOBase):
    """A file's bytes. A broken connection is replaced, and the rest is asked for.

    Without ranges, the rest is what follows the bytes that were read before.
    """

    def __init__(self, file: HttpFile) -> None:
        self._file = file
        self._at = 0
        self._answer: http.client.HTTPResponse | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.size is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size or 0}[whence]
        if start + offset != self._at:
            self._disconnect()
            self._at = start + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        is_end = self._file.size is not None and self._at >= self._file.size
        if is_end or not len(buffer):
            return 0
        data = retried(lambda: self._read_some(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _read_some(self, size: int) -> bytes:
        try:
            if self._answer is None:
                self._answer = self._connect()
            data = self._answer.read(size)
            if not data and self._file.size is not None:
                self._disconnect()  # the end of a range, or a broken connection
                self._answer = self._connect()
                data = self._answer.read(size)
                if not data:
                    raise ConnectionResetError("the connection ended early")
        except (OSError, http.client.HTTPException):
            self._disconnect()
            raise
        return data

    def _connect(self) -> http.client.HTTPResponse:
        file = self._file
        if file.has_ranges:
            end = min(self._at + RANGE_BYTES, file.size or 0) - 1
            answer = _request(file.url, {"Range": f"bytes={self._at}-{end}"})
        else:
            answer = _request(file.url, {})
        size, version = _described(answer)
        if (size, version) != (file.size, file.version) or file.has_ranges != (
            answer.status == 206
        ):
            answer.close()
            raise InvalidCommandError(
                f"{file.name} changed while it was read; give a copy that does not change"
            )
        left = 0 if file.has_ranges else self._at
        while left and (data := answer.read(min(left, 1 << 20))):
            left -= len(data)
        return answer

    def _disconnect(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()


def shown_url(url: str) -> str:
    """The address without user, password, query and fragment."""
    return re.sub(r"(?<=://)[^/?#]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])


def retried(ask: Callable[[], _Answer]) -> _Answer:
    """The result of `ask`, after throttling and broken connections. Raises as `ask`."""
    for attempt in range(1, MAX_ATTEMPTS):
        try:
            return ask()
        except (OSError, http.client.HTTPException) as error:
            if not _is_retryable(error):
                raise
            headers = getattr(error, "headers", None) or {}
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            pause_s = _retry_after_s(headers.get("Retry-After"))
            time.sleep(_BACKOFF.delay_s(attempt, random.random(), at_least_ms=1000 * pause_s))  # noqa: S311
    try:
        return ask()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: the connection broke") from None


def _is_retryable(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _RETRIED
    final = (socket.gaierror, ssl.SSLCertVerificationError, http.client.InvalidURL)
    return not isinstance(getattr(error, "reason", error), final)


def reason_of(error: Exception) -> str:
    """An error's reason, without the address that it may contain."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason)


def _retry_after_s(header: str | None) -> int:
    return min(int(header), _MAX_RETRY_AFTER_S) if header and header.isdecimal() else 0


def _request(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    headers = {"User-Agent": "fletcher", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - https or http
    return cast(
        "http.client.HTTPResponse",
        urllib.request.urlopen(request, timeout=TIMEOUT_S),  # noqa: S310
    )


def _described(answer: Any) -> tuple[int | None, str | None]:
    """Size and version of an answer's file."""
    headers = answer.headers
    size = headers.get("Content-Length")
    if answer.status == 206:
        size = (headers.get("Content-Range") or "").rpartition("/")[2]
    version = headers.get("ETag") or headers.get("Last-Modified")
    with contextlib.suppress(TypeError, ValueError):
        return int(size), version
    return None, version
