"""The options that flags, environment and file set, and the source of each value.

If several sources set an option, a flag wins over an environment variable, and the variable over
the configuration file. An option that no source sets has its default.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.config.option import nearest
from fletcher.config.server import OPTIONS, ServeConfig, fletcher_home
from fletcher.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, the source of each value that is not a default, and warnings.

    The warnings are about environment variables that look like misspelt options.
    """

    config: ServeConfig
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def to_toml(self) -> str:
        """The options as a TOML file, with each option's source in a comment."""
        lines = []
        for name in OPTIONS:
            value = self.config.value_of(name)
            if value is None:
                lines.append(f"# {name} is not set")
            else:
                lines.append(f"{name} = {_toml(value)}  # {self.sources.get(name, 'default')}")
        return "\n".join(lines) + "\n"


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    *,
    only: Collection[str] | None = None,
) -> Resolved:
    """Combine flags, environment and configuration file into one configuration.

    The value of a flag is a text, or a list of texts for a repeatable option. Without `file` the
    file that FLETCHER_CONFIG names is read. If `only` is given, options outside it keep their
    defaults. Raises ConfigError, which names the option, its source, the value and the allowed
    values.
    """
    if file is None and environ.get("FLETCHER_CONFIG"):
        file = Path(environ["FLETCHER_CONFIG"]).expanduser()
    in_file = {} if file is None else _read_file(file)
    values: dict[str, Any] = {"home": fletcher_home(environ)}
    sources: dict[str, str] = {}
    for name, option in OPTIONS.items():
        if only is not None and name not in only:
            continue
        if name in flags:
            given, source = flags[name], option.flag
        elif environ.get(option.variable):
            given, source = environ[option.variable], option.variable
        elif name in in_file:
            given, source = in_file[name], str(file)
        else:
            continue
        values[name] = option.read_value(given, source)
        sources[name] = source
    return Resolved(ServeConfig.from_options(**values), sources, misspelt_variables(environ))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"`config` is {str(path)!r}, which cannot be read: {error.strerror}", field="config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`config` {str(path)!r} is not TOML: {error}", field="config") from None
    except RecursionError:
        raise ConfigError(f"`config` {str(path)!r} is nested too deep", field="config") from None
    for key, value in values.items():
        if key not in OPTIONS:
            hint = nearest(key, OPTIONS)
            if isinstance(value, dict):
                hint = "; the file has no tables: write options as NAME = VALUE"
            raise ConfigError(
                f"`{key}` in {str(path)!r} is not an option{hint}",
                field=key,
                allowed=sorted(OPTIONS),
            )
    return values


def misspelt_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Warnings about environment variables that look like misspelt options."""
    # Warns of similar names only, because other programs may use FLETCHER_ variables, too.
    known = {option.variable for option in OPTIONS.values()} | {"FLETCHER_CONFIG"}
    strange = sorted(name for name in environ if name.startswith("FLETCHER_") and name not in known)
    return tuple(
        f"{name} is not an option{hint}" for name in strange if (hint := nearest(name, known))
    )


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # Strings, numbers and booleans are written the same way in JSON and TOML.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
