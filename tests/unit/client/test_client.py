import io
import json
import socket
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher import EmbedCommand, TlsOptions, TransferOptions, connect, errors, open_source
from fletcher.client.connection import Connection
from fletcher.client.exchange_call import ExchangeCall
from fletcher.client.files import ingest_files, ingest_id
from fletcher.client.messages import PutSummary, RowError
from fletcher.flight.answers import AnswerWriter
from fletcher.net.compression import CallCompression
from fletcher.net.flight_errors import handler_errors, to_flight_error
from tests.unit.client.client_servers import Behaving, Waiting, limit

SMALL = TransferOptions(message_bytes=1000, stall_timeout_s=20)
DIM = 4


def vectors_of(batch, dtype, *, failed=()):
    kind = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    values = [[float(len(text or ""))] * DIM for text in batch.column("text").to_pylist()]
    rows = [None if row in failed else values[row] for row in range(batch.num_rows)]
    return pa.record_batch({"vector": pa.array(rows, pa.list_(kind, DIM))})


class Embedding(Waiting):
    """Answers every batch with the lengths of its texts; subclasses misbehave."""

    def __init__(self, **options):
        super().__init__(**options)
        self.commands = []
        self.stalled = threading.Event()
        self.cancelled = threading.Event()

    def do_exchange(self, context, descriptor, reader, writer):
        command = json.loads(descriptor.command)
        self.commands.append(command)
        dtype = command.get("dtype", "float16")
        empty = pa.record_batch({"text": pa.array([], pa.utf8())})
        answers = AnswerWriter(context, writer)
        answers.begin(vectors_of(empty, dtype).schema, CallCompression("none"))
        with answers:
            for chunk in reader:
                fields = json.loads(chunk.app_metadata.to_pybytes())
                self.answer(context, writer, chunk.data, fields, dtype)

    def answer(self, context, writer, batch, fields, dtype):
        metadata = {"batch_id": fields["batch_id"], "errors": []}
        writer.write_with_metadata(vectors_of(batch, dtype), json.dumps(metadata).encode())


def table_of(lengths):
    return pa.table({"text": ["x" * n for n in lengths]})


