"""Sending of a committer's groups to its store, with the dataset's only writer."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from fletcher.core.owner import plain_id
from fletcher.core.ranges import RangeSet
from fletcher.delivery.actions import Staged
from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Destination, Group, SentGroups, WriterKind, writer_kind
from fletcher.delivery.journal.journal import Journal
from fletcher.delivery.journal.root import disk_failure
from fletcher.errors import RequestError, StoreUnavailableError, UploadConflictError
from fletcher.stores.base import Appended, DatasetWriter, WriteMode
from fletcher.util.closing import close_for_good

log = logging.getLogger(__name__)


class GroupSender:
    """A dataset's writer. Used on the committer's thread only.

    Args:
        journal: The dataset's journal, if it has one.
    """

    def __init__(
        self, destination: Destination, dedupe_index: DedupeIndex, journal: Journal | None
    ) -> None:
        self._destination = destination
        self._dedupe_index = dedupe_index
        self._journal = journal
        self._writer: DatasetWriter | None = None
        self._kind: WriterKind | None = None
        self._incarnation: str | None = None

    def open_writer(self, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        """The writer for rows of `schema`.

        Raises:
            FletcherError: As in `Store.open_writer`, or because the journal's disk fails.
        """
        kind = writer_kind(schema, upsert=mode == "upsert")
        if self._writer is None or self._kind != kind:
            self.close_writer()
            stored = schema.append(pa.field("batch_key", pa.utf8()))
            store, dataset = self._destination.store, self._destination.dataset
            self._writer = store.open_writer(dataset, stored, mode)
            self._kind = kind
            self._note_incarnation(store.incarnation(dataset))
        return self._writer

    def replace_dataset(self, staged: Staged) -> None:
        """Replace the dataset by a staged one.

        Raises:
            FletcherError: As in `Store.replace_dataset`, or because the journal's disk fails.
        """
        self.close_writer()
        destination = self._destination
        if self._journal is not None:
            with _journal_errors():
                self._journal.prepare_replacement()
                if staged.settled_keys:
                    groups = self._journal.settled_groups
                    groups.add_keys_of(staged.incarnation, staged.settled_keys)
        destination.store.replace_dataset(destination.dataset, staged.name)
        self._note_incarnation(staged.incarnation)

    def delete_upload(self, upload_id: str) -> int:
        """Delete the rows of an upload, and return their number.

        Raises:
            FletcherError: As in `Store.delete_upload`, or because the journal's disk fails.
        """
        self.close_writer()
        if self._journal is not None:
            with _journal_errors():
                # Groups of the upload must not be sent again after a crash. Its settled groups are
                # forgotten first: a client that sends them again does no harm, and one that takes
                # deleted rows for stored ones loses them.
                self._journal.prepare_replacement()
                self._journal.settled_groups.forget_upload(upload_id)
        self._dedupe_index.invalidate()
        destination = self._destination
        return destination.store.delete_upload(destination.dataset, upload_id)

    def _note_incarnation(self, incarnation: str | None) -> None:
        if self._incarnation not in (None, incarnation):
            self._dedupe_index.invalidate()
        self._incarnation = incarnation
        if self._journal is not None:
            self._journal.settled_groups.incarnation = incarnation or ""

    def append_groups(self, groups: Sequence[Group]) -> SentGroups:
        """Send groups of one kind to the store. `confirm_groups` must follow.

        A refusal counts only if it comes from a writer that was just opened: somebody may have
        altered the dataset since an older one was opened.

        Raises:
            RequestError: The store refuses rows of these groups.
            FletcherError: As in `DatasetWriter.append`, or because the journal's disk fails.
        """
        writer = self._writer
        try:
            return self._send_groups(groups)
        except RequestError as error:
            if writer is None or writer is not self._writer:
                raise
            log.info("`%s`: opened again: %s", self._destination.dataset, error)
        self.close_writer()
        for group in groups:
            group.in_doubt = True
        return self._send_groups(groups)

    def _send_groups(self, groups: Sequence[Group]) -> SentGroups:
        """Send groups of one kind, except groups in doubt that the store has already.

        Groups in doubt whose rows replace others are always sent again. The store may lack their
        key only because later rows replaced theirs; those later rows are sent again as well, in the
        same order. Returns and raises as `append_groups`.
        """
        telemetry = self._destination.telemetry
        (schema, _, upsert), _ = groups[0].rows[0].kind
        writer = self.open_writer(schema, "upsert" if upsert else "append")
        with _not_refused():
            wanted = self._wanted_groups(writer, groups)
        self._exclude_stored_rows(wanted.values())
        with _not_refused():
            can = self._destination.store.capabilities
            rows = {
                key: one.to_batch(null_vectors=can.null_vectors, exact_keys=can.counts_groups)
                for key, one in wanted.items()
            }
        batches = [batch for batch in rows.values() if batch.num_rows]
        num_rows = sum(batch.num_rows for batch in batches)
        if upsert and self._journal is not None:
            # Settled groups in the journal must not be sent again after a power loss. The store may
            # lack their key by then, because these rows replaced theirs.
            with _journal_errors():
                self._journal.sync_notes()
        with (
            telemetry.stage_duration.time(stage="append"),
            telemetry.span("append", rows=num_rows, groups=len(batches)),
        ):
            appended = writer.append(batches) if batches else Appended()
        unrecognized = [
            key
            for key, group in wanted.items()
            if not group.is_recognized(rows[key].num_rows, counts_groups=can.counts_groups)
        ]
        return SentGroups(groups, appended.slow_down, appended.unconfirmed, unrecognized)

    def confirm_groups(self, sent: SentGroups) -> None:
        """Wait until the store cannot lose groups any more, and note what it has.

        Raises:
            FletcherError: The groups may or may not be stored, or the journal's disk fails.
        """
        if sent.unconfirmed is not None:
            with _not_refused():
                sent.unconfirmed.confirm()
        if sent.unrecognized and self._journal is not None:
            with _journal_errors():
                self._journal.settled_groups.add_keys(sent.unrecognized)
        for part in itertools.chain.from_iterable(group.rows for group in sent.groups):
            if part.upload.incarnation is None:  # found in the journal, and not opened since
                part.upload.incarnation = self._incarnation or ""

    def _wanted_groups(self, writer: DatasetWriter, groups: Sequence[Group]) -> dict[str, Group]:
        """The groups to send, by key."""
        wanted = {group.batch_key: group for group in groups if not group.settled}
        in_doubt = {key for key, one in wanted.items() if one.in_doubt and not one.upsert}
        if not in_doubt:
            return wanted
        missing = set(writer.missing_keys(sorted(in_doubt)))
        if not missing <= in_doubt:
            raise StoreUnavailableError("the store names groups that it was not asked about")
        return {key: one for key, one in wanted.items() if key in missing or key not in in_doubt}

    def _exclude_stored_rows(self, groups: Iterable[Group]) -> None:
        """Exclude those rows of revived groups that the store has under other group keys.

        Raises:
            RequestError: The store has only some rows of a group in which texts have several rows.
        """
        store, dataset = self._destination.store, self._destination.dataset
        for group in groups:
            rows = group.rows[0]
            if not rows.revived or group.upsert:
                continue
            with _not_refused():
                stored = RangeSet(store.stored_ranges(dataset, rows.upload.upload_id))
            offsets = range(group.first, group.last + 1)
            old = [at for at, row in enumerate(offsets) if stored.covers(row, row)]
            if old and (num_rows := rows.load_batch().num_rows) != group.num_rows:
                if len(old) < group.num_rows:
                    raise UploadConflictError(
                        f"some of the rows {group.first}-{group.last} of upload "
                        f"{plain_id(rows.upload.upload_id)!r} are stored already; resume the "
                        "upload to send the others",
                        field="upload_id",
                    )
                old = list(range(num_rows))
            if old:
                group.rows[0] = replace(rows, excluded=tuple(sorted({*rows.excluded, *old})))

    def close_writer(self) -> None:
        """Close the dataset's writer; the next append or opening opens another one."""
        writer, self._writer, self._kind = self._writer, None, None
        if writer is not None:
            close_for_good(writer.close, f"`{self._destination.dataset}`: its writer")


@contextlib.contextmanager
def _not_refused() -> Iterator[None]:
    """Context of calls whose refusal, if any, does not concern the rows."""
    try:
        yield
    except RequestError as error:
        raise StoreUnavailableError(
            f"the store does not tell what it has: {error.message}", field="dataset"
        ) from error


@contextlib.contextmanager
def _journal_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_failure(error) from None
