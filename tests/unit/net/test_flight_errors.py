import logging

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher import errors
from fletcher.net.flight_errors import (
    FLIGHT_ERRORS,
    clean_message,
    flight_error_type,
    from_flight_error,
    handler_errors,
    to_flight_error,
)


def all_errors(kind=errors.FletcherError):
    for child in kind.__subclasses__():
        yield child
        yield from all_errors(child)


class FailingServer(flight.FlightServerBase):
    def __init__(self, exc):
        super().__init__("grpc://127.0.0.1:0")
        self.exc = exc

    @handler_errors(logging.getLogger("test"))
    def do_action(self, context, action):
        raise self.exc


def over_the_wire(exc):
    with FailingServer(exc) as server, flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
        with pytest.raises(flight.FlightError) as caught:
            list(client.do_action("x"))
        return caught.value


@pytest.mark.parametrize("kind", list(all_errors()))
def test_no_error_is_left_without_a_flight_error(kind):
    assert errors.FletcherError not in FLIGHT_ERRORS
    assert issubclass(flight_error_type(kind("m")), flight.FlightError)


def test_an_unmapped_error_would_be_noticed():
    with pytest.raises(LookupError, match="FletcherError"):
        flight_error_type(errors.FletcherError("m"))


@pytest.mark.parametrize("kind", list(errors.BY_CODE.values()))
def test_errors_cross_the_wire_whole(kind):
    sent = kind("`dims` is 3; ü", field="dims", allowed=["1", "2"], retry_after_ms=70)
    received = over_the_wire(sent)
    assert type(received) is flight_error_type(sent)
    got = from_flight_error(received)
    assert type(got) is kind
    assert got.to_dict() == sent.to_dict()


@pytest.mark.parametrize(
    "exc", [RuntimeError("secret /srv/x"), errors.ModelError("/srv/models/m is damaged")]
)
def test_what_nobody_meant_to_send_stays_in_the_log(exc, caplog):
    received = over_the_wire(exc)
    assert isinstance(received, flight.FlightInternalError)
    error = from_flight_error(received)
    assert type(error) is errors.InternalError
    assert "/srv" not in str(received)
    assert "Traceback" not in str(received)
    incident = error.message.rsplit(" ", 1)[1]
    assert incident in caplog.text
    assert "/srv" in caplog.text


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"code": "nothing", "message": "m"}',
        b'{"code": ["internal"], "message": "m"}',
        b'{"code": "internal", "message": 5}',
        b'{"code": "internal", "message": "m", "field": 5}',
        b'{"code": "internal", "message": "m", "allowed": 5}',
        b'{"code": "overloaded", "message": "m", "retry_after_ms": "soon"}',
    ],
)
def test_what_is_no_error_of_ours_is_none(raw):
    # Another server's `extra_info` is not to fail a client in the midst of telling its error.
    assert errors.from_json(raw) is None


def test_half_a_surrogate_pair_is_named_and_crosses_the_wire():
    received = from_flight_error(
        over_the_wire(errors.UnknownFieldError("`\ud800`", field="\ud800"))
    )
    assert (received.message, received.field) == ("`\\ud800`", "\\ud800")


def test_a_flight_error_passes_through():
    raised = flight.FlightUnavailableError("x", extra_info=b"y")
    assert to_flight_error(raised) is raised


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (flight.FlightUnavailableError("gone"), errors.UnavailableError),
        (flight.FlightTimedOutError("late"), errors.DeadlineExceededError),
        (flight.FlightUnauthenticatedError("who"), errors.UnauthenticatedError),
        (flight.FlightUnauthorizedError("no"), errors.UnauthorizedError),
        (flight.FlightServerError("bad", extra_info=b"not json"), errors.InternalError),
        (flight.FlightInternalError("bad", extra_info=b'{"code": "new"}'), errors.InternalError),
        (flight.FlightCancelledError("c"), errors.UnavailableError),
        (OSError("Could not write record batch"), errors.UnavailableError),
        (pa.ArrowNotImplementedError("no"), errors.InvalidCommandError),
        (pa.ArrowInvalid("Destination already closed"), errors.UnavailableError),
        (pa.ArrowInvalid("no"), errors.InvalidCommandError),
        (KeyError("no"), errors.InternalError),
    ],
)
def test_foreign_errors_find_a_place(exc, kind):
    assert type(from_flight_error(exc, "grpc://h:1")) is kind


def test_a_refused_connection_names_the_address():
    with (
        flight.connect("grpc://127.0.0.1:1") as client,
        pytest.raises(flight.FlightError) as caught,
    ):
        list(client.do_action("x"))
    error = from_flight_error(caught.value, "grpc://127.0.0.1:1")
    assert type(error) is errors.UnavailableError
    assert "grpc://127.0.0.1:1" in error.message
    assert "refused" in error.message


def test_messages_lose_what_was_added_on_the_way():
    text = (
        "Flight returned unavailable error, with message: the message. gRPC client debug context: "
        "UNKNOWN:the message. Detail: Failed. Client context: OK"
    )
    assert clean_message(OSError(text)) == "the message"
    assert clean_message(OSError("the message. Detail: Failed")) == "the message"
    assert clean_message(OSError("")) == "OSError"
