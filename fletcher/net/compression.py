"""Arrow's body compression of what is sent: which codec, and what `auto` makes of a connection.

Arrow compresses every buffer of a batch with one codec, and pyarrow has no way to leave a column
out, so a batch of text and vectors is chosen for as a whole. Text shrinks to a half (lz4) or a
quarter (zstd); dense vectors hardly at all, and lz4 then costs little, zstd more.

`auto` compares the seconds that a byte takes: to be compressed here, measured on the first batch by
kind of column, and to cross the connection. On this machine's loopback nothing pays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from fletcher.config.network import COMPRESSIONS, is_loopback
from fletcher.errors import FletcherError, InvalidCommandError

log = logging.getLogger(__name__)

Key = TypeVar("Key")
Value = TypeVar("Value")

AUTO = "auto"
NONE = "none"
CODECS = ("lz4", "zstd")

_SAMPLE_BYTES = 1 << 20
# Crosses 1 Gbit/s in 8 ms, well above a round trip's jitter.
_PROBE_BYTES = 1 << 20
# The first 4 to 7 MiB of a call go into buffers, not over the link.
_OBSERVED_BYTES = 16 << 20
_MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class CodecTrial:
    """What a codec does to one kind of column.

    Attributes:
        kind: `text`, `vectors` or `other`.
        codec: `lz4` or `zstd`.
        num_bytes: Size of what was tried, uncompressed.
        shrinks: How many times smaller it became.
        bytes_per_s: Uncompressed bytes compressed in a second.
    """

    kind: str
    codec: str
    num_bytes: int
    shrinks: float
    bytes_per_s: float


def check_compression(name: str) -> str:
    """The name itself.

    Raises:
        InvalidCommandError: It is none of COMPRESSIONS.
    """
    if name not in COMPRESSIONS:
        raise InvalidCommandError(
            f"`compression` is {name!r}, expected one of {', '.join(COMPRESSIONS)}",
            field="compression",
            allowed=COMPRESSIONS,
        )
    return name


def write_options(codec: str) -> pa.ipc.IpcWriteOptions:
    """Arrow's options for a codec's name; zstd at level 1, Arrow's default."""
    return pa.ipc.IpcWriteOptions(compression=None if codec == NONE else codec)


def measure(batch: pa.RecordBatch) -> list[CodecTrial]:
    """Tries every codec on the first MiB of a batch, each kind of column by itself."""
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
    """The codec with which the columns cross the link soonest; `none` where none helps.

    Compressing and sending are added up, as if they took turns: they share the cores with the rest.
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
    """Bytes per second to a peer, from calls with a small and a large body.

    Args:
        call: Sends a body, a JSON object, and waits for its answer.
    """
    padded = b'{"padding": "' + b"x" * _PROBE_BYTES + b'"}'
    small = min(_seconds(call, b"{}") for _ in range(3))
    large = min(_seconds(call, padded) for _ in range(2))
    return _PROBE_BYTES / max(large - small, 1e-6)


class CodecChooser:
    """What `auto` has found out about one peer: a codec for a schema. Thread-safe.

    Args:
        peer: Its address, for the log.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._lock = threading.Lock()
        self._codecs: OrderedDict[pa.Schema, str] = OrderedDict()

    def codec_for(self, schema: pa.Schema) -> str | None:
        """The codec for batches of a schema; None: nothing was learned yet."""
        with self._lock:
            return self._codecs.get(schema)

    def learn_codec(self, batch: pa.RecordBatch, link_bytes_per_s: float) -> str:
        """Measures a batch, remembers the codec for its schema and says so in the log."""
        trials = measure(batch)
        codec = choose(trials, link_bytes_per_s)
        _remember(self._lock, self._codecs, batch.schema, codec)
        shown = codec if codec != NONE else CODECS[0]
        found = ", ".join(
            f"{one.kind} {one.shrinks:.1f}x at {one.bytes_per_s / 1e6:.0f} MB/s"
            for one in trials
            if one.codec == shown
        )
        log.info(
            "compression to %s: %s (%s: %s; the connection takes %.0f MB/s)",
            self._peer,
            codec,
            shown,
            found,
            link_bytes_per_s / 1e6,
        )
        return codec


