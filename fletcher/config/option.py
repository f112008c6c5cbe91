"""Options: their types, limits and help, and how values are read and checked.

Each part of `ServeConfig` is an `OptionGroup`. Its fields that are made by `option` are options.
"""

# Fletcher does this without a library, for the sake of errors: the same message, with the option,
# its source, the value and the allowed values, for a flag, a variable or a TOML value. click and
# the settings libraries check all three, but do not report them alike.

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fletcher.config.model_alias import ANY_MODEL, MODEL_NAME, Alias
from fletcher.errors import ConfigError
from fletcher.util.docstrings import split_docstring
from fletcher.util.paths import is_uri

MIB, GIB = 1 << 20, 1 << 30
DAY_S = 86400
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_SIZE_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 1 << 10, "m": MIB, "g": GIB, "kib": 1 << 10, "mib": MIB, "gib": GIB, "tib": 1 << 40,
}  # fmt: skip
_MODEL = re.compile(rf"{MODEL_NAME}(?:@[0-9a-f]+)?")
_LOADABLE = re.compile(rf"{MODEL_NAME}|{re.escape(ANY_MODEL)}")
_SWITCHES = dict.fromkeys(("1", "true", "yes", "on"), True)
_SWITCHES |= dict.fromkeys(("0", "false", "no", "off"), False)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_size(text: str) -> int:
    """Bytes in `512MiB`, `1GB` or `4096`. Raises ValueError."""
    return round(_quantity(text, _SIZE_UNITS))


def parse_seconds(text: str) -> float:
    """Seconds in `30`, `1.5s`, `200ms`, `2m` or `1h`. Raises ValueError."""
    return _quantity(text, {"": 1, **_SECONDS})


def parse_milliseconds(text: str) -> float:
    """Milliseconds in `5`, `0.5ms` or `2s`. Raises ValueError."""
    return 1000 * _quantity(text, {"": 0.001, **_SECONDS})


def _quantity(text: str, units: Mapping[str, float]) -> float:
    match = _QUANTITY.fullmatch(text.strip())
    if not match or match[2].lower() not in units:
        raise ValueError(text)
    return float(match[1]) * units[match[2].lower()]


def split_list(text: str, comma: str = ",") -> tuple[str, ...]:
    """The parts of a text between commas, stripped; empty parts are dropped."""
    return tuple(name for part in re.split(comma, text) if (name := part.strip()))


def _stores(text: str) -> tuple[str, ...]:
    # A comma separates two addresses only if another address follows it, as paths may hold commas.
    return split_list(text, r",(?=\s*(?:[A-Za-z0-9][\w-]*=)?[a-z]+:)")


