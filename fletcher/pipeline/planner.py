"""Planner: a pure function from the lengths of rows to runs of the model.

Why no library: none weighs padding against the cost of one more run.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from fletcher.core.batches import Int32Array, Int64Array

# Fixed cost of a run, as the number of padded tokens that take the same time. Fitted to CPU time of
# all-MiniLM-L6-v2 on one Zen 5 core: OpenVINO 14 tokens (0.8 ms in bfloat16, 1.4 ms in float32),
# ONNX Runtime 2.
RUN_COST_TOKENS = 16

# Most rows of a run, however short the rows are.
MAX_BATCH_ROWS = 1024


def padded_length(lengths: npt.NDArray[np.integer], length_grid: int) -> Int64Array:
    """Rounds an array of lengths up to a grid, so that engines reuse compiled shapes."""
    return -(-lengths.astype(np.int64) // length_grid) * length_grid


def plan(
    lengths: Int32Array,
    *,
    max_batch_tokens: int,
    max_batch_rows: int,
    length_grid: int = 16,
    num_runners: int = 1,
    run_cost_tokens: int = RUN_COST_TOKENS,
) -> list[npt.NDArray[np.intp]]:
    """Cuts rows into micro-batches of similar length, longest first.

    Rows are sorted by length and cut greedily into micro-batches that fill the token budget. A
    micro-batch ends early if the next rows are so much shorter that padding them would cost more
    than one more run. The last two micro-batches get about equally many rows, if the padding that
    this adds costs no more than a run. If there are few rows, micro-batches become smaller, so that
    all runners get work. Equal input gives equal output.

    Args:
        lengths: int32 [num_rows], tokens of each row, at least 1.
        max_batch_tokens: Most padded tokens (rows x padded length) of a micro-batch. A row with a
            larger padded length gets a micro-batch for itself.
        max_batch_rows: Most rows of a micro-batch.
        length_grid: Padded lengths are multiples of this.
        num_runners: Number of runs that can execute at the same time.
        run_cost_tokens: Fixed cost of a run, in padded tokens.

    Returns:
        One array of row indices for each micro-batch. Every row is in exactly one array.
    """
    num_rows = len(lengths)
    if num_rows <= 1:
        return [np.arange(1)] * num_rows
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    padded = padded_length(lengths[order], length_grid)
    share = -(-int(padded.sum()) // max(num_runners, 1))
    budget = min(max_batch_tokens, max(share, 4 * run_cost_tokens))
    cuts = _cut(padded, budget, max_batch_rows, run_cost_tokens)
    _even_out_tail(padded, cuts, run_cost_tokens)
    return [order[first:last] for first, last in itertools.pairwise(cuts)]


def _cut(padded: Int64Array, budget: int, max_rows: int, run_cost: int) -> list[int]:
    """Returns the start of each micro-batch in the sorted rows, and their number."""
    # Plain integers from here on: for a few hundred steps they are faster than NumPy's.
    num_rows = len(padded)
    steps = (np.flatnonzero(np.diff(padded)) + 1).tolist()  # where the padded length drops
    step_lengths = padded[steps].tolist()
    lengths = padded.tolist()
    cuts, first, next_step = [0], 0, 0
    while first < num_rows:
        length = lengths[first]
        last = min(first + max(1, min(budget // length, max_rows)), num_rows)
        while next_step < len(steps) and steps[next_step] <= first:
            next_step += 1
        shorter = True
        while shorter:
            shorter, best_saving, end, step = False, run_cost, last, next_step
            while step < len(steps) and steps[step] < end:
                saving = (end - steps[step]) * (length - step_lengths[step])
                if saving > best_saving:
                    shorter, best_saving, last = True, saving, steps[step]
                step += 1
        cuts.append(last)
        first = last
    return cuts


def _even_out_tail(padded: Int64Array, cuts: list[int], run_cost: int) -> None:
    """Moves the last cut to the middle: the last micro-batch may be very small.

    Both micro-batches stay within the budget: the last one becomes no larger than the one before it
    was, in rows and in row length.
    """
    if len(cuts) < 3:
        return
    first, cut, end = cuts[-3:]
    middle = (first + end + 1) // 2
    added_padding = (end - cut) * int(padded[middle] - padded[cut]) if middle < cut else 0
    if middle < cut and added_padding <= run_cost:
        cuts[-2] = middle
