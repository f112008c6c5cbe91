"""Every option of the server once: its default, its limits and what it trades.

A flag, an environment variable and a TOML key derive from each field of `ServeConfig`:
`max_streams` is `--max-streams`, `FLETCHER_MAX_STREAMS` and `max_streams = 256`. A duration in
seconds drops its `_s` (`drain_timeout_s` is `--drain-timeout`), for its value may name another unit
(`2m`). A flag goes before the environment, that before the file, that before the default.
"""

# ruff: noqa: RUF009  (`_option` makes a dataclass field, no default value)

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.config.model_alias import Alias
from fletcher.config.option import (
    ALIASES,
    DAY_S,
    FILE,
    FOLDER,
    GIB,
    LOADABLE,
    MIB,
    MILLISECONDS,
    NAMES,
    SECONDS,
    SIZE,
    STORES,
    SWITCH,
    TEXT,
    WHOLE,
    Option,
    OptionType,
)
from fletcher.errors import ConfigError

DEFAULT_STORE = "default"
NO_STORE = "none"
# Of what is sent over a connection; the client's `compression` takes the same words.
COMPRESSIONS = ("none", "lz4", "zstd", "auto")
DISPATCHES = ("throughput-weighted", "least-loaded", "round-robin", "random")
# What int8 vectors are multiples of: `core.quantization`.
INT8_KINDS = ("auto", "row", "ranges")
_NAMED_STORE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


