"""Arrow's body compression of batches, and the choice of a codec by `auto`.

Arrow compresses every buffer of a batch with one codec, and pyarrow cannot leave a column out, so
the choice is made for a whole batch of text and vectors. Text shrinks to a half (lz4) or a quarter
(zstd). Dense vectors hardly shrink; lz4 then costs little, zstd more.

`auto` adds up the time to compress a byte, measured on the first batch by kind of column, and the
time to send it. On the loopback interface no codec pays.
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
# Takes 8 ms at 1 Gbit/s, well above the jitter of a round trip.
_PROBE_BYTES = 1 << 20
# More than the 4 to 7 MiB at the start of a call that buffers take.
OBSERVED_BYTES = 16 << 20
_MAX_SCHEMAS = 256


@dataclass(frozen=True, slots=True)
class CodecTrial:
    """Measurement of a codec on one kind of column."""

    kind: str  # `text`, `vectors` or `other`
    codec: str
    num_bytes: int  # of the sample, uncompressed
    shrinks: float  # uncompressed size divided by compressed size
    bytes_per_s: float  # uncompressed bytes compressed in a second


def check_compression(name: str) -> str:
    """Return the name; InvalidCommandError if it is not one of COMPRESSIONS."""
    if name not in COMPRESSIONS:
        raise InvalidCommandError(
            f"`compression` is {name!r}, expected one of {', '.join(COMPRESSIONS)}",
            field="compression",
            allowed=COMPRESSIONS,
        )
    return name


def write_options(codec: str) -> pa.ipc.IpcWriteOptions:
    """Arrow's options for a codec or `none`; zstd at level 1, Arrow's default."""
    return pa.ipc.IpcWriteOptions(compression=None if codec == NONE else codec)


def measure(batch: pa.RecordBatch) -> list[CodecTrial]:
    """Try every codec on the first MiB of a batch, on each kind of column by itself."""
    num_rows = max(1, batch.num_rows * _SAMPLE_BYTES // max(batch.nbytes, 1))
    sample = batch.slice(0, num_rows)
    kinds: dict[str, list[int]] = {}
    for index, field in enumerate(sample.schema):
        kinds.setdefault(_kind(field.type), []).append(index)
    trials = []
    for kind, columns in kinds.items():
        part = sample.select(columns)
        num_bytes, _ = _encode(part, NONE)
        for codec in CODECS:
            _encode(part, codec)  # the first time is slower
            size, seconds = _encode(part, codec)
            trials.append(CodecTrial(kind, codec, num_bytes, num_bytes / size, num_bytes / seconds))
    return trials


def choose(trials: Sequence[CodecTrial], link_bytes_per_s: float) -> str:
    """The codec with the least time to compress and send; `none` if no codec helps.

    The two times are added up, as compressing and sending share the cores with other work.
    """
    plain = sum(one.num_bytes for one in trials if one.codec == CODECS[0]) / link_bytes_per_s
    seconds = {NONE: plain} | {
        codec: sum(
            one.num_bytes * (1 / one.bytes_per_s + 1 / one.shrinks / link_bytes_per_s)
            for one in trials
            if one.codec == codec
        )
        for codec in CODECS
    }
    return min(seconds, key=lambda codec: seconds[codec])


def link_speed(call: Callable[[bytes], object]) -> float:
    """Bytes per second to a server; `call` sends a JSON body and waits for the answer."""
    padded = b'{"padding": "' + b"x" * _PROBE_BYTES + b'"}'
    small = min(_seconds(call, b"{}") for _ in range(3))
    large = min(_seconds(call, padded) for _ in range(2))
    return _PROBE_BYTES / max(large - small, 1e-6)


class CodecChooser:
    """Codecs that `auto` chose for one peer, by schema. Thread-safe."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._lock = threading.Lock()
        self._codecs: OrderedDict[pa.Schema, str] = OrderedDict()

    def codec_for(self, schema: pa.Schema) -> str | None:
        """The codec for batches of a schema; None: not measured yet."""
        with self._lock:
            return self._codecs.get(schema)

    def learn_codec(self, batch: pa.RecordBatch, link_bytes_per_s: float) -> str:
        """Measure a batch, remember the codec for its schema, and log it."""
        trials = measure(batch)
        codec = choose(trials, link_bytes_per_s)
        with self._lock:
            _remember(self._codecs, batch.schema, codec, _MAX_SCHEMAS)
        shown = codec if codec != NONE else CODECS[0]
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
    """The codec of batches to one server. Thread-safe.

    `auto` is `none` if the host is this machine. `probe` sends a body to the server and waits for
    the answer, or raises a FletcherError. The log names the server by `peer`.
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
        """Write options of a call with this first batch; measures the connection once."""
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
    """The codecs of a server's answers. Thread-safe.

    A call's codec is fixed before its first batch. So `auto` sends the first answers of a schema to
    a host uncompressed and measures how fast they go. After `observed_bytes` calls take the fastest
    codec. The codecs of `max_hosts` hosts are kept.
    """

    def __init__(
        self, compression: str, *, observed_bytes: int = OBSERVED_BYTES, max_hosts: int = 256
    ) -> None:
        self._compression = check_compression(compression)
        self._observed_bytes = observed_bytes
        self._max_hosts = max_hosts
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, CodecChooser] = OrderedDict()

    def for_call(self, peer: str, schema: pa.Schema) -> CallCompression:
        """The compression of one call's answers.

        gRPC names `peer`, the caller, as `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`.
        """
        if self._compression != AUTO:
            return CallCompression(self._compression)
        host = host_of(peer)
        if is_loopback(host):
            return CallCompression(NONE)
        with self._lock:
            chooser = self._hosts.get(host)
            if chooser is None:
                chooser = CodecChooser(host)
                _remember(self._hosts, host, chooser, self._max_hosts)
        codec = chooser.codec_for(schema)
        return CallCompression(codec or NONE, None if codec else chooser, self._observed_bytes)


class CallCompression:
    """The compression of one call's answers, and the measurement of their speed.

    After `observed_bytes` the chooser learns the codec of later calls. `options` are the writer's.
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
        """Record how long writing a batch blocked on the connection's buffers."""
        if self._chooser is None:
            return
        self._num_bytes += batch.nbytes
        self._seconds += seconds
        if self._num_bytes >= self._observed_bytes:
            self._chooser.learn_codec(batch, self._num_bytes / max(self._seconds, 1e-6))
            self._chooser = None


def host_of(peer: str) -> str:
    """The host in gRPC's name of a peer."""
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
    """Bytes on the wire and seconds of writing them."""
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
