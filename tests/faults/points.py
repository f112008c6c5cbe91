"""Points at which a call fails: their enumeration from a recording run, and the file calls' end.

A point is the first, the second or the last call of a call site. Python's call sites are those of
`tests.faults.callsites`, the others those of `filecalls.c`.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.failures import hows_of
from tests.faults.launching import SiteName

STORES = ("lance", "parquet", "fletcher", "longbow")
# Where a store's answers are read.
_ANSWERS = ("to_pybytes", "read_all", "run_action", "read_chunk")
_ERRNO = {"EIO": 5, "EMFILE": 24, "ENOSPC": 28, "ENOMEM": 12}
_FILE_ERRORS = {
    "open": ("EMFILE", "EIO", "ENOSPC"),
    "write": ("ENOSPC", "EIO"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "mmap": ("ENOMEM", "EIO"),
}
# The layout of `struct control` in filecalls.c.
_HEADER = struct.Struct("=IIIIQII480s")
_SITE = struct.Struct("=QII232s")
_NUM_SITES = 1024


@dataclass(frozen=True)
class Point:
    """A call that fails.

    Attributes:
        store: The kind of store, one of STORES.
        where: Process and call site.
        site: The call site, or its hash for a file call.
        role: The process of a Python call; empty for a file call.
        index: Which call of the site: 1 is the first.
        how: As in `Fault`; the error's name for a file call.
    """

    store: str
    where: str
    site: str
    role: str
    index: int
    how: str

    def __str__(self) -> str:
        return f"{self.store}: {self.where} #{self.index} {self.how}"


def build_preload(folder: Path) -> Path:
    """Compile `filecalls.c`."""
    library = folder / "filecalls.so"
    source = Path(__file__).with_name("filecalls.c")
    argv = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(argv, check=True, capture_output=True)
    return library


class FileControl:
    """The control file of `filecalls.c`."""

    def __init__(self, path: Path, root: Path, point: Point | None) -> None:
        path.write_bytes(bytes(_HEADER.size + _NUM_SITES * _SITE.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        here = point if point is not None and not point.role else None
        index, error = (here.index, _ERRNO[here.how]) if here else (0, 0)
        site = int(here.site) if here else 0
        _HEADER.pack_into(self._map, 0, 0, 0, index, error, site, 0, 0, str(root).encode())

    def arm(self, *, on: bool) -> None:
        struct.pack_into("=I", self._map, 0, int(on))

    @property
    def fired(self) -> bool:
        return bool(struct.unpack_from("=I", self._map, 4)[0])

    def counts(self) -> dict[str, tuple[int, int]]:
        """Hash and number of calls by site."""
        found = {}
        for number in range(_NUM_SITES):
            hashed, count, _, raw = _SITE.unpack_from(self._map, _HEADER.size + number * _SITE.size)
            if hashed:
                found[raw.split(b"\0")[0].decode()] = (hashed, count)
        return found


class Recording:
    """Calls of a run without a fault, and the vectors that it stored."""

    def __init__(
        self,
        calls: dict[tuple[str, int], tuple[str, int]],
        file_calls: dict[str, tuple[int, int]],
        vectors: Any,
    ) -> None:
        self.calls = calls
        self.file_calls = file_calls
        self.vectors = vectors

    def points(self, store: str, sites: Sequence[SiteName]) -> Iterator[Point]:
        """All points; `sites` describes the call sites by number."""
        for (role, number), (kind, count) in sorted(
            self.calls.items(), key=lambda one: one[0][::-1]
        ):
            name, text, timed = sites[number]
            hows = hows_of(text, kind, timed=timed)
            if ".stores.flight." in name and text.rpartition(".")[2] in _ANSWERS:
                hows += ["cut", "empty", "wrong"]
            for how in hows:
                for index in _indexes(count)[: 1 if how == "unlogged" else None]:
                    yield Point(store, f"{role} {name} [{kind}]", name, role, index, how)
        for name, (hashed, count) in sorted(self.file_calls.items()):
            for index in _indexes(count):
                for how in _FILE_ERRORS[name.split()[1]]:
                    yield Point(store, name, str(hashed), "", index, how)


def _indexes(count: int) -> list[int]:
    """The first, the second and the last of some calls."""
    return sorted({1, min(2, count), count})
