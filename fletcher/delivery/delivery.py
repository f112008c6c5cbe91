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

from fletcher.config.delivery import DeliveryConfig
from fletcher.config.journal import JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.breaker import PASSING, Breaker
from fletcher.delivery.dedupe.index import DedupeMemory
from fletcher.delivery.journal.journal import Journal, JournalSpace
from fletcher.delivery.journal.root import journal_folders, lock_journal
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.delivery.journal.writer import from_journal
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.delivery.uploads import Key, Uploads
from fletcher.errors import InvalidCommandError, StoreUnavailableError
from fletcher.stores.base import Store, WriteMode
from fletcher.stores.schemas import check_one_row_each
from fletcher.telemetry.tracing import Telemetry

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
        self._dedupe_memory = DedupeMemory(config.max_dedupe_bytes)
        telemetry.dedupe_index_memory.observe(lambda: self._dedupe_memory.used_bytes)
        self._telemetry = telemetry
        self._lock = threading.RLock()
        self._sinks: dict[tuple[str, str], DatasetSink] = {}
        self._uploads = Uploads(self._lock, lambda place: place in self._sinks)
        self._closed = False
        self._breakers = {name: Breaker(name) for name in stores}
        telemetry.queue_depth.observe(self._depth, stage="rows")
        for name, breaker in self._breakers.items():
            telemetry.store_away.observe(partial(_as_number, breaker), store=name)
            telemetry.store_append_share.observe(partial(self._pace, name), store=name)

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

    def open_upload(self, options: EmbedCommand, schema: pa.Schema) -> tuple[Upload, DatasetSink]:
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
        self, key: Key, store: Store, options: EmbedCommand, schema: pa.Schema
    ) -> tuple[Upload, DatasetSink]:
        name, dataset, upload_id = key
        durability = self._durability(options)
        fingerprint = (schema, schema.metadata, options.mode, options.dedupe, durability)
        mode = _write_mode(options)
        dedupe_by = _dedupe_by(options)
        self._breakers[name].check(None)  # else each caller waits for its own deadline
        sink = self._enter(key, store)
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
                        dedupe_by=dedupe_by,
                    )
                self._open(sink, schema, "append" if mode == "overwrite" else mode)
                if dedupe_by is not None:
                    sink.dedupe_index.load(dedupe_by)
                return upload, sink
            stored: _Ranges = []
            unsent: _Ranges = []
            failed = self._uploads.get(key)
            if failed is not None:
                # What was on its way when it failed must have arrived, or not, before we look.
                if not sink.wait_written(_OPENING_S):
                    raise StoreUnavailableError("the journal does not answer; try again later")
                self._open(sink, schema, "append")
            if options.upload_id is not None:
                stored, unsent = self._settled(store, dataset, upload_id)
            if mode == "overwrite" and (stored or unsent or failed is not None):
                mode = "append"
            self._open(sink, schema, mode)
            if mode == "overwrite":
                self._uploads.forget_dataset(name, dataset)
            if dedupe_by is not None:
                sink.dedupe_index.load(dedupe_by)
            new = Upload(
                dataset,
                upload_id,
                fingerprint=fingerprint,
                durability=durability,
                upsert=mode == "upsert",
                dedupe_by=dedupe_by,
                stored=stored,
                unsent=unsent,
            )
            if failed is not None:
                failed.hand_over_to(new)
            return self._uploads.join(key, fingerprint, new) or new, sink
        except BaseException:
            self._leave(sink, upload)
            raise

    def close_upload(self, upload: Upload, sink: DatasetSink) -> None:
        """One connection of an upload has ended."""
        if upload.failure is not None:
            sink.committer.drop_failed()
        self._leave(sink, upload)

    def upload_status(self, options: EmbedCommand) -> dict[str, Any]:
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
        for folder_name, dataset, folder in journal_folders(self._journal.folder):
            if folder_name not in names:
                if any(folder.glob("*.arrow")):
                    log.error(
                        "journal: %s has rows for a store that is not configured; left alone",
                        folder,
                    )
                continue
            name = names[folder_name]
            sink = self._enter((name, dataset, ""), self.stores[name])
            num_rows += sum(group.info.num_rows for group in sink.left_behind if not group.settled)
            self._leave(sink)
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
        sinks = self._all_sinks()
        for sink in sinks:
            sink.flush()
        for sink in sinks:
            sink.wait_idle(max(0.0, deadline - time.monotonic()))
        return all(sink.idle for sink in sinks)

    @property
    def store_unavailable(self) -> bool:
        """A store fails whatever is sent to it."""
        return any(breaker.away_since is not None for breaker in self._breakers.values())

    @property
    def journal_share(self) -> float | None:
        """How full the journal is, from 0 to 1; None where there is none."""
        space = self._space
        return None if space is None else min(1.0, space.used_bytes / space.max_bytes)

    def close(self) -> None:
        """Ends all routes and closes the stores. Idempotent."""
        with self._lock:
            self._closed = True
        for sink in self._all_sinks():
            sink.close()
        for store in self.stores.values():
            store.close()
        if self._journal_lock is not None:
            os.close(self._journal_lock)
            self._journal_lock = None

    def _durability(self, options: EmbedCommand) -> str:
        if options.durability is None:
            return "store" if self._journal is None else "journal"
        if options.durability == "journal" and self._journal is None:
            raise InvalidCommandError(
                "`durability` is journal, but this server runs without one",
                field="durability",
                allowed=["store", "memory"],
            )
        return options.durability

    def _open(self, sink: DatasetSink, schema: pa.Schema, mode: WriteMode) -> None:
        ready = sink.committer.open(schema, mode)
        try:
            ready.result(_OPENING_S)
        except TimeoutError:
            ready.cancel()
            raise StoreUnavailableError("the store does not answer; try again later") from None
        info = sink.committer.store.dataset(sink.committer.dataset) if mode == "upsert" else None
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
        return stored, SettledGroups(self._folder(store, dataset)).ranges(upload_id)

    def _folder(self, store: Store, dataset: str) -> Path:
        """Of a dataset's journal."""
        assert self._journal is not None
        return self._journal.folder / _folder_of(store) / dataset

    def _enter(self, key: Key, store: Store) -> DatasetSink:
        name, dataset, _ = key
        with self._lock:
            if self._closed:
                raise StoreUnavailableError("the server is shutting down")
            sink = self._sinks.get((name, dataset))
            if sink is not None:
                sink.users += 1
                return sink
            sink = self._sinks[name, dataset] = self._new_sink(name, dataset, store)
            return sink

    def _new_sink(self, name: str, dataset: str, store: Store) -> DatasetSink:
        journal = None
        if self._journal is not None and self._space is not None:
            retention_s = self._journal.retention_s
            journal = Journal(
                self._folder(store, dataset),
                self._space,
                segment_bytes=self._journal.segment_bytes,
                retention_s=lambda: 0.0 if store.capabilities.durable else retention_s,
            )
        sink = DatasetSink(
            store,
            dataset,
            self._config,
            self._breakers[name],
            self._telemetry,
            self._retire,
            journal=journal,
            space=self._space,
            dedupe_memory=self._dedupe_memory,
        )
        for group in sink.left_behind:
            info = group.info
            upload = self._uploads.found(name, dataset, info.upload_id, upsert=info.upsert)
            upload.secure_rows(info.first, info.last)
            assert journal is not None
            if not group.settled:
                sink.committer.submit_rows(from_journal(upload, group, journal, doubtful=True))
        return sink

    def _leave(self, sink: DatasetSink, upload: Upload | None = None) -> None:
        with self._lock:
            sink.users -= 1
            if upload is not None:
                self._uploads.leave(upload)

    def _retire(self, sink: DatasetSink) -> bool:
        """Lets an idle route go. Called by its lane's thread."""
        with self._lock:
            if sink.users or not sink.idle:
                return False
            sink.leave()
            for key, one in list(self._sinks.items()):
                if one is sink:
                    del self._sinks[key]
            return True

    def _all_sinks(self) -> list[DatasetSink]:
        with self._lock:
            return list(self._sinks.values())

    def _pace(self, name: str) -> float:
        """The share of a full append that the store bears, in its most burdened dataset."""
        with self._lock:
            shares = [
                one.committer.pace.share for key, one in self._sinks.items() if key[0] == name
            ]
        return min(shares, default=1.0)

    def _depth(self) -> int:
        return sum(sink.committer.depth() for sink in self._all_sinks())


def _write_mode(options: EmbedCommand) -> WriteMode:
    """What rows do in the store: those of a delta that are new or changed replace by id."""
    return "upsert" if options.mode == "delta" else options.mode


def _dedupe_by(options: EmbedCommand) -> str | None:
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
