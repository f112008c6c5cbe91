"""Runs a bundle's graph with plain ONNX Runtime: what golden values are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[np.float32]


def run_graph(
    graph: Path, rows: Sequence[Sequence[int]], *, width: int | None = None
) -> dict[str, Array]:
    """All outputs for token id rows, padded to the longest or to `width`, in one batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    width = width or max(map(len, rows))
    input_ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    names = [one.name for one in session.get_outputs()]
    feeds = {"input_ids": input_ids, "attention_mask": mask}
    return dict(zip(names, session.run(names, feeds), strict=True))


def cosines(left: Array, right: Array) -> Array:
    """Row by row; float64, so that the comparison itself costs no digits."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(1) / lengths)
