import json
import logging
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher import errors
from fletcher.net import flight_errors
from fletcher.net.flight_errors import (
    FLIGHT_ERRORS,
    HANDLER_ERRORS,
    TRAILER,
    NotFoundError,
    StatusError,
    clean_message,
    flight_error_type,
    from_flight_error,
    from_store_error,
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

    def fail(self, context, *, as_status=False):
        with handler_errors(context, logging.getLogger("test"), as_status=as_status):
            raise self.exc

    def do_action(self, context, action):
        self.fail(context)

    def list_flights(self, context, criteria):
        self.fail(context)

    def get_flight_info(self, context, descriptor):
        self.fail(context)

    def get_schema(self, context, descriptor):
        self.fail(context, as_status=True)

    def do_put(self, context, descriptor, reader, writer):
        self.fail(context)

    def do_exchange(self, context, descriptor, reader, writer):
        self.fail(context)

    def do_get(self, context, ticket):
        if ticket.ticket != b"late":
            self.fail(context)

        def batches():
            yield ROWS
            self.fail(context)

        return flight.GeneratorStream(ROWS.schema, batches())


ROWS = pa.record_batch({"a": [1]})
PATH = flight.FlightDescriptor.for_path("d")


def write(writer, reader=None):
    with writer:
        if reader is not None:
            writer.begin(ROWS.schema)
        writer.write_batch(ROWS)
        writer.done_writing()
        if reader is not None:
            reader.read_chunk()


CALLS = {
    "do_action": lambda client: list(client.do_action("x")),
    "list_flights": lambda client: list(client.list_flights()),
    "get_flight_info": lambda client: client.get_flight_info(PATH),
    "do_put": lambda client: write(client.do_put(PATH, ROWS.schema)[0]),
    "do_exchange": lambda client: write(*client.do_exchange(PATH)),
    "do_get": lambda client: client.do_get(flight.Ticket(b"x")).read_all(),
    "do_get, late": lambda client: client.do_get(flight.Ticket(b"late")).read_all(),
}


def over_the_wire(exc, call="do_action"):
    with FailingServer(exc) as server, flight.connect(f"grpc://127.0.0.1:{server.port}") as client:
        with pytest.raises(flight.FlightError) as caught:
            CALLS[call](client)
        return caught.value


# Statuses of gRPC. pyarrow's client shows the status only in its text.
STATUSES = {
    errors.RequestError("m"): "INVALID_ARGUMENT",
    errors.DimensionMismatchError("m"): "INVALID_ARGUMENT",
    errors.UnknownDatasetError("m"): "NOT_FOUND",
    errors.UnknownModelError("m"): "NOT_FOUND",
    errors.UnknownIdError("m"): "NOT_FOUND",
    errors.UnsupportedCallError("m"): "UNIMPLEMENTED",
    errors.OverloadedError("m"): "UNAVAILABLE",
    errors.DeadlineExceededError("m"): "DEADLINE_EXCEEDED",
    errors.InternalError("m"): "INTERNAL",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sent", STATUSES, ids=lambda sent: type(sent).__name__)
def test_every_call_carries_text_and_code_of_an_error(sent, call):
    received = over_the_wire(sent, call)
    assert "Traceback" not in str(received)
    assert clean_message(received) == "m"
    assert json.loads(received.extra_info) == {"code": sent.code, "message": "m"}
    if call in ("do_get", "do_put", "do_exchange"):
        assert f"{STATUSES[sent]}:m" in str(received)


@pytest.mark.parametrize("sent", STATUSES, ids=lambda sent: type(sent).__name__)
def test_get_schema_carries_the_text_of_an_error(sent):
    # pyarrow's client does not read the trailer, and knows a class for each of these statuses.
    kinds = {
        "INVALID_ARGUMENT": pa.ArrowInvalid,
        "NOT_FOUND": pa.ArrowKeyError,
        "UNIMPLEMENTED": pa.ArrowNotImplementedError,
    }
    said = pytest.raises(kinds.get(STATUSES[sent], pa.ArrowException))
    with (
        FailingServer(sent) as server,
        flight.connect(f"grpc://127.0.0.1:{server.port}") as client,
        said as caught,
    ):
        client.get_schema(PATH)
    assert "Traceback" not in str(caught.value)
    assert clean_message(caught.value).removeprefix("Unknown error: ") == "m"


def test_an_error_is_converted_and_counted_once():
    trailers = []
    context = SimpleNamespace(add_trailer=lambda *pair: trailers.append(pair))
    said = pytest.raises(NotFoundError)
    with said as caught, handler_errors(context), handler_errors(context):
        raise errors.UnknownDatasetError("m")
    assert str(caught.value) == "m"
    assert [name for name, _ in trailers] == [TRAILER]
    with pytest.raises(NotFoundError), handler_errors(None):
        raise errors.UnknownDatasetError("m")


@pytest.mark.parametrize("kind", list(all_errors()))
def test_no_error_is_left_without_a_flight_error(kind):
    assert errors.FletcherError not in FLIGHT_ERRORS
    assert issubclass(flight_error_type(kind("m")), HANDLER_ERRORS)


def test_an_unmapped_error_would_be_noticed():
    with pytest.raises(LookupError, match="FletcherError"):
        flight_error_type(errors.FletcherError("m"))


@pytest.mark.parametrize("kind", list(errors.BY_CODE.values()))
def test_errors_cross_the_wire_whole(kind):
    sent = kind("`dims` is 3; ü", field="dims", allowed=["1", "2"], retry_after_ms=70)
    received = over_the_wire(sent)
    kind_sent = flight_error_type(sent)
    is_status = issubclass(kind_sent, StatusError)
    assert type(received) is (flight.FlightInternalError if is_status else kind_sent)
    got = from_flight_error(received)
    assert type(got) is kind
    assert got.to_dict() == sent.to_dict()


class PanicException(BaseException):
    """Stands for that of pyo3, which is no Exception either."""


@pytest.mark.parametrize(
    "exc",
    [
        RuntimeError("secret /srv/x"),
        errors.ModelError("/srv/models/m is damaged"),
        PanicException("called `unwrap` in /srv/x.rs"),
        KeyboardInterrupt("/srv/x"),
    ],
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
        b"[" * 9999,
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


def raised_by_pyarrow():
    kinds = [*vars(flight).values(), *vars(pa).values()]
    return [
        kind
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, (flight.FlightError, pa.ArrowException))
    ]


@pytest.mark.parametrize("kind", raised_by_pyarrow())
def test_no_error_of_pyarrow_is_left_without_a_row(kind):
    for table in (flight_errors.SERVER_ERRORS, flight_errors.STORE_ERRORS):
        assert any(issubclass(kind, kinds) for kinds, *_ in table)


@pytest.mark.parametrize(
    ("exc", "kind", "words"),
    [
        (flight.FlightUnavailableError("x"), errors.StoreUnavailableError, "failed while asking"),
        (flight.FlightTimedOutError("x"), errors.StoreUnavailableError, "within the deadline"),
        (flight.FlightUnauthenticatedError("x"), errors.UnauthorizedError, "refused asking"),
        (flight.FlightUnauthorizedError("x"), errors.UnauthorizedError, "refused asking"),
        (flight.FlightServerError("x"), errors.StoreUnavailableError, "failed while asking"),
        (flight.FlightInternalError("x"), errors.StoreUnavailableError, "failed while asking"),
        (flight.FlightCancelledError("x"), errors.StoreUnavailableError, "failed while asking"),
        (OSError("x"), errors.StoreUnavailableError, "failed while asking"),
        (
            pa.ArrowNotImplementedError("gRPC returned unimplemented error, with message: x"),
            errors.RequestError,
            "refused asking",
        ),
        (
            pa.ArrowKeyError("gRPC returned not found error, with message: x"),
            errors.RequestError,
            "refused asking",
        ),
        (
            pa.ArrowInvalid("Flight returned invalid argument error, with message: x"),
            errors.RequestError,
            "refused asking",
        ),
        # Of an answer that was cut, empty or of another kind: no refusal.
        (pa.ArrowInvalid("Tried reading schema message"), errors.StoreUnavailableError, "answer"),
        (pa.ArrowKeyError("x"), errors.StoreUnavailableError, "answer cannot be read"),
        (pa.ArrowNotImplementedError("a column type"), errors.StoreUnavailableError, "answer"),
        (
            pa.ArrowInvalid("gRPC returned resource exhausted error, with message: queue full"),
            errors.OverloadedError,
            "overloaded, asking: queue full",
        ),
        (pa.ArrowMemoryError("x"), errors.StoreUnavailableError, "failed while asking"),
    ],
)
def test_a_store_is_retried_unless_it_refused(exc, kind, words):
    error = from_store_error(exc, "asking")
    assert type(error) is kind
    assert words in error.message
    # A timeout or a failure may be one dataset's: it does not prove that the store is unavailable.
    certain = isinstance(exc, flight.FlightUnavailableError)
    unproven = kind is errors.StoreUnavailableError and not certain
    assert error.field == (None if unproven else "store")


@pytest.mark.parametrize(
    ("field", "kept"), [("store", "store"), ("dataset", "dataset"), ("x", None)]
)
def test_a_fletcher_store_tells_whether_the_trouble_is_a_datasets(field, kept):
    sent = errors.StoreUnavailableError("it fails", field=field)
    assert from_store_error(to_flight_error(sent), "asking").field == kept


@pytest.mark.parametrize("kind", list(errors.BY_CODE.values()))
def test_an_error_of_a_fletcher_store_is_a_refusal_or_retryable(kind):
    sent = kind("`dims` is 3", field="dims", retry_after_ms=70)
    got = from_store_error(to_flight_error(sent), "asking")
    if isinstance(sent, errors.UnavailableError):
        overloaded = isinstance(sent, errors.OverloadedError)
        assert type(got) is (errors.OverloadedError if overloaded else errors.StoreUnavailableError)
        assert got.retry_after_ms == 70
    elif isinstance(
        sent, (errors.DeadlineExceededError, errors.CancelledError, errors.InternalError)
    ):
        assert type(got) is errors.StoreUnavailableError
    else:
        assert got.to_dict() == sent.to_dict()


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
    assert clean_message(OSError("gRPC returned invalid argument error, with message: no")) == "no"
    assert clean_message(OSError("")) == "OSError"


def test_a_web_server_is_not_taken_for_a_store():
    # gRPC's UNIMPLEMENTED, which a Longbow answers to unknown actions.
    found = pa.ArrowNotImplementedError(
        "Flight returned unimplemented error, with message: Received http2 header with status: 404"
    )
    error = from_store_error(found, "asking for capabilities")
    assert type(error) is errors.StoreUnavailableError
    assert error.field == "store"
    assert "404" in error.message
