"""Files in object stores: `s3://`, `gs://` and `hf://`."""

from __future__ import annotations

import contextlib
import datetime as dt
import glob
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow.fs as pa_fs

from fletcher.errors import ConfigError, InvalidCommandError
from fletcher.readers.files import format_of
from fletcher.readers.folders import TABLE_MARKS, Notice, no_files, table_refusal
from fletcher.readers.source_files import SourceFile, Version

# Attempts after throttling and broken connections; they take about a minute.
MAX_ATTEMPTS = 10
_TIMEOUT_S = 60.0


class ObjectStore(ABC):
    """The objects of one kind of store, by bucket and key. Thread-safe."""

    @abstractmethod
    def describe(self, key: str) -> Object | None:
        """The object of this name; None if there is none."""

    @abstractmethod
    def list_below(self, prefix: str) -> Iterable[Object]:
        """All objects below a folder; none if it does not exist."""

    @abstractmethod
    def open_object(self, key: str) -> BinaryIO:
        """An object's bytes, unbuffered and seekable."""


@dataclass(frozen=True, slots=True)
class Object:
    """An object's key with its bucket, its size and its version."""

    key: str
    size: int
    version: Version


@dataclass(frozen=True, slots=True)
class StoredFile(SourceFile):
    """A file in an object store."""

    store: ObjectStore
    key: str

    def stamp(self) -> tuple[int | None, Version]:
        try:
            found = self.store.describe(self.key)
        except OSError as error:
            raise InvalidCommandError(f"cannot read {self.name}: {first_line(error)}") from None
        if found is None:
            raise InvalidCommandError(f"cannot read {self.name}: it is gone")
        return found.size, found.version

    def _open_raw(self) -> BinaryIO:
        return self.store.open_object(self.key)


class ArrowStore(ObjectStore):
    """A store that pyarrow can read."""

    def __init__(self, filesystem: pa_fs.FileSystem) -> None:
        self._filesystem = filesystem

    def describe(self, key: str) -> Object | None:
        info = self._filesystem.get_file_info(key)
        return _object(info) if info.type == pa_fs.FileType.File else None

    def list_below(self, prefix: str) -> Iterable[Object]:
        selector = pa_fs.FileSelector(prefix, recursive=True, allow_not_found=True)
        found = self._filesystem.get_file_info(selector)
        return [_object(info) for info in found if info.type == pa_fs.FileType.File]

    def open_object(self, key: str) -> BinaryIO:
        return cast("BinaryIO", self._filesystem.open_input_file(key))


class HubStore(ObjectStore):
    """The Hugging Face hub."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def describe(self, key: str) -> Object | None:
        self._filesystem.invalidate_cache()
        with _hub_errors():
            try:
                info = self._filesystem.info(key)
            except FileNotFoundError:
                return None
        return _hub_object(info) if info["type"] == "file" else None

    def list_below(self, prefix: str) -> Iterable[Object]:
        with _hub_errors():
            found = self._filesystem.find(prefix, detail=True).values()
        return [_hub_object(info) for info in found]

    def open_object(self, key: str) -> BinaryIO:
        return cast("BinaryIO", self._filesystem.open(key, "rb", block_size=8 << 20))


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """Convert the errors of the hub's HTTP client, of any version."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - of httpx, whichever version
        raise OSError(first_line(error)) from None


def list_objects(
    scheme: str, path: str, notice: Notice, *, every: bool = False
) -> list[StoredFile]:
    """List the files at a path or a pattern of a store, sorted by their keys.

    Args:
        scheme: `s3`, `gs` or `hf`.
        path: Bucket and key, a folder of keys, or a pattern. `hf`: a path of the hub.
        notice: Called with a message about what is left out of a folder.
        every: Take a folder's files of unknown formats, too.

    Raises:
        InvalidCommandError: The store cannot be read, or there is no file to read.
        ConfigError: A package is not installed.
    """
    uri, path = f"{scheme}://{path}", path.rstrip("/")
    pattern = glob.has_magic(path)
    try:
        store = connect(scheme, path.partition("/")[0])
        one = store.describe(path)
        if one is not None:
            return [_stored(scheme, store, one)]
        top = _plain_start(path) if pattern else path
        found = sorted(store.list_below(top), key=lambda one: one.key)
    except (OSError, ValueError) as error:
        raise InvalidCommandError(f"cannot read {uri}: {first_line(error)}") from None
    if pattern:
        matches = re.compile(glob_regex(path)).fullmatch
        files = [_stored(scheme, store, one) for one in found if matches(one.key)]
        if not files:
            raise InvalidCommandError(f"no file matches {uri!r}")
        return files
    if not found:
        raise InvalidCommandError(f"cannot read {uri}: there is no such file or folder")
    shown = [one for one in found if "/." not in one.key.removeprefix(top)]
    _refuse_tables(uri, [one.key for one in found])
    files = [_stored(scheme, store, one) for one in shown if every or format_of(one.key)]
    left_out = len(found) - len(files)
    if left_out:
        notice(f"{left_out:,} hidden files and files of unknown kind in {uri} are skipped")
    if not files:
        raise no_files(uri)
    return files


