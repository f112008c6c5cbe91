"""Index of a LanceDB table's vectors, and how searches use it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from fletcher.util.durable import write_atomically

_log = logging.getLogger(__name__)

KINDS = (
    *("IVF_FLAT", "IVF_SQ", "IVF_PQ", "IVF_RQ"),
    *("IVF_HNSW_FLAT", "IVF_HNSW_SQ", "IVF_HNSW_PQ"),
)

# Search of binary vectors, or with an index of LanceDB's own tools: number of candidates per
# requested row, by LanceDB's approximate distance. The exact similarity then ranks the candidates.
# Share of float32's first 10 rows among 40 returned rows of binary vectors (all-MiniLM-L6-v2, 6,000
# texts, 1,000 queries): 0.882 by Hamming distance alone, 0.944 with 2 candidates per row, 0.963
# with 4, 0.967 with 8, 0.968 with all rows.
CANDIDATES = 8
MAX_CANDIDATES = 10_000
# File beside the table's versions, with the `SearchSettings` of its index.
_SETTINGS = "_fletcher_index.json"


class SearchSettings(msgspec.Struct):
    """Settings that searches with an index use, as `fletcher index` measured them.

    Attributes:
        index: Name of the index. The settings of another index do not count.
        nprobes: Number of partitions that are searched at least.
        candidates: Number of candidates per requested row.
        recall: Recall@10 that was measured with these settings.
    """

    index: str
    nprobes: int
    candidates: int
    recall: float


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """An index on the column `vector`.

    Attributes:
        name: Name of the index.
        kind: Type of the index, such as `IVF_PQ`.
        num_rows: Number of rows that the index has. Searches compare all other rows exactly.
        nprobes: Number of partitions that a search reads at least; None: LanceDB's default.
        candidates: Number of candidates per requested row.
    """

    name: str
    kind: str
    num_rows: int
    nprobes: int | None = None
    candidates: int = CANDIDATES

    def limit(self, k: int) -> int:
        """Number of candidates of a search for k rows."""
        return num_candidates(k, self.candidates)

    def applied_to(self, search: Any) -> Any:
        """LanceDB's search, with the settings of this index.

        More partitions are read if those have too few rows, for example because of a filter.
        """
        if self.nprobes is None:
            return search
        return search.minimum_nprobes(self.nprobes).maximum_nprobes(0)


def num_candidates(k: int, each: int) -> int:
    """Number of candidates of a search for k rows, with `each` per row."""
    return max(k, min(k * each, MAX_CANDIDATES))


def find_index(table: Any, folder: Path) -> VectorIndex | None:
    """The newest index on a table's vectors, with its settings; None if it has none."""
    found = [index for index in table.list_indices() if "vector" in index.columns]
    if not found:
        return None
    settings = _read_settings(folder)
    # An interrupted `fletcher index` leaves two indexes. Only one has settings.
    names = [index.name for index in found]
    place = names.index(settings.index) if settings and settings.index in names else -1
    kind, rows = kind_name(found[place].index_type), int(found[place].num_indexed_rows or 0)
    index = VectorIndex(names[place], kind, rows)
    if settings is None or settings.index != index.name:
        return index
    return replace(index, nprobes=settings.nprobes, candidates=settings.candidates)


def kind_name(written: str) -> str:
    """The type of an index in Fletcher's spelling: `IvfPq` becomes `IVF_PQ`."""
    known = {one.replace("_", "").lower(): one for one in KINDS}
    return known.get(written.replace("_", "").lower(), written)


def write_settings(folder: Path, settings: SearchSettings) -> None:
    """Store the settings of an index. The caller holds the table's lock."""
    write_atomically(folder / _SETTINGS, msgspec.json.encode(settings).decode())


def _read_settings(folder: Path) -> SearchSettings | None:
    try:
        return msgspec.json.decode((folder / _SETTINGS).read_bytes(), type=SearchSettings)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.warning("%s cannot be read, so LanceDB's settings are used: %s", _SETTINGS, error)
        return None
