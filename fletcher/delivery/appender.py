"""A lane's hold on its dataset: the one writer, and what of a group is sent through it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from fletcher.delivery.dedupe.index import DedupeIndex
from fletcher.delivery.groups import Group, WriterKind, writer_kind
from fletcher.delivery.journal.settled_groups import SettledGroups
from fletcher.errors import StoreUnavailableError
from fletcher.stores.base import DatasetWriter, Store, WriteMode
from fletcher.telemetry.tracing import Telemetry

log = logging.getLogger(__name__)


class Appender:
    """Opens a dataset's writer when it is needed; for one thread.

    Args:
        store: The store.
        dataset: The dataset's name.
        telemetry: Where durations and spans go.
        known: What the dataset holds.
        on_empty: Called before the dataset is emptied. May raise OSError.
        on_replace: Called before rows that are not journaled replace others. May raise OSError.
        unsent: Where groups are noted that the store cannot tell of; None: nowhere.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        telemetry: Telemetry,
        known: DedupeIndex,
        on_empty: Callable[[], None],
        on_replace: Callable[[], None],
        unsent: SettledGroups | None,
    ) -> None:
        self._store = store
        self._dataset = dataset
        self._telemetry = telemetry
        self._known = known
        self._on_empty = on_empty
        self._on_replace = on_replace
        self._unsent = unsent
        self._writer: DatasetWriter | None = None
        self._written: WriterKind | None = None  # what the writer was opened for

    @property
    def is_open(self) -> bool:
        """Whether it holds the dataset."""
        return self._writer is not None

    def use(self, schema: pa.Schema, mode: WriteMode) -> DatasetWriter:
        """The writer for rows of `schema`; `overwrite` empties the dataset first.

        Raises:
            FletcherError: As `Store.open_writer`.
        """
        wanted = writer_kind(schema, upsert=mode == "upsert")
        if self._writer is None or self._written != wanted or mode == "overwrite":
            self.close()
            if mode == "overwrite":
                with _journals_disk():
                    self._on_empty()
            stored = schema.append(pa.field("batch_key", pa.utf8()))
            self._writer = self._store.open_writer(self._dataset, stored, mode)
            self._written = wanted
            if mode == "overwrite":
                self._known.doubt()
        return self._writer

    def append(self, groups: Sequence[Group]) -> bool:
        """Stores groups of one kind, of those in doubt what is not there; whether to slow down.

        Rows that replace others all go again: a key may be gone because later rows replaced its
        rows, and these go again, too, in the same order.

        Raises:
            FletcherError: As the writer's `append`, and where the journal's disk fails.
        """
        (schema, _, upsert), journaled = groups[0].rows[0].kind
        null_vectors = self._store.capabilities.null_vectors
        writer = self.use(schema, "upsert" if upsert else "append")
        wanted = {group.key: group for group in groups}
        doubtful = [key for key, group in wanted.items() if group.doubtful and not upsert]
        if doubtful:
            for key in set(doubtful).difference(writer.missing_keys(doubtful)):
                del wanted[key]
        rows = {key: group.batch(null_vectors=null_vectors) for key, group in wanted.items()}
        batches = [batch for batch in rows.values() if batch.num_rows]
        num_rows = sum(batch.num_rows for batch in batches)
        if upsert and not journaled:  # journaled ones would go again behind those that they replace
            with _journals_disk():
                self._on_replace()
        with (
            self._telemetry.stage_duration.time(stage="append"),
            self._telemetry.span("append", rows=num_rows, groups=len(batches)),
        ):
            slow_down = bool(batches) and writer.append(batches)
        self._note_unsent(
            [key for key, group in wanted.items() if not self._told(group, rows[key].num_rows)]
        )
        return slow_down

    def close(self) -> None:
        """Lets the dataset go; it is opened again where need be."""
        writer, self._writer, self._written = self._writer, None, None
        if writer is not None:
            try:
                writer.close()
            except Exception:
                log.exception("closing `%s`", self._dataset)

    def _told(self, group: Group, num_stored: int) -> bool:
        """Whether the store can tell later that it has a group, of which it got so many rows."""
        if group.rows[0].upload.upsert:  # others may replace them all, and the key goes with them
            return False
        return num_stored > 0 and not (
            num_stored < group.num_rows and self._store.capabilities.counts_groups
        )

    def _note_unsent(self, keys: Sequence[str]) -> None:
        """The store may know nothing of these, but that they are settled must outlive us."""
        if keys and self._unsent is not None:
            with _journals_disk():
                self._unsent.add(keys)


@contextlib.contextmanager
def _journals_disk() -> Iterator[None]:
    """Says of a disk that fails that it is the journal's, for it passes."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(f"the journal's disk fails: {error.strerror}") from None
