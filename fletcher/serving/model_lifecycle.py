"""How models come and go: loaded off the way of calls, retired when nobody holds them any more.

A version is `configured` until somebody asks for it, then `loading` and `ready`; `retiring` it
takes no new calls, and its processes end with its last one. Under a memory budget those that were
not used for longest make room, and are `configured` again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from fletcher.errors import DrainingError, FletcherError, OverloadedError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_versions import ModelSource, ServedModel, Version

log = logging.getLogger(__name__)

# How long a model waits for others to make room.
PATIENCE_S = 30.0
RETRY_MS = 2000
# A model that could not be loaded is not tried by every call that asks for it.
_FAILED_S = 30.0
_POLL_S = 0.1
_MEASURE_S = 5.0
# An engine that hangs while it loads does not keep the server from ending.
_CLOSE_S = 10.0

GivenUp = Callable[[], bool]


class ModelLifecycle:
    """All versions of a server's models. Thread-safe.

    Args:
        source: Where models come from.
        max_bytes: Memory that the processes of all of them may take; 0: all there is.
        clock: Seconds that only grow.
    """

    def __init__(
        self, source: ModelSource, max_bytes: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.changed = threading.Condition()
        self.versions: dict[str, Version] = {}  # by name@hash; guarded by `changed`, as are they
        self._source = source
        self._max_bytes = max_bytes
        self._loading = threading.Lock()  # one at a time: each measures what the others left
        self._closed = threading.Event()

    def known(self, bundle: ModelBundle) -> Version:
        """The version of a bundle, which may be new."""
        return self.versions.setdefault(bundle.qualified_name, Version(bundle))

    def running(self) -> list[Version]:
        """Versions that have processes, in the order in which they came."""
        with self.changed:
            return [one for one in self.versions.values() if one.model is not None]

    def ready(
        self,
        choose: Callable[[], Version],
        given_up: GivenUp,
        *,
        patience_s: float = float("inf"),
        insist: bool = False,
    ) -> Version:
        """The version that `choose` names, loaded if need be; called with `changed` held.

        Args:
            choose: Asked again after every change.
            given_up: Whether whoever asked has gone away.
            patience_s: How long to wait.
            insist: Load also what could not be loaded a moment ago.

        Raises:
            OverloadedError: It is not loaded yet, or cannot be now.
            UnknownModelError: It takes more memory than it may.
        """
        deadline = self.clock() + patience_s
        seen_loading = None
        while True:
            version = choose()
            if self._closed.is_set():
                raise DrainingError("the server is shutting down", retry_after_ms=RETRY_MS)
            if version.state == "retiring" and not version.closing:  # its last call goes on
                version.state = "ready"
            if version.state == "ready":
                return version
            if version.state == "configured":
                recent = not insist and self.clock() < version.failed_until
                if version.failure is not None and (recent or version is seen_loading):
                    raise version.failure
                self._begin(version)
                name = f"load {version.name}"
                threading.Thread(target=self._come, args=(version,), name=name, daemon=True).start()
            if version.state == "loading":
                seen_loading = version
            if given_up() or self.clock() >= deadline:
                raise OverloadedError(
                    f"`model` {version.name} is being loaded; try again later",
                    field="model",
                    retry_after_ms=RETRY_MS,
                )
            self.changed.wait(_POLL_S)

    def load_now(self, versions: Iterable[Version]) -> None:
        """Loads versions here, as far as the memory goes; the first in any case.

        Raises:
            FletcherError: One does not run here.
        """
        for index, version in enumerate(versions):
            if index and self._used() + version.needed_bytes > self._most_bytes:
                log.info("%s is loaded when it is asked for: no room", version.name)
                continue
            self._begin(version)
            self._load(version)
            if version.cause is not None:
                raise version.cause
            if index and self._used() > self._most_bytes:  # its files told less than the truth
                with self.changed:
                    self.retire(version, keep=True)
        if self._max_bytes:
            threading.Thread(target=self._watch, name="models", daemon=True).start()

    def retire(self, version: Version, *, keep: bool, force: bool = False) -> None:
        """No new calls, and with `force` an end to those that hold it; `changed` is held."""
        version.state, version.keep = "retiring", keep
        self.settle(version, force=force)

    def settle(self, version: Version, *, force: bool = False) -> None:
        """A call has ended, or something has changed; called with `changed` held."""
        unheld = force or not version.num_calls
        if version.state == "retiring" and unheld and not version.closing:
            version.closing = True
            name = f"close {version.name}"
            threading.Thread(target=self._close, args=(version,), name=name, daemon=True).start()
        self.changed.notify_all()

    def measure(self) -> None:
        """Asks the kernel what models take, where that was long ago."""
        for one in self.running():
            model = one.model
            if model is not None and self.clock() - one.measured >= _MEASURE_S:
                one.measured = self.clock()
                one.memory_bytes = model.embedder.memory_bytes() or one.memory_bytes

    def balance(self) -> None:
        """Unloads idle models until those that run are within bounds; the last used stays."""
        self.measure()
        with self.changed:
            ready = [one for one in self.versions.values() if one.state == "ready"]
            idle = sorted((one for one in ready if one.idle), key=lambda one: one.last_used)
            for one in idle if len(idle) < len(ready) else idle[:-1]:
                if self._used(closing=False) > self._most_bytes:
                    self.retire(one, keep=True)

    def close(self) -> None:
        """Ends all models. Idempotent."""
        with self.changed:
            self._closed.set()
            self.changed.notify_all()
        if self._loading.acquire(timeout=_CLOSE_S):
            self._loading.release()
        models = [one.model for one in self.running() if one.model is not None]
        closing = [threading.Thread(target=model.embedder.close) for model in models]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def _begin(self, version: Version) -> None:
        version.state, version.failure, version.cause = "loading", None, None

    def _come(self, version: Version) -> None:
        self._load(version)
        if version.cause is not None:  # at the start whoever called says it
            log.error("%s cannot be loaded: %s", version.name, version.cause)
        self.balance()

    def _load(self, version: Version) -> None:
        """Makes a version ready, or says why it is not; never raises."""
        model: ServedModel | None = None
        started = self.clock()
        try:
            with self._loading:
                if self._closed.is_set():  # while others were loaded
                    raise DrainingError("the server is shutting down", retry_after_ms=RETRY_MS)
                self._make_room(version)
                model = self._source.load_model(version.bundle)
                version.memory_bytes = model.embedder.memory_bytes()
                version.measured = self.clock()
                self._check_fits(version)
                with self.changed:
                    if version.state != "loading" or self._closed.is_set():
                        raise DrainingError("nobody wants it any more", retry_after_ms=RETRY_MS)
                    version.model, version.state = model, "ready"
                    version.bundle = model.bundle  # as it is on the disk now
                    version.last_used = self.clock()
                    self.changed.notify_all()
        except Exception as error:  # noqa: BLE001 - told to whoever waits for it
            if model is not None:
                model.embedder.close()
            self._failed(version, error)
        else:
            seconds, size = self.clock() - started, version.memory_bytes / 1e6
            log.info("%s is ready after %.1f s, it takes %.0f MB", version.name, seconds, size)

    def _failed(self, version: Version, error: Exception) -> None:
        told: FletcherError
        if isinstance(error, (OverloadedError, DrainingError, UnknownModelError)):
            told, pause_s = error, 0.0
        else:
            pause_s = _FAILED_S
            told = OverloadedError(
                f"`model` {version.name} cannot be loaded now; the server's log says why",
                field="model",
                retry_after_ms=int(pause_s * 1000),
            )
        with self.changed:
            if version.state == "loading":
                version.state, version.failure, version.cause = "configured", told, error
                version.failed_until = self.clock() + pause_s
            self.changed.notify_all()

    def _close(self, version: Version) -> None:
        if version.model is not None:
            version.model.embedder.close()
        with self.changed:
            version.model, version.closing = None, False
            version.state = "configured" if version.keep else "gone"
            if not version.keep:
                del self.versions[version.name]
            log.info("%s is %s", version.name, "unloaded" if version.keep else "gone")
            self.changed.notify_all()

    @property
    def _most_bytes(self) -> float:
        return self._max_bytes or float("inf")

    def _used(self, *, closing: bool = True) -> int:
        """Bytes of what runs, as `Version.needed_bytes`; with or without what is being ended."""
        return sum(
            one.needed_bytes
            for one in self.versions.values()
            if one.model is not None and (closing or not one.closing)
        )

    def _make_room(self, version: Version) -> None:
        """Waits until a version fits beside what is in use.

        Raises:
            OverloadedError: Too much has been in use for too long.
            UnknownModelError: It is larger than all there may be.
        """
        self._check_fits(version)
        most, deadline = self._most_bytes - version.needed_bytes, self.clock() + PATIENCE_S
        with self.changed:
            while self._used() > most and not self._closed.is_set():
                idle = [one for one in self.versions.values() if one.idle]
                if self._used(closing=False) > most and idle:
                    self.retire(min(idle, key=lambda one: one.last_used), keep=True)
                elif self.clock() >= deadline:
                    raise OverloadedError(
                        f"`model` {version.name} finds no room in `max_model_memory`: the others "
                        "are in use; try again later",
                        field="model",
                        retry_after_ms=RETRY_MS,
                    )
                else:
                    self.changed.wait(_POLL_S)

    def _check_fits(self, version: Version) -> None:
        if version.needed_bytes > self._most_bytes:
            raise UnknownModelError(
                f"`model` {version.name} takes {version.needed_bytes:,} bytes, more than "
                f"`max_model_memory` ({self._max_bytes:,})",
                field="model",
            )

    def _watch(self) -> None:
        while not self._closed.wait(_MEASURE_S):
            self.balance()
