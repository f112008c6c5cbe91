"""All options of the server, declared once in the parts of `ServeConfig`.

Each part of `ServeConfig` declares its options as fields. A flag, an environment variable and a
TOML key derive from each field: `limits.max_streams` is `--max-streams`, `FLETCHER_MAX_STREAMS` and
`max_streams = 256`. For a field in seconds they drop the `_s` (`drain_timeout_s` is
`--drain-timeout`), because the given value may name another unit (`2m`).
`fletcher.config.resolution` reads the flags, variables and keys.
"""

# ruff: noqa: RUF009  (`option` makes a dataclass field, no default value)

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fletcher.config.delivery import DEFAULT_STORE, NO_STORE, DeliveryConfig, JournalConfig
from fletcher.config.engine import EngineConfig, WorkerConfig
from fletcher.config.model import CacheConfig, ModelConfig, OutputConfig
from fletcher.config.network import NetworkConfig
from fletcher.config.option import (
    FOLDER,
    GIB,
    MIB,
    SIZE,
    Option,
    OptionGroup,
    nearest,
    option,
    options_of,
)
from fletcher.errors import ConfigError

_NAMED_STORE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)", re.DOTALL)
# Share of `max_memory` for data in flight. The rest is for dedupe indexes, code and libraries.
_BUDGET_SHARE = 0.5
# Share of `max_memory` for dedupe indexes. By default that is enough for some 15 million ids (17
# bytes each), or 8 million ids with hashes of their texts (32 bytes each).
_DEDUPE_SHARE = 0.125


def fletcher_home(environ: Mapping[str, str] | None = None) -> Path:
    """Folder of models, journals and caches.

    It is FLETCHER_HOME, else XDG_DATA_HOME/fletcher, else ~/.local/share/fletcher.
    """
    environ = os.environ if environ is None else environ
    if home := environ.get("FLETCHER_HOME"):
        return Path(home).expanduser()
    # The XDG base directory specification says to ignore relative paths.
    data = Path(environ.get("XDG_DATA_HOME") or "")
    return (data if data.is_absolute() else Path("~/.local/share").expanduser()) / "fletcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig(OptionGroup):
    """Bounds on calls, memory and messages.

    Attributes:
        max_streams: Maximum number of open calls. A higher limit admits more callers, and each open
            call may hold one message in memory.
        idle_timeout_s: Time after which a call ends whose client sends and takes nothing, 0: never.
            A shorter time frees places among `max_streams` sooner, but ends calls of clients that
            pause for longer. Calls that wait for vectors or acknowledgements never end so.
        max_memory: Memory for work in progress. With a lower limit, callers have to wait earlier.
        max_message_bytes: Largest decoded message. Each open call may hold one message in memory.
        max_row_bytes: Largest text. A row with a larger text fails, without effect on other rows.
        drain_timeout_s: Time after SIGTERM in which accepted rows can still reach their stores.
    """

    max_streams: int = option(256, minimum=1)
    idle_timeout_s: float = option(600)
    max_memory: int = option(2 * GIB, SIZE)
    max_message_bytes: int = option(64 * MIB, SIZE, minimum=1)
    max_row_bytes: int = option(16 * MIB, SIZE, minimum=1)
    drain_timeout_s: float = option(30)

    def _check_together(self) -> None:
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

    @property
    def budget_bytes(self) -> int:
        """Memory for data in flight, in bytes."""
        return int(self.max_memory * _BUDGET_SHARE)

    @property
    def dedupe_bytes(self) -> int:
        """Memory for the dedupe indexes of all datasets, in bytes."""
        return int(self.max_memory * _DEDUPE_SHARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig(OptionGroup):
    """Level and format of the log, and destination of traces and metrics.

    Attributes:
        log_level: Least severe level of log lines on standard error.
        log_format: Format of log lines: text for people, json for log collectors.
        otlp_endpoint: OTLP/HTTP URL that receives traces and metrics. Exporting makes each call
            slightly slower.
    """

    log_level: str = option("info", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", choices=("text", "json"))
    otlp_endpoint: str | None = option(
        None, pattern=r"https?://.+", expected="an http:// or https:// URL"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """All options of a server, checked. Use `from_options` to construct it.

    The unit of a value follows from its name: bytes, seconds (`_s`), milliseconds (`_ms`) or a
    count.

    Attributes:
        home: Folder of models, journals and caches. A model takes about 100 MB.

    Raises:
        ConfigError: A value out of range, or options that contradict each other.
    """

    network: NetworkConfig
    model: ModelConfig
    output: OutputConfig
    cache: CacheConfig
    engine: EngineConfig
    workers: WorkerConfig
    delivery: DeliveryConfig
    journal: JournalConfig
    limits: LimitsConfig
    telemetry: TelemetryConfig
    home: Path = option(fletcher_home, FOLDER)

    @classmethod
    def from_options(cls, **values: Any) -> ServeConfig:
        """Make a configuration from values by option name, such as `port` or `store`.

        Raises ConfigError for a value out of range, or for options that contradict each other.
        Raises TypeError for an option that does not exist.
        """
        home = values.pop("home", None) or fletcher_home()
        fields: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for name, value in values.items():
            if name not in OPTIONS:
                raise TypeError(f"{name!r} is not an option{nearest(name, OPTIONS)}")
            fields[PART_OF[name]][OPTIONS[name].field] = value
        fields["journal"]["folder"] = home / "journal"
        fields["delivery"]["max_dedupe_bytes"] = LimitsConfig(**fields["limits"]).dedupe_bytes
        return cls(home=home, **{part: PARTS[part](**fields[part]) for part in PARTS})

    def with_options(self, **values: Any) -> ServeConfig:
        """A copy with some values replaced. Raises the same errors as `from_options`."""
        return self.from_options(**{name: self.value_of(name) for name in OPTIONS} | values)

    def value_of(self, name: str) -> Any:
        """The value of the option with a name, such as `port`."""
        part = PART_OF[name]
        return getattr(getattr(self, part) if part else self, OPTIONS[name].field)

    def __post_init__(self) -> None:
        if self.workers.tokenizer == "null" and self.engine.backend != "null":
            raise ConfigError(
                "`tokenizer` is 'null', whose tokens no model understands, and `backend` is "
                f"{self.engine.backend!r}; give --backend null with it",
                field="tokenizer",
                allowed=["model"],
            )
        _ = self.store_addresses

    @property
    def store_addresses(self) -> dict[str, str]:
        """Store addresses by store name, the default first; empty if the store is `none`."""
        addresses: dict[str, str] = {}
        if self.delivery.stores == (NO_STORE,):
            return addresses
        for text in self.delivery.stores or (f"lance:{self.home / 'vectors'}",):
            match = _NAMED_STORE.fullmatch(text)
            name, address = match.groups() if match else (DEFAULT_STORE, text)
            if name in addresses:
                raise ConfigError(
                    f"`store` has the name {name!r} twice; name each: NAME=ADDRESS", field="store"
                )
            addresses[name] = address
        return addresses


PARTS: dict[str, Any] = {
    name: part for name, part in get_type_hints(ServeConfig).items() if name != "home"
}
# Options by name, in the order of the help and of `--print-config`.
OPTIONS: dict[str, Option] = {
    one.name: one for part in (*PARTS.values(), ServeConfig) for one in options_of(part)
}
# Name of the part that holds each option, by option name; empty for `home`.
PART_OF = {one.name: part for part in PARTS for one in options_of(PARTS[part])} | {"home": ""}
