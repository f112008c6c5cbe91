"""Signs of trouble in a Longbow, and remedies. docs/longbow.md explains them."""

from __future__ import annotations

from fletcher.stores.base import DatasetInfo

# Number of rows from which Longbow's auto-sharding replaces a dataset's index.
AUTO_SHARDING_ROWS = 10_000
LOST = (
    "auto-sharding lost rows from Longbow's index: start Longbow with "
    "LONGBOW_AUTO_SHARDING_ENABLED=false, which indexes all rows anew. `fletcher search` finds all "
    "rows meanwhile"
)
FULL = (
    "it answers other calls at once, as a Longbow does whose memory is full; start it again with a "
    "larger LONGBOW_MAX_MEMORY"
)
BEHIND = "Longbow's own searches find only indexed rows; `fletcher search` finds all rows"


def index_trouble(earlier: DatasetInfo | None, now: DatasetInfo) -> str | None:
    """Trouble with a dataset's index, and the remedy; None without trouble.

    Args:
        earlier: The dataset some seconds ago, if known. An index that grows has lost no rows. A
            Longbow that says it is ready may still be indexing.
        now: The dataset.
    """
    rows, indexed = now.num_rows, now.num_indexed
    if rows is None or indexed is None or indexed >= rows:
        return None
    before = None if earlier is None else (earlier.num_rows, earlier.num_indexed)
    stands_still = before == (rows, indexed) and not now.is_indexing
    return LOST if stands_still and rows > AUTO_SHARDING_ROWS else BEHIND
