"""Checks of rows against what a dataset remembers."""

from __future__ import annotations

import pytest

from fletcher.errors import ModelMismatchError
from fletcher.stores.schemas import check_compatible
from tests.doubles.store_rows import schema


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        ("prompt", "query: ", "passage: ", r"`fletcher\.prompt` is passage: , .* with query: "),
        ("prompt", "", "passage: ", r"`fletcher\.prompt` is passage: , .* with an empty one"),
        ("prompt", "query: ", "", r"`fletcher\.prompt` is empty"),
        ("chunking", "none", "tokens:64:mean", r"`fletcher\.chunking` is tokens:64:mean"),
        ("similarity", "cosine", "dot", r"`fletcher\.similarity` is dot, .* written with cosine"),
    ],
)
def test_a_dataset_remembers_how_its_vectors_were_made(
    key: str, old: str, new: str, message: str
) -> None:
    stored = schema().with_metadata({f"fletcher.{key}": old})
    check_compatible("d", stored, schema().with_metadata({f"fletcher.{key}": old}))
    check_compatible("d", stored, schema().remove_metadata())  # of a version that did not say
    with pytest.raises(ModelMismatchError, match=message):
        check_compatible("d", stored, schema().with_metadata({f"fletcher.{key}": new}))