def glob_regex(pattern: str) -> str:
    """The regular expression of a pattern; `*` matches neither `/` nor hidden files."""
    parts = []
    for part in re.split(r"(\*\*/|\*\*$|/)", pattern):
        if part == "**/":
            parts.append(r"(?:(?!\.)[^/]+/)*")
        elif part == "**":
            parts.append(r"(?:(?!\.)[^/]+/)*(?!\.)[^/]+")
        elif part == "/":
            parts.append(part)
        elif part:
            parts.append(("" if part.startswith(".") else r"(?!\.)") + _segment_regex(part))
    return "".join(parts)


def _segment_regex(part: str) -> str:
    signs = []
    for sign in re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL):
        if sign in "*?":
            signs.append("[^/]*" if sign == "*" else "[^/]")
        elif len(sign) > 1:
            inner = sign[1:-1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            signs.append(f"[{'^' + inner[1:] if inner.startswith('!') else inner}]")
        else:
            signs.append(re.escape(sign))
    return "".join(signs)


def _plain_start(pattern: str) -> str:
    """The folders before the first sign of a pattern."""
    plain = []
    for part in pattern.split("/"):
        if glob.has_magic(part):
            break
        plain.append(part)
    if not plain:
        raise InvalidCommandError(f"the pattern {pattern!r} needs the name of a bucket")
    return "/".join(plain)


def _refuse_tables(uri: str, keys: list[str]) -> None:
    for mark, kind in TABLE_MARKS.items():
        if any(f"/{mark}/" in key for key in keys):
            raise table_refusal(uri, kind)
    if any(re.search(r"/metadata/[^/]*\.metadata\.json$", key) for key in keys):
        raise table_refusal(uri, "an Iceberg table")


def _stored(scheme: str, store: ObjectStore, one: Object) -> StoredFile:
    return StoredFile(f"{scheme}://{one.key}", one.size, one.version, store, one.key)


def first_line(error: Exception) -> str:
    """An error's first line, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def connect(scheme: str, bucket: str) -> ObjectStore:
    """Connect to a store, with credentials of the environment or a profile.

    Raises:
        ConfigError: A package is not installed.
    """
    if scheme == "hf":
        return HubStore(_hub())
    if scheme == "gs":
        limit = dt.timedelta(seconds=_TIMEOUT_S)
        endpoint = os.environ.get("STORAGE_EMULATOR_HOST")
        local = {} if not endpoint else _endpoint(endpoint) | {"anonymous": True}
        return ArrowStore(pa_fs.GcsFileSystem(retry_time_limit=limit, **local))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not (endpoint or region or os.environ.get("AWS_PROFILE")):
        region = pa_fs.resolve_s3_region(bucket)
    return ArrowStore(
        pa_fs.S3FileSystem(
            region=region,
            connect_timeout=10.0,
            request_timeout=_TIMEOUT_S,
            retry_strategy=pa_fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
            **(_endpoint(endpoint) if endpoint else {}),
        )
    )


def _endpoint(url: str) -> dict[str, Any]:
    parts = urlsplit(url if "://" in url else f"https://{url}")
    return {"endpoint_override": parts.netloc, "scheme": parts.scheme}


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            "`hf://` needs the package huggingface_hub; install it with: pip install "
            "'longbow-fletcher[hub]'",
            field="paths",
        ) from None
    return huggingface_hub.HfFileSystem(skip_instance_cache=True)


def _object(info: pa_fs.FileInfo) -> Object:
    # A list of objects has milliseconds, and the answer for one object has seconds.
    return Object(info.path, info.size, info.mtime_ns and info.mtime_ns // 10**9 * 10**9)


def _hub_object(info: dict[str, Any]) -> Object:
    lfs = info.get("lfs") or {}
    return Object(info["name"], info["size"], lfs.get("sha256") or info.get("blob_id"))
