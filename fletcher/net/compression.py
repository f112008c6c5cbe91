"""Arrow's body compression of batches, and the choice of a codec by `auto`.

Arrow compresses all buffers of a batch with one codec, and pyarrow cannot leave a column
uncompressed. So one codec is chosen for the text and the vectors of a batch. Text shrinks to a half
(lz4) or a quarter (zstd). Dense vectors hardly shrink; on them lz4 wastes little time, zstd more.

`auto` compares codecs by the time to compress a batch plus the time to send it. The speed of
compression is measured on the first batch, for each kind of column. On the loopback interface no
codec saves time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fletcher.config.network import COMPRESSIONS, is_loopback
from fletcher.errors import FletcherError, InvalidCommandError

log = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"
CODECS = ("lz4", "zstd")

_SAMPLE_BYTES = 1 << 20
# Sending this takes 8 ms at 1 Gbit/s, well above the jitter of a round trip.
_PROBE_BYTES = 1 << 20
# More than the 4 to 7 MiB that fill the connection's buffers at the start of a call.
OBSERVED_BYTES = 16 << 20
_MAX_SCHEMAS = 256


@dataclass(frozen=True, slots=True)
class CodecTrial:
    """Measurement of a codec on one kind of column."""

    kind: str  # `text`, `vectors` or `other`
    codec: str
    num_bytes: int  # uncompressed size of the sample
    shrinks: float  # uncompressed size divided by compressed size
    bytes_per_s: float  # speed of compression, in uncompressed bytes per second


def check_compression(name: str) -> str:
    """Return `name`. Raises InvalidCommandError if it is not one of COMPRESSIONS."""
    if name not in COMPRESSIONS:
        raise InvalidCommandError(
            f"`compression` is {name!r}, expected one of {', '.join(COMPRESSIONS)}",
            field="compression",
            allowed=COMPRESSIONS,
        )
    return name


def write_options(codec: str) -> pa.ipc.IpcWriteOptions:
    """Arrow's write options for a codec or `none`; zstd has Arrow's default level, 1."""
    return pa.ipc.IpcWriteOptions(compression=None if codec == NONE else codec)


def measure(batch: pa.RecordBatch, codecs: Sequence[str] = CODECS) -> list[CodecTrial]:
    """Try codecs on the first MiB of a batch, separately for each kind of column."""
    num_rows = max(1, batch.num_rows * _SAMPLE_BYTES // max(batch.nbytes, 1))
    sample = batch.slice(0, num_rows)
    kinds: dict[str, list[int]] = {}
    for index, field in enumerate(sample.schema):
        kinds.setdefault(_kind(field.type), []).append(index)
    trials = []
    for kind, columns in kinds.items():
        part = sample.select(columns)
        num_bytes, _ = _encode(part, NONE)
        for codec in codecs:
            _encode(part, codec)  # not measured: the first use of a codec is slower
            size, seconds = _encode(part, codec)
            trials.append(CodecTrial(kind, codec, num_bytes, num_bytes / size, num_bytes / seconds))
    return trials


def choose(trials: Sequence[CodecTrial], link_bytes_per_s: float) -> str:
    """The codec with the shortest time to compress and send; `none` if no codec helps.

    The two times are added up although they may overlap, because both compete with other work for
    the CPU cores.
    """
    codecs = sorted({one.codec for one in trials})
    plain = sum(one.num_bytes for one in trials if one.codec == codecs[0]) / link_bytes_per_s
    seconds = {NONE: plain} | {
        codec: sum(
            one.num_bytes * (1 / one.bytes_per_s + 1 / one.shrinks / link_bytes_per_s)
            for one in trials
            if one.codec == codec
        )
        for codec in codecs
    }
    return min(seconds, key=lambda codec: seconds[codec])


def link_speed(call: Callable[[bytes], object]) -> float:
    """Measure the bytes per second of a connection to a server.

    `call` sends a JSON body to the server and waits for the answer.
    """
    padded = b'{"padding": "' + b"x" * _PROBE_BYTES + b'"}'
    small = min(_seconds(call, b"{}") for _ in range(3))
    large = min(_seconds(call, padded) for _ in range(2))
    return _PROBE_BYTES / max(large - small, 1e-6)


class CodecChooser:
    """Codecs that `auto` chose for batches to one peer, by schema. Thread-safe.

    `codecs`: those to choose from; at least one.
    """

    def __init__(self, peer: str, codecs: Sequence[str] = CODECS) -> None:
        self._peer = peer
        self._offered = codecs
        self._lock = threading.Lock()
        self._codecs: OrderedDict[pa.Schema, str] = OrderedDict()

    def codec_for(self, schema: pa.Schema) -> str | None:
        """The codec for batches with a schema; None: not measured yet."""
        with self._lock:
            return self._codecs.get(schema)

    def learn_codec(self, batch: pa.RecordBatch, link_bytes_per_s: float) -> str:
        """Choose a codec by measuring a batch; remember it for the schema, and log it."""
        trials = measure(batch, self._offered)
        codec = choose(trials, link_bytes_per_s)
        with self._lock:
            _remember(self._codecs, batch.schema, codec, _MAX_SCHEMAS)
        shown = codec if codec != NONE else self._offered[0]
        found = ", ".join(
            f"{one.kind} {one.shrinks:.1f}x at {one.bytes_per_s / 1e6:.0f} MB/s"
            for one in trials
            if one.codec == shown
        )
        log.info(
            "compression to %s: %s (%s: %s; the connection takes %.0f MB/s)",
            *(self._peer, codec, shown, found, link_bytes_per_s / 1e6),
        )
        return codec


class SendCompression:
    """Compression of the batches that are sent to one server. Thread-safe.

    If the host is this machine, `auto` means `none`. `probe` sends a body to the server and waits
    for the answer; it may raise a FletcherError. `peer` is the server's name in the log.
    """

    def __init__(
        self, compression: str, *, host: str, peer: str, probe: Callable[[bytes], object]
    ) -> None:
        self._compression = check_compression(compression)
        if compression == AUTO and is_loopback(host):
            self._compression = NONE
            log.debug("compression to %s: none, as it is on this machine", peer)
        self._chooser = CodecChooser(peer)
        self._probe = probe
        self._link_bytes_per_s: float | None = None

    @property
    def needs_batch(self) -> bool:
        """Whether `options` depends on the call's first batch."""
        return self._compression == AUTO

    def options(self, batch: pa.RecordBatch | None) -> pa.ipc.IpcWriteOptions:
        """Write options for a call whose first batch is `batch`.

        Measures the connection, unless that has been done before.
        """
        if not self.needs_batch:
            return write_options(self._compression)
        if batch is None or not batch.num_rows:
            return write_options(NONE)
        codec = self._chooser.codec_for(batch.schema)
        if codec is None:
            try:
                if self._link_bytes_per_s is None:
                    self._link_bytes_per_s = link_speed(self._probe)
            except FletcherError as error:
                log.debug("the connection's speed is unknown: %s", error)
                return write_options(NONE)  # the call itself will report the error
            codec = self._chooser.learn_codec(batch, self._link_bytes_per_s)
        return write_options(codec)