def _listed(pattern: re.Pattern[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = split_list(text)
        if not all(pattern.fullmatch(name) for name in names):
            raise ValueError(text)
        return names

    return parse


def _aliases(text: str) -> tuple[str, ...]:
    # A comma separates two aliases only if another `NAME=` follows it.
    parts = split_list(text, r",(?=[^,=]*=)")
    for part in parts:
        Alias.from_text(part)
    return parts


def _file(text: str) -> Path:
    if not text or is_uri(text):
        raise ValueError(text)
    return Path(text).expanduser()


@dataclass(frozen=True, slots=True)
class OptionType:
    """A type of option value.

    `parse` converts the text of a flag, a variable or a TOML string. It raises ValueError or
    KeyError. TOML values of the types `toml` are not parsed; only the items of a list are.
    `minimum` and `maximum` apply to options that do not set their own limits.
    """

    metavar: str
    expected: str
    parse: Callable[[str], Any]
    toml: tuple[type, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


TEXT = OptionType("TEXT", "text, not empty", str)
WHOLE = OptionType("N", "a whole number", int, (int,), 0)
SIZE = OptionType("SIZE", "a size such as 512MiB or 1GB", parse_size, (int,), 0)
# At most a day, because some timers in C fail with longer waits.
SECONDS = OptionType(
    "SECONDS", "seconds, or a time such as 200ms or 2m", parse_seconds, (int, float), 0, DAY_S
)
MILLISECONDS = OptionType(
    "MS", "milliseconds, or a time such as 1s", parse_milliseconds, (int, float), 0, 1000 * DAY_S
)
SWITCH = OptionType("BOOL", "true or false", lambda text: _SWITCHES[text.strip().lower()], (bool,))
STORES = OptionType("STORE", "NAME=ADDRESS or ADDRESS, separated by commas", _stores, (list,))
NAMES = OptionType("MODEL", "NAME or NAME@HASH, separated by commas", _listed(_MODEL), (list,))
LOADABLE = OptionType("MODEL", "names of models without @HASH, or *", _listed(_LOADABLE), (list,))
ALIASES = OptionType("ALIAS", "NAME=MODEL:WEIGHT,MODEL:WEIGHT", _aliases, (list,))
FILE = OptionType("FILE", "a path on this machine", _file)
FOLDER = OptionType("FOLDER", "a path on this machine", _file)
# Types of options that do not name theirs, by the annotation of the field.
_KINDS = {"str": TEXT, "int": WHOLE, "bool": SWITCH, "float": SECONDS, "Path": FILE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of the server.

    `name` is the TOML key; the flag and the variable derive from it. `field` is the name of the
    field that holds the value in the option's part of `ServeConfig`. `pattern` must match the whole
    value. `hidden` holds choices that no help shows, for measurements. `expected` describes the
    allowed values, if the description in `kind` is not enough. A `default` of None means no
    default, or one that is computed.
    """

    name: str
    field: str
    kind: OptionType
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    pattern: str = ""
    expected: str = ""
    minimum: float | None = None
    maximum: float | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "FLETCHER_" + self.name.upper()

    @property
    def allowed(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = self.expected or self.kind.expected
        if self.minimum is not None and self.maximum is not None:
            words += f", from {self.minimum:.12g} to {self.maximum:.12g}"
        elif self.minimum is not None:
            words += f", at least {self.minimum:.12g}"
        return words

    def read_value(self, value: Any, source: str) -> Any:
        """Convert and check the text of a flag or a variable, or a TOML value.

        Raises ConfigError, which names the option, the source, the value and the allowed values.
        """
        try:
            if isinstance(value, str):
                parsed = self.kind.parse(value)
            elif isinstance(value, list) and list in self.kind.toml:
                parsed = tuple(item for text in value for item in self.kind.parse(text) or ("",))
            elif type(value) in self.kind.toml:
                parsed = value
            else:
                raise ValueError(value)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._refusal(value, source) from None
        if not self._fits(parsed):
            raise self._refusal(value, source)
        return parsed

    def check_value(self, value: Any, source: str = "the program") -> None:
        """Raise ConfigError if a value is not allowed."""
        if not self._fits(value):
            raise self._refusal(value, source)

    def _fits(self, value: Any) -> bool:
        if value is None:
            return True
        if isinstance(value, tuple):
            return all(value)
        if self.choices:
            return value in (*self.choices, *self.hidden)
        if isinstance(value, str):
            return bool(re.fullmatch(self.pattern or ".+", value))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = -math.inf if self.minimum is None else self.minimum
            return low <= value <= (math.inf if self.maximum is None else self.maximum)
        return True

    def _refusal(self, value: Any, source: str) -> ConfigError:
        return ConfigError(
            f"`{self.name}` is {value!r} (from {source}), expected {self.allowed}",
            field=self.name,
            allowed=self.choices or [self.allowed],
        )


def option(default: Any, kind: OptionType | None = None, **limits: Any) -> Any:
    """Make a dataclass field that is an option.

    `limits` are further fields of `Option`, such as `choices`.

    Without `kind` the field's annotation determines the type. The option's help is the field's
    entry under `Attributes` in the docstring of the class.
    """
    metadata = {"kind": kind, **limits}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def options_of(part: type) -> tuple[Option, ...]:
    """The options among the fields of a dataclass, in the order of the fields."""
    _, texts = split_docstring(part.__doc__, "Attributes")
    found = []
    for spec in dataclasses.fields(part):
        if spec.metadata:
            kind = spec.metadata["kind"] or _KINDS[str(spec.type).removesuffix(" | None")]
            limits = {"minimum": kind.minimum, "maximum": kind.maximum, **spec.metadata}
            default = None if spec.default is dataclasses.MISSING else spec.default
            named = {"name": spec.name.removesuffix("_s"), **limits, "kind": kind}
            found.append(
                Option(field=spec.name, help=texts.get(spec.name, ""), default=default, **named)
            )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionGroup:
    """Base of a part of `ServeConfig`, which checks its values when constructed.

    Raises ConfigError for values out of range, or for options that contradict each other.
    """

    def __post_init__(self) -> None:
        part: type = type(self)
        for one in options_of(part):
            one.check_value(getattr(self, one.field))
        self._check_together()

    def _check_together(self) -> None:
        """Hook for subclasses: raise ConfigError if options contradict each other."""


def nearest(word: str, known: Collection[str]) -> str:
    """The hint `; did you mean X?`, or an empty string if no known word is similar."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
