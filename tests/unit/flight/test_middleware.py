"""Bearer tokens of calls, and whose uploads they name."""

from __future__ import annotations

import pytest
from pyarrow import flight

from fletcher.core.owner import token_owner
from fletcher.flight.middleware import TokenFactory


def owner(factory: TokenFactory, token: str) -> str:
    return factory.start_call(None, {"authorization": [f"Bearer {token}"]}).owner


def test_a_token_of_the_file_is_the_owner() -> None:
    factory = TokenFactory(("a", "b"))
    assert [owner(factory, token) for token in "ab"] == [token_owner(b"a"), token_owner(b"b")]


def test_callers_in_the_servers_process_are_anonymous_whatever_their_token() -> None:
    # Each process has another random token, and resumes the uploads of the processes before it.
    assert {owner(TokenFactory((), token), token) for token in ("one", "two")} == {""}
    assert owner(TokenFactory(("a",), "own"), "a") == token_owner(b"a")


@pytest.mark.parametrize(
    ("factory", "token"),
    [(TokenFactory((), "own"), ""), (TokenFactory((), "own"), "a"), (TokenFactory(("a",)), "")],
)
def test_other_tokens_are_refused(factory: TokenFactory, token: str) -> None:
    with pytest.raises(flight.FlightUnauthenticatedError):
        owner(factory, token)
    with pytest.raises(flight.FlightUnauthenticatedError):
        factory.start_call(None, {})
