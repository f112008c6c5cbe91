"""Texts of the `embed` action."""

from __future__ import annotations

from typing import Any

import pytest

from fletcher.errors import BatchTooLargeError, InvalidCommandError
from fletcher.flight.embed_action import MAX_TEXTS, _batch_of


def test_as_many_texts_as_the_limit_says_are_taken() -> None:
    assert _batch_of(["a"] * MAX_TEXTS).num_rows == MAX_TEXTS
    with pytest.raises(BatchTooLargeError, match=f"{MAX_TEXTS + 1} texts, at most {MAX_TEXTS}"):
        _batch_of(["a"] * (MAX_TEXTS + 1))


@pytest.mark.parametrize("texts", [None, "a", ["a", None], ["a", 1], {"a": 1}, ["\ud800"]])
def test_other_texts_are_refused(texts: Any) -> None:
    with pytest.raises(InvalidCommandError) as refused:
        _batch_of(texts)
    assert refused.value.field == "texts"
