"""Documents that come in pieces, over real sockets and processes."""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher.errors import InvalidCommandError
from fletcher.runtime import Runtime
from fletcher.v1.embed_pb2 import EmbedCommand
from tests.integration.conftest import SMALL_PARTS, StartServer
from tests.integration.flight_calls import TIMEOUT, command, error_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "stream.py"
SERVER_OPTIONS = SMALL_PARTS
SCHEMA = pa.schema([("id", pa.utf8()), ("text", pa.utf8())])
HOW = {"chunking": "sentences:24:none", "include_text": True, "dtype": "float32"}
TEXT = "The use of it, e.g. 22 of them. It is so! Programs hold on. 世界。Grüße to Mr. Hold. " * 9


def batch(*rows: tuple[str | None, str | None]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [(), ()]
    return pa.record_batch([pa.array(one, pa.utf8()) for one in columns], SCHEMA)


def cut(text: str, seed: int, num_pieces: int) -> list[str]:
    random = Random(seed)
    ends = sorted(random.randrange(len(text) + 1) for _ in range(num_pieces - 1))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


class Call:
    """A continuous exchange in plain pyarrow, in turns."""

    def __init__(self, server: Runtime, descriptor: flight.FlightDescriptor | None = None) -> None:
        self.client = flight.connect(server.address)
        self.writer, self.reader = self.client.do_exchange(
            descriptor or command(**HOW, continuous=True), TIMEOUT
        )
        self.writer.begin(SCHEMA)

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        chunk = self.reader.read_chunk()
        return json.loads(chunk.app_metadata.to_pybytes()), chunk.data.drop_columns(
            ["timestamp"]
        ).to_pylist()

    def send(
        self, *rows: tuple[str | None, str | None], ends: bool = False
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Sends a batch and waits for all its answers: their metadata and rows."""
        if ends:
            self.writer.write_with_metadata(batch(*rows), b'{"document_end": true}')
        else:
            self.writer.write_batch(batch(*rows))
        said: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        while not said or not said[-1]["last"]:
            metadata, some = self.read()
            said.append(metadata)
            found += some
        return said, found

    def end(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        self.writer.done_writing()
        found = []
        with suppress(StopIteration):
            while True:
                found.append(self.read())
        self.writer.close()
        return found


@contextmanager
def calling(server: Runtime, descriptor: flight.FlightDescriptor | None = None) -> Iterator[Call]:
    call = Call(server, descriptor)
    try:
        yield call
    finally:
        call.reader.cancel()
        with suppress(flight.FlightError, pa.ArrowException, OSError):
            call.writer.close()
        call.client.close()


def whole_rows(
    client: fletcher.Client, texts: dict[str, str], how: dict[str, Any] = HOW
) -> list[dict[str, Any]]:
    """The ordinary chunk rows of whole texts."""
    options = fletcher.EmbedCommand(**how)
    with client.exchange([batch(*texts.items())], options) as exchange:
        table = pa.Table.from_batches(list(exchange), exchange.schema)
    return list(table.drop_columns(["timestamp"]).to_pylist())


@pytest.mark.parametrize("chunking", [HOW["chunking"], "each-sentence:none:late"])
def test_chunks_are_those_of_whole_texts(
    server: Runtime, client: fletcher.Client, chunking: str
) -> None:
    how = HOW | {"chunking": chunking}
    texts = {"a": TEXT, "b": "", "c": TEXT[::-1], "d": "of " * 3000}
    sent = [(name, one) for name, text in texts.items() for one in cut(text, 5, 40)]
    with calling(server, command(**how, continuous=True)) as call:
        found = []
        for first in range(0, len(sent), 3):
            found += call.send(*sent[first : first + 3])[1]
        ((metadata, rows),) = call.end()
    assert 0 <= metadata.pop("row_first") < len(sent)
    assert metadata == {"batch_id": None, "last": True, "errors": []}
    assert [*found, *rows] == whole_rows(client, texts, how)


def test_a_chunk_comes_before_the_next_piece_is_sent(server: Runtime) -> None:
    binary = EmbedCommand(**HOW, continuous=True).SerializeToString()
    with calling(server, flight.FlightDescriptor.for_command(binary)) as call:
        said, found = call.send(("a", "It is so! Programs"))
        assert (said, found) == ([{"batch_id": 0, "row_first": 0, "last": True, "errors": []}], [])
        said, found = call.send(("a", " hold on. " + "of them " * 20))
        assert {one["batch_id"] for one in said} == {1}
        assert [one["last"] for one in said] == [False] * (len(said) - 1) + [True]
        assert "It is so! Programs hold on. ".startswith(found[0]["text"])
        assert found[0]["vector"] is not None
        said, found = call.send(ends=True)
        assert [one["last"] for one in said] == [True]
        assert found[-1]["text"].endswith("of them ")
        assert call.send(("a", "of"), ("b", "it"))[1][0]["chunk_index"] == 0
        ((said_last, (last,)),) = call.end()
        assert (last["id"], last["text"], said_last["batch_id"]) == ("b", "it", None)


def test_a_document_that_fails_leaves_the_others(server: Runtime) -> None:
    with calling(server) as call:
        said, found = call.send(("a", "of them"), ("a", None), ("a", "it"), ("b", "is"), ends=True)
        assert [(row["id"], row["text"]) for row in found] == [("a", None), ("b", "is")]
        (error,) = [error for one in said for error in one["errors"]]
        assert (error["row"], error["id"], error["code"]) == (0, "a", "invalid_command")
        said, found = call.send(("a", "it"), ends=True)
        assert found[0]["text"] == "it"
        assert call.end() == []


def test_a_failed_document_ends_the_call_where_that_is_asked(server: Runtime) -> None:
    asked = command(**HOW, continuous=True, on_error="abort")
    with calling(server, asked) as call:
        call.send(("a", "of them"))
        call.writer.write_batch(batch(("a", None)))
        chunk = call.reader.read_chunk()
        assert json.loads(chunk.app_metadata.to_pybytes())["code"] == "invalid_command"


@pytest.mark.parametrize(
    ("fields", "metadata", "said"),
    [
        ({"chunking": "tokens:8"}, b"", "end `chunking` with :none"),
        ({"chunking": None}, b"", "`chunking` is none, expected one"),
        ({"continuous": False}, b'{"document_end": true}', "every row is a document;"),
        ({}, b'{"document_end": 1}', "expected true or false"),
        ({"continuous": "yes"}, b"", "expected true or false"),
    ],
)
def test_what_makes_no_sense_is_refused(
    server: Runtime, fields: dict[str, Any], metadata: bytes, said: str
) -> None:
    asked = {**HOW, "continuous": True, **fields}
    asked = {name: value for name, value in asked.items() if value is not None}
    with (
        pytest.raises(flight.FlightError) as caught,  # of whichever step comes to hear of it
        calling(server, command(**asked)) as call,
    ):
        call.writer.write_with_metadata(batch(("a", "of")), metadata)
        call.writer.done_writing()
        while True:
            call.reader.read_chunk()
    assert said in error_of(caught.value)["message"]


def test_the_end_of_a_document_stands_on_a_batch(server: Runtime) -> None:
    with calling(server) as call:
        call.writer.write_metadata(b'{"document_end": true}')
        call.writer.done_writing()
        with pytest.raises(flight.FlightError) as caught:
            call.reader.read_chunk()
            call.reader.read_chunk()
        assert "without a batch" in error_of(caught.value)["message"]
        with suppress(flight.FlightError):
            call.writer.close()


def test_it_is_for_exchanges(server: Runtime, client: fletcher.Client) -> None:
    options = fletcher.EmbedCommand(dataset="d", continuous=True, chunking="tokens:none")
    with pytest.raises(InvalidCommandError, match="use DoExchange"):
        client.put(batch(("a", "of")), options)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held_bytes(server: Runtime) -> int:
    return int(server.service.budget.statistics()["used_bytes"])


def test_a_client_that_goes_leaves_nothing(server: Runtime) -> None:
    wait_until(lambda: server.service.admission.num_streams == 0)
    with calling(server) as call:
        call.send(("a", TEXT))
        assert server.service.admission.num_streams == 1
        wait_until(lambda: held_bytes(server) == 0)  # between pieces nothing is on its way
        call.send(("a", TEXT))
    wait_until(lambda: server.service.admission.num_streams == 0)
    assert held_bytes(server) == 0


def test_no_tokenizer_knows_anything_of_a_document(
    start_server: StartServer,
) -> None:
    server = start_server()
    (model,) = server.service.models.running().values()
    tokenizers = model.embedder.tokenizers
    with fletcher.connect(server.address) as client:
        expected = whole_rows(client, {"a": TEXT})
    with calling(server) as call:
        found = []
        for number, piece in enumerate(cut(TEXT, 9, 6)):
            found += call.send(("a", piece))[1]
            if number in (1, 3):
                for one in tokenizers.process_ids():
                    os.kill(one, signal.SIGKILL)
        found += [row for _, rows in call.end() for row in rows]
    assert found == expected


def test_a_client_that_never_reads_is_stopped(server: Runtime) -> None:
    rows = 0
    stopped = threading.Event()
    with calling(server, command(chunking="tokens:8:none", continuous=True)) as call:

        def write() -> None:
            nonlocal rows
            with suppress(flight.FlightError, pa.ArrowException, OSError):
                while not stopped.is_set():
                    call.writer.write_batch(batch(("a", "of them it is " * 200)))
                    rows += 1

        thread = threading.Thread(target=write)
        thread.start()
        before = -1

        def stands() -> bool:
            nonlocal before
            before, moved = rows, rows != before
            time.sleep(0.5)
            return not moved and rows == before > 0

        wait_until(stands)
        # What it may hold, and a part that was let in as the last one.
        assert held_bytes(server) < server.service.budget.total_bytes
        stopped.set()
        call.reader.cancel()
        thread.join(30)
        assert not thread.is_alive()
    wait_until(lambda: server.service.admission.num_streams == 0)
    assert held_bytes(server) == 0


def test_the_client_gives_chunks_while_it_takes_pieces(
    server: Runtime, client: fletcher.Client
) -> None:
    pieces: queue.Queue[str | tuple[str, str] | None] = queue.Queue()
    with client.stream(iter(pieces.get, "END"), chunking="sentences:24:none") as stream:
        pieces.put("It is so! Programs hold")
        pieces.put(" on. " + "of them " * 20)
        first = next(stream)
        assert (first.id, first.index, first.start, first.error) == ("0", 0, 0, None)
        assert "It is so! Programs hold on. ".startswith(first.text or "-")
        pieces.put(None)
        rest = []
        while not rest or rest[-1].end < len("It is so! Programs hold on. " + "of them " * 20):
            rest.append(next(stream))
        pieces.put("of it")
        pieces.put(("x", "so"))
        pieces.put("END")
        assert [(one.id, one.text) for one in stream] == [("1", "of it"), ("x", "so")]
    vectors = client.embed([first.text or "", "so"])
    np.testing.assert_array_equal(first.vector, vectors[0])


def test_who_leaves_does_not_wait_for_the_next_piece(
    client: fletcher.Client, server: Runtime, capfd: pytest.CaptureFixture[str]
) -> None:
    pieces: queue.Queue[str] = queue.Queue()
    with client.stream(iter(pieces.get, "END"), chunking="tokens:8:none") as stream:
        pieces.put("of them it is " * 10)
        next(stream)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 4  # it waits 5 s for a thread that may end by itself
    wait_until(lambda: server.service.admission.num_streams == 0)
    writing = stream._exchange._call.threads[0]
    del stream
    pieces.put("and then")
    writing.join(30)
    assert not writing.is_alive()
    del writing
    gc.collect()
    assert "Close() failed" not in capfd.readouterr().err


def test_the_example_prints_the_same_chunks_of_lines_and_of_texts(server: Runtime) -> None:
    text = (TEXT + "\n") * 3 + "\n" + "One more\nof them.\n"
    found = []
    for flags in ([], ["--whole"]):
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), *flags, server.address],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        found.append(done.stdout)
    assert found[0] == found[1]
    assert found[0].startswith("0 0 0 ")
    assert "\n1 0 0 " in found[0]


def test_batches_of_an_exchange_have_rows(client: fletcher.Client) -> None:
    pieces = [batch(("a", piece)) for piece in ("of", " them", " it", "")]
    options = fletcher.EmbedCommand(**HOW, continuous=True)
    with client.exchange(pieces, options) as exchange:
        assert [one.column("text").to_pylist() for one in exchange] == [["of them it"]]


def test_the_client_waits_for_pieces_and_not_for_answers_that_are_owed(server: Runtime) -> None:
    patient = fletcher.TransferOptions(stall_timeout_s=0.5)
    pieces: queue.Queue[str | None] = queue.Queue()
    with (
        fletcher.connect(server.address, transfer=patient) as client,
        client.stream(iter(pieces.get, "END"), chunking="tokens:8:none") as stream,
    ):
        pieces.put("of them it")
        timer = threading.Timer(1.5, lambda: [pieces.put(one) for one in (" is", "END")])
        timer.start()
        assert "".join(one.text or "" for one in stream) == "of them it is"
        timer.join()


def test_the_client_takes_large_pieces_and_tells_of_failed_documents(server: Runtime) -> None:
    text = "of them it is " * 20_000
    transfer = fletcher.TransferOptions(message_bytes=100_000)
    with fletcher.connect(server.address, transfer=transfer) as client:
        options = {"chunking": "tokens:32:none", "dtype": "int8"}
        with client.stream([("a", text), ("b", "so")], **options) as stream:
            found = list(stream)
        assert "".join(one.text or "" for one in found) == text + "so"
        assert found[0].vector.dtype == np.int8
        assert found[0].scale is not None
        wrong: list[Any] = [7, ("a", None), ("a", b"of")]
        for piece in wrong:
            with (
                client.stream(["of", piece], chunking="tokens:8:none") as stream,
                pytest.raises(InvalidCommandError, match="expected Unicode text"),
            ):
                list(stream)