class AnswerCompression:
    """Compression of a server's answers. Thread-safe.

    Answers are compressed only by a codec that the caller accepts.

    The codec of a call cannot change after its first batch. So `auto` sends a host the first
    answers with a schema uncompressed, and measures how fast they are sent. Calls that begin after
    `observed_bytes` bytes have the fastest codec. Codecs are remembered for `max_hosts` hosts.
    """

    def __init__(
        self, compression: str, *, observed_bytes: int = OBSERVED_BYTES, max_hosts: int = 256
    ) -> None:
        self._compression = check_compression(compression)
        self._observed_bytes = observed_bytes
        self._max_hosts = max_hosts
        self._lock = threading.Lock()
        self._hosts: OrderedDict[tuple[str, tuple[str, ...]], CodecChooser] = OrderedDict()

    def for_call(
        self, peer: str, schema: pa.Schema, accepted: tuple[str, ...] = ()
    ) -> CallCompression:
        """The compression of one call's answers.

        Args:
            peer: gRPC's name of the caller: `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`.
            schema: Schema of the answers.
            accepted: Codecs that the caller can read.
        """
        if self._compression != AUTO:
            return CallCompression(self._compression if self._compression in accepted else NONE)
        host = host_of(peer)
        if is_loopback(host) or not accepted:
            return CallCompression(NONE)
        key = host, tuple(sorted(set(accepted)))
        with self._lock:
            chooser = self._hosts.get(key)
            if chooser is None:
                chooser = CodecChooser(*key)
                _remember(self._hosts, key, chooser, self._max_hosts)
        codec = chooser.codec_for(schema)
        return CallCompression(codec or NONE, None if codec else chooser, self._observed_bytes)


class CallCompression:
    """The compression of one call's answers, and the measurement of their speed.

    After `observed_bytes` bytes the chooser chooses the codec for later calls. `options` are for
    the Arrow writer of the answers.
    """

    def __init__(
        self, codec: str, chooser: CodecChooser | None = None, observed_bytes: int = 0
    ) -> None:
        self.options = write_options(codec)
        self._chooser = chooser
        self._observed_bytes = observed_bytes
        self._num_bytes = 0
        self._seconds = 0.0

    def record_write(self, batch: pa.RecordBatch, seconds: float) -> None:
        """Record for how many seconds writing a batch blocked."""
        if self._chooser is None:
            return
        self._num_bytes += batch.nbytes
        self._seconds += seconds
        if self._num_bytes >= self._observed_bytes:
            self._chooser.learn_codec(batch, self._num_bytes / max(self._seconds, 1e-6))
            self._chooser = None


def host_of(peer: str) -> str:
    """The host in a peer's name as gRPC writes it."""
    host = peer.partition(":")[2].rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "").strip("[]")


def _remember(entries: OrderedDict[Any, Any], key: object, value: object, limit: int) -> None:
    entries[key] = value
    while len(entries) > limit:
        entries.popitem(last=False)


def _kind(data_type: pa.DataType) -> str:
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    if pa.types.is_fixed_size_list(data_type):
        return "vectors"
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return "text" if any(is_text(data_type) for is_text in texts) else "other"


def _encode(batch: pa.RecordBatch, codec: str) -> tuple[int, float]:
    """Encode a batch. Returns its size on the wire in bytes, and the seconds it took."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=write_options(codec)) as writer:
        before = sink.tell()
        started = time.perf_counter()
        writer.write_batch(batch)
        seconds = time.perf_counter() - started
        size = sink.tell() - before
    return size, max(seconds, 1e-9)


def _seconds(call: Callable[[bytes], object], body: bytes) -> float:
    started = time.perf_counter()
    call(body)
    return time.perf_counter() - started
