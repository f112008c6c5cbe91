"""Inputs and outputs of graphs without padding, written by `models.onnx.packed`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import BoolArray, Int32Array, MicroBatch
from fletcher.inference.graph_io import GraphIO
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.onnx.packed import INPUTS


class PackedIO(GraphIO):
    """GraphIO of a graph without padding; create it with `packed`."""

    @classmethod
    def packed(cls, bundle: ModelBundle) -> PackedIO:
        """Inputs and outputs of the graph that `write_packed` writes for a bundle."""
        return cls(
            inputs=INPUTS,
            dtypes=dict.fromkeys(INPUTS, np.int32),
            outputs=bundle.outputs,
            pad_token_id=bundle.pad_token_id,
            max_length=bundle.max_length,
            dim=bundle.dim,
            has_norms=bundle.normalize,
            exits=bundle.layers,
        )

    def feeds(self, batch: MicroBatch) -> tuple[dict[str, npt.NDArray[Any]], BoolArray]:
        """The graph's four inputs, int32, and the mask of tokens, [num_rows, longest].

        Raises:
            ValueError: A row is longer than `max_length`.
        """
        mask = self._mask(batch, int(batch.lengths.max()))
        return self._arrays(batch, mask), mask

    def filled(self, input_ids: Int32Array, num_tokens: int) -> dict[str, npt.NDArray[Any]]:
        """The four inputs for two rows, one text and one row of padding.

        Together the rows have `num_tokens` tokens, and each has at least 1. The inputs' shapes
        depend only on `num_tokens`.
        """
        rest = num_tokens - len(input_ids)
        padding = np.full(rest, self.pad_token_id, np.int32)
        lengths = np.array([len(input_ids), rest], np.int32)
        batch = MicroBatch(np.concatenate([input_ids, padding]), lengths)
        return self._arrays(batch, self._mask(batch, num_tokens))

    def _arrays(self, batch: MicroBatch, mask: BoolArray) -> dict[str, npt.NDArray[Any]]:
        ends = np.zeros(len(batch.lengths) + 1, dtype=np.int32)
        np.cumsum(batch.lengths, out=ends[1:])
        places = np.arange(len(batch.input_ids), dtype=np.int32)
        flat = mask.reshape(-1)
        offsets = np.concatenate([np.flatnonzero(flat), np.flatnonzero(~flat)])
        arrays = (
            batch.input_ids,
            places - np.repeat(ends[:-1], batch.lengths),
            offsets.astype(np.int32).reshape(mask.shape),
            ends,
        )
        return dict(zip(self.inputs, arrays, strict=True))
