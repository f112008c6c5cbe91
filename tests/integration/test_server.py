"""DoPut, DoExchange and the actions over real sockets, with what clients really send."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fletcher.errors import ConfigError, StoreUnavailableError
from fletcher.runtime import Runtime
from fletcher.stores.lance.writer import LanceWriter
from tests.integration.conftest import StartServer
from tests.integration.flight_calls import TIMEOUT, action, command, error_of, exchange, put

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})
WORDS = "debian packages hold programs that people use every day and night".split()
names = (f"dataset-{n}" for n in itertools.count())


def rows(first: int, last: int) -> pa.RecordBatch:
    texts = [" ".join(WORDS[n % 7 : n % 7 + n % 5]) + f" {n}" for n in range(first, last)]
    return pa.record_batch({"id": pa.array(range(first, last), pa.int64()), "text": texts}, SCHEMA)


def stored(server: Runtime, dataset: str) -> pa.Table:
    reader = server.service.delivery.stores["default"].scan(dataset)
    return reader.read_all().sort_by("id")


@pytest.fixture
def client(server: Runtime) -> Iterator[flight.FlightClient]:
    with flight.connect(server.address) as client:
        yield client


def test_every_row_reaches_the_store_with_its_own_text(
    server: Runtime, client: flight.FlightClient
) -> None:
    name = next(names)
    batches = [rows(first, min(first + 700, 5000)) for first in range(0, 5000, 700)]
    answers = put(client, batches, SCHEMA, end=5000, dataset=name, upload_id="u")
    *acks, summary = answers
    assert summary["type"] == "summary"
    assert summary["complete"] is True
    assert summary["rows_received"] == summary["rows_stored"] == summary["rows_durable"] == 5000
    assert all(ack["type"] == "ack" for ack in acks)
    assert [ack["row_first"] for ack in acks] == [0, *(ack["row_last"] + 1 for ack in acks[:-1])]
    assert acks[-1]["row_last"] == 4999
    durable = [ack["rows_durable"] for ack in acks]
    assert durable == sorted(durable)
    assert all(ack["rows_durable"] > ack["row_last"] for ack in acks)

    table = stored(server, name)
    assert table.column("id").to_pylist() == list(range(5000))
    assert table.column("text").to_pylist() == [
        text for batch in batches for text in batch.column("text").to_pylist()
    ]
    # The null backend's vectors depend on the tokens alone: the same row by another way.
    ((alone, _),) = exchange(client, [rows(4321, 4322)], SCHEMA, dtype="float16")
    assert alone.column("vector")[0].as_py() == table.column("vector")[4321].as_py()


def test_sent_twice_is_stored_once(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    put(client, [rows(0, 300)], SCHEMA, dataset=name, upload_id="u")
    summary = put(client, [rows(0, 500)], SCHEMA, end=500, dataset=name, upload_id="u")[-1]
    assert summary["complete"] is True
    assert summary["rows_stored"] == 500
    assert summary["rows_deduplicated"] == 300
    assert stored(server, name).column("id").to_pylist() == list(range(500))
    status = action(client, "upload_status", {"upload_id": "u", "dataset": name})
    assert status == {"rows_durable": 500, "ranges": [[0, 499]], "complete": True}


def test_a_client_that_vanishes_can_resume(server: Runtime, client: flight.FlightClient) -> None:
    # The failed write of an acknowledgement threw away what was in the pipeline, but it stayed
    # claimed: a resumed upload passed it over, and waited for it for ever.
    name = next(names)
    for timeout_s in (0.3, 0.6, 0.9):
        options = flight.FlightCallOptions(timeout=timeout_s)
        # No thread that reads: pyarrow may crash where a call is closed under one.
        descriptor = command(dataset=name, upload_id="u")
        writer, _ = client.do_put(descriptor, SCHEMA, options)
        with pytest.raises((flight.FlightError, pa.ArrowException, OSError)), writer:
            for first in itertools.count(0, 500):
                writer.write_batch(rows(first, first + 500))
    durable = action(client, "upload_status", {"upload_id": "u", "dataset": name})["rows_durable"]
    batches = [rows(first, first + 500) for first in range(0, durable + 20_000, 500)]
    end = sum(batch.num_rows for batch in batches)
    limit = flight.FlightCallOptions(timeout=30)
    *_, summary = put(client, batches, SCHEMA, end=end, options=limit, dataset=name, upload_id="u")
    status = action(client, "upload_status", {"upload_id": "u", "dataset": name})
    assert status["rows_durable"] >= end
    assert summary["errors"] == []
    table = stored(server, name)
    assert table.column("id").to_pylist() == list(range(table.num_rows))


def test_without_an_end_marker_an_upload_is_not_complete(client: flight.FlightClient) -> None:
    for end in (None, 99, 101):
        summary = put(client, [rows(0, 100)], SCHEMA, end=end, dataset=next(names))[-1]
        assert summary["complete"] is False
        assert summary["rows_durable"] == 100


def test_exchange_keeps_order_and_batches(client: flight.FlightClient) -> None:
    batches = [rows(0, 1), rows(1, 1), rows(1, 3000), rows(3000, 3007), rows(3007, 3007)]
    answers = exchange(client, batches, SCHEMA, dtype="float32")
    assert [batch.num_rows for batch, _ in answers] == [1, 0, 2999, 7, 0]
    assert [metadata["batch_id"] for _, metadata in answers] == [0, 1, 2, 3, 4]
    ids = [row for batch, _ in answers for row in batch.column("id").to_pylist()]
    assert ids == list(range(3007))
    for batch, _ in answers:
        assert batch.schema.field("vector").type == pa.list_(pa.field("item", pa.float32()), 32)
        values = batch.column("vector").flatten().to_numpy().reshape(-1, 32)
        assert np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
        assert "text" not in batch.schema.names


def test_rows_fail_alone_and_are_named(server: Runtime, client: flight.FlightClient) -> None:
    batch = pa.record_batch({"id": ["a", "b", None, "d"], "text": ["one", None, "three", "four"]})
    ((answer, metadata),) = exchange(client, [batch], batch.schema)
    assert [vector is None for vector in answer.column("vector").to_pylist()] == [
        False,
        True,
        True,
        False,
    ]
    assert [(error["row"], error["id"]) for error in metadata["errors"]] == [(1, "b"), (2, None)]

    name = next(names)
    summary = put(client, [batch], batch.schema, end=4, dataset=name)[-1]
    assert summary["rows_failed"] == 2
    assert summary["complete"] is True
    assert [error["row"] for error in summary["errors"]] == [1, 2]
    assert stored(server, name).num_rows == summary["rows_stored"] == 4

    with pytest.raises(flight.FlightInternalError) as caught:
        exchange(client, [batch], batch.schema, on_error="abort")
    assert error_of(caught.value)["field"] == "text"


@pytest.mark.parametrize(
    ("fields", "field"), [({"on_error": "abort"}, "text"), ({"dims": 7}, "dims")]
)
def test_an_exchange_that_fails_says_so_to_a_client_that_waits(
    client: flight.FlightClient, fields: dict[str, Any], field: str
) -> None:
    # It said so when the client sent again: one that waited for its vectors never heard. And
    # pyarrow aborts the process of a client that writes while its other thread reads the end.
    batch = pa.record_batch({"text": pa.array([None], pa.utf8())})
    options = flight.FlightCallOptions(timeout=20)
    writer, reader = client.do_exchange(command(**fields), options)
    writer.begin(batch.schema)
    writer.write_batch(batch)
    told = reader.read_chunk()
    assert told.data.num_rows == 0  # clients of other languages read no message without a batch
    told_error = json.loads(told.app_metadata.to_pybytes())
    assert told_error["field"] == field
    writer.done_writing()
    with pytest.raises(flight.FlightInternalError) as caught:
        reader.read_chunk()
    assert error_of(caught.value) == told_error
    with pytest.raises(flight.FlightInternalError):
        writer.close()


def test_an_exchanges_error_list_is_bounded_a_batch(client: flight.FlightClient) -> None:
    # It was bounded a piece: a batch of many pieces came with as many times the errors.
    schema = pa.schema({"text": pa.utf8()})
    batches = [pa.record_batch([pa.nulls(n, pa.utf8())], schema) for n in (3000, 5)]
    first, second = exchange(client, batches, schema)
    assert [one["row"] for one in first[1]["errors"]] == list(range(1000))
    assert [one["row"] for one in second[1]["errors"]] == list(range(3000, 3005))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_batches(server: Runtime, client: flight.FlightClient, codec: str) -> None:
    name = next(names)
    options = flight.FlightCallOptions(
        timeout=60, write_options=pa.ipc.IpcWriteOptions(compression=codec)
    )
    put(client, [rows(0, 1000)], SCHEMA, dataset=name, options=options)
    assert stored(server, name).num_rows == 1000


def test_a_batch_of_200_000_rows(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    texts = pa.array([f"text {n % 1000}" for n in range(200_000)])
    batch = pa.record_batch({"text": texts})
    summary = put(client, [batch], batch.schema, end=200_000, dataset=name)[-1]
    assert summary["complete"] is True
    assert stored(server, name).num_rows == 200_000


@pytest.mark.parametrize("batches", [[], [rows(0, 0)]])
def test_streams_without_rows(
    server: Runtime, client: flight.FlightClient, batches: list[pa.RecordBatch]
) -> None:
    name = next(names)
    summary = put(client, batches, SCHEMA, end=0, dataset=name)[-1]
    assert summary["complete"] is True
    assert summary["rows_received"] == 0
    assert len(exchange(client, batches, SCHEMA)) == len(batches)


def test_a_path_embeds_with_defaults(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    writer, _ = client.do_put(flight.FlightDescriptor.for_path(name), SCHEMA, TIMEOUT)
    with writer:
        writer.write_batch(rows(0, 10))
    table = stored(server, name)
    assert table.schema.field("vector").type.value_type == pa.float16()
    name_of_model = server.service.models.default.bundle.qualified_name
    assert table.schema.metadata[b"fletcher.model"].decode() == f"null-{name_of_model}"
    info = client.get_flight_info(flight.FlightDescriptor.for_path(name))
    assert info.total_records == 10
    assert name in [flight.descriptor.path[0].decode() for flight in client.list_flights()]
    assert client.get_schema(command(dataset=name)).schema.field("vector").type == (
        table.schema.field("vector").type
    )


def test_normalize_false_gives_longer_vectors_than_one(client: flight.FlightClient) -> None:
    ((plain, _),) = exchange(client, [rows(0, 5)], SCHEMA, dtype="float32", normalize=False)
    ((unit, _),) = exchange(client, [rows(0, 5)], SCHEMA, dtype="float32")
    assert plain.schema.metadata[b"fletcher.normalized"] == b"false"
    assert unit.schema.metadata[b"fletcher.normalized"] == b"true"


def test_actions(server: Runtime, client: flight.FlightClient) -> None:
    assert action(client, "health") == {"status": "ok"}
    assert action(client, "ready")["ready"] is True
    (model,) = action(client, "list_models")["models"]
    assert model["dim"] == 32
    answer = action(client, "embed", {"texts": ["one", "two"], "dtype": "float32"})
    assert np.array(answer["embeddings"]).shape == (2, 32)
    stats = action(client, "stats")
    assert stats["fletcher.texts.received"] >= 2
    assert stats["engine"]["chosen_by"] == "rule"
    assert all(one["state"] == "healthy" for one in stats["replicas"] + stats["tokenizers"])
    assert {one.type for one in client.list_actions()} >= {"health", "stats", "embed"}


def test_embed_waits_for_nobody_elses_memory(server: Runtime, client: flight.FlightClient) -> None:
    # It handed in all texts before it took the first vectors: beyond its own reserve, it waited
    # for ever where streams that nobody reads have the rest.
    hog = server.service.budget.open_allowance()
    hog.acquire(server.service.budget.total_bytes)
    try:
        texts = [f"{n} " + "x y " * 900 for n in range(256)]
        answer = action(client, "embed", {"texts": texts})
    finally:
        hog.close()
    assert len(answer["embeddings"]) == 256
    assert server.service.budget.statistics()["used_bytes"] == 0


BAD_UTF8 = pa.StringArray.from_buffers(
    2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")
)
WILD = pa.StringArray.from_buffers(
    2, pa.py_buffer(np.array([0, 1 << 30, 3], np.int32)), pa.py_buffer(b"abc")
)


@pytest.mark.parametrize(
    ("batch", "fields", "code", "field"),
    [
        (pa.record_batch({"body": ["x"]}), {}, "unknown_column", "text_column"),
        (pa.record_batch({"text": [1]}), {}, "column_type", "text_column"),
        (pa.record_batch({"text": ["x"]}), {"model": "gpt"}, "unknown_model", "model"),
        (pa.record_batch({"text": ["x"]}), {"dtype": "int3"}, "invalid_command", "dtype"),
        (pa.record_batch({"text": ["x"]}), {"datset": "x"}, "unknown_field", "datset"),
        (pa.record_batch({"text": ["x"]}), {"dims": 7}, "dimension_mismatch", "dims"),
        (pa.record_batch({"text": ["x"]}), {"layers": 1}, "invalid_command", "layers"),
        (pa.record_batch({"text": ["x"]}), {"columns": ["no"]}, "unknown_column", "columns"),
        (pa.record_batch({"text": BAD_UTF8}), {}, "invalid_utf8", "text"),
        (pa.record_batch({"text": WILD}), {}, "column_type", "text"),
        (pa.record_batch({"text": ["x" * (70 << 20)]}), {}, "batch_too_large", None),
    ],
)
def test_bad_requests_are_answered_with_their_reason(
    client: flight.FlightClient,
    batch: pa.RecordBatch,
    fields: dict[str, object],
    code: str,
    field: str | None,
) -> None:
    for call in (put, exchange):
        target = {"dataset": next(names)} if call is put else {}
        with pytest.raises(flight.FlightError) as caught:
            call(client, [batch], batch.schema, **{**target, **fields})
        error = error_of(caught.value)
        assert error["code"] == code
        assert error.get("field") == field
        assert "Traceback" not in str(caught.value)
        assert ".py" not in str(caught.value)
    put(client, [rows(0, 3)], SCHEMA, dataset=next(names))  # nobody else is harmed


@pytest.mark.parametrize("descriptor", [b"{", b'{"dataset": "a", "dataset": "b"}', b"\xff\x00"])
def test_commands_that_are_none(client: flight.FlightClient, descriptor: bytes) -> None:
    with pytest.raises(flight.FlightInternalError) as caught:
        writer, reader = client.do_put(
            flight.FlightDescriptor.for_command(descriptor), SCHEMA, TIMEOUT
        )
        with writer:
            writer.done_writing()
            reader.read()
    assert error_of(caught.value)["code"] == "invalid_command"


@pytest.mark.parametrize("name", ["a/b", "", "../up", "x" * 129, "-dash"])
def test_dataset_names(client: flight.FlightClient, name: str) -> None:
    with pytest.raises(flight.FlightInternalError) as caught:
        put(client, [rows(0, 1)], SCHEMA, dataset=name)
    assert error_of(caught.value)["field"] == "dataset"


def test_a_row_of_50_mb_fails_alone(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    batch = pa.record_batch({"text": ["small", "x" * (50 << 20), "also small"]})
    summary = put(client, [batch], batch.schema, end=3, dataset=name)[-1]
    assert [(error["row"], error["code"]) for error in summary["errors"]] == [(1, "row_too_large")]
    vectors = stored(server, name).column("vector").to_pylist()
    assert sum(vector is None for vector in vectors) == 1


def test_a_zstd_batch_that_decodes_to_1_5_gb_is_refused(client: flight.FlightClient) -> None:
    data = pa.allocate_buffer(1_500_000_000)
    np.frombuffer(data, np.uint8)[:] = 32
    offsets = pa.py_buffer(np.array([0, 1_500_000_000], np.int32))
    batch = pa.record_batch({"text": pa.StringArray.from_buffers(1, offsets, data)})
    options = flight.FlightCallOptions(
        timeout=60, write_options=pa.ipc.IpcWriteOptions(compression="zstd")
    )
    with pytest.raises(flight.FlightError) as caught:
        put(client, [batch], batch.schema, dataset=next(names), options=options)
    assert error_of(caught.value)["code"] == "batch_too_large"
    put(client, [rows(0, 3)], SCHEMA, dataset=next(names))


def refused_metadata(client: flight.FlightClient, raw: bytes) -> dict[str, Any]:
    """The error of a DoPut whose batch comes with this."""
    writer, reader = client.do_put(command(dataset=next(names)), SCHEMA, TIMEOUT)
    with pytest.raises(flight.FlightInternalError) as caught, writer:
        writer.write_with_metadata(rows(0, 1), raw)
        writer.done_writing()
        while reader.read() is not None:
            pass
    return error_of(caught.value)


def test_bad_app_metadata(client: flight.FlightClient) -> None:
    for raw in (b"nonsense", b"[1]", b'{"row_offset": -1}', b'{"end": true}', b'{"what": 1}'):
        assert refused_metadata(client, raw)["code"] == "invalid_command"


@pytest.mark.parametrize(
    ("raw", "said"), [(b'{"\\ud800": 1}', "ud800"), (b" " * 70_000 + b"{}", "70002 bytes")]
)
def test_app_metadata_that_is_hard_to_say_no_to(
    client: flight.FlightClient, raw: bytes, said: str
) -> None:
    # Half a surrogate pair could not be repeated in UTF-8: the error came without `extra_info`.
    error = refused_metadata(client, raw)
    assert error["field"] == "app_metadata"
    assert said in error["message"]


def test_refusals_of_calls_that_pyarrow_answers_its_own_way(client: flight.FlightClient) -> None:
    # pyarrow sends tracebacks: for a call that is not there, and for any error of GetSchema.
    with pytest.raises(flight.FlightInternalError) as caught:
        client.do_get(flight.Ticket(b"x"), TIMEOUT).read_all()
    assert error_of(caught.value)["code"] == "invalid_command"
    for descriptor, kind, said in (
        (command(dims=7), pa.ArrowInvalid, "`dims`"),
        (command(dataset="none"), pa.ArrowKeyError, "'none'"),
    ):
        with pytest.raises(kind, match=said) as refused:
            client.get_schema(descriptor, TIMEOUT)
        for leak in ("Traceback", "File", ".py"):
            assert leak not in str(caught.value)
            assert leak not in str(refused.value)


def test_an_error_names_an_id_as_far_as_it_is_needed(client: flight.FlightClient) -> None:
    # 100 of them were kept for each of 1,000 uploads, whatever their size.
    batch = pa.record_batch({"id": ["\u00fc" * 100_000, "b"], "text": pa.array([None, "x"])})
    summary = put(client, [batch], batch.schema, end=2, dataset=next(names))[-1]
    ((_, metadata),) = exchange(client, [batch], batch.schema)
    for errors in (summary["errors"], metadata["errors"]):
        assert [(one["row"], one["id"]) for one in errors] == [(0, "\u00fc" * 1024)]


def test_texts_that_come_back_count_in_the_answer(
    client: flight.FlightClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 300 codes of one long text are a small batch, and were written out without a bound.
    monkeypatch.setattr("fletcher.flight.answers._MAX_WHOLE_BYTES", 1 << 20)
    codes = pa.array([0] * 300, pa.int32())
    texts = pa.DictionaryArray.from_arrays(codes, pa.array(["x" * 10_000]))
    batch = pa.record_batch({"text": texts})
    assert len(exchange(client, [batch], batch.schema)) == 1
    answers = exchange(client, [batch], batch.schema, include_text=True, answer_bytes=500_000)
    assert len(answers) > 5
    assert sum(answer.num_rows for answer, _ in answers) == 300
    with pytest.raises(flight.FlightInternalError) as caught:
        exchange(client, [batch], batch.schema, include_text=True, answer_bytes=0)
    assert error_of(caught.value)["code"] == "batch_too_large"


def test_another_model_or_width_cannot_be_mixed_into_a_dataset(
    client: flight.FlightClient,
) -> None:
    name = next(names)
    put(client, [rows(0, 3)], SCHEMA, dataset=name, dtype="float16")
    for fields in ({"dtype": "float32"}, {"normalize": False}, {"text_column": "id"}):
        with pytest.raises(flight.FlightInternalError):
            put(client, [rows(0, 3)], SCHEMA, dataset=name, **fields)
    put(client, [rows(3, 6)], SCHEMA, dataset=name)


def test_overwrite_and_upsert(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    put(client, [rows(0, 100)], SCHEMA, dataset=name)
    put(client, [rows(50, 120)], SCHEMA, dataset=name, mode="upsert")
    assert stored(server, name).column("id").to_pylist() == list(range(120))
    fields = {"dataset": name, "mode": "overwrite", "upload_id": "o"}
    for end in (None, 3):  # no end, and another number of rows
        summary = put(client, [rows(7, 9)], SCHEMA, end=end, **fields)[-1]
        assert summary["complete"] is False
        assert stored(server, name).column("id").to_pylist() == list(range(120))
    summary = put(client, [rows(7, 9)], SCHEMA, end=2, **fields)[-1]
    assert summary["complete"] is True
    assert stored(server, name).column("id").to_pylist() == [7, 8]
    put(client, [rows(9, 10)], SCHEMA, dataset=name)
    assert put(client, [rows(7, 9)], SCHEMA, end=2, **fields)[-1]["complete"] is True  # a repeat
    assert stored(server, name).column("id").to_pylist() == [7, 8, 9]


def test_dedupe_over_connections(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    twice = pa.concat_tables([pa.Table.from_batches([rows(0, 300)])] * 2).combine_chunks()
    batches = [*twice.to_batches(), rows(200, 500)]
    fields = {"dataset": name, "upload_id": "u", "dedupe": "id"}
    *acks, summary = put(client, batches, SCHEMA, end=900, **fields)
    assert summary["complete"] is True
    assert summary["rows_received"] == summary["rows_durable"] == 900
    assert (summary["rows_stored"], summary["rows_deduplicated"]) == (500, 400)
    assert acks[-1]["row_last"] == 899
    assert stored(server, name).column("id").to_pylist() == list(range(500))
    texts = pa.record_batch({"id": [900, 901], "text": ["new", "new"]}, SCHEMA)
    fields = {"dataset": name, "dedupe": "text"}
    summary = put(client, [rows(10, 20), texts], SCHEMA, end=12, **fields)[-1]
    assert (summary["rows_stored"], summary["rows_deduplicated"]) == (1, 11)
    assert summary["complete"] is True
    assert stored(server, name).column("vector").null_count == 0


def test_delta_embeds_what_changed(server: Runtime, client: flight.FlightClient) -> None:
    name = next(names)
    fields = {"dataset": name, "mode": "delta"}
    put(client, [rows(0, 1000)], SCHEMA, end=1000, **fields)
    tokens = server.service.telemetry.device_tokens.values()
    again = put(client, [rows(0, 1000)], SCHEMA, end=1000, **fields)[-1]
    assert (again["rows_stored"], again["rows_deduplicated"]) == (0, 1000)
    assert again["complete"] is True
    assert server.service.telemetry.device_tokens.values() == tokens
    changed = pa.record_batch({"id": [5, 7, 2000], "text": ["edited", WORDS[0], "new"]}, SCHEMA)
    batches = [rows(0, 10), changed, rows(7, 8)]
    summary = put(client, batches, SCHEMA, end=14, **fields)[-1]
    assert (summary["rows_stored"], summary["rows_deduplicated"]) == (4, 10)
    table = stored(server, name)
    assert table.column("id").to_pylist() == [*range(1000), 2000]
    assert table.column("text")[5].as_py() == "edited"
    assert table.column("text")[7] == rows(7, 8).column("text")[0]  # changed, and back
    ((alone, _),) = exchange(client, [changed], SCHEMA, dtype="float16")
    assert alone.column("vector")[0].as_py() == table.column("vector")[5].as_py()


LINKED = SCHEMA.append(pa.field("url", pa.utf8()))


def linked(ids: list[int], texts: list[str], urls: list[str]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(ids), pa.array(texts), pa.array(urls)], schema=LINKED)


def test_delta_stores_another_carried_column_with_the_same_vector(
    server: Runtime, client: flight.FlightClient
) -> None:
    name, telemetry = next(names), server.service.telemetry
    fields = {"dataset": name, "mode": "delta", "columns": ["url"], "durability": "store"}
    texts = [f"text {one}" for one in range(300)]
    first = linked(list(range(300)), texts, ["u"] * 300)
    put(client, [first], LINKED, end=300, **fields)
    before = stored(server, name)
    tokens, reused = telemetry.device_tokens.values(), sum(telemetry.rows_reused.values().values())
    # The id 3 comes twice in one batch, and 5 again in a later one: the last row counts.
    changed = linked([1, 3, 3, 299], [texts[one] for one in (1, 3, 3, 299)], ["v", "a", "b", "v"])
    later = linked([5, 1, 5], [texts[5], texts[1], texts[5]], ["a", "w", "u"])
    upload = {**fields, "upload_id": f"u-{name}"}
    put(client, [changed], LINKED, **upload)  # without an end, and resumed
    summary = put(client, [changed, later], LINKED, end=7, **upload)[-1]
    assert summary["complete"] is True
    assert telemetry.device_tokens.values() == tokens
    assert sum(telemetry.rows_reused.values().values()) - reused in (6, 7)
    table = stored(server, name)
    urls = dict.fromkeys(range(300), "u") | {1: "w", 3: "b", 299: "v"}
    assert dict(zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True)) == urls
    for column in ("id", "text", "vector", "token_count", "truncated"):
        assert table[column].equals(before[column])
    # A text that changed too is embedded, beside one that did not.
    mixed = linked([7, 8], ["other", texts[8]], ["z", "z"])
    put(client, [mixed], LINKED, end=2, **fields)
    assert telemetry.device_tokens.values() != tokens
    table = stored(server, name)
    assert table["url"].to_pylist()[6:10] == ["u", "z", "z", "u"]
    assert table["vector"][8] == before["vector"][8]
    ((alone, _),) = exchange(client, [mixed.select(["text"])], pa.schema({"text": pa.utf8()}))
    assert table["vector"][7].as_py() == pytest.approx(alone["vector"][0].as_py(), abs=2e-3)


def test_delta_embeds_again_if_the_store_cannot_be_read(
    server: Runtime, client: flight.FlightClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, telemetry = next(names), server.service.telemetry
    fields = {"dataset": name, "mode": "delta", "columns": ["url"], "durability": "store"}
    put(client, [linked([1, 2], ["a", "b"], ["u", "u"])], LINKED, end=2, **fields)
    put(client, [linked([1], ["a"], ["u"])], LINKED, end=1, **fields)  # the index is filled
    reused = telemetry.rows_reused.values()
    store = server.service.delivery.stores["default"]
    with monkeypatch.context() as patched:
        patched.setattr(store, "scan", lambda *_, **__: 1 / 0)
        summary = put(client, [linked([1, 2], ["a", "b"], ["v", "v"])], LINKED, end=2, **fields)[-1]
    assert summary["complete"] is True
    assert telemetry.rows_reused.values() == reused
    table = stored(server, name)
    assert (table["url"].to_pylist(), table["vector"].null_count) == (["v", "v"], 0)


def test_delta_keeps_the_vector_if_the_store_fails_after_it_was_read(
    server: Runtime, client: flight.FlightClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, telemetry = next(names), server.service.telemetry
    fields = {"dataset": name, "mode": "delta", "columns": ["url"], "durability": "store"}
    put(client, [linked([1, 2], ["a", "b"], ["u", "u"])], LINKED, end=2, **fields)
    before, tokens = stored(server, name), telemetry.device_tokens.values()
    append, failed = LanceWriter.append, []

    def failing(writer: LanceWriter, batches: Any) -> bool:
        if not failed:
            failed.append(writer)
            raise StoreUnavailableError("away for a moment", field="dataset")
        return append(writer, batches)

    monkeypatch.setattr(LanceWriter, "append", failing)
    summary = put(client, [linked([2, 1], ["b", "a"], ["v", "w"])], LINKED, end=2, **fields)[-1]
    assert failed
    assert summary["complete"] is True
    table = stored(server, name)
    assert table["url"].to_pylist() == ["w", "v"]
    assert table["vector"].equals(before["vector"])
    assert telemetry.device_tokens.values() == tokens


def test_delta_makes_a_vector_for_a_row_that_had_none(
    server: Runtime, client: flight.FlightClient
) -> None:
    name = next(names)
    fields = {"dataset": name, "columns": ["url"], "durability": "store"}
    long = "word " * 2000
    put(client, [linked([1], [long], ["u"])], LINKED, end=1, truncate="error", **fields)
    assert stored(server, name)["vector"].null_count == 1
    put(client, [linked([1], [long], ["v"])], LINKED, end=1, mode="delta", **fields)
    table = stored(server, name)
    assert (table["url"].to_pylist(), table["vector"].null_count) == (["v"], 0)


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({"dedupe": "text", "include_text": False}, "include_text", "stored texts"),
        ({"mode": "delta", "include_text": False}, "include_text", "stored texts"),
        ({"mode": "upsert", "dedupe": "id"}, "dedupe", "omit one"),
        ({"mode": "delta", "id_column": "nope"}, "id_column", "nope"),
    ],
)
def test_dedupe_that_cannot_be(
    client: flight.FlightClient, fields: dict[str, object], field: str, word: str
) -> None:
    with pytest.raises(flight.FlightInternalError, match=word) as caught:
        put(client, [rows(0, 1)], SCHEMA, dataset=next(names), **fields)
    assert error_of(caught.value)["field"] == field


def test_duplicates_have_no_meaning_without_a_dataset_or_ids(client: flight.FlightClient) -> None:
    for fields in ({"dedupe": "id"}, {"dedupe": "text"}, {"mode": "delta"}):
        with pytest.raises(flight.FlightInternalError, match="DoExchange") as caught:
            exchange(client, [rows(0, 1)], SCHEMA, **fields)
        assert error_of(caught.value)["field"] in fields
    schema = pa.schema({"text": pa.utf8()})
    for fields in ({"dedupe": "id"}, {"mode": "delta"}):
        with pytest.raises(flight.FlightInternalError, match="no column `id`"):
            put(client, [rows(0, 1).select(["text"])], schema, dataset=next(names), **fields)


def test_the_embedding_cache_changes_no_vector(
    start_server: StartServer, client: flight.FlightClient
) -> None:
    cached = start_server(embedding_cache=1 << 20)
    long = pa.record_batch({"id": [1, 2, 3], "text": ["word " * 500, None, "a word"]}, SCHEMA)
    batches = [rows(0, 500), rows(0, 1), long, rows(250, 750)]
    with flight.connect(cached.address) as other:
        for fields in ({"dtype": "float32"}, {"normalize": False}, {"truncate": "start"}):
            for _ in range(2):
                plain = exchange(client, batches, SCHEMA, **fields)
                for (one, errors), (two, same) in zip(
                    plain, exchange(other, batches, SCHEMA, **fields), strict=True
                ):
                    assert one.drop_columns(["timestamp"]).equals(two.drop_columns(["timestamp"]))
                    assert errors == same
        stats = action(other, "stats")
        # Of six calls the first, and the first with another truncation, found nothing at most.
        assert stats["fletcher.cache.hits"] >= 2 * stats["fletcher.cache.misses"]
        assert 0 < stats["fletcher.cache.memory"] <= 1 << 20
        tokens = stats["fletcher.tokens.received"]
        exchange(other, batches, SCHEMA)
        assert action(other, "stats")["fletcher.tokens.received"] == tokens


def test_tokens(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("# ours\nsecret-1\nsecret-2\n")
    server = start_server(token_file=tokens)
    with flight.connect(server.address) as client:
        for headers, good in (
            ([], False),
            ([(b"authorization", b"Bearer wrong")], False),
            ([(b"authorization", b"secret-1")], False),
            ([(b"authorization", b"Bearer secret-2")], True),
        ):
            options = flight.FlightCallOptions(timeout=20, headers=headers)
            calls = [
                lambda options=options: list(
                    client.do_action(flight.Action("health", b""), options)
                ),
                lambda options=options: put(
                    client, [rows(0, 2)], SCHEMA, dataset="d", options=options
                ),
                lambda options=options: exchange(client, [rows(0, 2)], SCHEMA, options=options),
            ]
            for call in calls:
                if good:
                    call()
                    continue
                with pytest.raises(flight.FlightUnauthenticatedError) as caught:
                    call()
                assert error_of(caught.value)["code"] == "unauthenticated"


def test_more_streams_than_allowed_are_refused_with_a_hint(start_server: StartServer) -> None:
    server = start_server(max_streams=2)
    with flight.connect(server.address) as client:
        held = []
        for _ in range(2):
            writer, reader = client.do_exchange(command(), TIMEOUT)
            writer.begin(SCHEMA)
            writer.write_batch(rows(0, 1))
            reader.read_chunk()
            held.append((writer, reader))
        with pytest.raises(flight.FlightUnavailableError) as caught:
            exchange(client, [rows(0, 1)], SCHEMA)
        error = error_of(caught.value)
        assert error["code"] == "overloaded"
        assert error["retry_after_ms"] > 0
        for writer, reader in held:
            writer.done_writing()
            with pytest.raises(StopIteration):
                reader.read_chunk()
            writer.close()
        exchange(client, [rows(0, 1)], SCHEMA)


def test_a_drain_stores_what_was_accepted_and_refuses_the_rest(start_server: StartServer) -> None:
    server = start_server(group_delay_ms=60_000)
    with flight.connect(server.address) as client:
        writer, reader = client.do_put(command(dataset="d", upload_id="u"), SCHEMA, TIMEOUT)
        for first in range(0, 1000, 100):
            writer.write_batch(rows(first, first + 100))
        while action(client, "stats")["fletcher.rows.received"] < 1000:
            pass
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(server.drain(30)))
        drain.start()
        drain.join(30)
        assert drained == [True]
        assert stored(server, "d").num_rows == 1000
        with pytest.raises(flight.FlightUnavailableError) as caught:
            put(client, [rows(0, 1)], SCHEMA, dataset="other")
        assert error_of(caught.value)["code"] == "draining"
        assert action(client, "ready")["ready"] is False
        reader_error = pytest.raises(flight.FlightUnavailableError)
        with reader_error, writer:
            writer.write_batch(rows(1000, 1001))
            writer.done_writing()
            while reader.read() is not None:
                pass


def test_closing_at_once_ends_open_calls_and_leaves_no_thread(start_server: StartServer) -> None:
    before = {thread.name for thread in threading.enumerate()}
    server = start_server(group_delay_ms=60_000)
    with flight.connect(server.address) as client:
        writer, _ = client.do_put(command(dataset="d"), SCHEMA, TIMEOUT)
        writer.write_batch(rows(0, 3000))
        while action(client, "stats")["fletcher.rows.received"] < 3000:
            pass
        server.close()
        with pytest.raises((flight.FlightError, pa.ArrowException)), writer:
            writer.done_writing()
    for thread in threading.enumerate():
        if thread.name.startswith(("put-", "exchange-", "lane-")) and thread.name not in before:
            thread.join(10)
            assert not thread.is_alive(), thread.name


def test_a_port_in_use_is_named_before_anything_is_loaded(
    server: Runtime, start_server: StartServer
) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*`port`"):
        start_server(port=port)
