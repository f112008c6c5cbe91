import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pyarrow as pa
import pytest

import fletcher
from fletcher import EmbedCommand, TransferOptions, connect, errors
from fletcher.client.messages import parse_reply
from fletcher.net.flight_errors import handler_errors, to_flight_error
from fletcher.net.message_size import batch_bytes, cut_batch
from tests.unit.client.client_servers import Behaving, Waiting, ack, limit

FAST = TransferOptions(
    message_bytes=1000, window_bytes=4000, stall_timeout_s=20, backoff_s=0.001, max_retries=3
)


def texts(n, size=20):
    return pa.table({"text": [f"{row:0{size}}" for row in range(n)]})


def stored(server, n, size=20):
    return server.rows == {row: f"{row:0{size}}" for row in range(n)}


def test_all_rows_arrive_in_messages_of_bearable_size():
    acks = []
    with Behaving() as server, connect(server.uri, transfer=FAST) as client:
        summary = client.put(texts(500), "d", on_ack=acks.append)
        assert stored(server, 500)
        assert server.calls == 1
        assert max(server.sizes) <= 1000
        assert min(server.sizes) >= 400
        assert server.commands[0]["dataset"] == "d"
    assert summary.complete
    assert summary.rows_stored == 500
    assert summary.model == "m@h"
    assert summary.errors[0].code == "row_too_large"
    assert acks[-1].rows_durable == 500
    assert [one.row_last for one in acks] == sorted(one.row_last for one in acks)


@pytest.mark.parametrize("rows", [0, 1])
def test_small_and_empty_uploads_end_too(rows):
    with Behaving() as server, connect(server.uri) as client:
        summary = client.put(texts(rows), EmbedCommand(dataset="d", upload_id="u"))
        assert (summary.complete, summary.rows_stored, summary.upload_id) == (True, rows, "u")


class Frame:
    """What pandas and Polars have in common: iterated over, it gives its columns' names."""

    def __init__(self, table):
        self._table = table

    def __iter__(self):
        return iter(self._table.column_names)

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "shape",
    [
        lambda table: table,
        lambda table: table.combine_chunks().to_batches()[0],
        lambda table: table.to_reader(max_chunksize=7),
        lambda table: table.to_batches(max_chunksize=7),
        lambda table: (batch for batch in table.to_batches(max_chunksize=7)),
        lambda table: pa.table({"text": table["text"].cast(pa.string_view())}),
        Frame,
    ],
)
def test_whatever_holds_batches_can_be_put(shape):
    with Behaving() as server, connect(server.uri, transfer=FAST) as client:
        assert client.put(shape(texts(100)), "d").complete
        assert stored(server, 100)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (3, "`data` is a int, "),
        ([], "a list of nothing, .* pass an empty Table, which has a schema"),
        (["a"], "a list of a str, "),
        ({"text": ["a"]}, r"a dict, .* pyarrow.table\(data\)"),
        ([{"text": "a"}], r"a list of a dict, .* pyarrow.Table.from_pylist\(data\)"),
    ],
)
def test_what_holds_none_is_refused(data, said):
    with Behaving() as server, connect(server.uri) as client:
        with pytest.raises(errors.InvalidCommandError, match=said):
            client.put(data, "d")
        with pytest.raises(errors.InvalidCommandError, match="`dataset`"):
            client.put(texts(1), EmbedCommand())
        assert server.calls == 0


def test_an_upload_in_two_calls_counts_its_rows_through():
    options = EmbedCommand(dataset="d", upload_id="u")
    with Behaving() as server, connect(server.uri) as client:
        first = client.put(texts(10).slice(0, 6), options, end=False)
        assert not first.complete
        assert client.put(texts(10).slice(6), options, row_offset=6).complete
        assert stored(server, 10)


def test_a_second_run_sends_nothing_again():
    options = EmbedCommand(dataset="d", upload_id="u")
    with Behaving() as server, connect(server.uri, transfer=FAST) as client:
        client.put(texts(100).slice(0, 50), options, end=False)
        second = client.put(texts(100), options, resume=True)
        assert second.complete
        assert second.rows_skipped == 50
        assert client.put(texts(100), options, resume=True).rows_skipped == 100
        assert server.calls == 3
        assert stored(server, 100)
        assert server.sent_again == 0


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_holes_in_what_the_server_has_are_filled_across_a_lost_connection(broken):
    class Breaking(Behaving):
        armed = False

        def before(self, fields):
            if self.armed and fields["batch_id"] == broken:
                self.armed = False
                raise to_flight_error(errors.StoreUnavailableError("gone", retry_after_ms=1))

    options = EmbedCommand(dataset="d", upload_id="u")
    one_each = replace(FAST, window_bytes=100)  # each part waits for the earlier one
    with Breaking() as server, connect(server.uri, transfer=one_each) as client:
        whole = texts(40, 20)  # one message
        for first in (5, 20):
            client.put(whole.slice(first, 5), options, row_offset=first, end=False)
        server.armed = True
        summary = client.put(whole, options, resume=True)
        assert (summary.complete, summary.rows_skipped) == (True, 10)
        assert stored(server, 40)
        assert server.sent_again == 0
        assert server.calls == 4


