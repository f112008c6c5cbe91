"""Who may call: bearer tokens, compared in constant time."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

from pyarrow import flight

from fletcher.errors import ConfigError, UnauthenticatedError
from fletcher.net.flight_errors import to_flight_error


def read_tokens(path: Path) -> tuple[str, ...]:
    """Tokens of a file: one a line; blank lines and lines that start with `#` are passed over.

    Raises:
        ConfigError: The file cannot be read or holds no token.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`token_file` cannot be read: {error}", field="token_file") from None
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise ConfigError("`token_file` holds no token; put one on each line", field="token_file")
    return tokens


class TokenFactory(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets a call begin only with `authorization: Bearer TOKEN` and a known token."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        super().__init__()
        self._tokens = [token.encode() for token in tokens]

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        """Refuses callers without a valid token."""
        values = headers.get("authorization") or headers.get("Authorization") or []
        given = values[0] if values else ""
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not token:
            error = UnauthenticatedError(
                "no token; send the header `authorization: Bearer TOKEN`", field="authorization"
            )
            raise to_flight_error(error)
        # Every token is compared, so that the time tells nothing.
        known = [hmac.compare_digest(token.strip().encode(), one) for one in self._tokens]
        if not any(known):
            raise to_flight_error(
                UnauthenticatedError("the token is not valid", field="authorization")
            )