def test_vectors_come_back_in_order_and_in_the_batches_that_were_sent():
    class Counting(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            self.pieces = fields["batch_id"] + 1
            rows = range(fields["row_offset"], fields["row_offset"] + batch.num_rows)
            entries = [
                {"row": row, "id": row, "code": "row_too_large", "message": "too long"}
                for row in rows
                if row % 50 == 0
            ]
            metadata = {"batch_id": fields["batch_id"], "errors": entries}
            failed = {row - rows[0] for row in rows if row % 50 == 0}
            out = vectors_of(batch, dtype, failed=failed)
            writer.write_with_metadata(out, json.dumps(metadata).encode())

    sizes = [119, 1, 0, 200, 2]
    sent = [table_of(range(1, size + 1)).combine_chunks() for size in sizes]
    data = [
        pa.record_batch({"text": table["text"].combine_chunks()}, schema=table.schema)
        for table in sent
    ]
    failed = []
    with Counting() as server, connect(server.uri, transfer=SMALL) as client:
        with client.exchange(data) as exchange:
            assert exchange.schema.field("vector").type.list_size == DIM
            row = 0
            for size in (119, 1, 200, 2):
                batch = next(exchange)
                wanted = [
                    None if n % 50 == 0 else float(n - row + 1) for n in range(row, row + size)
                ]
                got = batch.column("vector").to_pylist()
                assert [vector and vector[0] for vector in got] == wanted
                failed += [error.row for error in exchange.errors]
                assert all(row <= error.row < row + size for error in exchange.errors)
                row += size
            assert list(exchange) == []
        assert list(exchange) == []
        assert server.pieces > 20
    assert failed == list(range(0, 322, 50))


class Wide(Embedding):
    def do_exchange(self, context, descriptor, reader, writer):
        writer.begin(pa.schema({"vector": pa.binary()}))
        for chunk in reader:
            wide = pa.array([b"x" * 10_000] * chunk.data.num_rows)
            writer.write_with_metadata(pa.record_batch({"vector": wide}), b"{}")


def test_large_answers_wait_in_the_server_not_here():
    data = table_of([10] * 40).to_batches(max_chunksize=4)
    with Wide() as server, connect(server.uri) as client:
        limit(client, max_answer_bytes=1000)
        with client.exchange(data) as exchange:
            for batch in exchange:
                assert batch.num_rows == 4
                assert len(exchange._call.answers) <= 1


def test_a_server_is_not_blamed_for_a_caller_that_takes_its_time():
    data = table_of([10] * 4).to_batches(max_chunksize=1)
    with Wide() as server, connect(server.uri) as client:
        limit(client, max_answer_bytes=1)
        with client.exchange(data) as exchange:
            for _ in range(4):
                with exchange._changed:
                    assert exchange._changed.wait_for(lambda: exchange._call.answers, 10)
                    exchange._call.last_activity -= 1000  # that long ago
                assert next(exchange).num_rows == 1
            assert list(exchange) == []


def test_an_answer_to_another_batch_is_noticed():
    class Swapping(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            super().answer(context, writer, batch, {"batch_id": 1 - fields["batch_id"]}, dtype)

    said = pytest.raises(errors.InternalError, match="answered batch 1 where batch 0 was due")
    with Swapping() as server, connect(server.uri) as client, said:
        list(client.exchange(table_of([1, 2]).to_batches(max_chunksize=1)))


def test_more_than_the_wire_holds_does_not_lock():
    # 60 MB each way, against a server that answers before it reads on.
    class Echo(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            wide = pa.array([b"x" * 1_000_000] * batch.num_rows)
            writer.write_with_metadata(pa.record_batch({"vector": wide}), b"{}")

        def do_exchange(self, context, descriptor, reader, writer):
            writer.begin(pa.schema({"vector": pa.binary()}))
            for chunk in reader:
                self.answer(context, writer, chunk.data, {}, "")

    data = (pa.record_batch({"text": ["x" * 1_000_000]}) for _ in range(60))
    with Echo() as server, connect(server.uri) as client, client.exchange(data) as exchange:
        assert sum(batch.num_rows for batch in exchange) == 60


def test_embed_gives_an_array():
    with Embedding() as server, connect(server.uri) as client:
        vectors = client.embed(["a", "bb", "ccc"], prompt="query", dims=DIM)
        assert vectors.dtype == np.float32
        assert vectors.tolist() == [[1.0] * DIM, [2.0] * DIM, [3.0] * DIM]
        assert client.embed([]).shape == (0, DIM)
        assert client.embed(text for text in ("a", "bb"))[:, 0].tolist() == [1, 2]
        assert client.embed(["a"], dtype="float16").dtype == np.float16
        many = client.embed(["x" * (n % 7) for n in range(10_000)])
        assert many[:, 0].tolist() == [n % 7 for n in range(10_000)]
    command = {"prompt": "query", "dims": DIM, "dtype": "float32"}
    assert server.commands[0] == {**command, "accept_compression": ["lz4", "zstd"]}


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_embed_refuses_what_is_no_array(texts):
    class Sparse(Embedding):
        def do_exchange(self, context, descriptor, reader, writer):
            kind = pa.list_(pa.struct([("index", pa.int32()), ("value", pa.float32())]))
            writer.begin(pa.schema([("vector", kind)]))
            for chunk in reader:
                fields = json.loads(chunk.app_metadata.to_pybytes())
                batch = pa.record_batch({"vector": pa.array([[]] * chunk.data.num_rows, kind)})
                metadata = {"batch_id": fields["batch_id"], "errors": []}
                writer.write_with_metadata(batch, json.dumps(metadata).encode())

    refused = pytest.raises(errors.InvalidCommandError, match="`exchange` returns such vectors")
    with Sparse() as server, connect(server.uri) as client, refused:
        client.embed(texts)


@pytest.mark.parametrize("texts", ["a text", [1], [b"\xff"], ["\ud800"]])
def test_embed_wants_a_list_of_texts(texts):
    with Embedding() as server, connect(server.uri) as client:
        with pytest.raises(errors.InvalidCommandError, match="`texts`"):
            client.embed(texts)
        with pytest.raises(errors.UnknownFieldError, match="`colour`"):
            client.embed(["a"], colour="red")


def test_failed_rows_are_told_by_exchange_and_raised_by_embed():
    class Failing(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            entry = {"row": 1, "id": None, "code": "row_too_large", "message": "too long"}
            metadata = {"batch_id": fields["batch_id"], "errors": [entry]}
            out = vectors_of(batch, dtype, failed={1})
            writer.write_with_metadata(out, json.dumps(metadata).encode())

    with Failing() as server, connect(server.uri) as client:
        with client.exchange(table_of([1, 2, 3])) as exchange:
            (batch,) = exchange
            assert batch.column("vector").to_pylist()[1] is None
            assert [(one.row, one.code) for one in exchange.errors] == [(1, "row_too_large")]
        with pytest.raises(errors.RowTooLargeError, match="text 1: too long"):
            client.embed(["a", "b", "c"])


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_refusal_arrives_as_it_was_meant(when):
    class Refusing(Embedding):
        def do_exchange(self, context, descriptor, reader, writer):
            if when == "at once":
                with AnswerWriter(context, writer), handler_errors(context):
                    raise errors.UnknownModelError("no such model", field="model")
            super().do_exchange(context, descriptor, reader, writer)

        def answer(self, context, writer, batch, fields, dtype):
            if fields["batch_id"] == 2:
                with handler_errors(context):
                    raise errors.ColumnTypeError("no such type", field="text")
            super().answer(context, writer, batch, fields, dtype)

    with Refusing() as server, connect(server.uri, transfer=SMALL) as client:
        answers = iter(client.exchange(table_of([100] * 1000)))
        with pytest.raises(errors.RequestError, match="no such") as caught:
            list(answers)
        assert caught.value.field == ("model" if when == "at once" else "text")
        assert list(answers) == []


class Refusing(Embedding):
    """Refuses calls, each with the next error, when it has read the next number of batches."""

    def __init__(self, *refusals):
        super().__init__()
        self.refusals = list(refusals)

    def do_exchange(self, context, descriptor, reader, writer):
        if not self.refusals:
            return super().do_exchange(context, descriptor, reader, writer)
        num_read, error = self.refusals.pop(0)
        for _, _ in zip(range(num_read), reader, strict=False):
            pass
        self.commands.append(None)
        with AnswerWriter(context, writer), handler_errors(context):
            raise error


ALL = 1000
AGAIN = {"backoff_s": 0.01, "stall_timeout_s": 20}


@pytest.mark.parametrize("compression", ["none", "auto"])
def test_an_exchange_that_is_refused_before_its_first_answer_comes_again(monkeypatch, compression):
    overloaded = errors.OverloadedError("too much", retry_after_ms=300)
    refusals = [(1, overloaded), (2, errors.DrainingError("going down")), (ALL, overloaded)]
    lengths = [[number, number + 1] for number in range(1, 100)]

    def data():
        # Read once: what was sent in vain must not be asked of it again.
        for number, one in enumerate(lengths):
            yield from table_of(one).to_batches()
            if number < 2:
                assert refused[number].wait(30)

    refused = [threading.Event(), threading.Event()]
    transfer = TransferOptions(message_bytes=100, compression=compression, **AGAIN)
    fail = ExchangeCall._fail

    def failed(call, error):
        fail(call, error)
        refused[min(len(server.commands), 2) - 1].set()

    monkeypatch.setattr(ExchangeCall, "_fail", failed)
    with Refusing(*refusals) as server, connect(server.uri, transfer=transfer) as client:
        exchange = client.exchange(data())
        started = time.monotonic()
        got = [[row[0] for row in one.column("vector").to_pylist()] for one in exchange]
        assert got == lengths
        assert time.monotonic() - started >= 0.6, "not before the server said"
        assert len(server.commands) == 4


@pytest.mark.parametrize(
    ("refusals", "options", "num_calls"),
    [
        ([(ALL, errors.OverloadedError("no"))] * 9, {"max_retries": 2}, 3),
        ([(ALL, errors.OverloadedError("no"))], {"window_bytes": 50}, 1),
        ([(ALL, errors.ColumnTypeError("no"))], {}, 1),
        ([(ALL, errors.InternalError("no"))], {}, 1),
    ],
)
def test_an_exchange_does_not_come_again_for_ever_nor_in_vain(refusals, options, num_calls):
    transfer = TransferOptions(**AGAIN, **options)
    with Refusing(*refusals) as server, connect(server.uri, transfer=transfer) as client:
        with pytest.raises(errors.FletcherError, match="no") as caught:
            list(client.exchange(table_of([100])))
        assert type(caught.value) is type(refusals[0][1])
        assert len(server.commands) == num_calls


def test_an_exchange_waits_for_a_server_that_is_started_again(monkeypatch):
    starting = {}

    def pause(connection, failures, error):
        if failures == 2:
            starting["server"] = Embedding(location=uri)
        return 0.05

    with Embedding() as server:
        uri = server.uri
        client = connect(uri, transfer=TransferOptions(stall_timeout_s=20))
        assert client.embed(["a"]).tolist() == [[1] * DIM]
    monkeypatch.setattr(Connection, "retry_delay_s", pause)
    try:
        assert client.embed(["bb"]).tolist() == [[2] * DIM]
    finally:
        client.close()
        starting["server"].shutdown()


def test_an_exchange_with_a_server_that_is_gone_ends():
    with Embedding() as server:
        client = connect(server.uri, transfer=TransferOptions(max_retries=2, **AGAIN))
    with client, pytest.raises(errors.UnavailableError, match="nothing listens"):
        client.embed(["a"])


def test_an_exchange_that_answered_does_not_come_again():
    class Full(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            if fields["batch_id"] == 1:
                raise to_flight_error(errors.OverloadedError("no"))
            super().answer(context, writer, batch, fields, dtype)

    def data():
        yield from table_of([1]).to_batches()
        assert answered.wait(30)
        yield from table_of([2]).to_batches()

    answered = threading.Event()
    transfer = TransferOptions(**AGAIN)
    with Full() as server, connect(server.uri, transfer=transfer) as client:
        exchange = client.exchange(data())
        assert next(exchange).num_rows == 1
        answered.set()
        with pytest.raises(errors.OverloadedError, match="no"):
            next(exchange)
        assert len(server.commands) == 1


def test_an_exchange_whose_input_is_busy_is_told_of_the_refusal():
    go_on = threading.Event()

    def data():
        yield from table_of([1]).to_batches()
        assert go_on.wait(30)

    refusals = [(1, errors.OverloadedError("too much"))]
    with (
        Refusing(*refusals) as server,
        connect(server.uri, transfer=TransferOptions(**AGAIN)) as client,
    ):
        limit(client, leave_s=0.1, close_s=0.1)
        exchange = client.exchange(data())
        with pytest.raises(errors.OverloadedError, match="too much"):
            next(exchange)
        go_on.set()
        for thread in exchange._call.threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_failure_that_is_told_before_the_calls_end_is_raised_at_once():
    heard = threading.Event()

    class Telling(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            error = errors.ColumnTypeError("no such type", field="text")
            writer.write_with_metadata(vectors_of(batch.slice(0, 0), dtype), error.to_json())

    def data():
        yield from table_of([1]).to_batches()
        assert heard.wait(30)  # no more before the first is answered

    transfer = TransferOptions(stall_timeout_s=5)
    with Telling() as server, connect(server.uri, transfer=transfer) as client:
        limit(client, close_s=0.1)
        exchange = client.exchange(data())
        with pytest.raises(errors.ColumnTypeError, match="no such type") as caught:
            next(exchange)
        assert caught.value.field == "text"
        heard.set()
        for thread in exchange._call.threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_server_that_ends_early_is_noticed():
    class Leaving(Embedding):
        def do_exchange(self, context, descriptor, reader, writer):
            batch = reader.read_chunk().data
            out = vectors_of(batch, "float32")
            writer.begin(out.schema)
            writer.write_batch(out)

    said = pytest.raises(errors.UnavailableError)
    with Leaving() as server, connect(server.uri, transfer=SMALL) as client, said:
        list(client.exchange(table_of([100] * 1000)))


def test_a_server_that_answers_nothing_is_noticed():
    class Silent(Embedding):
        def do_exchange(self, context, descriptor, reader, writer):
            for _ in reader:
                pass

    said = pytest.raises(errors.UnavailableError, match="after 0 of 1 rows")
    with Silent() as server, connect(server.uri) as client, said:
        list(client.exchange(table_of([1])))


def test_what_the_input_raises_comes_out():
    def data():
        yield from table_of([1, 2]).to_batches()
        raise RuntimeError("the input broke")

    said = pytest.raises(RuntimeError, match="the input broke")
    with Embedding() as server, connect(server.uri) as client, said:
        list(client.exchange(data()))


@pytest.fixture
def stalling():
    class Stalling(Embedding):
        def answer(self, context, writer, batch, fields, dtype):
            if fields["batch_id"] == 0:
                super().answer(context, writer, batch, fields, dtype)
            else:
                self.stalled.set()
                self.hold(context)
                if context.is_cancelled():
                    self.cancelled.set()

    with Stalling() as server:
        yield server


def test_a_server_that_stalls_is_given_up_and_told(stalling):
    transfer = TransferOptions(message_bytes=1000, stall_timeout_s=0.2)
    with connect(stalling.uri, transfer=transfer) as client:
        with pytest.raises(errors.DeadlineExceededError, match=r"nothing for 0\.2 s"):
            list(client.exchange(table_of([100] * 1000)))
        assert stalling.cancelled.wait(10)


@pytest.mark.parametrize("rows", [100, 300_000])
def test_leaving_early_cancels(stalling, rows):
    with connect(stalling.uri, transfer=SMALL) as client:
        limit(client, close_s=10)
        started = time.monotonic()
        data = table_of([100] * rows).to_batches(max_chunksize=5)
        with client.exchange(data) as exchange:
            next(exchange)
            assert stalling.stalled.wait(10)
        assert stalling.cancelled.wait(10)
        assert time.monotonic() - started < 8
        assert not any(thread.is_alive() for thread in exchange._call.threads)


class Actions(Behaving):
    def do_action(self, context, action):
        body = action.body.to_pybytes() if action.body else b""
        answers = {
            "health": {"status": "ok"},
            "ready": {"ready": False},
            "stats": {"rows": 3},
            "list_models": {"models": [{"name": "m"}]},
            "upload_status": {"asked": json.loads(body or b"{}")},
        }
        return [json.dumps(answers[action.type]).encode()]


def test_actions():
    with Actions() as server, connect(server.uri) as client:
        assert client.address == server.uri
        assert repr(client) == f"<fletcher.Client of {server.uri}>"
        assert client.health() == {"status": "ok"}
        assert client.ready() is False
        assert client.stats() == {"rows": 3}
        assert client.list_models() == [{"name": "m"}]
        assert client.upload_status("u", "d") == {"asked": {"upload_id": "u", "dataset": "d"}}


@pytest.mark.parametrize("answer", [[], [b"no json"], [b"[]"]])
def test_an_answer_that_is_none_is_an_error(answer):
    class Babbling(Behaving):
        def do_action(self, context, action):
            return answer

    with Babbling() as server, pytest.raises(errors.InternalError, match="`health`"):
        connect(server.uri)


def test_another_flight_server_is_told_from_fletcher():
    said = pytest.raises(
        errors.InvalidCommandError, match=r"expected a Fletcher server.* a store has"
    )
    with flight.FlightServerBase("grpc://127.0.0.1:0") as server, said:
        connect(f"grpc://127.0.0.1:{server.port}")


def test_another_protocol_is_told_from_flight():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(errors.UnavailableError, match=f"{port}.*check the port") as caught:
            connect(f"grpc://127.0.0.1:{port}", timeout_s=10)
    assert caught.value.code == "unavailable"


def test_nobody_there_is_said_with_the_address():
    with pytest.raises(errors.UnavailableError, match=r"grpc://127\.0\.0\.1:1.*refused"):
        connect("grpc://127.0.0.1:1")


def test_a_server_that_does_not_answer_is_given_up():
    class Mute(Waiting):
        def do_action(self, context, action):
            self.hold(context)
            return []

    with Mute() as server, pytest.raises(errors.UnavailableError, match=r"within 0\.2 s"):
        connect(server.uri, timeout_s=0.2)


@pytest.mark.parametrize(
    "uri",
    ["", "localhost:8815", "http://h:1", "grpc://h", "grpc://:1", "grpc://h:x", "grpc://h:1/path"],
)
def test_what_is_no_address_is_refused(uri):
    with pytest.raises(errors.InvalidCommandError, match="`uri`") as caught:
        connect(uri)
    meant = "did you mean grpc://localhost:8815?" in caught.value.message
    assert meant == (uri == "localhost:8815")


def test_tls_wants_an_encrypted_address_and_files_that_exist(tmp_path):
    with pytest.raises(errors.InvalidCommandError, match="not encrypted"):
        connect("grpc://127.0.0.1:1", tls=TlsOptions())
    with pytest.raises(errors.InvalidCommandError, match="cannot read"):
        connect("grpcs://127.0.0.1:1", tls=TlsOptions(ca=tmp_path / "none"))


class TokenFactory(flight.ServerMiddlewareFactory):
    def start_call(self, info, headers):
        if headers.get("authorization") != ["Bearer secret"]:
            raise to_flight_error(errors.UnauthenticatedError("the token is missing or wrong"))


def test_the_token_goes_with_every_call(tmp_path):
    with Behaving(middleware={"token": TokenFactory()}) as server:
        for token in (None, "wrong"):
            with pytest.raises(errors.UnauthenticatedError, match="token"):
                connect(server.uri, token=token)
        with connect(server.uri, token="secret") as client:
            assert client.put(table_of([1, 2]), "d").complete


@pytest.fixture
def files(tmp_path):
    for name, rows in (("a", range(30)), ("b", range(30, 50))):
        lines = (json.dumps({"body": f"text {n}", "id": n, "stars": n}) for n in rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_ingest_twice_stores_once(files):
    options = EmbedCommand(dataset="d", text_column="body", columns=("stars",))

    class Named(Behaving):
        def do_put(self, context, descriptor, reader, writer):
            reader = (self.renamed(chunk) for chunk in reader)
            super().do_put(context, descriptor, reader, writer)

        def renamed(self, chunk):
            if chunk.data is not None:
                self.names = chunk.data.schema.names
                data = chunk.data.rename_columns(["id", "text", "stars"])
                return _Chunk(data, chunk)
            return chunk

    with Named() as server, connect(server.uri, transfer=SMALL) as client:
        first = client.ingest(files / "a.jsonl", options)
        again = client.ingest([files / "a.jsonl"], options)
        assert first.complete
        assert again.complete
        assert first.upload_id == again.upload_id
        assert server.rows == {n: f"text {n}" for n in range(30)}
        assert server.sent_again == 0
        assert server.names == ["id", "body", "stars"]
        assert server.commands[0]["text_column"] == "body"
        assert server.commands[0]["columns"] == ["stars"]


class _Chunk:
    def __init__(self, data, chunk):
        self.data = data
        self.app_metadata = chunk.app_metadata


def test_the_name_of_an_ingest_is_of_what_matters(files):
    def name(**changes):
        source = open_source(files, text_column="body", limit=changes.pop("limit", None))
        return ingest_id(source, EmbedCommand(**{"dataset": "d", **changes}))

    same = [name(), name(), name(limit=3), name(columns=("stars",)), name(dtype="float32")]
    assert len({*same, name(priority="bulk", upload_id="u")}) == 1
    changed = [name(), name(dataset="e"), name(mode="overwrite"), name(prompt="query: ")]
    assert len({*changed, name(mode="overwrite", limit=3)}) == 5
    for mode in ("upsert", "delta"):  # files may be changed, and changed back
        assert name(mode=mode) != name(mode=mode)
    (files / "b.jsonl").write_text('{"body": "other", "id": 1}')
    assert name() not in changed


class Puts:
    """Stands for `Client.put`: remembers the rows of each upload."""

    def __init__(self):
        self.rows = {}
        self.ends = {}

    def __call__(self, source, options, *, resume, on_ack, end=True):
        assert resume
        texts = pa.Table.from_batches(source.batches(), source.schema)[options.text_column]
        rows = self.rows.setdefault(options.upload_id, [])
        new = texts.to_pylist()[len(rows) :]
        rows += new
        self.ends[options.upload_id] = end
        error = RowError(0, None, "x", "y")
        number = len(rows)
        skipped = len(texts) - len(new)
        return PutSummary(
            options.upload_id, end, number, number, 0, number, errors=(error,), rows_skipped=skipped
        )

    @property
    def texts(self):
        return sorted(text for rows in self.rows.values() for text in rows)


def ingest_with(put, files, **changes):
    source = open_source(files, text_column="body", limit=changes.pop("limit", None))
    options = EmbedCommand(**{"dataset": "d", "text_column": "body", **changes})
    return ingest_files(put, source, options, None)


def test_an_overwrite_is_sent_anew_after_it_took_effect(files):
    # Other rows were added in between, and the third call did nothing.
    put = Puts()
    ingest_with(put, files / "a.jsonl", mode="overwrite")
    ingest_with(put, files / "b.jsonl", mode="append")
    summary = ingest_with(put, files / "a.jsonl", mode="overwrite")
    assert summary.rows_skipped == 0
    assert len(put.rows) == 3
    limited = ingest_with(put, files / "a.jsonl", mode="overwrite", limit=2)
    assert put.ends[limited.upload_id]  # it has no other rows, so it can take effect
    named = ingest_with(put, files / "a.jsonl", mode="overwrite", upload_id="u")
    again = ingest_with(put, files / "a.jsonl", mode="overwrite", upload_id="u")
    assert named.upload_id == again.upload_id == "u"


def test_a_file_that_was_repaired_or_added_stores_no_other_again(files):
    put = Puts()
    summary = ingest_with(put, files)
    assert (summary.complete, summary.rows_received, summary.rows_skipped) == (True, 50, 0)
    assert [name for name, _ in summary.uploads] == [str(files / "a.jsonl"), str(files / "b.jsonl")]
    assert [error.file for error in summary.errors] == [name for name, _ in summary.uploads]
    (files / "b.jsonl").write_text('{"body": "repaired", "id": 1}')
    (files / "c.jsonl").write_text('{"body": "added", "id": 2}')
    summary = ingest_with(put, files)
    assert (summary.rows_received, summary.rows_skipped) == (32, 30)
    assert put.texts == sorted([f"text {n}" for n in range(50)] + ["repaired", "added"])


def test_two_files_of_the_same_content_are_both_stored_and_once(files):
    (files / "b.jsonl").write_bytes((files / "a.jsonl").read_bytes())
    put = Puts()
    for _ in range(2):
        assert ingest_with(put, files).rows_received == 60
    assert len(put.texts) == 60


def test_a_trial_with_a_limit_and_then_all_stores_each_row_once(files):
    put = Puts()
    for most, received in ((5, 5), (35, 35), (None, 50)):
        summary = ingest_with(put, files, limit=most)
        assert summary.complete
        assert summary.rows_received == received
        assert set(put.ends.values()) == {most is None}
    assert put.texts == sorted(f"text {n}" for n in range(50))
    assert ingest_with(put, files, limit=5).complete  # although more rows are there


def test_files_are_one_upload_where_their_order_matters_or_a_name_is_given(files):
    for changes in ({"mode": "overwrite"}, {"upload_id": "u"}):
        put = Puts()
        summary = ingest_with(put, files, **changes)
        assert summary.uploads == ()
        assert list(put.rows) == [summary.upload_id]


def test_a_pipe_is_ingested_under_a_name_of_its_own(tmp_path):
    names = set()
    for _ in range(2):
        source = open_source("-", stdin=io.BytesIO(b"a\nb\n"))
        with Behaving() as server, connect(server.uri) as client:
            summary = client.ingest(source, "d")
            assert server.rows == {0: "a", 1: "b"}
            names.add(summary.upload_id)
    assert len(names) == 2
