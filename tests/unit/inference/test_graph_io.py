"""What engines are warmed up with."""

import pytest

from fletcher.inference.graph_io import GraphIO

IO = GraphIO(
    inputs=("input_ids",),
    dtypes={},
    outputs=("embedding",),
    pad_token_id=0,
    max_length=8192,
    dim=8,
    pooling=None,
    normalize=False,
    has_norms=False,
    exits=(1,),
)


def shapes(tokens_per_s: float, max_batch_tokens: int = 4096) -> list[tuple[int, int]]:
    given, now = [], [0.0]
    for batch in IO.warm_up_batches(max_batch_tokens, lambda: now[0]):
        given.append((len(batch.lengths), int(batch.lengths[0])))
        assert set(batch.lengths.tolist()) == {given[-1][1]}
        now[0] += given[-1][0] * given[-1][1] / tokens_per_s
    return given


def test_full_batches_warm_up_an_engine_but_no_text_of_thousands_of_tokens() -> None:
    assert shapes(1e5) == [
        (1, 16),
        (1, 16),
        (8, 512),
        (16, 256),
        (32, 128),
        (64, 64),
        (128, 32),
        (256, 16),
        (1, 1),
    ]


@pytest.mark.parametrize("tokens_per_s", [1, 20, 80, 300])
def test_an_engine_that_is_slow_for_its_model_gets_less(tokens_per_s: float) -> None:
    given = shapes(tokens_per_s)
    assert all(rows * length <= 5 * tokens_per_s + 1 for rows, length in given[2:-1])
    assert given[-1] == (1, 1)
    assert len(given) == {1: 3, 20: 6, 80: 8, 300: 9}[int(tokens_per_s)]
