"""Options of models: which are served or loadable, their vectors and the cache."""

# ruff: noqa: RUF009  (`option` makes a dataclass field, no default value)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fletcher.config.model_alias import Alias
from fletcher.config.option import ALIASES, FOLDER, LOADABLE, MIB, NAMES, SIZE, OptionGroup, option
from fletcher.errors import ConfigError

# Allowed values of the option `int8`; `core.quantization` explains `row` and `ranges`.
INT8_KINDS = ("auto", "row", "ranges")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(OptionGroup):
    """The models of a server, their aliases and the memory for all of them.

    Attributes:
        default: Model for calls that name no model.
        models: Further model to serve, as NAME or NAME@HASH; repeatable. Each model runs in its own
            processes and has its own memory. All models share the CPU cores.
        loadable_models: Model that callers may load and swap while the server runs; repeatable, *
            for all installed models. Any caller may then make the server spend memory on it.
        model_aliases: NAME=MODEL:WEIGHT,MODEL:WEIGHT divides the calls for NAME among models;
            repeatable. The alias `default` divides calls that name no model.
        max_model_memory: Memory for the processes of all models, 0: no limit. Above this limit the
            least recently used model is unloaded. The next call for it waits until it is loaded
            again.
    """

    default: str = option("all-MiniLM-L6-v2", name="model")
    models: tuple[str, ...] = option((), NAMES)
    loadable_models: tuple[str, ...] = option((), LOADABLE)
    model_aliases: tuple[str, ...] = option((), ALIASES, name="model_alias")
    max_model_memory: int = option(0, SIZE)

    def _check_together(self) -> None:
        _ = self.aliases

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """`model_aliases`, parsed. Raises ConfigError for a name given twice."""
        aliases = tuple(Alias.from_text(text) for text in self.model_aliases)
        taken = [name.partition("@")[0] for name in (self.default, *self.models)]
        for alias in aliases:
            if alias.name in taken:
                raise ConfigError(
                    f"`model_alias` has the name {alias.name!r} twice, or a model has that name; "
                    "choose another",
                    field="model_alias",
                )
            taken.append(alias.name)
        return aliases


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig(OptionGroup):
    """Widths and types of the vectors that callers may ask for.

    Attributes:
        allow_undeclared: Accept `dims` that a model does not declare. How much quality such vectors
            lose is unknown.
        int8: Scale of int8 vectors. row: each vector has a scale, which takes 4 bytes; nothing is
            clipped. ranges: the ranges of `fletcher model calibrate`; values outside are clipped.
            auto: ranges if the model has them, else row.
    """

    allow_undeclared: bool = option(False)
    int8: str = option(INT8_KINDS[0], choices=INT8_KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig(OptionGroup):
    """Embedding cache: vectors of earlier texts, in memory or on disk.

    Attributes:
        max_bytes: Memory for vectors of texts seen before, in addition to --max-memory; 0: no
            cache. Use a cache if texts repeat. If none do, it only costs a hash of each text.
        folder: Keep the embedding cache in a file in this folder. Needs an --embedding-cache of at
            least 64MiB. The cache then survives restarts, but lookups are slower than in memory.
    """

    max_bytes: int = option(0, SIZE, name="embedding_cache")
    folder: Path | None = option(None, FOLDER, name="embedding_cache_dir")

    def _check_together(self) -> None:
        if self.folder is not None and self.max_bytes < 64 * MIB:
            raise ConfigError(
                f"`embedding_cache` is {self.max_bytes}, expected at least 64MiB with "
                "`embedding_cache_dir`",
                field="embedding_cache",
            )
