"""All options of the server, declared once in the parts of `ServeConfig`.

Each part of `ServeConfig` declares its options as fields. A flag, an environment variable and a
TOML key derive from each: `limits.max_streams` is `--max-streams`, `FLETCHER_MAX_STREAMS` and
`max_streams = 256`. A duration in seconds drops its `_s` (`drain_timeout_s` is `--drain-timeout`),
for its value may name another unit (`2m`). `fletcher.config.resolution` reads them.
"""

# ruff: noqa: RUF009  (`option` makes a dataclass field, no default value)

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.config.delivery import DEFAULT_STORE, NO_STORE, DeliveryConfig
from fletcher.config.engine import EngineConfig, WorkerConfig
from fletcher.config.journal import JournalConfig
from fletcher.config.limits import LimitsConfig
from fletcher.config.model import CacheConfig, ModelConfig, OutputConfig
from fletcher.config.network import NetworkConfig
from fletcher.config.option import FOLDER, Option, nearest, option, options_of
from fletcher.config.telemetry import TelemetryConfig
from fletcher.errors import ConfigError

_NAMED_STORE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)", re.DOTALL)


def fletcher_home(environ: Mapping[str, str] | None = None) -> Path:
    """Folder of models, journals and caches.

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
    """All options of a server, checked; made by `from_options`.

    Values are in bytes, seconds (`_s`), milliseconds (`_ms`) or counts, as their names say.

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
        """Makes a configuration of values by option name, such as `port` or `store`.

        Other options have their defaults.

        Raises:
            ConfigError: A value out of range, or options that contradict each other.
            TypeError: An option that does not exist.
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
        """The configuration with some values replaced. Raises as `from_options`."""
        return self.from_options(**{name: self.value_of(name) for name in OPTIONS} | values)

    def value_of(self, name: str) -> Any:
        """The value of an option, by its name."""
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
        """Addresses by name, the default first; empty if the only store is `none`."""
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
    "network": NetworkConfig,
    "model": ModelConfig,
    "output": OutputConfig,
    "cache": CacheConfig,
    "engine": EngineConfig,
    "workers": WorkerConfig,
    "delivery": DeliveryConfig,
    "journal": JournalConfig,
    "limits": LimitsConfig,
    "telemetry": TelemetryConfig,
}
# By option name, in the order of help and of `--print-config`.
OPTIONS: dict[str, Option] = {
    one.name: one for part in (*PARTS.values(), ServeConfig) for one in options_of(part)
}
# By option name, the part that holds it; empty for `home`.
PART_OF = {one.name: part for part in PARTS for one in options_of(PARTS[part])} | {"home": ""}
