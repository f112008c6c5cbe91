"""Begin of an upload, its continuation on another connection, and its deletion."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher.core.owner import plain_id
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import SettledRanges, Upload, UploadKey, UploadTerms
from fletcher.delivery.upload_registry import UploadRegistry
from fletcher.errors import StoreUnavailableError, UnsupportedCallError, UploadConflictError
from fletcher.stores.base import Store, WriteMode
from fletcher.stores.schemas import check_one_row_each
from fletcher.stores.staging import is_replaced_by, staged_name


class UploadOpener:
    """Prepares datasets for uploads, and asks stores for their rows. Thread-safe.

    Args:
        uploads: The server's uploads.
        timeout_s: How long a connection waits for the dataset to be prepared.
        journal_folder: Returns the journal's folder of a store's dataset; None without a journal.
    """

    def __init__(
        self,
        uploads: UploadRegistry,
        timeout_s: float,
        journal_folder: Callable[[Store, str], Path | None],
    ) -> None:
        self._uploads = uploads
        self._timeout_s = timeout_s
        self._journal_folder = journal_folder

    def resume(
        self, upload: Upload, sink: DatasetSink, schema: pa.Schema, terms: UploadTerms
    ) -> None:
        """Prepare the dataset for another connection of an upload in progress."""
        if upload.terms.fingerprint is None:
            store = sink.committer.destination.store
            upload.settle_found(self.settled(store, upload.stored_as, upload.upload_id))
            upload.adopt_terms(terms)
        self._open_dataset(sink, schema, _write_mode(terms))
        if terms.dedupe_by is not None:
            sink.dedupe_index.load_kind(terms.dedupe_by)

    def begin(
        self,
        key: UploadKey,
        sink: DatasetSink,
        schema: pa.Schema,
        terms: UploadTerms,
        *,
        named: bool,
    ) -> Upload:
        """Begin an upload that is not in progress.

        `named`: the client chose the upload id, so the store may have rows of that upload already.
        """
        _, dataset, upload_id = key
        store = sink.committer.destination.store
        settled = SettledRanges([], [])
        ended = self._uploads.find_upload(*key)
        if ended is not None:
            # These two steps wait until the ended upload's pending rows are journaled, stored or
            # dropped. Only then is the store asked which rows it has.
            if not sink.wait_written(self._timeout_s):
                raise StoreUnavailableError("the journal does not answer; try again later")
            self._open_dataset(sink, schema, "append")
            if ended.lost:
                ended.forget_settled()
        if named:
            place = sink.committer.destination.dataset
            settled = self.settled(store, place, upload_id)
        self._open_dataset(sink, schema, _write_mode(terms))
        if terms.dedupe_by is not None:
            sink.dedupe_index.load_kind(terms.dedupe_by)
        new = Upload(dataset, upload_id, terms, settled)
        if ended is not None:
            ended.hand_over_to(new)
        return self._uploads.join_upload(key, terms, new) or new

    def _open_dataset(self, sink: DatasetSink, schema: pa.Schema, mode: WriteMode) -> None:
        self._wait(sink.committer.request_opening(schema, mode))
        destination = sink.committer.destination
        dataset = destination.dataset
        stored = destination.store.read_schema(dataset) if mode == "upsert" else None
        if stored is not None:
            check_one_row_each(dataset, stored, schema)

    def stored_status(self, store: Store, dataset: str | None, upload_id: str) -> dict[str, Any]:
        """The state of an upload, as the store knows it.

        `dataset`: None means all datasets.
        """
        datasets = [dataset] if dataset else [one.name for one in store.datasets()]
        for name in datasets:
            if is_replaced_by(store.incarnation(name), upload_id):
                settled = self.settled(store, name, upload_id)
                found = Upload(name, upload_id, UploadTerms("store"), settled)
                return {**found.status(), "complete": True}
        staged = [staged_name(one, upload_id) for one in datasets]
        for name in [*datasets, *staged]:
            settled = self.settled(store, name, upload_id)
            if any(settled):
                return Upload(name, upload_id, UploadTerms("store"), settled).status()
        return {"rows_durable": 0, "ranges": [], "complete": False}

    def delete_upload(self, key: UploadKey, sink: DatasetSink) -> int:
        """Delete the rows of an upload from its store, and forget the upload.

        Returns the number of deleted rows. Afterwards the same id names a new upload.

        Raises:
            UnsupportedCallError: The store cannot delete rows for good.
            UploadConflictError: The upload has a connection.
            StoreUnavailableError: The store does not answer, or rows of the upload wait for it.
        """
        store, _, upload_id = key
        if not sink.committer.destination.store.capabilities.deletes_uploads:
            raise UnsupportedCallError(
                f"the store {store!r} cannot delete the rows of an upload for good", field="store"
            )
        upload = self._uploads.find_upload(*key)
        if upload is not None and upload.connections:
            raise UploadConflictError(
                f"upload {plain_id(upload_id)!r} has a connection; end it first", field="upload_id"
            )
        if upload is not None:
            written = sink.wait_written(self._timeout_s)
            if not written or (upload.pending and not sink.wait_idle(self._timeout_s)):
                raise StoreUnavailableError(
                    f"rows of upload {plain_id(upload_id)!r} wait for the store; try again later"
                )
        try:
            return int(self._wait(sink.committer.request_deletion(upload_id)))
        finally:
            self._uploads.forget_upload(key)  # after an error only the store knows what it has

    def _wait(self, ready: Future[Any]) -> Any:
        """The result of a request to a committer."""
        try:
            return ready.result(self._timeout_s)
        except TimeoutError:
            ready.cancel()
            raise StoreUnavailableError("the store does not answer; try again later") from None

    def settled(self, store: Store, dataset: str, upload_id: str) -> SettledRanges:
        """Rows of an upload that need not be sent again, by the store and the journal."""
        incarnation = store.incarnation(dataset)
        if incarnation is None:
            return SettledRanges([], [])
        stored = store.stored_ranges(dataset, upload_id)
        folder = self._journal_folder(store, dataset)
        if folder is None:
            return SettledRanges(stored, [])
        settled_groups = SettledGroups(folder)
        return SettledRanges(stored, settled_groups.ranges_of(upload_id, incarnation))


def _write_mode(terms: UploadTerms) -> WriteMode:
    """Mode of the writer: an overwrite appends to its staged dataset."""
    return "append" if terms.mode == "overwrite" else terms.mode