def test_the_window_bounds_what_is_unacknowledged():
    class Counting(Waiting):
        received = 0

        def do_put(self, context, descriptor, reader, writer):
            held = []
            for chunk in reader:
                fields = json.loads(chunk.app_metadata.to_pybytes())
                if chunk.data is not None:
                    self.received += chunk.data.nbytes
                    held.append((fields["batch_id"], chunk.data.num_rows))
                    if len(held) == 3:  # no more fits: 3 messages of about 1,200 bytes
                        self.hold(context)
                        self.reply(writer, ack("u", fields["batch_id"], 0, 0, 0))
                        held.clear()
            self.finish(writer, "u")

    produced = itertools.count()

    def source():
        for _ in range(12):
            next(produced)
            yield pa.record_batch({"text": ["x" * 1000]})

    transfer = TransferOptions(message_bytes=1000, window_bytes=3800, stall_timeout_s=0.3)
    with Counting() as server, connect(server.uri, transfer=transfer) as client:
        limit(client, abandon_s=0.1)
        with pytest.raises(errors.DeadlineExceededError, match=r"nothing for 0\.3 s"):
            client.put(source(), EmbedCommand(dataset="d", upload_id="u"))
        assert server.received <= 3800
        assert next(produced) == 4  # one more was taken from the source and waits


def test_a_server_that_never_acknowledges_is_given_up():
    class Silent(Waiting):
        def do_put(self, context, descriptor, reader, writer):
            self.hold(context)

    transfer = TransferOptions(stall_timeout_s=0.2)
    with Silent() as server, connect(server.uri, transfer=transfer) as client:
        limit(client, abandon_s=0.1)
        for data in (texts(10), texts(200_000, 400)):  # the second blocks in its write
            started = time.monotonic()
            with pytest.raises(errors.DeadlineExceededError, match="upload_id"):
                client.put(data, "d")
            assert time.monotonic() - started < 10
        server.released.set()


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_broken_connection_is_resumed_where_the_server_is(lost, caplog):
    class Breaking(Behaving):
        broken = 0

        def breakdown(self, fields, where):
            if where == lost and fields["batch_id"] in (3, 7) and self.broken < 2:
                self.broken += 1
                raise to_flight_error(errors.StoreUnavailableError("gone", retry_after_ms=1))

        def before(self, fields):
            self.breakdown(fields, "before")

        def after(self, fields):
            self.breakdown(fields, "after")

    with Breaking() as server, connect(server.uri, transfer=FAST) as client:
        summary = client.put(iter(texts(500).to_batches(max_chunksize=11)), "d")
        assert summary.complete
        assert stored(server, 500)
        assert server.calls == 3
        assert len({command["upload_id"] for command in server.commands}) == 1
    assert f"upload {summary.upload_id}: gone; retrying" in caplog.text


def test_a_call_that_ends_early_without_a_summary_is_resumed():
    class Leaving(Behaving):
        def do_put(self, context, descriptor, reader, writer):
            if self.calls == 0:
                self.calls += 1
                reader.read_chunk()
                return
            super().do_put(context, descriptor, reader, writer)

    with Leaving() as server, connect(server.uri, transfer=FAST) as client:
        assert client.put(texts(500), "d").complete
        assert stored(server, 500)


def test_retries_are_bounded():
    class Down(Behaving):
        def before(self, fields):
            raise to_flight_error(errors.DrainingError("shutting down"))

    with Down() as server, connect(server.uri, transfer=FAST) as client:
        with pytest.raises(errors.DrainingError):
            client.put(texts(10), "d")
        assert server.calls == 1 + FAST.max_retries


def test_a_dataset_that_cannot_be_used_is_tried_again_a_few_times_only():
    class Locked(Behaving):
        def before(self, fields):
            raise to_flight_error(errors.StoreUnavailableError("locked", field="dataset"))

    limits = replace(FAST, max_retries=1000)
    with Locked() as server, connect(server.uri, transfer=limits) as client:
        with pytest.raises(errors.StoreUnavailableError):
            client.put(texts(10), "d")
        assert server.calls == 6


