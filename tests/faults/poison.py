"""Texts for which the null backend gives vectors that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.inference.null import NullBackend
from fletcher.vectors.ragged import starts_of

# Only this text has so many equal tokens after its first token.
TEXT = "z z z z z z z z"
_NUM_EQUAL = 4


def install() -> None:
    """Make the null backend of this process and its children fail on such texts."""
    run = NullBackend.run

    def poisoned(self: Any, batch: MicroBatch) -> InferenceResult:
        result = run(self, batch)
        ids, starts = batch.input_ids, starts_of(batch.lengths)
        for row, (start, length) in enumerate(zip(starts, batch.lengths, strict=True)):
            first = ids[start + 1 : start + 1 + _NUM_EQUAL]
            if length > _NUM_EQUAL + 1 and (first == first[0]).all():
                result.embeddings[row] = np.nan
        return result

    NullBackend.run = poisoned  # type: ignore[method-assign]
