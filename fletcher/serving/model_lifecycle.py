"""Loading, retiring and closing of model versions, within a limit on memory.

A version is `configured` until a call asks for it, then `loading` and `ready`. While `retiring` it
takes no new calls, and its processes end after its last one. If memory is limited, the versions
that were not used for longest are retired to make room, and are `configured` again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from fletcher.errors import DrainingError, FletcherError, OverloadedError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_versions import ModelSource, ModelVersion, ServedModel

log = logging.getLogger(__name__)

IsCancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class ModelTiming:
    """Waits and intervals of loading models."""

    call_wait_s: float = 30.0  # of a call, for a model that is being loaded
    room_wait_s: float = 30.0  # of a model, for others to make room
    retry_ms: int = 2000  # until refused callers should try again
    failed_s: float = 30.0  # in which calls do not try a model again that could not be loaded
    poll_s: float = 0.1  # between two looks whether a waiting caller's client is gone
    measure_s: float = 5.0  # between two measurements of memory
    close_s: float = 10.0  # of `close`, for an engine that hangs while it loads


class ModelLifecycle:
    """All versions of a server's models; arguments as of `ModelManager`. Thread-safe.

    Attributes:
        changed: Guards `versions` and every version in it; notified of each change.
        versions: By `name@hash`, in the order of first use.
    """

    def __init__(
        self, source: ModelSource, max_bytes: int, clock: Callable[[], float], timing: ModelTiming
    ) -> None:
        self.clock = clock
        self.timing = timing
        self.changed = threading.Condition()
        self.versions: dict[str, ModelVersion] = {}
        self._source = source
        self._max_bytes = max_bytes
        self._limit_bytes = max_bytes or float("inf")
        self._loading = threading.Lock()  # one load at a time: each measures what is left
        self._closed = threading.Event()

    def version_of(self, bundle: ModelBundle) -> ModelVersion:
        """The version of a bundle, made on first use."""
        return self.versions.setdefault(bundle.qualified_name, ModelVersion(bundle))

    def running(self) -> list[tuple[ModelVersion, ServedModel]]:
        """Versions that have processes, in the order of first use."""
        with self.changed:
            return [(one, one.model) for one in self.versions.values() if one.model is not None]

    def wait_ready(
        self,
        choose: Callable[[], ModelVersion],
        is_cancelled: IsCancelled,
        *,
        timeout_s: float = float("inf"),
        retry_failed: bool = False,
    ) -> ModelVersion:
        """Wait until the chosen version is loaded. The caller holds `changed`.

        Args:
            choose: Gives the version; called again after every change.
            is_cancelled: Whether the client is gone.
            timeout_s: Longest wait.
            retry_failed: Load a version that could not be loaded a moment ago.

        Raises:
            OverloadedError: The version is not loaded in time, or cannot be loaded now.
            UnknownModelError: It needs more memory than `max_bytes`.
            DrainingError: The server is shutting down.
        """
        deadline = self.clock() + timeout_s
        seen_loading = None
        while True:
            version = choose()
            if self._closed.is_set():
                raise self._draining("the server is shutting down")
            if version.state == "retiring" and not version.closing:  # a call still holds it
                version.state = "ready"
            if version.state == "ready":
                return version
            if version.state == "configured":
                recent = not retry_failed and self.clock() < version.failed_until
                if version.failure is not None and (recent or version is seen_loading):
                    raise version.failure
                _mark_loading(version)
                self._start_thread("load", self._load_on_demand, version)
            if version.state == "loading":
                seen_loading = version
            if is_cancelled() or self.clock() >= deadline:
                raise self.overloaded(f"`model` {version.name} is being loaded; try again later")
            self.changed.wait(self.timing.poll_s)

    def load_at_start(self) -> None:
        """Load all versions while memory lasts, the first in any case.

        Raises the error of a version that does not run here.
        """
        for index, version in enumerate(list(self.versions.values())):
            if index and self._used_bytes() + version.needed_bytes > self._limit_bytes:
                log.info("%s is loaded when a call asks for it: no memory now", version.name)
                continue
            _mark_loading(version)
            self._load(version)
            if version.cause is not None:
                raise version.cause
            if index and self._used_bytes() > self._limit_bytes:  # more than its files
                with self.changed:
                    self.retire(version, returns=True)
        if self._max_bytes:
            threading.Thread(target=self._watch_memory, name="models", daemon=True).start()

    def retire(self, version: ModelVersion, *, returns: bool, force: bool = False) -> None:
        """Refuse new calls to a version, or if it `returns`, until one loads it again.

        With `force`, the calls that hold it end, too. The caller holds `changed`.
        """
        version.state, version.returns = "retiring", returns
        self.close_unused(version, force=force)

    def close_unused(self, version: ModelVersion, *, force: bool = False) -> None:
        """Close a retiring version that no call holds. The caller holds `changed`."""
        unused = force or not version.num_calls
        if version.state == "retiring" and unused and not version.closing:
            version.closing = True
            self._start_thread("close", self._close_processes, version)
        self.changed.notify_all()

    def measure_memory(self) -> None:
        """Measure the memory of models, unless that was done a moment ago."""
        for one, model in self.running():
            if self.clock() - one.measured >= self.timing.measure_s:
                one.measured = self.clock()
                one.memory_bytes = model.embedder.memory_bytes() or one.memory_bytes

    def unload_excess(self) -> None:
        """Retire idle models until the others fit; keep the one used last."""
        self.measure_memory()
        with self.changed:
            ready = [one for one in self.versions.values() if one.state == "ready"]
            idle = sorted((one for one in ready if one.idle), key=lambda one: one.last_used)
            for one in idle if len(idle) < len(ready) else idle[:-1]:
                if self._used_bytes(closing=False) > self._limit_bytes:
                    self.retire(one, returns=True)

    def close(self) -> None:
        """End all models. Idempotent."""
        with self.changed:
            self._closed.set()
            self.changed.notify_all()
        if self._loading.acquire(timeout=self.timing.close_s):
            self._loading.release()
        closing = [threading.Thread(target=model.embedder.close) for _, model in self.running()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def _start_thread(
        self, verb: str, work: Callable[[ModelVersion], None], version: ModelVersion
    ) -> None:
        name = f"{verb} {version.name}"
        threading.Thread(target=work, args=(version,), name=name, daemon=True).start()

    def _load_on_demand(self, version: ModelVersion) -> None:
        self._load(version)
        if version.cause is not None:  # at the start, the caller says it
            log.error("%s cannot be loaded: %s", version.name, version.cause)
        self.unload_excess()

    def _load(self, version: ModelVersion) -> None:
        """Make a version ready, or note why it is not. Never raises."""
        model: ServedModel | None = None
        started = self.clock()
        try:
            with self._loading:
                if self._closed.is_set():  # while others were loaded
                    raise self._draining("the server is shutting down")
                self._make_room(version)
                model = self._source.load_model(version.bundle)
                version.memory_bytes = model.embedder.memory_bytes()
                version.measured = self.clock()
                self._check_fits(version)
                with self.changed:
                    if version.state != "loading" or self._closed.is_set():
                        raise self._draining("the model is not needed any more")
                    version.model, version.state = model, "ready"
                    version.bundle = model.bundle  # as it is on the disk now
                    version.last_used = self.clock()
                    self.changed.notify_all()
        except Exception as error:  # noqa: BLE001 - told to the callers that wait for it
            if model is not None:
                model.embedder.close()
            self._note_failure(version, error)
        else:
            seconds, size = self.clock() - started, version.memory_bytes / 1e6
            log.info("%s is ready after %.1f s and takes %.0f MB", version.name, seconds, size)

    def _note_failure(self, version: ModelVersion, error: Exception) -> None:
        failure: FletcherError
        if isinstance(error, (OverloadedError, DrainingError, UnknownModelError)):
            failure, pause_s = error, 0.0
        else:
            pause_s = self.timing.failed_s
            failure = OverloadedError(
                f"`model` {version.name} cannot be loaded now; the server's log says why",
                field="model",
                retry_after_ms=int(pause_s * 1000),
            )
        with self.changed:
            if version.state == "loading":
                version.state, version.failure, version.cause = "configured", failure, error
                version.failed_until = self.clock() + pause_s
            self.changed.notify_all()

    def _close_processes(self, version: ModelVersion) -> None:
        if version.model is not None:
            version.model.embedder.close()
        with self.changed:
            version.model, version.closing = None, False
            version.state = "configured" if version.returns else "gone"
            if not version.returns:
                del self.versions[version.name]
            log.info("%s is %s", version.name, "unloaded" if version.returns else "gone")
            self.changed.notify_all()

    def _used_bytes(self, *, closing: bool = True) -> int:
        """Memory of running models, with or without those that are being closed."""
        return sum(
            one.needed_bytes
            for one in self.versions.values()
            if one.model is not None and (closing or not one.closing)
        )

    def _make_room(self, version: ModelVersion) -> None:
        """Wait until a version fits beside the others; retire idle ones for it.

        Raises:
            OverloadedError: The others were in use for too long.
            UnknownModelError: The version is larger than the limit.
        """
        self._check_fits(version)
        most_bytes = self._limit_bytes - version.needed_bytes
        deadline = self.clock() + self.timing.room_wait_s
        with self.changed:
            while self._used_bytes() > most_bytes and not self._closed.is_set():
                idle = [one for one in self.versions.values() if one.idle]
                if self._used_bytes(closing=False) > most_bytes and idle:
                    self.retire(min(idle, key=lambda one: one.last_used), returns=True)
                elif self.clock() >= deadline:
                    raise self.overloaded(
                        f"`model` {version.name} does not fit into `max_model_memory`: the others "
                        "are in use; try again later"
                    )
                else:
                    self.changed.wait(self.timing.poll_s)

    def _check_fits(self, version: ModelVersion) -> None:
        if version.needed_bytes > self._limit_bytes:
            raise UnknownModelError(
                f"`model` {version.name} takes {version.needed_bytes:,} bytes, more than "
                f"`max_model_memory` ({self._max_bytes:,})",
                field="model",
            )

    def _watch_memory(self) -> None:
        while not self._closed.wait(self.timing.measure_s):
            self.unload_excess()

    def overloaded(self, message: str) -> OverloadedError:
        """The refusal of a call that may come again in a moment."""
        return OverloadedError(message, field="model", retry_after_ms=self.timing.retry_ms)

    def _draining(self, message: str) -> DrainingError:
        return DrainingError(message, retry_after_ms=self.timing.retry_ms)


def _mark_loading(version: ModelVersion) -> None:
    version.state, version.failure, version.cause = "loading", None, None
