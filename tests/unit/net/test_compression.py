"""Which codec `auto` takes, from what it measures and from what it is told."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest

from fletcher.errors import InvalidCommandError, UnavailableError
from fletcher.net import compression
from fletcher.net.compression import (
    CODECS,
    AnswerCompression,
    CodecTrial,
    SendCompression,
    choose,
    host_of,
    link_speed,
    measure,
)

WORDS = "debian packages hold programs that people use every day and night".split()


def batch(num_rows: int = 2000, *columns: str) -> pa.RecordBatch:
    """Sentences, and vectors of noise."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) for _ in range(num_rows)]
    vectors = rng.standard_normal(num_rows * 96).astype(np.float16)
    whole = pa.record_batch(
        {
            "id": pa.array(range(num_rows)),
            "text": texts,
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), 96),
        }
    )
    return whole.select(list(columns) or whole.schema.names)


def trials(kind: str, lz4: tuple[float, float], zstd: tuple[float, float]) -> list[CodecTrial]:
    """Of 1 MB: how much it shrinks, and MB/s."""
    return [
        CodecTrial(kind, codec, 10**6, shrinks, speed * 1e6)
        for codec, (shrinks, speed) in (("lz4", lz4), ("zstd", zstd))
    ]


# As measured on the corpus; see docs/lab-book.md.
TEXT = trials("text", (2.6, 600), (3.7, 450))
VECTORS = trials("vectors", (1.0, 3200), (1.09, 1000))


@pytest.mark.parametrize(
    ("tried", "link_mb_s", "codec"),
    [
        (TEXT, 1700, "none"),  # loopback
        (TEXT, 300, "lz4"),
        (TEXT, 12, "zstd"),  # 100 Mbit/s
        (VECTORS, 1700, "none"),
        (VECTORS, 125, "none"),  # 1 Gbit/s: 9% less is not worth the time
        (VECTORS, 12, "zstd"),
        (TEXT + VECTORS, 1700, "none"),
        (TEXT + VECTORS, 125, "zstd"),
    ],
)
def test_the_codec_that_crosses_the_link_soonest(
    tried: list[CodecTrial], link_mb_s: float, codec: str
) -> None:
    assert choose(tried, link_mb_s * 1e6) == codec


def test_measuring_tells_kinds_apart() -> None:
    found = {(one.kind, one.codec): one for one in measure(batch())}
    assert {kind for kind, _ in found} == {"text", "vectors", "other"}
    assert found["text", "zstd"].shrinks > found["text", "lz4"].shrinks > 1.5
    assert found["vectors", "lz4"].shrinks == pytest.approx(1.0, abs=0.05)
    assert all(one.bytes_per_s > 0 for one in found.values())


def test_a_slice_is_measured_and_a_dictionary_of_text_is_text() -> None:
    table = batch(100, "text")
    coded = pa.record_batch({"text": table.column("text").dictionary_encode()})
    assert {one.kind for one in measure(coded)} == {"text"}
    (lz4, _) = measure(batch(5000, "text").slice(4000, 10))
    assert lz4.num_bytes < 10_000


def test_link_speed_is_what_a_large_body_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call(body: bytes) -> None:
        now[0] += 0.05 + len(body) / 10e6  # 50 ms, 10 MB/s

    monkeypatch.setattr(compression.time, "perf_counter", lambda: now[0])
    assert link_speed(call) == pytest.approx(10e6, rel=0.01)


def send_compression(
    choice: str, host: str, link_mb_s: float, monkeypatch: pytest.MonkeyPatch
) -> SendCompression:
    monkeypatch.setattr(compression, "link_speed", lambda _: link_mb_s * 1e6)
    monkeypatch.setattr(compression, "measure", lambda *_: TEXT)  # a busy machine's would vary
    return SendCompression(choice, host=host, peer=f"grpc://{host}", probe=lambda _: None)