class SendCompression:
    """The codec of batches that are sent to one server. Thread-safe.

    Args:
        compression: One of COMPRESSIONS.
        host: The server's; where it is this machine, `auto` is `none`.
        peer: Its address, for the log.
        probe: Sends a body to the server and waits for an answer; raises a FletcherError.
    """

    def __init__(
        self, compression: str, *, host: str, peer: str, probe: Callable[[bytes], object]
    ) -> None:
        self._compression = check_compression(compression)
        if compression == AUTO and is_loopback(host):
            self._compression = NONE
            log.debug("compression to %s: none, for it is on this machine", peer)
        self._chooser = CodecChooser(peer)
        self._probe = probe
        self._link_bytes_per_s: float | None = None

    @property
    def needs_batch(self) -> bool:
        """It must see a batch before it can tell."""
        return self._compression == AUTO

    def options(self, batch: pa.RecordBatch | None) -> pa.ipc.IpcWriteOptions:
        """For a call whose first batch this is; asks the server for its speed the first time."""
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
                return write_options(NONE)  # the call itself will tell
            codec = self._chooser.learn_codec(batch, self._link_bytes_per_s)
        return write_options(codec)


class AnswerCompression:
    """The codecs of what a server sends back, a call's fixed before its first batch. Thread-safe.

    So `auto` sends the first answers of a kind to a host as they are and watches how fast they go;
    later calls take what would have been fastest.

    Args:
        compression: One of COMPRESSIONS.
    """

    def __init__(self, compression: str) -> None:
        self._compression = check_compression(compression)
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, CodecChooser] = OrderedDict()

    def for_call(self, peer: str, schema: pa.Schema) -> CallCompression:
        """One call's answers.

        Args:
            peer: As gRPC names the caller: `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`.
            schema: Of the answers.
        """
        if self._compression != AUTO:
            return CallCompression(self._compression, None)
        host = host_of(peer)
        if is_loopback(host):
            return CallCompression(NONE, None)
        with self._lock:
            chooser = self._hosts.get(host)
        if chooser is None:
            chooser = CodecChooser(host)
            _remember(self._lock, self._hosts, host, chooser)
        codec = chooser.codec_for(schema)
        return CallCompression(codec or NONE, chooser if codec is None else None)


class CallCompression:
    """How one call's answers are written, and how fast they go where that is not known yet."""

    def __init__(self, codec: str, learning: CodecChooser | None) -> None:
        self.options = write_options(codec)
        self._learning = learning
        self._num_bytes = 0
        self._seconds = 0.0

    def record_write(self, batch: pa.RecordBatch, seconds: float) -> None:
        """A batch was written, and that took so long: waiting for the connection's buffers."""
        if self._learning is None:
            return
        self._num_bytes += batch.nbytes
        self._seconds += seconds
        if self._num_bytes >= _OBSERVED_BYTES:
            self._learning.learn_codec(batch, self._num_bytes / max(self._seconds, 1e-6))
            self._learning = None


def host_of(peer: str) -> str:
    """The host in gRPC's name of a caller."""
    host = peer.partition(":")[2].rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "").strip("[]")


def _remember(lock: threading.Lock, known: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    with lock:
        known[key] = value
        while len(known) > _MAX_REMEMBERED:
            known.popitem(last=False)


def _kind(data_type: pa.DataType) -> str:
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    if pa.types.is_fixed_size_list(data_type):
        return "vectors"
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return "text" if any(is_text(data_type) for is_text in texts) else "other"


def _encode(batch: pa.RecordBatch, codec: str) -> tuple[int, float]:
    """Bytes on the wire, and the seconds that writing them took."""
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
