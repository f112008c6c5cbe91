"""Exact search: compare every query with every document, block by block."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import FloatArray, Int64Array
from fletcher.evaluation.vectors import Embedded

# Numbers of documents that are compared with a block of queries at once. A document with several
# vectors takes more memory.
_DOCUMENTS = {"dense": 8192, "sparse": 8192, "multi": 256}


class Nearest:
    """The best documents for each query, collected over several blocks of documents.

    Documents with equal scores keep their order. Each score is packed with the index of its
    document into one integer key, so that the largest keys belong to the best documents.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.num_documents = 0
        self._keys = np.empty((num_queries, 0), np.int64)

    def add_scores(self, scores: FloatArray) -> None:
        """Add scores for the next documents.

        `scores` is float32 [num_queries, number of documents added] without NaN.
        """
        places = np.arange(self.num_documents, self.num_documents + scores.shape[1])
        self.num_documents += scores.shape[1]
        keys = np.concatenate([self._keys, _ordered(scores) << 32 | (0xFFFFFFFF - places)], axis=1)
        if keys.shape[1] > self.k:
            keys = np.partition(keys, keys.shape[1] - self.k, axis=1)[:, -self.k :]
        self._keys = keys

    @property
    def found(self) -> Int64Array:
        """Indexes of documents, best first: int64 [num_queries, min(k, num_documents)]."""
        return np.asarray(0xFFFFFFFF - (self._best & 0xFFFFFFFF), np.int64)

    @property
    def scores(self) -> FloatArray:
        """Scores of the documents in `found`: float32, same shape."""
        return _swapped((self._best >> 32).astype(np.int32)).view(np.float32)

    @property
    def _best(self) -> npt.NDArray[np.int64]:
        return -np.sort(-self._keys, axis=1)


def _ordered(scores: FloatArray) -> npt.NDArray[np.int64]:
    """Convert scores to integers in the same order, using the bits of IEEE 754."""
    return _swapped((scores + np.float32(0)).view(np.int32)).astype(np.int64)  # + 0: no -0.0


def _swapped(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Reverse the order of the negative integers. Applied twice, this changes nothing."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def search(queries: Embedded, documents: Embedded, k: int) -> Int64Array:
    """The k most similar documents for each query, best first.

    The schema of the documents determines the similarity, as in `fletcher search`.

    Returns:
        int64 [num_queries, min(k, num_documents)], indexes of documents. Documents with equal
        scores keep their order.
    """
    found = []
    for block in queries.blocks():
        asked = queries.similarity.queries(block)
        nearest = Nearest(len(asked), k)
        for batch in documents.blocks(_DOCUMENTS[documents.similarity.output]):
            nearest.add_scores(documents.similarity.scores(asked, batch))
        found.append(nearest.found)
    return np.concatenate(found)
