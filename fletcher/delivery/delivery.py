"""The store side of the house: uploads, and a route for every dataset that is being written."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher.delivery.breaker import PASSING, Breaker
from fletcher.delivery.journal import Journal, JournalSpace
from fletcher.delivery.journals import journals, lock_journal
from fletcher.delivery.known import KnownSpace
from fletcher.delivery.lane import DeliveryConfig
from fletcher.delivery.outbox import from_journal
from fletcher.delivery.route import JournalConfig, Route
from fletcher.delivery.unsent import Unsent
from fletcher.delivery.upload import Upload
from fletcher.delivery.uploads import Key, Uploads
from fletcher.errors import InvalidCommandError, StoreUnavailableError
from fletcher.options import EmbedOptions
from fletcher.stores.base import Store, WriteMode
from fletcher.stores.schemas import check_one_row_each
from fletcher.telemetry import Telemetry

log = logging.getLogger(__name__)

_Ranges = list[tuple[int, int]]
# A lane that waits for its store opens nothing; new uploads need not wait as long as old ones.
_OPENING_S = 60.0


class Delivery:
    """Opens uploads and carries their rows to the stores.

    Args:
        stores: By name; the first is the default.
        config: Groups and retries.
        telemetry: Where counts, durations and spans go.
        journal: Where rows are journaled; None: not at all.

    Raises:
        ConfigError: The journal's folder cannot be used, or is another server's.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        config: DeliveryConfig,
        telemetry: Telemetry,
        journal: JournalConfig | None = None,
    ) -> None:
        self.stores = dict(stores)
        self._journal = journal
        self._space = JournalSpace(journal.max_bytes) if journal is not None else None
        self._journal_lock = lock_journal(journal.folder) if journal is not None else None
        self._config = config
        self._known_space = KnownSpace(config.max_known_bytes)
        telemetry.known_memory.watch(lambda: self._known_space.used_bytes)
        self._telemetry = telemetry
        self._lock = threading.RLock()
        self._routes: dict[tuple[str, str], Route] = {}
        self._uploads = Uploads(self._lock, lambda place: place in self._routes)
        self._closed = False
        self._breakers = {name: Breaker(name) for name in stores}
        telemetry.queue_depth.watch(self._depth, stage="rows")
        for name, breaker in self._breakers.items():
            telemetry.store_away.watch(partial(_as_number, breaker), store=name)
            telemetry.store_pace.watch(partial(self._pace, name), store=name)

    def store(self, name: str | None) -> tuple[str, Store]:
        """A store by its configured name; None: the default.

        Raises:
            InvalidCommandError: There is no such store, or none at all.
        """
        if not self.stores:
            raise InvalidCommandError(
                "this server has no store; use DoExchange, or start it with `--store`",
                field="store",
            )
        if name is None:
            name = next(iter(self.stores))
        if name not in self.stores:
            raise InvalidCommandError(
                f"`store` is {name!r}, expected the name of a configured store",
                field="store",
                allowed=list(self.stores),
            )
        return name, self.stores[name]

    def open(self, options: EmbedOptions, schema: pa.Schema) -> tuple[Upload, Route]:
        """Opens or resumes an upload; `close` it for each `open`.

        Args:
            options: The command; `dataset` is set.
            schema: Of the rows to come, without `batch_key`.

        Raises:
            UploadConflictError: The upload is in progress with other options.
            ModelMismatchError, DimensionMismatchError, ColumnTypeError: The dataset differs.
            InvalidCommandError: The dataset cannot be asked for duplicates.
            StoreUnavailableError: The store does not answer.
        """
        name, store = self.store(options.store)
        dataset = options.dataset
        assert dataset is not None
        upload_id = options.upload_id or uuid.uuid4().hex
        key = (name, dataset, upload_id)
        with self._uploads.alone(key, _OPENING_S):
            return self._open_upload(key, store, options, schema)

    def _open_upload(
        self, key: Key, store: Store, options: EmbedOptions, schema: pa.Schema
    ) -> tuple[Upload, Route]:
        name, dataset, upload_id = key
        durability = self._durability(options)
        fingerprint = (schema, schema.metadata, options.mode, options.dedupe, durability)
        mode = _write_mode(options)
        known_by = _known_by(options)
        self._breakers[name].check(None)  # else each caller waits for its own deadline
        route = self._enter(key, store)
        upload = None
        try:
            upload = self._uploads.join(key, fingerprint)
            if upload is not None:
                if upload.fingerprint is None:
                    self._look_up(upload, store)
                    upload.begin(
                        fingerprint,
                        durability=durability,
                        upsert=mode == "upsert",
                        known_by=known_by,
                    )
                self._open(route, schema, "append" if mode == "overwrite" else mode)
                if known_by is not None:
                    route.known.load(known_by)
                return upload, route
            stored: _Ranges = []
            unsent: _Ranges = []
            failed = self._uploads.get(key)
            if failed is not None:
                # What was on its way when it failed must have arrived, or not, before we look.
                if not route.wait_written(_OPENING_S):
                    raise StoreUnavailableError("the journal does not answer; try again later")
                self._open(route, schema, "append")
            if options.upload_id is not None:
                stored, unsent = self._settled(store, dataset, upload_id)
            if mode == "overwrite" and (stored or unsent or failed is not None):
                mode = "append"
            self._open(route, schema, mode)
            if mode == "overwrite":
                self._uploads.forget_dataset(name, dataset)
            if known_by is not None:
                route.known.load(known_by)
            new = Upload(
                dataset,
                upload_id,
                fingerprint=fingerprint,
                durability=durability,
                upsert=mode == "upsert",
                known_by=known_by,
                stored=stored,
                unsent=unsent,
            )
            if failed is not None:
                failed.succeed(new)
            return self._uploads.join(key, fingerprint, new) or new, route
        except BaseException:
            self._leave(route, upload)
            raise

    def close(self, upload: Upload, route: Route) -> None:
        """One connection of an upload has ended."""
        if upload.failure is not None:
            route.lane.drop_failed()
        self._leave(route, upload)

    def status(self, options: EmbedOptions) -> dict[str, Any]:
        """What is known of an upload: from memory, else from the store."""
        name, store = self.store(options.store)
        if options.upload_id is None:
            raise InvalidCommandError("`upload_id` is missing", field="upload_id")
        upload = self._uploads.find(name, options.dataset, options.upload_id)
        if upload is not None:
            if upload.fingerprint is None:
                # Of an upload found in the journal, the store may have an earlier part.
                with contextlib.suppress(*PASSING):
                    self._breakers[name].check(None)
                    self._look_up(upload, store)
            return upload.status()
        self._breakers[name].check(None)  # else the caller waits for a deadline, its own maybe
        datasets = [options.dataset] if options.dataset else [one.name for one in store.datasets()]
        for dataset in datasets:
            stored, unsent = self._settled(store, dataset, options.upload_id)
            if stored or unsent:
                return Upload(
                    dataset,
                    options.upload_id,
                    fingerprint=(),
                    durability="store",
                    stored=stored,
                    unsent=unsent,
                ).status()
        return {"rows_durable": 0, "ranges": [], "complete": False}

    def recover(self) -> int:
        """Takes up what an earlier process journaled and did not store.

        Returns:
            Rows on their way to their stores now.
        """
        if self._journal is None:
            return 0
        num_rows = 0
        names = {_folder_of(store): name for name, store in self.stores.items()}
        for folder_name, dataset, folder in journals(self._journal.folder):
            if folder_name not in names:
                if any(folder.glob("*.arrow")):
                    log.error(
                        "journal: %s has rows for a store that is not configured; left alone",
                        folder,
                    )
                continue
            name = names[folder_name]
            route = self._enter((name, dataset, ""), self.stores[name])
            num_rows += sum(group.info.num_rows for group in route.left_behind if not group.settled)
            self._leave(route)
        return num_rows

    def statistics(self) -> dict[str, Any]:
        """Each store's state, for the `stats` action."""
        return {
            name: {**breaker.snapshot(), "pace": self._pace(name)}
            for name, breaker in self._breakers.items()
        }

    def flush(self, timeout_s: float) -> bool:
        """Stores what is here now; False if it did not get done in time."""
        deadline = time.monotonic() + timeout_s
        routes = self._all_routes()
        for route in routes:
            route.hurry()
        for route in routes:
            route.wait_idle(max(0.0, deadline - time.monotonic()))
        return all(route.idle for route in routes)

    @property
    def store_away(self) -> bool:
        """A store fails whatever is sent to it."""
        return any(breaker.away_since is not None for breaker in self._breakers.values())

    @property
    def journal_share(self) -> float | None:
        """How full the journal is, from 0 to 1; None where there is none."""
        space = self._space
        return None if space is None else min(1.0, space.used_bytes / space.max_bytes)

    def shut_down(self) -> None:
        """Ends all routes and closes the stores. Idempotent."""
        with self._lock:
            self._closed = True
        for route in self._all_routes():
            route.close()
        for store in self.stores.values():
            store.close()
        if self._journal_lock is not None:
            os.close(self._journal_lock)
            self._journal_lock = None

    def _durability(self, options: EmbedOptions) -> str:
        if options.durability is None:
            return "store" if self._journal is None else "journal"
        if options.durability == "journal" and self._journal is None:
            raise InvalidCommandError(
                "`durability` is journal, but this server runs without one",
                field="durability",
                allowed=["store", "memory"],
            )
        return options.durability

    def _open(self, route: Route, schema: pa.Schema, mode: WriteMode) -> None:
        ready = route.lane.open(schema, mode)
        try:
            ready.result(_OPENING_S)
        except TimeoutError:
            ready.cancel()
            raise StoreUnavailableError("the store does not answer; try again later") from None
        info = route.lane.store.dataset(route.lane.dataset) if mode == "upsert" else None
        if info is not None:
            check_one_row_each(info.name, info.schema)

    def _look_up(self, upload: Upload, store: Store) -> None:
        upload.found(*self._settled(store, upload.dataset, upload.upload_id))

    def _settled(self, store: Store, dataset: str, upload_id: str) -> tuple[_Ranges, _Ranges]:
        """An upload's rows that the store holds, and those that it never got and needs not get."""
        if store.dataset(dataset) is None:
            return [], []
        stored = store.stored_ranges(dataset, upload_id)
        if self._journal is None:
            return stored, []
        return stored, Unsent(self._folder(store, dataset)).ranges(upload_id)

    def _folder(self, store: Store, dataset: str) -> Path:
        """Of a dataset's journal."""
        assert self._journal is not None
        return self._journal.folder / _folder_of(store) / dataset

    def _enter(self, key: Key, store: Store) -> Route:
        name, dataset, _ = key
        with self._lock:
            if self._closed:
                raise StoreUnavailableError("the server is shutting down")
            route = self._routes.get((name, dataset))
            if route is not None:
                route.users += 1
                return route
            route = self._routes[name, dataset] = self._new_route(name, dataset, store)
            return route

    def _new_route(self, name: str, dataset: str, store: Store) -> Route:
        journal = None
        if self._journal is not None and self._space is not None:
            retention_s = self._journal.retention_s
            journal = Journal(
                self._folder(store, dataset),
                self._space,
                segment_bytes=self._journal.segment_bytes,
                retention_s=lambda: 0.0 if store.capabilities.durable else retention_s,
            )
        route = Route(
            store,
            dataset,
            self._config,
            self._breakers[name],
            self._telemetry,
            self._retire,
            journal=journal,
            space=self._space,
            known_space=self._known_space,
        )
        for group in route.left_behind:
            info = group.info
            upload = self._uploads.found(name, dataset, info.upload_id, upsert=info.upsert)
            upload.secure(info.first, info.last)
            assert journal is not None
            if not group.settled:
                route.lane.put(from_journal(upload, group, journal, doubtful=True))
        return route

    def _leave(self, route: Route, upload: Upload | None = None) -> None:
        with self._lock:
            route.users -= 1
            if upload is not None:
                self._uploads.leave(upload)

    def _retire(self, route: Route) -> bool:
        """Lets an idle route go. Called by its lane's thread."""
        with self._lock:
            if route.users or not route.idle:
                return False
            route.leave()
            for key, one in list(self._routes.items()):
                if one is route:
                    del self._routes[key]
            return True

    def _all_routes(self) -> list[Route]:
        with self._lock:
            return list(self._routes.values())

    def _pace(self, name: str) -> float:
        """The share of a full append that the store bears, in its most burdened dataset."""
        with self._lock:
            shares = [one.lane.pace.share for key, one in self._routes.items() if key[0] == name]
        return min(shares, default=1.0)

    def _depth(self) -> int:
        return sum(route.lane.depth() for route in self._all_routes())


def _write_mode(options: EmbedOptions) -> WriteMode:
    """What rows do in the store: those of a delta that are new or changed replace by id."""
    return "upsert" if options.mode == "delta" else options.mode  # type: ignore[return-value]


def _known_by(options: EmbedOptions) -> str | None:
    """By what an upload knows rows that are there already; None: it does not ask."""
    if options.mode == "delta":
        return "delta"
    return None if options.dedupe == "off" else options.dedupe


def _as_number(breaker: Breaker) -> float:
    return float(breaker.away_since is not None)


def _folder_of(store: Store) -> str:
    """A store's folder of journals: rows meant for one address must not go to another's."""
    scheme, _, rest = store.address.partition(":")
    if not rest.startswith("//"):  # a folder, which a relative path names only from here
        rest = str(Path(rest).absolute())
    return f"{scheme}-{hashlib.sha256(rest.encode()).hexdigest()[:12]}"