def test_auto_says_once_what_it_chose_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = send_compression("auto", "far.example", 1, monkeypatch)
    with caplog.at_level(logging.INFO, "fletcher.net.compression"):
        for _ in range(3):
            assert one.options(batch(500, "text")).compression == "zstd"
    (message,) = caplog.messages
    assert message.startswith("compression to grpc://far.example: zstd (zstd: text ")
    assert "the connection takes 1 MB/s" in message
    assert one.options(None).compression is None
    assert one.options(batch(0, "text")).compression is None


def test_on_this_machine_auto_neither_asks_nor_compresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        one = send_compression("auto", host, 0.001, monkeypatch)
        assert not one.needs_batch
        assert one.options(batch(10)).compression is None
    assert send_compression("lz4", "localhost", 1, monkeypatch).options(None).compression == "lz4"


def test_a_speed_that_cannot_be_told_is_asked_for_again() -> None:
    calls: list[bytes] = []

    def probe(body: bytes) -> None:
        calls.append(body)
        raise UnavailableError("away")

    one = SendCompression("auto", host="far.example", peer="far", probe=probe)
    for _ in range(2):
        assert one.options(batch(10)).compression is None
    assert len(calls) == 2


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(InvalidCommandError, match="`compression` is 'gzip', expected one of none"):
        SendCompression("gzip", host="h", peer="p", probe=lambda _: None)


def test_answers_are_watched_until_their_codec_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "measure", lambda *_: TEXT)
    answers = AnswerCompression("auto", observed_bytes=100_000)
    part = batch(500, "text")
    first = answers.for_call("ipv4:10.0.0.7:5000", part.schema, CODECS)
    for _ in range(4):
        assert first.options.compression is None
        first.record_write(part, part.nbytes / 1e6)  # 1 MB/s
    assert answers.for_call("ipv4:10.0.0.7:5001", part.schema, CODECS).options.compression == "zstd"
    assert answers.for_call("ipv4:10.0.0.8:5000", part.schema, CODECS).options.compression is None
    other = batch(10, "vector").schema
    assert answers.for_call("ipv4:10.0.0.7:5001", other, CODECS).options.compression is None
    local = answers.for_call("ipv4:127.0.0.1:5000", part.schema, CODECS)
    for _ in range(4):
        local.record_write(part, 10)
    assert answers.for_call("ipv4:127.0.0.1:5001", part.schema, CODECS).options.compression is None


def test_answers_forget_the_hosts_they_heard_of_first() -> None:
    answers = AnswerCompression("auto", max_hosts=2)
    for number in range(5):
        answers.for_call(f"ipv4:10.0.0.{number}:1", batch(1).schema, CODECS)
    assert [host for host, _ in answers._hosts] == ["10.0.0.3", "10.0.0.4"]


@pytest.mark.parametrize("choice", ["lz4", "zstd", "auto"])
def test_a_caller_gets_only_codecs_that_it_can_read(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, ...]] = []

    def measure(_: pa.RecordBatch, codecs: tuple[str, ...]) -> list[CodecTrial]:
        measured.append(codecs)
        return [one for one in TEXT if one.codec in codecs]

    monkeypatch.setattr(compression, "measure", measure)
    answers, part = AnswerCompression(choice, observed_bytes=1), batch(500, "text")
    for accepted in ((), ("lz4",), ("zstd",), ("zstd", "lz4")):
        answers.for_call("ipv4:10.0.0.7:1", part.schema, accepted).record_write(part, 1.0)
        found = answers.for_call("ipv4:10.0.0.7:1", part.schema, accepted).options.compression
        assert found is None or found in accepted
        assert (found is None) == (not accepted or choice not in ("auto", *accepted))
    assert measured == ([("lz4",), ("zstd",), ("lz4", "zstd")] if choice == "auto" else [])


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:[::1]:5000", "::1"),
        ("ipv6:%5B::1%5D:5000", "::1"),
    ],
)
def test_hosts_of_callers(peer: str, host: str) -> None:
    assert host_of(peer) == host
