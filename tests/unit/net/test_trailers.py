"""Errors of any size keep their class and code on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pyarrow import flight

from fletcher.errors import (
    FletcherError,
    InternalError,
    InvalidUtf8Error,
    OverloadedError,
    UnknownColumnError,
    UnknownModelError,
)
from fletcher.net.flight_errors import from_flight_error, handler_errors
from fletcher.net.trailers import fitted

ERRORS: dict[str, FletcherError] = {
    "short": UnknownColumnError("no `a`", field="a", allowed=["b", "c"]),
    "columns": UnknownColumnError(
        f"expected one of {', '.join(['c' * 1000] * 50)}", allowed=["c" * 1000] * 50
    ),
    "aliases": UnknownModelError("unknown", allowed=[f"alias-{n}" for n in range(4000)]),
    "emojis": InvalidUtf8Error("\U0001f600" * 9000, field="\U0001f600" * 900),
    "quotes": InvalidUtf8Error('"' * 9000, field='"' * 900, allowed=['"' * 900] * 90),
    "control": InvalidUtf8Error("\x01" * 9000, field="\x01" * 900, allowed=["\x01" * 900] * 90),
    "percent": OverloadedError("%" * 9000, retry_after_ms=5),
}


class Server(flight.FlightServerBase):
    def do_action(self, context: Any, action: Any) -> Any:
        with handler_errors(context):
            raise ERRORS[action.type]


@pytest.fixture(scope="module")
def client() -> Iterator[flight.FlightClient]:
    with (
        Server("grpc://127.0.0.1:0") as server,
        flight.connect(f"grpc://127.0.0.1:{server.port}") as client,
    ):
        yield client


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_any_size_arrives_with_class_and_code(
    client: flight.FlightClient, name: str
) -> None:
    sent = ERRORS[name]
    with pytest.raises(flight.FlightError) as caught:
        list(client.do_action(flight.Action(name, b"")))
    # Other gRPC libraries send base64, which is a third longer. The text takes up to 1,500 bytes.
    assert len(caught.value.extra_info) * 4 / 3 + 2000 < 8192
    error = from_flight_error(caught.value)
    assert type(error) is type(sent)
    assert error.retry_after_ms == sent.retry_after_ms
    assert error.message.removesuffix("...") == sent.message[: len(error.message.rstrip("."))]
    assert (error.allowed is None) == (sent.allowed is None)
    fields = json.loads(caught.value.extra_info)
    assert fields["code"] == sent.code


def test_what_fits_is_not_cut() -> None:
    assert fitted(ERRORS["short"]).to_dict() == ERRORS["short"].to_dict()
    long = InternalError("x" * 1500)
    assert fitted(long).message == long.message


def test_what_is_left_out_is_counted() -> None:
    allowed = fitted(ERRORS["aliases"]).allowed
    assert allowed is not None
    assert allowed[:2] == ["alias-0", "alias-1"]
    assert allowed[-1] == f"... and {4000 - len(allowed) + 1} more"
    assert fitted(ERRORS["columns"]).message.endswith("c...")
