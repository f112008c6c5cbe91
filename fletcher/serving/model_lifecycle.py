"""Loading, retiring and closing of model versions, within a limit on memory.

A version is `configured` until a call asks for it. It is then `loading`, and `ready` once it is
loaded. A `retiring` version takes no new calls, and its processes end after its last call. If
memory is limited, the least recently used versions are retired to make room. These versions become
`configured` again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fletcher.errors import (
    DrainingError,
    FletcherError,
    ModelError,
    OverloadedError,
    UnknownModelError,
)
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_versions import ModelSource, ModelVersion, ServedModel
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)

IsCancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class ModelTiming:
    """Waits and intervals of loading models."""

    call_wait_s: float = 30.0  # longest wait of a call for a model that is being loaded
    room_wait_s: float = 30.0  # longest wait of a model for memory that other models use
    retry_ms: int = 2000  # delay after which refused callers should try again
    failed_s: float = 30.0  # pause after a failed load; calls do not load the model meanwhile
    poll_s: float = 0.1  # between two checks whether a waiting caller's client is gone
    measure_s: float = 5.0  # between two measurements of the models' memory
    close_s: float = 10.0  # longest wait of `close` for a model that is being loaded


class ModelLifecycle:
    """All versions of a server's models. Thread-safe.

    The arguments are those of `ModelManager`.

    Attributes:
        changed: Condition that guards `versions` and every version in it. Notified after each
            change.
        versions: Versions by `name@hash`, in the order of first use.
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
        self._loading = threading.Lock()  # one load at a time, as each checks the memory left
        self._closed = threading.Event()

    def version_of(self, bundle: ModelBundle) -> ModelVersion:
        """The version of a bundle; created on first use."""
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
            choose: Returns the version to wait for. Called again whenever a version's state
                changes.
            is_cancelled: Returns whether the client is gone.
            timeout_s: Longest wait, in seconds.
            retry_failed: Load the version even if an attempt failed within the last `failed_s`
                seconds.

        Raises:
            OverloadedError: The version is not loaded in time, or cannot be loaded now.
            UnknownModelError: The version cannot be loaded: its bundle is damaged, or it needs more
                memory than `max_bytes`.
            DrainingError: The server is shutting down.
        """
        deadline = self.clock() + timeout_s
        seen_loading = None
        while True:
            version = choose()
            if self._closed.is_set():
                raise self._draining("the server is shutting down")
            if version.state == "retiring" and not version.closing:  # still held by a call
                version.state = "ready"
            if version.state == "ready":
                return version
            if version.state == "configured":
                recent = not retry_failed and self.clock() < version.failed_until
                if version.failure is not None and (recent or version is seen_loading):
                    raise version.failure
                self._start_thread("load", self._load_on_demand, version)
                _mark_loading(version)
            if version.state == "loading":
                seen_loading = version
            if is_cancelled() or self.clock() >= deadline:
                raise self.overloaded(f"`model` {version.name} is being loaded; try again later")
            self.changed.wait(self.timing.poll_s)

    def load_at_start(self) -> None:
        """Load versions while memory lasts, and the first one in any case.

        A version that does not fit is loaded when a call asks for it. Raises the error of a version
        that cannot be loaded.
        """
        for index, version in enumerate(list(self.versions.values())):
            if index and self._used_bytes() + version.needed_bytes > self._limit_bytes:
                log.info("%s is loaded when a call asks for it: no memory now", version.name)
                continue
            _mark_loading(version)
            self._load(version)
            if version.cause is not None:
                raise version.cause
            if index and self._used_bytes() > self._limit_bytes:  # more than its files' size
                with self.changed:
                    self.retire(version, returns=True)
        if self._max_bytes:
            threading.Thread(target=self._watch_memory, name="models", daemon=True).start()

    def retire(self, version: ModelVersion, *, returns: bool, force: bool = False) -> None:
        """Take a version out of use, and close it after its last call.

        Without `returns`, new calls are refused. With `returns`, a new call makes the version ready
        again. With `force`, the version is closed now, which ends the calls that hold it. The
        caller holds `changed`.
        """
        version.state, version.returns = "retiring", returns
        self.close_unused(version, force=force)

    def close_unused(self, version: ModelVersion, *, force: bool = False) -> None:
        """Close a retiring version that no call holds.

        With `force`, close it even if calls hold it. The caller holds `changed`. Raises
        OverloadedError if no thread can start; the version can then be used or closed later.
        """
        unused = force or not version.num_calls
        if version.state == "retiring" and unused and not version.closing:
            self._start_thread("close", self._close_processes, version)
            version.closing = True
        self.changed.notify_all()

    def measure_memory(self) -> None:
        """Measure each running model's memory, at most once in `measure_s` seconds."""
        for one, model in self.running():
            if self.clock() - one.measured >= self.timing.measure_s:
                one.measured = self.clock()
                one.memory_bytes = model.embedder.memory_bytes() or one.memory_bytes

    def unload_excess(self) -> None:
        """Retire idle models, least recently used first, until memory suffices.

        If all ready models are idle, the one used last is kept.
        """
        self.measure_memory()
        with self.changed:
            ready = [one for one in self.versions.values() if one.state == "ready"]
            idle = sorted((one for one in ready if one.idle), key=lambda one: one.last_used)
            for one in idle if len(idle) < len(ready) else idle[:-1]:
                if self._used_bytes(closing=False) > self._limit_bytes:
                    with contextlib.suppress(OverloadedError):  # tried again later
                        self.retire(one, returns=True)

    def close(self) -> None:
        """Close all models. Idempotent."""
        with self.changed:
            self._closed.set()
            self.changed.notify_all()
        if self._loading.acquire(timeout=self.timing.close_s):
            self._loading.release()
        closing = []
        for version, model in self.running():
            try:
                closing.append(start_thread(f"close {version.name}", model.embedder.close))
            except OverloadedError:  # closed here, one after the other
                model.embedder.close()
        for thread in closing:
            thread.join()

    def _start_thread(
        self, verb: str, work: Callable[[ModelVersion], None], version: ModelVersion
    ) -> None:
        name = f"{verb} {version.name}"
        start_thread(name, partial(work, version))  # it waits for `changed`, which the caller holds

    def _load_on_demand(self, version: ModelVersion) -> None:
        self._load(version)
        if version.cause is not None:  # at the start, `load_at_start` raises it
            log.error("%s cannot be loaded: %s", version.name, version.cause)
        self.unload_excess()

    def _load(self, version: ModelVersion) -> None:
        """Load a version, or note why it cannot be loaded. Never raises."""
        model: ServedModel | None = None
        started = self.clock()
        try:
            with self._loading:
                if self._closed.is_set():  # closed while other models were loaded
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
                    version.bundle = model.bundle  # as just read from the disk
                    version.last_used = self.clock()
                    self.changed.notify_all()
        except Exception as error:  # noqa: BLE001 - reported to the waiting callers
            if model is not None:
                model.embedder.close()
            self._note_failure(version, error)
        else:
            seconds, size = self.clock() - started, version.memory_bytes / 1e6
            log.info("%s is ready after %.1f s and takes %.0f MB", version.name, seconds, size)

    def _note_failure(self, version: ModelVersion, error: Exception) -> None:
        failure: FletcherError
        pause_s = self.timing.failed_s
        if isinstance(error, (OverloadedError, DrainingError, UnknownModelError)):
            failure, pause_s = error, 0.0
        elif isinstance(error, ModelError):
            failure = damaged_model(error)
        else:
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
        """Retire idle versions, and wait until a version fits beside the others.

        Raises:
            OverloadedError: Calls used the other versions for too long.
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
        """Error that tells a client to repeat the call after `retry_ms`."""
        return OverloadedError(message, field="model", retry_after_ms=self.timing.retry_ms)

    def _draining(self, message: str) -> DrainingError:
        return DrainingError(message, retry_after_ms=self.timing.retry_ms)


def damaged_model(error: ModelError) -> UnknownModelError:
    """Error for callers that names a damaged model, its file and the defect.

    A ModelError itself would be reported as `internal`.
    """
    return UnknownModelError(error.message, field="model")


def _mark_loading(version: ModelVersion) -> None:
    version.state, version.failure, version.cause = "loading", None, None
