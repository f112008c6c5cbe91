"""Uploads, and one sink for each dataset that receives rows."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher.config.delivery import DeliveryConfig, JournalConfig
from fletcher.core.command import EmbedCommand
from fletcher.delivery.breaker import Breaker
from fletcher.delivery.completion import UploadCompletion
from fletcher.delivery.dedupe.fingerprints import delta_kind
from fletcher.delivery.dedupe.index import DedupeMemory
from fletcher.delivery.groups import Destination
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.root import JournalSpace, folder_name, lock_journal
from fletcher.delivery.journal.writer import journaled_rows
from fletcher.delivery.opening import UploadOpener
from fletcher.delivery.recovery import DatasetPlace, Recovery, places_with_rows
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.store_survey import StoreSurvey
from fletcher.delivery.timing import DeliveryTiming
from fletcher.delivery.upload import Upload, UploadKey, UploadTerms
from fletcher.delivery.upload_registry import UploadRegistry
from fletcher.errors import FletcherError, InvalidCommandError, StoreUnavailableError
from fletcher.stores.base import Store
from fletcher.stores.staging import is_replaced_by, staged_name
from fletcher.telemetry.tracing import Telemetry
from fletcher.util.insist import insist

log = logging.getLogger(__name__)


class Delivery:
    """Opens uploads and carries their rows to the stores. Thread-safe.

    Args:
        stores: Stores by name. The first one is the default.
        journal: Folder and sizes of the journal. None means no journal.

    Raises:
        ConfigError: The journal's folder cannot be used, or another server is using it.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        config: DeliveryConfig,
        telemetry: Telemetry,
        journal: JournalConfig | None = None,
        timing: DeliveryTiming | None = None,
    ) -> None:
        self.stores = dict(stores)
        self._config = config
        self._telemetry = telemetry
        self._journal = journal
        self._timing = timing or DeliveryTiming()
        self._space = JournalSpace(journal.max_bytes) if journal is not None else None
        self._journal_lock = lock_journal(journal.folder) if journal is not None else None
        self._dedupe_memory = DedupeMemory(config.max_dedupe_bytes)
        self._lock = threading.RLock()
        self._sinks: dict[tuple[str, str], DatasetSink] = {}
        self._uploads = UploadRegistry(self._lock, lambda place: place in self._sinks)
        self._closed = False
        self._opener = UploadOpener(
            self._uploads, self._timing.opening_timeout_s, self._journal_folder
        )
        self._completion = UploadCompletion(
            self._uploads, config.store_retry_s, self._end_staged_sink
        )
        self._recovery = Recovery(self._recover_dataset, self._timing.retry)
        self._breakers = {name: Breaker(name, self._timing.retry) for name in stores}
        self._surveys = {name: StoreSurvey(name, store) for name, store in stores.items()}
        telemetry.dedupe_index_memory.observe(lambda: self._dedupe_memory.used_bytes)
        telemetry.queue_depth.observe(
            lambda: sum(one.committer.num_waiting_rows for one in self._all_sinks()), stage="rows"
        )
        for name, breaker in self._breakers.items():
            telemetry.store_away.observe(breaker.unavailability, store=name)
            telemetry.store_append_share.observe(partial(self._append_share, name), store=name)

    def store(self, name: str | None) -> tuple[str, Store]:
        """Name and store for a configured name; None selects the default store.

        Raises:
            InvalidCommandError: No store has that name, or no store is configured.
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
        """Open or resume an upload. Each call needs one call of `close_upload` later.

        `options` must name a dataset; `schema` is that of the output columns, without `batch_key`.

        Raises:
            UploadConflictError: The upload is in progress with other options.
            ModelMismatchError: The dataset has vectors of another model, exit, pooling or norm.
            DimensionMismatchError: The dataset's vectors have another number of dimensions.
            ColumnTypeError: A column of the dataset has another type.
            InvalidCommandError: The dataset's rows cannot be compared for duplicates.
            StoreUnavailableError: The store does not answer.
        """
        name, store = self.store(options.store)
        assert options.dataset is not None
        key = (name, options.dataset, options.upload_id or uuid.uuid4().hex)
        terms = self._terms(options, schema)
        with self._uploads.lock_opening(key, self._timing.opening_timeout_s):
            place, staged = key[1], staged_name(key[1], key[2])
            places = [place, staged] if terms.mode == "overwrite" else [place]
            incarnations = {one: self._incarnation(name, one) for one in places}
            if incarnations.get(staged) or not is_replaced_by(incarnations[place], key[2]):
                place = places[-1]
            else:  # an overwrite whose rows are in effect, and whose staged dataset is deleted
                terms = replace(terms, mode="append")
            sink = self._enter_sink((name, place, key[2]), store)
            upload = None
            try:
                for dataset, incarnation in incarnations.items():
                    if self._completion.check_rows(name, store, dataset, incarnation):
                        sink.dedupe_index.invalidate()
                upload = self._uploads.join_upload(key, terms)
                if upload is not None:
                    self._opener.resume(upload, sink, schema, terms)
                else:
                    named = options.upload_id is not None
                    upload = self._opener.begin(key, sink, schema, terms, named=named)
                if upload.incarnation is None:
                    # Empty, not None, if the dataset was deleted at once: its rows count as gone.
                    upload.incarnation = incarnations[place] or store.incarnation(place) or ""
            except BaseException:
                self._leave_sink(sink, upload)
                raise
            return upload, sink

    def complete_upload(self, options: EmbedCommand, upload: Upload, sink: DatasetSink) -> None:
        """Let a whole overwrite take effect, and check that the store still has the rows.

        Called once all rows of a connection are settled or journaled.

        Raises:
            UploadConflictError: The dataset was overwritten or deleted meanwhile.
            FletcherError: The store does not answer, or does not replace the dataset.
        """
        name, store = self.store(options.store)
        key = (name, upload.dataset, upload.upload_id)
        if upload.stored_as != upload.dataset and upload.whole and upload.failure is None:
            with self._uploads.lock_opening(key, self._timing.opening_timeout_s):
                live = self._enter_sink(key, store)
                try:
                    self._completion.replace_dataset(name, upload, sink, live)
                finally:
                    self._leave_sink(live)
        elif upload.incarnation is not None:
            self._check_rows(name, upload)
            with contextlib.suppress(FletcherError):  # the store confirmed each row before
                if self._completion.check_count(store, upload):
                    sink.dedupe_index.invalidate()

    def leave_upload(self, upload: Upload, error: FletcherError) -> None:
        """End a connection early, and fail the upload with `error` if it was the last one."""
        self._uploads.leave_upload(upload, error)

    def close_upload(self, upload: Upload, sink: DatasetSink, *, left: bool = False) -> None:
        if upload.failure is not None:
            sink.committer.drop_abandoned()
        self._leave_sink(sink, None if left else upload)

    def upload_status(self, options: EmbedCommand) -> dict[str, Any]:
        """The state of an upload, from memory if it is known there, else from the store.

        Raises:
            StoreUnavailableError: The state has to come from the store, which does not answer.
        """
        name, store = self.store(options.store)
        if options.upload_id is None:
            raise InvalidCommandError("`upload_id` is missing", field="upload_id")
        upload = self._uploads.find_upload(name, options.dataset, options.upload_id)
        if upload is not None:
            if upload.incarnation is not None:
                self._check_rows(name, upload)
            if upload.terms.fingerprint is None:
                # The upload was found in the journal. Add the rows that only the store has, or the
                # client would take them for lost.
                self._breakers[name].require_ready(upload.stored_as)
                upload.settle_found(self._opener.settled(store, upload.stored_as, upload.upload_id))
            if upload.failure is None or upload.status()["ranges"]:
                return upload.status()
        # Fail now if the store is unavailable; else the caller would wait for a deadline.
        self._breakers[name].require_ready(options.dataset)
        return self._opener.stored_status(store, options.dataset, options.upload_id)

    def delete_upload(self, options: EmbedCommand) -> int:
        """See `UploadOpener.delete_upload`."""
        name, store = self.store(options.store)
        key = (name, options.dataset or "", options.upload_id or "")
        with self._uploads.lock_opening(key, self._timing.opening_timeout_s):
            if self._incarnation(name, key[1]) is None:
                return 0
            sink = self._enter_sink(key, store)
            try:
                return self._opener.delete_upload(key, sink)
            finally:
                self._leave_sink(sink)

    def _check_rows(self, store_name: str, upload: Upload) -> None:
        """Ask the store for an upload's dataset, unless the breaker holds it back."""
        place = upload.stored_as
        if self._breakers[store_name].held_since(place) is None:
            with contextlib.suppress(FletcherError):  # the rows are journaled or stored
                incarnation = self._incarnation(store_name, place)
                store = self.stores[store_name]
                self._completion.check_rows(store_name, store, place, incarnation)

    def _incarnation(self, store_name: str, dataset: str) -> str | None:
        """A dataset's incarnation; fails at once if the breaker holds the dataset back."""
        breaker = self._breakers[store_name]
        breaker.require_ready(dataset)
        with breaker.guard_call(dataset, proof=False):
            return self.stores[store_name].incarnation(dataset)

    def recover(self) -> int:
        """Send rows that an earlier process journaled and return their number."""
        if self._journal is None:
            return 0
        names = {folder_name(store.address): name for name, store in self.stores.items()}
        return self._recovery.start(places_with_rows(self._journal.folder, names, self._space))

    def _recover_dataset(self, place: DatasetPlace) -> int:
        name, dataset = place
        sink = self._enter_sink((name, dataset, ""), self.stores[name])
        self._leave_sink(sink)
        return sum(group.info.num_rows for group in sink.recovered if not group.settled)

    def statistics(self) -> dict[str, Any]:
        """Each store's state, for the `stats` action."""
        found = {name: survey.statistics() for name, survey in self._surveys.items()}
        return {
            name: {**one.snapshot(), "pace": self._append_share(name), "datasets": found[name]}
            for name, one in self._breakers.items()
        }

    def flush(self, timeout_s: float) -> bool:
        """Store all waiting rows now; False if that takes longer than `timeout_s`."""
        deadline, sinks = time.monotonic() + timeout_s, self._all_sinks()
        for sink in sinks:
            sink.flush()
        for sink in sinks:
            sink.wait_idle(max(0.0, deadline - time.monotonic()))
        return all(sink.idle for sink in sinks)

    @property
    def store_unavailable(self) -> bool:
        return any(one.unavailable_since is not None for one in self._breakers.values())

    @property
    def journal_share(self) -> float | None:
        """Used share of the journal, 0 to 1; None without a journal."""
        space = self._space
        return None if space is None else min(1.0, space.used_bytes / space.max_bytes)

    def close(self) -> None:
        """End all sinks and close the stores. Idempotent."""
        with self._lock:
            self._closed = True
        self._recovery.close()
        for sink in self._all_sinks():
            sink.close()
        for store in self.stores.values():
            store.close()
        if self._journal_lock is not None:
            self._journal_lock.close()

    def _terms(self, options: EmbedCommand, schema: pa.Schema) -> UploadTerms:
        durability = options.durability or ("store" if self._journal is None else "journal")
        if durability == "journal" and self._journal is None:
            raise InvalidCommandError(
                "`durability` is journal, but this server runs without one",
                field="durability",
                allowed=["store", "memory"],
            )
        dedupe_by: str | None = None if options.dedupe == "off" else options.dedupe
        if options.mode == "delta":
            dedupe_by = delta_kind(schema)
        return UploadTerms(
            durability,
            # The new and changed rows of a delta upload replace stored rows with the same id.
            mode="upsert" if options.mode == "delta" else options.mode,
            dedupe_by=dedupe_by,
            fingerprint=(schema, schema.metadata, options.mode, options.dedupe, durability),
        )

    def _journal_folder(self, store: Store, dataset: str) -> Path | None:
        if self._journal is None:
            return None
        return self._journal.folder / folder_name(store.address) / dataset

    def _enter_sink(self, key: UploadKey, store: Store) -> DatasetSink:
        name, dataset, _ = key
        with self._lock:
            if self._closed:
                raise StoreUnavailableError("the server is shutting down")
            sink = self._sinks.get((name, dataset))
            if sink is not None:
                sink.users += 1
            else:
                sink = self._sinks[name, dataset] = self._new_sink(name, dataset, store)
            return sink

    def _new_sink(self, name: str, dataset: str, store: Store) -> DatasetSink:
        journal = None
        if self._journal is not None and self._space is not None:
            retention_s = self._journal.retention_s
            journal = Journal(
                self._journal.folder / folder_name(store.address) / dataset,
                self._space,
                segment_bytes=self._journal.segment_bytes,
                retention_s=lambda: 0.0 if store.capabilities.durable else retention_s,
            )
        sink = DatasetSink(
            Destination(store, dataset, self._breakers[name], self._telemetry),
            self._config,
            self._timing,
            journal,
            self._dedupe_memory,
            self._retire_sink,
        )
        for group in sink.recovered:
            assert journal is not None
            info = group.info
            if journal.rejected.has_group(group):
                if group.settled:
                    continue  # its rows are not durable
                insist(partial(journal.rejected.drop_group, group), f"`{dataset}`: recovery")
            upload = self._uploads.recover_upload(name, dataset, info.upload_id, upsert=info.upsert)
            if not group.settled:  # the store is asked for the others
                upload.secure_rows(info.first, info.last)
                rows = journaled_rows(upload, group, journal, in_doubt=True)
                insist(partial(sink.committer.submit_rows, rows), f"`{dataset}`: recovery")
        return sink

    def _leave_sink(self, sink: DatasetSink, upload: Upload | None = None) -> None:
        with self._lock:
            sink.users -= 1
            if upload is not None:
                self._uploads.leave_upload(upload)

    def _retire_sink(self, sink: DatasetSink) -> bool:
        """Retire and forget a sink; False if it is in use or not idle.

        Called on the thread of the sink's committer.
        """
        with self._lock:
            if sink.users or not sink.idle:
                return False
            self._sinks = {key: one for key, one in self._sinks.items() if one is not sink}
            insist(sink.retire, f"`{sink.committer.destination.dataset}`: its end")
            return True

    def _end_staged_sink(self, sink: DatasetSink) -> None:
        """End the idle sink of a staged dataset, and delete its settled groups."""
        with self._lock:
            self._sinks = {key: one for key, one in self._sinks.items() if one is not sink}
        sink.close()
        if sink.journal is not None:
            sink.journal.release_space()
            sink.journal.settled_groups.clear()
            sink.journal.remove_empty_folder()

    def _all_sinks(self) -> list[DatasetSink]:
        with self._lock:
            return list(self._sinks.values())

    def _append_share(self, name: str) -> float:
        """Smallest append size of a store's datasets, as a share of a full append."""
        with self._lock:
            sinks = [sink for (store, _), sink in self._sinks.items() if store == name]
        return min((sink.committer.append_size.share for sink in sinks), default=1.0)
