"""Composition root, which builds a server from its configuration and closes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from fletcher.config.network import NetworkConfig
from fletcher.config.server import ServeConfig
from fletcher.delivery.delivery import Delivery
from fletcher.errors import ConfigError
from fletcher.flight.middleware import Credentials
from fletcher.flight.server import FlightServer
from fletcher.inference.host import detect_host
from fletcher.models.bundle.registry import Registry
from fletcher.net.compression import AnswerCompression
from fletcher.net.ports import check_port
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.serving.admission import Admission
from fletcher.serving.load_level import LoadLevel, LoadMonitor, LoadSignals
from fletcher.serving.model_loader import ModelLoader, open_cache_backend
from fletcher.serving.model_manager import ModelManager
from fletcher.serving.service import Service
from fletcher.stores.address import open_store
from fletcher.telemetry.tracing import Telemetry, configure
from fletcher.util.allocator import IdleTrimmer, keep_large_blocks
from fletcher.util.insist import insist
from fletcher.util.threads import start_thread

log = logging.getLogger(__name__)

# Time for calls to end by themselves at a shutdown, and then for those whose connection was ended.
_LAST_WORDS_S = 0.5
_SHUTDOWN_S = 2.0
# Longest normal wait of a stream for memory. It is a tenth of the 600 s after which clients give up
# (TransferOptions.stall_timeout_s).
_STARVING_S = 60.0


class Runtime:
    """A server in this process, from `start` to `close`.

    `progress` is called with messages for people about long work, such as a download. None: these
    messages are logged. `own_token` is a bearer token that only callers in this process know. With
    it, the server refuses calls without a token, and uploads are anonymous, so that a later process
    can resume them with another token.
    """

    def __init__(
        self,
        config: ServeConfig,
        progress: Callable[[str], None] | None = None,
        own_token: str = "",
    ) -> None:
        self.config = config
        self.address = ""
        self._own_token = own_token
        self._progress = progress or log.info
        self._closed = threading.Event()
        # Closes all started parts, in reverse order.
        self._started = ExitStack()
        self._service: Service | None = None
        self._server: FlightServer | None = None  # destroyed last: the end may wait for threads
        self._calls_ended = True

    def __enter__(self) -> Runtime:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.drain(self.config.limits.drain_timeout_s if kind is None else 0.0)
        self.close()

    def start(self) -> None:
        """Load the models, start all workers, then listen on `address`.

        Raises FletcherError if something is missing or does not work. What was started until then
        is closed again.
        """
        keep_large_blocks()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the runtime is closed; return False on a timeout."""
        return self._closed.wait(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new calls and wait until accepted rows are stored.

        Returns whether all accepted rows reached their stores in time.
        """
        if self._service is None:
            return True
        service = self._service
        admission, delivery, budget = service.admission, service.delivery, service.budget
        admission.draining.set()
        deadline = time.monotonic() + timeout_s
        quiet = 0
        while time.monotonic() < deadline:
            if admission.wait_idle(0.05):
                break
            # A call whose client sends nothing need not be waited for, because it holds no rows.
            busy = budget.statistics()["used_bytes"] > 0
            quiet = 0 if busy else quiet + 1
            if quiet > 5:
                break
        left = max(0.0, deadline - time.monotonic())
        done = delivery.flush(left) and budget.statistics()["used_bytes"] == 0
        if not done and timeout_s > 0:
            log.warning("drain: some rows were not stored within %g s", timeout_s)
        return done

    def close(self) -> bool:
        """Close all parts, and return whether all calls ended. Idempotent.

        The process cannot exit in the ordinary way before all calls have ended.
        """
        self._service = None
        self._started.pop_all().close()
        self._closed.set()
        return self._calls_ended

    @property
    def service(self) -> Service:
        """The service behind all protocols, available only between `start` and `close`."""
        assert self._service is not None
        return self._service

    def _start(self) -> None:
        config = self.config
        credentials = replace(Credentials.from_config(config.network), own_token=self._own_token)
        check_port(config.network.host, config.network.port)
        telemetry = configure(config.telemetry.otlp_endpoint)
        self._started.callback(telemetry.close)
        cache_backend = open_cache_backend(config.cache)
        if cache_backend is not None:
            self._started.callback(cache_backend.close)
        delivery = self._open_delivery(telemetry)
        registry = Registry(config.home / "models")
        for name in (config.model.default, *config.model.models):
            registry.ensure_model(name, self._progress)
        budget = MemoryBudget(config.limits.budget_bytes, config.limits.max_streams)
        load = LoadMonitor(
            lambda: _signals(budget, admission, delivery, models),
            telemetry,
            on_change=lambda level: budget.spare(half=level is LoadLevel.SEVERE),
        )
        admission = Admission(config.limits.max_streams, load, telemetry)
        loader = ModelLoader(
            config,
            detect_host(),
            budget,
            telemetry,
            under_pressure=lambda: load.level is not LoadLevel.NORMAL,
            backend=cache_backend,
        )
        models = ModelManager(
            loader,
            config.model.default,
            loadable=config.model.loadable_models,
            max_bytes=config.model.max_model_memory,
        )
        self._started.callback(models.close)
        for stage in ("texts", "tokens", "micro_batches"):
            telemetry.queue_depth.observe(partial(models.queued, stage), stage=stage)
        self._service = Service(
            models=models,
            budget=budget,
            delivery=delivery,
            admission=admission,
            answers=AnswerCompression(config.network.compression),
            load=load,
            telemetry=telemetry,
            outputs=config.output,
        )
        models.start(config.model.models, config.model.aliases)
        load.start()
        self._started.callback(load.close)
        trimmer = IdleTrimmer(lambda: int(budget.statistics()["used_bytes"]))
        trimmer.start()
        self._started.callback(trimmer.stop)
        idle_timeout_s = config.limits.idle_timeout_s
        self._server = server = _listen(self._service, config.network, credentials, idle_timeout_s)
        self._started.callback(self._shut_down, server)
        self.address = server.address

    def _open_delivery(self, telemetry: Telemetry) -> Delivery:
        config = self.config
        stores = {
            name: open_store(
                address,
                timeout_s=config.delivery.store_timeout_s,
                compression=config.delivery.store_compression,
            )
            for name, address in config.store_addresses.items()
        }
        journal = config.journal if config.journal.max_bytes and stores else None
        delivery = Delivery(stores, config.delivery, telemetry, journal)
        self._started.callback(delivery.close)
        if num_rows := delivery.recover():
            log.info("journal: %d rows of an earlier run are sent to their stores", num_rows)
        return delivery

    def _shut_down(self, server: FlightServer) -> None:
        # `shutdown` has no deadline. It waits for handlers, which may wait for clients that send
        # nothing. The end of their connections ends them.
        start = partial(start_thread, "shutdown", server.shutdown)
        shutdown = insist(start, "the server's end")
        shutdown.join(_LAST_WORDS_S)
        server.end_calls()
        shutdown.join(_SHUTDOWN_S)
        self._calls_ended = not shutdown.is_alive()


def _signals(
    budget: MemoryBudget, admission: Admission, delivery: Delivery, models: ModelManager
) -> LoadSignals:
    num_starving = budget.starving(_STARVING_S)
    return LoadSignals(
        memory=budget.used_share(),
        streams=admission.stream_share,
        starving=num_starving / max(1, admission.num_streams) if num_starving > 1 else 0.0,
        journal=delivery.journal_share,
        store_unavailable=delivery.store_unavailable,
        queue=models.queued_windows(),
    )


def _listen(
    service: Service, config: NetworkConfig, credentials: Credentials, idle_timeout_s: float
) -> FlightServer:
    try:
        return FlightServer(service, config, credentials, idle_timeout_s)
    except Exception as error:  # for a port in use and bad PEM, pyarrow raises several types
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {str(error).splitlines()[0][:200]}; "
            "check that the port is free and the certificate is PEM",
            field="port",
        ) from error
