import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fletcher.pipeline.planner import padded_length, plan

LENGTHS = st.lists(st.integers(1, 512), max_size=300)


def as_lengths(values):
    return np.array(values, dtype=np.int32)


def padded_tokens(lengths, batches, grid):
    return sum(len(rows) * padded_length(lengths[rows], grid).max() for rows in batches)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4096), st.integers(1, 64), st.sampled_from([1, 8, 16, 32]))
def test_every_row_is_planned_once_and_within_the_budget(values, budget, max_rows, grid):
    lengths = as_lengths(values)
    batches = plan(
        lengths, max_batch_tokens=budget, max_batch_rows=max_rows, length_grid=grid, num_runners=2
    )
    planned = np.concatenate(batches) if batches else np.zeros(0, dtype=np.intp)
    assert np.array_equal(np.sort(planned), np.arange(len(lengths)))
    for rows in batches:
        assert 1 <= len(rows) <= max_rows
        assert len(rows) == 1 or len(rows) * padded_length(lengths[rows], grid).max() <= budget


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([256, 1024]), st.integers(0, 64))
@example([200] + [160] * 3 + [10] * 2, 4096, 16)
def test_padding_beyond_the_grid_never_costs_more_than_the_runs_it_saves(values, budget, run_cost):
    lengths = as_lengths(values)
    batches = plan(lengths, max_batch_tokens=budget, max_batch_rows=999, run_cost_tokens=run_cost)
    for rows in batches:
        padded = np.sort(padded_length(lengths[rows], 16))[::-1]
        # No place to split this run saves more padding than the second run would cost; the tail
        # was evened out and may hold as much again.
        for cut in range(1, len(padded)):
            assert (len(padded) - cut) * (padded[0] - padded[cut]) <= 2 * run_cost


@settings(deadline=None)
@given(LENGTHS)
def test_the_longest_come_first_and_equals_keep_their_order(values):
    lengths = as_lengths(values)
    batches = plan(lengths, max_batch_tokens=512, max_batch_rows=32)
    order = np.concatenate(batches) if batches else np.zeros(0, dtype=np.intp)
    assert np.array_equal(order, np.argsort(-lengths, kind="stable"))


def test_a_row_over_the_budget_runs_alone():
    batches = plan(as_lengths([10, 300, 12]), max_batch_tokens=128, max_batch_rows=32)
    assert [rows.tolist() for rows in batches] == [[1], [2, 0]]


def test_very_different_lengths_are_not_padded_together():
    lengths = as_lengths([200] + [10] * 8)
    batches = plan(lengths, max_batch_tokens=4096, max_batch_rows=64)
    assert [len(rows) for rows in batches] == [1, 8]


def test_the_tail_is_evened_out():
    lengths = as_lengths([16] * 66)
    batches = plan(lengths, max_batch_tokens=64 * 16, max_batch_rows=64)
    assert [len(rows) for rows in batches] == [33, 33]


def test_little_work_is_spread_over_the_runners():
    lengths = as_lengths([32] * 16)
    alone = plan(lengths, max_batch_tokens=1024, max_batch_rows=64)
    spread = plan(lengths, max_batch_tokens=1024, max_batch_rows=64, num_runners=2)
    assert [len(rows) for rows in alone] == [16]
    assert [len(rows) for rows in spread] == [8, 8]


def test_a_corpus_is_padded_little_in_few_runs():
    lengths = np.random.default_rng(7).gamma(1.6, 50, 10_000).astype(np.int32).clip(3, 256)
    batches = plan(lengths, max_batch_tokens=1024, max_batch_rows=256)
    to_grid = int(padded_length(lengths, 16).sum())
    assert padded_tokens(lengths, batches, 16) <= 1.01 * to_grid
    assert len(batches) <= 1.1 * to_grid / 1024


@pytest.mark.parametrize("num_runners", [1, 4])
def test_nothing_to_plan(num_runners):
    assert plan(as_lengths([]), max_batch_tokens=8, max_batch_rows=8, num_runners=num_runners) == []