def _option(default: Any, group: str, kind: OptionType, text: str, **limits: Any) -> Any:
    if kind in (WHOLE, SIZE):
        limits = {"minimum": 0, **limits}
    elif kind in (SECONDS, MILLISECONDS):
        # Longer waits than C's timers take would fail where they are used.
        limits = {"minimum": 0, "maximum": DAY_S * (1 if kind is SECONDS else 1000), **limits}
    metadata = {"group": group, "kind": kind, "help": text, **limits}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def fletcher_home(environ: Mapping[str, str] | None = None) -> Path:
    """Where models, journals and caches live.

    FLETCHER_HOME, else XDG_DATA_HOME/fletcher, else ~/.local/share/fletcher.
    """
    environ = os.environ if environ is None else environ
    if home := environ.get("FLETCHER_HOME"):
        return Path(home).expanduser()
    # The XDG base directory specification has relative paths ignored.
    data = Path(environ.get("XDG_DATA_HOME") or "")
    return (data if data.is_absolute() else Path("~/.local/share").expanduser()) / "fletcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """All options of a server, checked. `OPTIONS` says what each trades.

    Attributes are bytes, seconds (`_s`), milliseconds (`_ms`) or counts, as their names say.

    Raises:
        ConfigError: A value out of range, or options that contradict each other.
    """

    host: str = _option(
        "127.0.0.1", "network", TEXT, "address to listen on; 0.0.0.0 lets other machines in"
    )
    port: int = _option(
        8815, "network", WHOLE, "TCP port; 0 takes a free one, which is printed", maximum=65535
    )
    token_file: Path | None = _option(
        None, "network", FILE, "bearer tokens, one a line; without it every caller is let in"
    )
    tls_cert: Path | None = _option(
        None, "network", FILE, "PEM certificate: callers encrypt, at some cost in CPU time"
    )
    tls_key: Path | None = _option(None, "network", FILE, "PEM private key of --tls-cert")
    tls_client_ca: Path | None = _option(
        None, "network", FILE, "PEM CA; callers must show a certificate that it signed"
    )
    insecure: bool = _option(
        False, "network", SWITCH, "allow a host other than loopback without --token-file"
    )
    compression: str = _option(
        "none",
        "network",
        TEXT,
        "of vectors sent back; they shrink little, carried text much; auto measures each caller's "
        "connection",
        choices=COMPRESSIONS,
    )
    model: str = _option("all-MiniLM-L6-v2", "model", TEXT, "model used where a caller names none")
    models: tuple[str, ...] = _option(
        (),
        "model",
        NAMES,
        "models served beside --model, repeatable, as NAME or NAME@HASH; each has processes and "
        "memory of its own, and all share the cores",
    )
    loadable_models: tuple[str, ...] = _option(
        (),
        "model",
        LOADABLE,
        "models that callers may have loaded and swapped beside --model and --models, repeatable; "
        "*: all that are installed; each takes memory, and whoever may call may load",
    )
    model_aliases: tuple[str, ...] = _option(
        (),
        "model",
        ALIASES,
        "NAME=MODEL:WEIGHT,MODEL:WEIGHT, repeatable: calls for NAME are divided among models; an "
        "alias `default` divides those that name no model",
    )
    max_model_memory: int = _option(
        0,
        "model",
        SIZE,
        "bytes that the processes of all models may take, 0: all there is; beyond it the model not "
        "used for longest is unloaded, and the next call for it waits until it is loaded again",
    )
    device: str = _option(
        "auto",
        "model",
        TEXT,
        "auto, cpu, cuda, or cuda:0,1 for some GPUs; auto prefers GPUs",
        pattern=r"auto|cpu|cuda(:\d+(,\d+)*)?",
        expected="auto, cpu, cuda or cuda:N,...",
    )
    device_fallback: str = _option(
        "none",
        "model",
        TEXT,
        "cpu: when no GPU is left, the CPU takes over until one is back: slower, and its vectors "
        "differ in their last digits; none: callers are told to come again",
        choices=("none", "cpu"),
    )
    backend: str = _option(
        "auto",
        "model",
        TEXT,
        "engine; auto takes what `fletcher tune` measured here, else the device's usual best; "
        "null makes vectors without a model",
        choices=("auto", "onnxruntime", "openvino", "null"),
    )
    precision: str = _option(
        "auto",
        "model",
        TEXT,
        "arithmetic; float32 is exact, the others are faster where the hardware has them",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    threads: int = _option(
        0, "model", WHOLE, "CPU cores for the model, 0: all; fewer leaves room for others"
    )
    tokenizer_workers: int = _option(
        0, "model", WHOLE, "tokenizer processes, 0: from the cores; each takes memory", maximum=1024
    )
    tokenizer: str = _option(
        "model",
        "model",
        TEXT,
        "model: its own; null takes bytes for tokens, to measure what surrounds the model, and "
        "needs --backend null",
        choices=("model", "null"),
    )
    max_batch_tokens: int = _option(
        0, "model", WHOLE, "tokens in one run, 0: the engine's best; more: throughput, latency"
    )
    replicas_per_device: int = _option(
        0,
        "model",
        WHOLE,
        "copies of the model on each GPU, 0: one, or what `fletcher tune` found; more may keep it "
        "busier with short texts, each takes its memory",
        maximum=64,
    )
    gpu_memory: int = _option(
        0,
        "model",
        SIZE,
        "bytes of a GPU that one copy of the model may take, 0: all; less leaves room for others, "
        "and runs that need more fail",
    )
    cuda_graphs: bool = _option(
        False,
        "model",
        SWITCH,
        "on GPUs, in float16: a text of up to 63 tokens that runs alone is one launch, to answer "
        "sooner; takes the model's memory once more, beside --gpu-memory, and longer to start; not "
        "tried on a GPU yet",
    )
    embedding_cache: int = _option(
        0,
        "model",
        SIZE,
        "room for vectors of texts embedded before, beside --max-memory; 0: none, for where texts "
        "do not repeat it costs a hash a text and gives nothing",
    )
    embedding_cache_dir: Path | None = _option(
        None,
        "model",
        FOLDER,
        "keep the embedding cache in a file here, at least 64MiB: it outlives the server, and each "
        "look is slower than memory's",
    )
    dispatch: str = _option(
        "throughput-weighted",
        "model",
        TEXT,
        "which device gets the next run: by what each gets done, for devices that differ or slow "
        "down; the others need no measuring and suit equal devices",
        choices=DISPATCHES,
    )
    worker_timeout_s: float = _option(
        120,
        "model",
        SECONDS,
        "longest run before its process is replaced and the work goes elsewhere; less: hangs end "
        "sooner, slow devices may be taken for hung",
        minimum=1,
    )
    isolate_engine: bool = _option(
        False,
        "model",
        SWITCH,
        "keep engines out of the server's own process, where one answers short texts that come "
        "when nothing else runs: these take longer, but no failure of an engine ends the server",
    )
    max_queue_delay_ms: float = _option(
        5, "model", MILLISECONDS, "wait to fill a run; more: fuller runs, later answers"
    )
    allow_undeclared: bool = _option(
        False,
        "model",
        SWITCH,
        "give dims that the model does not declare, at a loss of quality that nobody has measured",
    )
    int8: str = _option(
        "auto",
        "model",
        TEXT,
        "row: each vector has a scale, 4 bytes more, and nothing is clipped; ranges: as `fletcher "
        "model calibrate` found them, what lies outside is clipped; auto: ranges where the model "
        "has them",
        choices=INT8_KINDS,
    )
    stores: tuple[str, ...] = _option(
        (),
        "store",
        STORES,
        "NAME=ADDRESS or ADDRESS, repeatable, the first is the default: lance:PATH, parquet:PATH, "
        "grpc://HOST:PORT, none (vectors are only sent back); default: lance: in the home folder",
    )
    max_journal: int = _option(
        4 * GIB,
        "store",
        SIZE,
        "disk for rows that are acknowledged and not stored yet; 0: none, stores must answer first",
    )
    journal_retention_s: float = _option(
        DAY_S,
        "store",
        SECONDS,
        "how long rows are kept for stores that acknowledge before they are durable",
    )
    group_rows: int = _option(
        10_000, "store", WHOLE, "rows in one write; more: fewer, larger, later writes", minimum=1
    )
    group_delay_ms: float = _option(
        500, "store", MILLISECONDS, "longest wait to fill a write; less: earlier acknowledgement"
    )
    store_timeout_s: float = _option(
        60, "store", SECONDS, "longest wait for one write before it is tried again", minimum=0.001
    )
    store_compression: str = _option(
        "auto",
        "store",
        TEXT,
        "of rows sent to Flight stores: saves network, costs CPU time; auto measures both",
        choices=COMPRESSIONS,
    )
    store_retry_s: float = _option(
        300, "store", SECONDS, "how long a failing write is retried before its upload fails"
    )
    max_streams: int = _option(
        256, "limits", WHOLE, "open calls at once; each may hold one message", minimum=1
    )
    max_memory: int = _option(
        2 * GIB, "limits", SIZE, "bytes of work held at once; less: callers wait earlier"
    )
    max_message_bytes: int = _option(
        64 * MIB, "limits", SIZE, "largest decoded message; each stream may hold one", minimum=1
    )
    max_row_bytes: int = _option(
        16 * MIB, "limits", SIZE, "largest text; longer ones fail alone", minimum=1
    )
    drain_timeout_s: float = _option(
        30, "limits", SECONDS, "on SIGTERM, time for accepted rows to reach the store"
    )
    log_level: str = _option(
        "info",
        "process",
        TEXT,
        "least level written to standard error",
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = _option(
        "text", "process", TEXT, "text for people, json for collectors", choices=("text", "json")
    )
    otlp_endpoint: str | None = _option(
        None,
        "process",
        TEXT,
        "send traces and metrics to this OTLP/HTTP URL; a little time a call",
        pattern=r"https?://.+",
        expected="an http:// or https:// URL",
    )
    home: Path = _option(fletcher_home, "process", FOLDER, "models and caches, some 100 MB a model")

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            option.check(getattr(self, option.field))
        self._check_network()
        if self.tokenizer == "null" and self.backend != "null":
            raise ConfigError(
                f"`tokenizer` is null, whose tokens no model knows, and `backend` is "
                f"{self.backend!r}; give --backend null with it",
                field="tokenizer",
                allowed=["model"],
            )
        if self.max_row_bytes > self.max_message_bytes:
            raise ConfigError(
                f"`max_row_bytes` is {self.max_row_bytes}, more than `max_message_bytes` "
                f"({self.max_message_bytes}), in which a row must fit",
                field="max_row_bytes",
            )
        if self.max_message_bytes > self.max_memory:
            raise ConfigError(
                f"`max_message_bytes` is {self.max_message_bytes}, more than `max_memory` "
                f"({self.max_memory}), in which a message must fit",
                field="max_message_bytes",
            )
        if self.embedding_cache_dir is not None and self.embedding_cache < 64 * MIB:
            raise ConfigError(
                f"`embedding_cache` is {self.embedding_cache}, expected at least 64MiB with "
                "`embedding_cache_dir`",
                field="embedding_cache",
            )
        _ = self.store_addresses, self.aliases

    def _check_network(self) -> None:
        if not (self.insecure or self.token_file or is_loopback(self.host)):
            raise ConfigError(
                f"`host` is {self.host!r}, which other machines can reach, and there is no "
                "`token_file`; give --token-file, or --insecure to let everybody in",
                field="host",
                allowed=["127.0.0.1", "::1", "localhost"],
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            there, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ConfigError(f"`{there}` needs `{missing}` with it", field=missing)
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("`tls_client_ca` needs `tls_cert` and `tls_key`", field="tls_cert")
        for name in ("token_file", "tls_cert", "tls_key", "tls_client_ca"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"`{name}` is {str(path)!r}, which is no file", field=name)

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """What `model_aliases` says."""
        aliases = tuple(Alias.parse(text) for text in self.model_aliases)
        taken = [name.partition("@")[0] for name in (self.model, *self.models)]
        for alias in aliases:
            if alias.name in taken:
                raise ConfigError(
                    f"`model_alias` gives the name {alias.name!r} twice, or a model has it",
                    field="model_alias",
                )
            taken.append(alias.name)
        return aliases

    @property
    def store_addresses(self) -> dict[str, str]:
        """Addresses by name, the default first; empty where `stores` is `none`."""
        addresses: dict[str, str] = {}
        if self.stores == (NO_STORE,):
            return addresses
        for text in self.stores or (f"lance:{self.home / 'vectors'}",):
            match = _NAMED_STORE.fullmatch(text)
            name, address = match.groups() if match else (DEFAULT_STORE, text)
            if name in addresses:
                raise ConfigError(
                    f"`store` gives the name {name!r} twice; name each: NAME=ADDRESS", field="store"
                )
            addresses[name] = address
        return addresses


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _name(field: str) -> str:
    return {"stores": "store", "model_aliases": "model_alias"}.get(field, field.removesuffix("_s"))


OPTIONS: dict[str, Option] = {
    _name(spec.name): Option(field=spec.name, name=_name(spec.name), **spec.metadata)
    for spec in dataclasses.fields(ServeConfig)
}


def nearest(word: str, known: Collection[str]) -> str:
    """`; did you mean X?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