def test_a_call_that_made_no_progress_for_long_is_not_retried():
    class Down(Behaving):
        def before(self, fields):
            raise to_flight_error(errors.DrainingError("shutting down"))

    limits = replace(FAST, stall_timeout_s=0.5, max_retries=1 << 20)
    with Down() as server, connect(server.uri, transfer=limits) as client:
        with pytest.raises(errors.DrainingError):
            client.put(texts(10), "d")
        assert server.calls > 1


def test_rows_that_cannot_be_known_are_not_sent_again():
    class Down(Behaving):
        def before(self, fields):
            raise to_flight_error(errors.DrainingError("shutting down"))

    with Down() as server, connect(server.uri, transfer=FAST) as client:
        with pytest.raises(errors.DrainingError):
            client.put(texts(10), EmbedCommand(dataset="d", durability="memory"))
        assert server.calls == 1


def test_before_any_row_is_sent_every_upload_is_tried_again():
    # Where the rows began beyond 0 this was taken for rows on their way.
    class Starting(Behaving):
        asked = 0

        def status(self, body):
            self.asked += 1
            if self.asked == 1:
                raise to_flight_error(errors.DrainingError("starting"))
            return super().status(body)

    options = EmbedCommand(dataset="d", upload_id="u", durability="memory")
    with Starting() as server, connect(server.uri, transfer=FAST) as client:
        client.put(texts(10).slice(6), options, row_offset=6, resume=True)
        assert sorted(server.rows) == [6, 7, 8, 9]
        assert server.asked == 2


def test_a_server_that_does_not_say_in_time_what_it_has_is_asked_again():
    # Its store hung; the client gave up, where it tries again whatever else passes.
    class Hanging(Behaving):
        asked = 0

        def status(self, body):
            self.asked += 1
            if self.asked == 1:
                assert gone.wait(30)
            return super().status(body)

    gone = threading.Event()
    with (
        Hanging() as server,
        connect(server.uri, transfer=FAST, timeout_s=1) as client,
    ):
        try:
            client.put(texts(10), EmbedCommand(dataset="d", upload_id="u"), resume=True)
        finally:
            gone.set()
        assert stored(server, 10)
        assert server.asked == 2


def test_an_upload_that_fails_while_its_client_waits_is_resumed():
    # The server sent its summary and read on; the client had no room to send and waited for ever.
    class Failing(Behaving):
        def do_put(self, context, descriptor, reader, writer):
            if self.calls:
                super().do_put(context, descriptor, reader, writer)
                return
            self.calls += 1
            reader.read_chunk()
            self.finish(writer, "u")
            for _ in reader:
                pass
            raise to_flight_error(errors.StoreUnavailableError("gone", retry_after_ms=1))

    transfer = replace(FAST, stall_timeout_s=5)
    with Failing() as server, connect(server.uri, transfer=transfer) as client:
        assert client.put(texts(500), "d").complete
        assert stored(server, 500)
        assert server.calls == 2


def test_a_server_that_forgot_acknowledged_rows_is_noticed():
    class Forgetful(Behaving):
        def after(self, fields):
            if fields["batch_id"] == 5:
                self.rows.clear()
                raise to_flight_error(errors.StoreUnavailableError("gone"))

    said = pytest.raises(errors.UploadConflictError, match="send the whole upload again")
    with Forgetful() as server, connect(server.uri, transfer=FAST) as client, said:
        client.put(texts(500), "d")


def test_a_refusal_arrives_as_it_was_meant():
    class Refusing(Behaving):
        def do_put(self, context, descriptor, reader, writer):
            self.calls += 1
            with handler_errors(context):
                raise errors.UnknownModelError("`model` is x", field="model")

    with Refusing() as server, connect(server.uri) as client:
        for size in (10, 200_000):
            with pytest.raises(errors.UnknownModelError) as caught:
                client.put(texts(size), "d")
            assert caught.value.field == "model"
        assert server.calls == 2


@pytest.mark.parametrize("reply", [b"nonsense", b"[]", b'{"type": "ack"}', b'{"type": "summary"}'])
def test_a_reply_that_is_none_is_an_error(reply):
    class Babbling(Behaving):
        def reply(self, writer, message):
            writer.write(pa.py_buffer(reply))

    said = pytest.raises(errors.InternalError, match="expected an acknowledgement")
    with Babbling() as server, connect(server.uri) as client, said:
        client.put(texts(3), "d")


def test_replies_of_other_kinds_are_passed_over():
    assert parse_reply(b'{"status": "slow_down"}') is None


def test_what_the_source_raises_comes_out_and_the_upload_stays_incomplete():
    def source():
        yield from texts(30).to_batches(max_chunksize=10)
        raise RuntimeError("the source broke")

    with Behaving() as server, connect(server.uri, transfer=FAST) as client:
        with pytest.raises(RuntimeError, match="the source broke"):
            client.put(source(), "d")
        assert server.announced is None


