"""Indexes of a LanceDB table's vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """An index on the column `vector`.

    Attributes:
        name: Name of the index.
        kind: Type of the index, such as `IVF_PQ`.
    """

    name: str
    kind: str


def find_index(table: Any) -> VectorIndex | None:
    """The index on a table's vectors; None if it has none."""
    for index in table.list_indices():
        if "vector" in index.columns:
            return VectorIndex(index.name, kind_name(index.index_type))
    return None


def num_indexed(table: Any, index: VectorIndex) -> int:
    """Number of the table's rows that an index has."""
    found = table.index_stats(index.name)
    return 0 if found is None else int(found.num_indexed_rows)


def kind_name(written: str) -> str:
    """The type of an index in Fletcher's spelling: `IvfPq` becomes `IVF_PQ`."""
    known = {"".join(one.split("_")).lower(): one for one in KINDS}
    return known.get(written.replace("_", "").lower(), written)


KINDS = (
    *("IVF_FLAT", "IVF_SQ", "IVF_PQ", "IVF_RQ"),
    *("IVF_HNSW_FLAT", "IVF_HNSW_SQ", "IVF_HNSW_PQ"),
)
