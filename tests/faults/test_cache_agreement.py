"""A server with the embedding cache and one without it agree over random calls.

`scripts/soak --cache` compares thousands of calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.faults.cache_calls import calls, play
from tests.faults.cache_servers import Pair, exit_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exit_models(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module", params=["memory", "disk"])
def pair(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    with Pair(models, tmp_path_factory.mktemp("pair"), kind=request.param, backend="null") as pair:
        yield pair


def test_they_agree_to_the_bit_with_null_inference(pair: Pair) -> None:
    chosen = islice(calls(2, pair.models), 250)
    counts = play(pair.cached, pair.plain, chosen, least_cosine=None)
    assert min(counts[f"{way} answered"] for way in ("exchange", "put", "embed")) > 10
    assert pair.num_hits > 100
