"""Inputs and outputs of graphs for all engines, with padding and pooling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import BoolArray, FloatArray, InferenceResult, Int32Array, MicroBatch
from fletcher.errors import ModelError
from fletcher.models.bundle.bundle import HIDDEN, ModelBundle
from fletcher.models.checkpoint.markers import Queries, Skipped
from fletcher.vectors.pooling import normalize, pool
from fletcher.vectors.ragged import sparse

# Padded lengths are multiples of this number, so that only few shapes occur. Engines keep memory
# plans and compiled kernels for each shape. The planner rounds lengths up to the same multiples.
LENGTH_GRID = 16

# Limits of the warm-up: tokens of its longest row, and seconds of its longest run. Longer rows are
# rare, and the longest rows can take minutes.
_WARM_UP_LENGTH = 512
_WARM_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class GraphIO:
    """A graph's inputs and outputs by name, and the computation left after the graph.

    Attributes:
        inputs: Names of the inputs.
        dtypes: Integer type of each input.
        outputs: Names of the outputs that Fletcher reads, as in ModelBundle.
        pad_token_id: Id of padding tokens.
        max_length: Largest number of tokens in a row.
        dim: Width of an embedding.
        exits: Last layer of each of the model's blocks.
        pooling: Pooling that is left to do after the graph; None if the graph pools.
        normalize: Whether L2 normalization is left to do after the graph.
        has_norms: Whether the second output holds the L2 norms, float32 [B, 1].
        output: Kind of vectors, as in ModelBundle.
        skipped, queries: Choice of the tokens that have a vector, as in ModelBundle.
    """

    inputs: tuple[str, ...]
    dtypes: Mapping[str, npt.DTypeLike]
    outputs: tuple[str, ...]
    pad_token_id: int
    max_length: int
    dim: int
    exits: tuple[int, ...]
    pooling: str | None = None
    normalize: bool = False
    has_norms: bool = False
    output: str = "dense"
    skipped: Skipped | None = None
    queries: Queries | None = None

    @classmethod
    def for_graph(
        cls,
        bundle: ModelBundle,
        input_dtypes: Mapping[str, npt.DTypeLike],
        output_names: Sequence[str],
    ) -> GraphIO:
        """Create a GraphIO for a bundle and check it against the loaded graph.

        Raises:
            ModelError: The graph has other inputs than the bundle declares, or lacks an output.
        """
        if set(input_dtypes) != set(bundle.inputs):
            raise ModelError(
                f"`model` {bundle.name}: the graph has inputs {sorted(input_dtypes)}, "
                f"fletcher.json says {sorted(bundle.inputs)}; add the model again with "
                "`fletcher model add`",
                field="model",
            )
        missing = [name for name in bundle.outputs if name not in output_names]
        if missing:
            raise ModelError(
                f"`model` {bundle.name}: the graph has no output `{missing[0]}`, its outputs are "
                f"{list(output_names)}; add the model again with `fletcher model add`",
                field="model",
            )
        return cls(
            inputs=bundle.inputs,
            dtypes=dict(input_dtypes),
            outputs=bundle.outputs,
            pad_token_id=bundle.pad_token_id,
            max_length=bundle.max_length,
            dim=bundle.dim,
            pooling=bundle.pooling if bundle.graph_output == "token_embeddings" else None,
            normalize=bundle.normalize and not bundle.graph_normalizes,
            has_norms=bundle.graph_normalizes,
            exits=bundle.layers,
            output=bundle.output,
            skipped=bundle.skipped,
            queries=bundle.queries,
        )

    def num_blocks(self, layers: int) -> int:
        """Number of blocks to run for vectors after layer `layers`; 0 is the last layer.

        Raises:
            ValueError: No block ends after that layer.
        """
        return self.exits.index(layers) + 1 if layers else len(self.exits)

    def next_feeds(self, feeds: Mapping[str, Any], hidden: Any) -> dict[str, Any]:
        """Inputs of a block, from the previous block's inputs `feeds` and output `hidden`."""
        rest = {name: value for name, value in feeds.items() if name not in ("input_ids", HIDDEN)}
        return {HIDDEN: hidden, **rest}

    def feeds(self, batch: MicroBatch) -> tuple[dict[str, npt.NDArray[Any]], BoolArray]:
        """The graph's inputs and the mask of tokens, each [num_rows, padded length].

        Raises:
            ValueError: A row is longer than `max_length`.
        """
        # The rounded length may exceed the model's number of positions.
        filled = self._filled(batch)
        longest = int((batch.lengths if filled is None else filled).max())
        on_grid = -(-longest // LENGTH_GRID) * LENGTH_GRID
        mask = self._mask(batch, min(on_grid, self.max_length))
        shape, length = mask.shape, mask.shape[1]
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in self.inputs:
            dtype = self.dtypes[name]
            if name == "input_ids":
                arrays[name] = np.full(shape, self.pad_token_id, dtype=dtype)
                arrays[name][mask] = batch.input_ids
            elif name == "attention_mask":
                arrays[name] = mask.astype(dtype)
            elif name == "position_ids":
                arrays[name] = np.tile(np.arange(length, dtype=dtype), (shape[0], 1))
            else:  # token_type_ids: a row is one sequence, of type 0
                arrays[name] = np.zeros(shape, dtype=dtype)
        if filled is not None and self.queries is not None:
            fillers = _places(filled, length) & ~mask
            arrays["input_ids"][fillers] = self.queries.filler
            if self.queries.attended:
                arrays["attention_mask"][fillers] = 1
        return arrays, mask

    def _mask(self, batch: MicroBatch, length: int) -> BoolArray:
        longest = int(batch.lengths.max())
        if longest > self.max_length:
            raise ValueError(f"a row has {longest} tokens, the model takes {self.max_length}")
        return _places(batch.lengths, length)

    def _filled(self, batch: MicroBatch) -> Int32Array | None:
        """int32 [num_rows], tokens of each row including fillers; None without fillers."""
        if self.queries is None or self.queries.filler is None:
            return None
        return self.queries.filled(batch.input_ids, batch.lengths)

    def result(
        self,
        batch: MicroBatch,
        mask: BoolArray,
        outputs: Sequence[npt.NDArray[Any]],
        compute_s: float,
    ) -> InferenceResult:
        """Make the result of a run from the graph's outputs.

        `mask` is the mask from `feeds`. `outputs` are in the order of `self.outputs`.

        Raises:
            ModelError: The graph's output has another shape than the bundle declares.
        """
        if self.output == "multi":
            return self._token_vectors(batch, mask, np.asarray(outputs[0], np.float32), compute_s)
        embeddings, norms = self.embeddings(outputs, mask)
        if self.output == "dense":
            return InferenceResult(embeddings, norms, compute_s)
        pairs, counts = sparse(embeddings)
        return InferenceResult(pairs, None, compute_s, counts=counts)

    def _token_vectors(
        self, batch: MicroBatch, mask: BoolArray, vectors: FloatArray, compute_s: float
    ) -> InferenceResult:
        self._check_shape(vectors, (*mask.shape, self.dim))
        kept = mask.copy()
        if self.skipped is not None:
            kept[mask] = ~self.skipped.places(batch.input_ids, batch.lengths)
        if (filled := self._filled(batch)) is not None:
            kept |= _places(filled, mask.shape[1]) & ~mask
        counts = kept.sum(axis=1).astype(np.int32)
        return InferenceResult(vectors[kept], None, compute_s, counts=counts)

    def _check_shape(self, array: FloatArray, expected: tuple[int, ...]) -> None:
        if array.shape != expected:
            raise ModelError(
                f"`model`: the graph's output has shape {array.shape}, expected {expected} by "
                "fletcher.json; add the model again with the right `dim`",
                field="model",
            )

    def embeddings(
        self, outputs: Sequence[npt.NDArray[Any]], mask: BoolArray
    ) -> tuple[FloatArray, FloatArray | None]:
        """Make embeddings and norms, as in InferenceResult, from the graph's outputs.

        Raises:
            ModelError: The graph's output has another shape than the bundle declares.
        """
        embeddings = np.asarray(outputs[0], dtype=np.float32)
        shape = mask.shape if self.pooling else mask.shape[:1]
        self._check_shape(embeddings, (*shape, self.dim))
        if self.pooling:
            embeddings = pool(embeddings, mask, self.pooling)
        if self.normalize:
            return normalize(embeddings)
        norms = np.asarray(outputs[1], dtype=np.float32).reshape(-1) if self.has_norms else None
        return embeddings, norms

    def warm_up_batches(
        self, max_batch_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> Iterator[MicroBatch]:
        """Micro-batches for the warm-up, with rows of a few lengths.

        Two short micro-batches come first. The time that the caller takes for the second one limits
        the size of the others, so that each takes some seconds. Without this limit, a large model
        on one core could take minutes. Then the rows get shorter from micro-batch to micro-batch.
        Runs of all layers also warm up all exits, because every block pools.
        """
        shortest = _zeros(1, min(LENGTH_GRID, self.max_length))
        yield shortest
        started = clock()
        yield shortest
        most = max_batch_tokens
        if elapsed_s := clock() - started:
            most = min(most, int(LENGTH_GRID / elapsed_s * _WARM_UP_S))
        length = min(self.max_length, _WARM_UP_LENGTH)
        while length >= LENGTH_GRID:
            if length <= most:
                yield _zeros(most // length, length)
            length //= 2
        yield _zeros(1, 1)


def _places(lengths: Int32Array, width: int) -> BoolArray:
    """Bool [num_rows, width], True at the first `lengths[row]` places of each row."""
    places: BoolArray = np.arange(width, dtype=np.int32) < lengths[:, None]
    return places


def _zeros(num_rows: int, length: int) -> MicroBatch:
    lengths = np.full(num_rows, length, dtype=np.int32)
    return MicroBatch(np.zeros(num_rows * length, dtype=np.int32), lengths)
