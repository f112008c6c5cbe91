"""What an upload keeps while its client sends nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from fletcher.core.batches import EmbeddingBatch
from fletcher.flight.put import _Put
from fletcher.pipeline.assembly import Output
from fletcher.pipeline.stream import Result


class Stream:
    """Gives two results, and looks what is left of the first while the second is to come."""

    def __init__(self) -> None:
        self.released: list[int] = []
        self.is_left = True

    def results(self) -> Iterator[Result]:
        result = self._result()
        seen = weakref.ref(result.embeddings.embeddings)  # type: ignore[union-attr]
        yield result
        del result
        self.is_left = seen() is not None
        yield self._result()

    def _result(self) -> Result:
        vectors = np.zeros((2, 4), np.float32)
        counts, cut = np.zeros(2, np.int32), np.zeros(2, np.bool_)
        return Result((None, []), EmbeddingBatch(vectors, None, counts, cut), 7)

    def whole(self) -> int:
        return 0

    def release(self, num_bytes: int, row_bytes: int) -> None:
        self.released.append(num_bytes + row_bytes)


def test_nothing_is_kept_of_a_piece_while_the_next_is_to_come() -> None:
    def assemble(_: Any, outcome: EmbeddingBatch) -> Output:
        vectors = pa.array(outcome.embeddings.reshape(-1))  # over the very memory
        batch = pa.record_batch({"id": ["a"] * len(vectors), "vector": vectors})
        return Output(batch, {}, np.arange(3))

    put, stream = object.__new__(_Put), Stream()
    fields: dict[str, Any] = {
        "_stream": stream,
        "_assembler": SimpleNamespace(assemble=assemble, kept_bytes=0),
        "_options": SimpleNamespace(on_error="continue"),
        "_sink": SimpleNamespace(hurry=lambda: None),
    }
    for name, value in fields.items():
        setattr(put, name, value)
    put._deliver()
    assert stream.released == [7, 7]
    assert not stream.is_left
