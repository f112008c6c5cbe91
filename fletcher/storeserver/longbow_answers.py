"""Results of searches as a Longbow answers them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# Similarity by which a Longbow ranks rows. Its scores are distances with a minus sign.
METRIC = "euclidean"


def longbow_scores(scores: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Scores 1 / (1 + distance) for scores of METRIC; -inf for rows without a score."""
    with np.errstate(divide="ignore"):
        found = np.where(np.isfinite(scores), 1 / (1 - scores), -np.inf)
    return found.astype(np.float32)


def longbow_table(found: pa.Table) -> pa.Table:
    """Rows that a search found, with a Longbow's order of columns and type of ids.

    Whole numbers become uint64. Negative ids become their two's complement. Ids that are texts stay
    texts: a Longbow has row numbers in their place, by which nobody can find the rows.
    """
    columns = {name: found[name] for name in ("id", "score")}
    columns |= {name: found[name] for name in found.column_names if name not in columns}
    if pa.types.is_integer(found["id"].type):
        # Of an unsafe cast of int8, the sign is extended first.
        wide = found["id"].type if pa.types.is_uint64(found["id"].type) else pa.int64()
        columns["id"] = pc.cast(pc.cast(found["id"], wide), pa.uint64(), safe=False)
    return pa.table(columns, metadata=found.schema.metadata)