def test_what_on_ack_raises_comes_out():
    def on_ack(one):
        raise RuntimeError("enough")

    with Behaving() as server, connect(server.uri, transfer=FAST) as client:
        with pytest.raises(RuntimeError, match="enough"):
            client.put(texts(500), "d", on_ack=on_ack)
        assert server.announced is None


class Broken:
    """A call whose writes fail while its answers are still being waited for."""

    def __init__(self):
        self.reading = threading.Event()
        self.read_on = threading.Event()
        self.closed_while_reading = None
        self.closed = threading.Event()

    def do_put(self, *_):
        return self, self

    def write_with_metadata(self, *_):
        assert self.reading.wait(30)
        raise pa.ArrowInvalid("broken")

    def done_writing(self):
        pass

    def read(self):
        self.reading.set()
        assert self.read_on.wait(30)
        self.reading.clear()

    def close(self):
        self.closed_while_reading = self.reading.is_set()
        self.closed.set()


def test_a_call_is_not_closed_under_the_thread_that_reads(monkeypatch):
    # pyarrow crashed the process.
    broken = Broken()
    with Behaving() as server, connect(server.uri, transfer=FAST) as client:
        limit(client, abandon_s=0.05)
        monkeypatch.setattr(client._connection, "flight", broken)
        with pytest.raises(errors.FletcherError, match="broken"):
            client.put(texts(3), "d")
        assert not broken.closed.is_set()
        broken.read_on.set()
        assert broken.closed.wait(30)
        assert broken.closed_while_reading is False
        monkeypatch.undo()


SERVER = """
import sys
from tests.unit.client.client_servers import Behaving
class Stopping(Behaving):
    def after(self, fields):
        if fields["batch_id"] == 5:
            print("five", flush=True)
            sys.stdin.read()
server = Stopping()
print(server.port, flush=True)
server.serve()
"""


def test_a_server_that_is_killed_is_an_unavailable_one():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    with process:
        uri = f"grpc://127.0.0.1:{process.stdout.readline().strip()}"
        caught = []

        def run():
            with connect(uri, transfer=FAST) as client:
                try:
                    client.put(texts(5000), "d")
                except errors.FletcherError as error:
                    caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert process.stdout.readline() == "five\n"
        process.send_signal(signal.SIGKILL)
        thread.join(60)
    assert [type(error) for error in caught] == [errors.UnavailableError]
    assert uri in caught[0].message


def test_slices_are_measured_by_their_rows():
    big = pa.record_batch({"text": ["x" * 100] * 999 + ["y" * 50_000]})
    pieces = list(cut_batch(big, 10_000))
    assert pa.Table.from_batches(pieces).combine_chunks().to_batches()[0] == big
    assert max(batch_bytes(piece) for piece in pieces[:-1]) <= 10_000
    assert pieces[-1].num_rows == 1
    dictionary = pa.record_batch({"text": pa.array(["x" * 100_000, "y"] * 50).dictionary_encode()})
    assert [piece.num_rows for piece in cut_batch(dictionary, 10_000)] == [100]


def test_the_public_names():
    assert fletcher.__all__ == [
        "Ack",
        "BatchTooLargeError",
        "CancelledError",
        "Chunk",
        "Client",
        "ColumnTypeError",
        "DeadlineExceededError",
        "DimensionMismatchError",
        "DocumentStream",
        "DrainingError",
        "EmbedCommand",
        "Exchange",
        "FletcherError",
        "InternalError",
        "InvalidCommandError",
        "InvalidUtf8Error",
        "JournalFullError",
        "ModelMismatchError",
        "NotFiniteError",
        "OverloadedError",
        "PutSummary",
        "RequestError",
        "RowError",
        "RowTooLargeError",
        "StoreUnavailableError",
        "TextSource",
        "TlsOptions",
        "TransferOptions",
        "UnauthenticatedError",
        "UnauthorizedError",
        "UnavailableError",
        "UnknownColumnError",
        "UnknownDatasetError",
        "UnknownFieldError",
        "UnknownModelError",
        "UploadConflictError",
        "__version__",
        "connect",
        "dequantize",
        "open_source",
        "rescore",
    ]
    for name in fletcher.__all__:
        assert getattr(fletcher, name) is not None
    assert set(fletcher.__all__) <= set(dir(fletcher))
    with pytest.raises(AttributeError, match="nothing"):
        _ = fletcher.nothing
    missing = {kind.__name__ for kind in errors.BY_CODE.values()} - set(fletcher.__all__)
    assert missing == set()
