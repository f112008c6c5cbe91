"""What names of models stand for, and who holds which: a call keeps the one that it began with.

A name stands for one version at a time. A swap lets it stand for another once that is ready, and
the old one retires when its last call has ended. Versions of one name are side by side as
`name@hash`. An alias divides calls among models.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fletcher.config.model_alias import ANY_MODEL, Alias
from fletcher.errors import InvalidCommandError, OverloadedError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_lifecycle import PATIENCE_S, RETRY_MS, GivenUp, ModelLifecycle
from fletcher.serving.model_versions import ModelSource, ServedModel, Version

__all__ = ["DEFAULT_ALIAS", "ModelManager", "ModelSource", "ServedModel"]

log = logging.getLogger(__name__)

# Who names no model gets what this alias says, where there is one.
DEFAULT_ALIAS = "default"


def _never() -> bool:
    return False


class ModelManager:
    """Hands out leases of models, loads and retires them. Thread-safe.

    Args:
        source: Where they come from.
        default: Name of the one for commands that name none.
        loadable: Names that operators may have loaded beside those of the start; ANY_MODEL: all.
        max_bytes: Memory that the processes of all of them may take; 0: all there is.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        source: ModelSource,
        default: str,
        *,
        loadable: Collection[str] = (),
        max_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._default = default
        self._loadable = set(loadable)
        self._life = ModelLifecycle(source, max_bytes, clock)
        self._changed = self._life.changed  # guards all of this, too
        self._current: dict[str, Version] = {}
        self._aliases: dict[str, Alias] = {}

    def start(self, names: Iterable[str], aliases: Iterable[Alias] = ()) -> None:
        """Loads models, the default first, as far as the memory goes; the others on demand.

        Raises:
            FletcherError: One is not there or does not run here, or an alias names another.
        """
        versions = []
        for name in dict.fromkeys((self._default, *names)):
            version = self._life.known(self._source.find_bundle(name))
            self._loadable.add(version.bundle.name)
            if "@" in name:
                self._current.setdefault(version.bundle.name, version)
            else:
                self._current[name] = version
            versions.append(version)
        for alias in aliases:
            self.set_alias(alias)
        self._life.load_now(dict.fromkeys(versions))

    def close(self) -> None:
        """Ends all models. Idempotent."""
        self._life.close()

    # What calls need.

    @contextmanager
    def lease(
        self,
        wanted: str | None,
        *,
        key: str = "",
        held: str | None = None,
        given_up: GivenUp = _never,
    ) -> Iterator[ServedModel]:
        """The model that `wanted` stands for, which stays as it is while the body runs.

        One that is not loaded is loaded first; that is waited for, for a while.

        Args:
            wanted: A command's `model`; None: the default.
            key: Where an alias divides calls, those of the same key stay together; empty: none do.
            held: `name@hash` that the call's dataset has; an alias that has it, too, takes it.
            given_up: Whether the caller has gone away.

        Raises:
            UnknownModelError: There is none of that name, or it takes more memory than it may.
            OverloadedError: It is not loaded yet, or cannot be now.
        """
        key = key or uuid.uuid4().hex
        with self._changed:
            version = self._life.ready(
                lambda: self._choose(wanted, key, held), given_up, patience_s=PATIENCE_S
            )
            model = version.model
            assert model is not None
            version.num_calls += 1
            version.last_used = self._life.clock()
        try:
            yield model
        finally:
            with self._changed:
                version.num_calls -= 1
                version.last_used = self._life.clock()
                self._life.settle(version)

    def splits(self, wanted: str | None) -> bool:
        """Whether a command's `model` leaves a choice."""
        alias = self._aliases.get(DEFAULT_ALIAS if wanted is None else wanted)
        return alias is not None and len(alias.targets) > 1

    # What operators do.

    def load_model(self, name: str, given_up: GivenUp = _never) -> str:
        """Loads a model, and answers its `name@hash` when it is ready.

        Where its name stands for another version already, it is ready beside that.

        Raises:
            UnknownModelError: It may not be loaded, is not installed, or takes more memory than it
                may.
            InvalidCommandError: It is an alias, or runs with exits or int8 ranges of before.
            OverloadedError: It cannot be loaded now.
        """
        bundle = self._look(name)
        with self._changed:
            version = self._installed(bundle, given_up)
            self._current.setdefault(bundle.name, version)
            return version.name

    def swap_model(self, name: str, given_up: GivenUp = _never) -> str:
        """Lets a name stand for the version that is installed under it, or for `name@hash`.

        Calls get that as soon as it is ready; those that began before end with the old one, which
        then retires, unless an alias names it. If it cannot be loaded, nothing changes.

        Raises:
            As `load_model`.
        """
        bundle = self._look(name)
        with self._changed:
            version = self._installed(bundle, given_up)
            old = self._current.get(bundle.name)
            self._current[bundle.name] = version
            if old is not None and old is not version:
                log.info("%s takes the place of %s", version.name, old.name)
                if old.name not in self._needed():
                    self._life.retire(old, keep=False)
            return version.name

    def unload_model(self, name: str, *, force: bool = False) -> str:
        """Takes a version out of service, and answers its `name@hash`; its calls may end.

        Args:
            name: A `name`, or a version as `name@hash`.
            force: Calls that hold it are cut off, and their clients are told to come again; it is
                gone when this answers.

        Raises:
            UnknownModelError: It is not there.
            InvalidCommandError: It is the default, or an alias sends calls to it.
            OverloadedError: It is being loaded.
        """
        with self._changed:
            version = self._current.get(name) or self._life.versions.get(name)
            if version is None:
                raise self._unknown(name)
            self._check_unneeded(version)
            if version.state == "loading":
                raise OverloadedError(
                    f"`model` {version.name} is being loaded; unload it when it is ready",
                    field="model",
                    retry_after_ms=RETRY_MS,
                )
            if self._current.get(version.bundle.name) is version:
                del self._current[version.bundle.name]
            self._life.retire(version, keep=False, force=force)
            if force:
                self._changed.wait_for(lambda: version.state == "gone")
            return version.name

    def set_alias(self, alias: Alias) -> None:
        """Divides calls that ask for a name among models, in place of what it said before.

        Raises:
            UnknownModelError: One of them is not there.
            InvalidCommandError: A model has the alias's name.
        """
        with self._changed:
            if alias.name in self._current:
                raise InvalidCommandError(
                    f"`alias` is {alias.name!r}, which is a model's name; choose another",
                    field="alias",
                )
            for target, _ in alias.targets:
                self._find(target)
            self._aliases[alias.name] = alias
            log.info("alias %s: %s", alias.name, alias.shares)

    def remove_alias(self, name: str) -> None:
        """Lets a name stand for nothing.

        Raises:
            InvalidCommandError: It is no alias.
        """
        with self._changed:
            if self._aliases.pop(name, None) is None:
                raise InvalidCommandError(
                    f"`alias` is {name[:200]!r}, which is none",
                    field="alias",
                    allowed=list(self._aliases),
                )

    # What there is to see.

    @property
    def default(self) -> Version:
        """What calls get that name no model, but for an alias that divides them."""
        with self._changed:
            alias = self._aliases.get(DEFAULT_ALIAS)
            return self._find(alias.targets[0][0] if alias else self._default)

    @property
    def serves(self) -> bool:
        """Whether calls that name no model get what they ask for, now or once it is loaded."""
        version = self.default
        model = version.model
        if version.state == "ready" and model is not None:
            return model.embedder.ready
        return version.cause is None

    def running(self) -> list[Version]:
        """Versions that have processes, in the order in which they came."""
        return self._life.running()

    def queued(self, stage: str) -> int:
        """What waits for a stage of `Embedder.queued`, in all models."""
        models = [one.model for one in self.running()]
        return sum(model.embedder.queued(stage) for model in models if model is not None)

    def queued_windows(self) -> float:
        """Tokens of all models that wait to be planned, in windows."""
        models = [one.model for one in self.running()]
        return sum(model.embedder.queued_windows() for model in models if model is not None)

    def describe(self) -> list[dict[str, Any]]:
        """Each version: its state, its calls and its memory."""
        self._life.measure()
        default = self.default
        with self._changed:
            now = self._life.clock()
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
                for one in self._life.versions.values()
            ]

    def bundles(self) -> dict[str, ModelBundle]:
        """What each version is, by `name@hash`."""
        with self._changed:
            return {one.name: one.bundle for one in self._life.versions.values()}

    def aliases(self) -> dict[str, str]:
        """What each alias stands for, as `Alias.from_text` reads it after the `=`."""
        with self._changed:
            return {name: alias.shares for name, alias in self._aliases.items()}

    # Finding; called with `_changed` held.

    def _choose(self, wanted: str | None, key: str, held: str | None) -> Version:
        name = wanted
        if name is None:
            name = DEFAULT_ALIAS if DEFAULT_ALIAS in self._aliases else self._default
        alias = self._aliases.get(name)
        if alias is None:
            return self._find(name)
        if held is not None:
            for target, _ in alias.targets:
                version = self._find(target)
                if version.name == held:
                    return version
        return self._find(alias.pick_target(key))

    def _find(self, name: str) -> Version:
        version = self._current.get(name) or self._life.versions.get(name)
        if version is None or (version.state == "retiring" and not version.keep):
            raise self._unknown(name)
        return version

    def _unknown(self, name: str) -> UnknownModelError:
        known = [*self._aliases, *self._current, *self._life.versions]
        return UnknownModelError(
            f"`model` is {name[:200]!r}, but this server runs {', '.join(self._life.versions)}",
            field="model",
            allowed=known,
        )

    def _look(self, name: str) -> ModelBundle:
        """An installed bundle, for operators; any version of a name that may be loaded."""
        short = name.partition("@")[0]
        if short in self._aliases:  # of a version, too: the name would stand for two things
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
        return self._source.find_bundle(name)

    def _installed(self, bundle: ModelBundle, given_up: GivenUp) -> Version:
        """The version of an installed bundle, once it is ready, for operators."""
        if self._life.known(bundle).is_outdated(bundle):
            raise InvalidCommandError(
                f"`model` {bundle.qualified_name} runs, with other exit layers or int8 ranges than "
                "are installed by now; unload it first, or start the server again",
                field="model",
            )
        return self._life.ready(lambda: self._life.known(bundle), given_up, insist=True)

    def _needed(self) -> dict[str, str]:
        """Names that calls are sent to without asking for them, and why."""
        needed = {self._default: "callers get it who name no model"}
        for alias in self._aliases.values():
            needed |= {name: f"alias {alias.name} sends calls to it" for name, _ in alias.targets}
        return needed

    def _check_unneeded(self, version: Version) -> None:
        if version.state == "retiring" and not version.keep:
            return
        for name, why in self._needed().items():
            if version in (self._current.get(name), self._life.versions.get(name)):
                raise InvalidCommandError(
                    f"`model` {version.name} is needed: {why}; change that first", field="model"
                )
