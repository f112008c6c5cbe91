"""Names of models: the version that a call gets, and changes by operators.

A name stands for one version at a time. A swap makes the name stand for another version as soon as
that version is ready. The old version retires after its last call. Several versions of one model
can run side by side, each under its `name@hash`. An alias divides calls between models. A call
keeps the version that it began with.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fletcher.config.model_alias import ANY_MODEL, Alias
from fletcher.errors import InvalidCommandError, ModelError, OverloadedError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_lifecycle import (
    IsCancelled,
    ModelLifecycle,
    ModelTiming,
    damaged_model,
)
from fletcher.serving.model_versions import ModelSource, ModelVersion, ServedModel

log = logging.getLogger(__name__)

# Alias for commands that name no model, if an alias of this name is set.
DEFAULT_ALIAS = "default"


class ModelManager:
    """Models by name: leases for calls, changes by operators. Thread-safe.

    Args:
        default: The model of commands that name none.
        loadable: Names of models that operators may load, besides the names passed to `start`.
            ANY_MODEL permits all.
        max_bytes: Most memory for the processes of all models, in bytes; 0: no limit.
        clock: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        source: ModelSource,
        default: str,
        *,
        loadable: Collection[str] = (),
        max_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
        timing: ModelTiming | None = None,
    ) -> None:
        self._source = source
        self._default = default
        self._loadable = set(loadable)
        self._lifecycle = ModelLifecycle(source, max_bytes, clock, timing or ModelTiming())
        self._changed = self._lifecycle.changed  # guards `_current` and `_aliases`, too
        self._current: dict[str, ModelVersion] = {}
        self._aliases: dict[str, Alias] = {}

    def start(self, names: Iterable[str], aliases: Iterable[Alias] = ()) -> None:
        """Load models while memory lasts, the default model first.

        Models that do not fit are loaded when a call asks for them. Raises FletcherError if a model
        is not installed or cannot be loaded, or if an alias names a model that is not among these
        models.
        """
        for name in dict.fromkeys((self._default, *names)):
            version = self._lifecycle.version_of(self._source.find_bundle(name))
            self._loadable.add(version.bundle.name)
            if "@" in name:
                self._current.setdefault(version.bundle.name, version)
            else:
                self._current[name] = version
        for alias in aliases:
            self.set_alias(alias)
        self._lifecycle.load_at_start()

    def close(self) -> None:
        """Close all models. Idempotent."""
        self._lifecycle.close()

    # For calls.

    @contextmanager
    def lease(
        self,
        name: str | None,
        *,
        alias_key: str = "",
        dataset_model: str | None = None,
        is_cancelled: IsCancelled = lambda: False,
    ) -> Iterator[ServedModel]:
        """Lease the model that a name stands for: keep it loaded while the body runs.

        If the model is not loaded, the call loads it and waits up to `ModelTiming.call_wait_s`.

        Args:
            name: A command's `model`; None: the default model.
            alias_key: Calls with the same key get the same model of an alias; empty: a random one.
            dataset_model: Model to choose if it is one of the alias' models, as `name@hash`.
            is_cancelled: Returns whether the client is gone.

        Raises:
            UnknownModelError: No model has that name, or the model is damaged or needs too much
                memory.
            OverloadedError: The model is not loaded in time, or cannot be loaded now.
        """
        key = alias_key or uuid.uuid4().hex
        with self._changed:
            version = self._lifecycle.wait_ready(
                lambda: self._choose_version(name, key, dataset_model),
                is_cancelled,
                timeout_s=self._lifecycle.timing.call_wait_s,
            )
            assert version.model is not None
            model = version.model
            version.num_calls += 1
            version.last_used = self._lifecycle.clock()
        try:
            yield model
        finally:
            with self._changed:
                version.num_calls -= 1
                version.last_used = self._lifecycle.clock()
                with contextlib.suppress(OverloadedError):  # closed after a later call
                    self._lifecycle.close_unused(version)

    def is_divided(self, name: str | None) -> bool:
        """Whether a command's `model` is an alias of several models."""
        alias = self._find_alias(name)
        return alias is not None and len(alias.targets) > 1

    # For operators.

    def load_model(self, name: str, is_cancelled: IsCancelled = lambda: False) -> str:
        """Load a model, and return its `name@hash` when it is ready.

        If the name already stands for another version, both versions run side by side.

        Raises:
            UnknownModelError: Loading the model is not permitted, or the model is not installed,
                is damaged or needs too much memory.
            InvalidCommandError: The name is an alias, or the version runs with other exits or int8
                ranges than the installed bundle has.
            OverloadedError: The model cannot be loaded now.
        """
        bundle = self._find_loadable(name)
        with self._changed:
            version = self._load_version(bundle, is_cancelled)
            self._current.setdefault(bundle.name, version)
            return version.name

    def swap_model(self, name: str, is_cancelled: IsCancelled = lambda: False) -> str:
        """Make a model's name stand for its installed version, or for `name@hash`.

        New calls get the new version as soon as it is ready. Earlier calls keep the old version,
        which then retires unless an alias names it. If the new version cannot be loaded, nothing
        changes. Raises the same errors as `load_model`.
        """
        bundle = self._find_loadable(name)
        with self._changed:
            version = self._load_version(bundle, is_cancelled)
            old = self._current.get(bundle.name)
            self._current[bundle.name] = version
            if old is not None and old is not version:
                log.info("%s replaces %s", version.name, old.name)
                if old.name not in self._targets():
                    self._lifecycle.retire(old, returns=False)
            return version.name

    def unload_model(self, name: str, *, force: bool = False) -> str:
        """Take a version out of service, and return its `name@hash`.

        Calls that use the version run to their end. With `force`, these calls end with a retryable
        error, and the version is closed before this method returns.

        Raises:
            UnknownModelError: The server has no version of that name.
            InvalidCommandError: The version is the default, or an alias sends calls to it.
            OverloadedError: The version is being loaded.
        """
        with self._changed:
            version = self._current.get(name) or self._lifecycle.versions.get(name)
            if version is None:
                raise self._unknown_model(name)
            self._check_not_needed(version)
            if version.state == "loading":
                raise self._lifecycle.overloaded(
                    f"`model` {version.name} is being loaded; unload it when it is ready"
                )
            if self._current.get(version.bundle.name) is version:
                del self._current[version.bundle.name]
            self._lifecycle.retire(version, returns=False, force=force)
            if force:
                self._changed.wait_for(lambda: version.state == "gone")
            return version.name

    def set_alias(self, alias: Alias) -> None:
        """Divide calls for a name between models; replace an alias of the same name.

        Raises:
            UnknownModelError: The server does not have one of the models.
            InvalidCommandError: A model has the alias' name.
        """
        with self._changed:
            if alias.name in self._current:
                raise InvalidCommandError(
                    f"`alias` is {alias.name!r}, which is a model's name; choose another",
                    field="alias",
                )
            for target, _ in alias.targets:
                self._find_version(target)
            self._aliases[alias.name] = alias
            log.info("alias %s: %s", alias.name, alias.shares)

    def remove_alias(self, name: str) -> None:
        """Remove an alias. Raises InvalidCommandError if there is no such alias."""
        with self._changed:
            if self._aliases.pop(name, None) is None:
                known = list(self._aliases)
                raise InvalidCommandError(
                    f"unknown `alias` {name[:200]!r}; known: {', '.join(known) or 'none'}",
                    field="alias",
                    allowed=known,
                )

    # For statistics.

    @property
    def default(self) -> ModelVersion:
        """Version for commands that name no model.

        If the alias `default` is set, this is the version of the alias' first model.
        """
        with self._changed:
            alias = self._find_alias(None)
            return self._find_version(alias.targets[0][0] if alias else self._default)

    @property
    def serves(self) -> bool:
        """Whether the default model is ready, or can be loaded when a call asks for it."""
        version = self.default
        if version.state == "ready" and version.model is not None:
            return version.model.embedder.ready
        return version.cause is None

    def running(self) -> dict[str, ServedModel]:
        """Models that have processes, by `name@hash`, in the order of first use."""
        return {version.name: model for version, model in self._lifecycle.running()}

    def queued(self, stage: str) -> int:
        """Number of items in one of the queues of `Embedder.queued`, over all models."""
        return sum(model.embedder.queued(stage) for model in self.running().values())

    def queued_windows(self) -> float:
        """Backlog of all models: tokens that are in no micro-batch yet, in batch windows."""
        return sum(model.embedder.queued_windows() for model in self.running().values())

    def describe(self) -> list[dict[str, Any]]:
        """State, calls and memory of each version, in types that JSON has."""
        self._lifecycle.measure_memory()
        default = self.default
        with self._changed:
            now = self._lifecycle.clock()
            return [
                {
                    "name": one.bundle.name,
                    "hash": one.bundle.hash,
                    "state": one.state,
                    "is_default": one is default,
                    "is_current": self._current.get(one.bundle.name) is one,
                    "calls": one.num_calls,
                    "memory_bytes": one.memory_bytes if one.model is not None else 0,
                    "idle_s": round(now - one.last_used, 3) if one.idle else None,
                    "failed": one.cause is not None,
                }
                for one in self._lifecycle.versions.values()
            ]

    def bundles(self) -> dict[str, ModelBundle]:
        """Each version's bundle, by `name@hash`."""
        with self._changed:
            return {one.name: one.bundle for one in self._lifecycle.versions.values()}

    def aliases(self) -> dict[str, str]:
        """Each alias' models and weights: MODEL:WEIGHT,MODEL:WEIGHT."""
        with self._changed:
            return {name: alias.shares for name, alias in self._aliases.items()}

    # The caller holds `_changed`.

    def _choose_version(
        self, name: str | None, key: str, dataset_model: str | None
    ) -> ModelVersion:
        alias = self._find_alias(name)
        if alias is None:
            return self._find_version(self._default if name is None else name)
        if dataset_model is not None:
            for target, _ in alias.targets:
                version = self._find_version(target)
                if version.name == dataset_model:
                    return version
        return self._find_version(alias.pick_target(key))

    def _find_alias(self, name: str | None) -> Alias | None:
        return self._aliases.get(DEFAULT_ALIAS if name is None else name)

    def _find_version(self, name: str) -> ModelVersion:
        version = self._current.get(name) or self._lifecycle.versions.get(name)
        if version is None or version.is_leaving:
            raise self._unknown_model(name)
        return version

    def _unknown_model(self, name: str) -> UnknownModelError:
        versions = self._lifecycle.versions
        return UnknownModelError(
            f"`model` is {name[:200]!r}, but this server runs {', '.join(versions)}",
            field="model",
            allowed=[*self._aliases, *self._current, *versions],
        )

    def _load_version(self, bundle: ModelBundle, is_cancelled: IsCancelled) -> ModelVersion:
        """Load the version of an installed bundle."""
        if self._lifecycle.version_of(bundle).is_outdated(bundle):
            raise InvalidCommandError(
                f"`model` {bundle.qualified_name} runs with other exit layers or int8 ranges than "
                "are installed now; unload it first, or restart the server",
                field="model",
            )
        return self._lifecycle.wait_ready(
            lambda: self._lifecycle.version_of(bundle), is_cancelled, retry_failed=True
        )

    def _targets(self) -> dict[str, str]:
        """Names of models that are the default or in an alias, each with the reason."""
        targets = {self._default: "it is the default"}
        for alias in self._aliases.values():
            targets |= {name: f"alias {alias.name} sends calls to it" for name, _ in alias.targets}
        return targets

    def _check_not_needed(self, version: ModelVersion) -> None:
        if version.is_leaving:
            return
        for name, why in self._targets().items():
            if version in (self._current.get(name), self._lifecycle.versions.get(name)):
                raise InvalidCommandError(
                    f"`model` {version.name} is needed: {why}; change that first", field="model"
                )

    def _find_loadable(self, name: str) -> ModelBundle:
        """Find an installed bundle by a permitted name, or by its `name@hash`."""
        short = name.partition("@")[0]
        if short in self._aliases:  # a model of that name would make the name ambiguous
            raise InvalidCommandError(
                f"`model` is {name!r}, but {short} is an alias; name a model", field="model"
            )
        if short not in self._loadable and ANY_MODEL not in self._loadable:
            allowed = sorted(self._loadable)
            raise UnknownModelError(
                f"`model` is {name[:200]!r}, but this server may load {', '.join(allowed)}; its "
                "option --loadable-models lets it load others",
                field="model",
                allowed=allowed,
            )
        try:
            return self._source.find_bundle(name)
        except ModelError as error:
            raise damaged_model(error) from None
