"""Input files: their names, sizes and versions, and streams of their bytes."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import pyarrow as pa

from fletcher.errors import InvalidCommandError
from fletcher.readers.pieces import PieceStream

# Time of the last change in ns, or a text that a server changes with the content.
Version: TypeAlias = int | str | None


@dataclass(frozen=True, slots=True)
class SourceFile(ABC):
    """A file on this machine or elsewhere. Thread-safe.

    Attributes:
        name: Path or URI, as a user writes it, without credentials.
        size: Size in bytes; None if it is unknown, as for a pipe.
        version: Time of the last change in ns of a local file. Of another file, its ETag, hash, or
            time of the last change. None if nothing is known.
    """

    name: str
    size: int | None
    version: Version

    @property
    def path(self) -> Path | None:
        """Path on this machine; None for a file elsewhere."""
        return None

    def open(self, offset: int = 0, length: int | None = None) -> BinaryIO:
        """Open at most `length` bytes from `offset` on, as an unbuffered stream.

        Raises:
            OSError, InvalidCommandError: The file cannot be read.
        """
        raw = self._open_raw()
        if offset:
            raw.seek(offset)
        return raw if length is None else cast("BinaryIO", _Part(raw, length))

    def open_table(self) -> Path | pa.NativeFile:
        """The file for Arrow's readers, which need any part of it."""
        if self.path is not None:
            return self.path
        raw = self._open_raw()
        return raw if isinstance(raw, pa.NativeFile) else pa.PythonFile(raw, "r")

    @abstractmethod
    def stamp(self) -> tuple[int | None, Version]:
        """Size and version at this moment. Raises InvalidCommandError if the file is gone."""

    @abstractmethod
    def _open_raw(self) -> BinaryIO: ...


@dataclass(frozen=True, slots=True)
class LocalFile(SourceFile):
    """A file or named pipe of this machine."""

    local_path: Path

    @property
    def path(self) -> Path:
        return self.local_path

    @classmethod
    def at_path(cls, path: Path) -> LocalFile:
        """The file at a path. Raises InvalidCommandError if it cannot be read."""
        size, version = _stamp(path)
        return cls(str(path), size, version, path)

    def stamp(self) -> tuple[int | None, Version]:
        return _stamp(self.local_path)

    def _open_raw(self) -> BinaryIO:
        return cast("BinaryIO", self.local_path.open("rb", buffering=0))


def _stamp(path: Path) -> tuple[int | None, int | None]:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidCommandError(f"cannot read {path}: {reason}") from None
    is_regular = stat.S_ISREG(status.st_mode)
    return (status.st_size, status.st_mtime_ns) if is_regular else (None, None)


class _Part(PieceStream):
    """The next `length` bytes of a stream."""

    def __init__(self, raw: BinaryIO, length: int) -> None:
        self._raw, self._length = raw, length
        self._read = 0

    def tell(self) -> int:
        return self._read - len(self._ready)

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _next_piece(self, size: int) -> bytes | None:
        data = self._raw.read(min(size, self._length - self._read))
        self._read += len(data)
        return data or None
