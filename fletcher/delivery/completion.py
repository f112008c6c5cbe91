"""End of an upload: a whole overwrite takes effect, and lost rows are noticed.

An upload with `mode: overwrite` writes to a staged dataset, which has its own sink and journal.
Once the announced number of rows is stored there, the staged dataset replaces the dataset. Until
then readers see the old rows. An unfinished staged dataset is kept, so that the upload can be
resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

from fletcher.core.owner import plain_id
from fletcher.delivery.actions import Staged
from fletcher.delivery.sink import DatasetSink
from fletcher.delivery.upload import Upload
from fletcher.delivery.upload_registry import UploadRegistry
from fletcher.errors import StoreUnavailableError, UploadConflictError
from fletcher.stores.base import Store
from fletcher.stores.staging import is_replaced_by

log = logging.getLogger(__name__)


class UploadCompletion:
    """Ends whole uploads. Thread-safe.

    Args:
        uploads: The server's uploads.
        timeout_s: How long the store may take to store the last rows, or to replace a dataset.
        end_sink: Ends the idle sink of a staged dataset, and forgets its journal.
    """

    def __init__(
        self, uploads: UploadRegistry, timeout_s: float, end_sink: Callable[[DatasetSink], None]
    ) -> None:
        self._uploads = uploads
        self._timeout_s = timeout_s
        self._end_sink = end_sink

    def check_rows(
        self, store_name: str, store: Store, stored_as: str, incarnation: str | None
    ) -> bool:
        """End uploads whose dataset was dropped or replaced; return whether any was.

        The clients of these uploads are told that their rows are gone. They may send the whole
        uploads again.

        Args:
            incarnation: The dataset's incarnation, as the store reported it just now.

        Raises:
            StoreUnavailableError: The store does not answer.
        """
        found = self._uploads.find_uploads(
            store_name,
            lambda one: one.stored_as == stored_as and _is_other(one.incarnation, incarnation),
        )
        if not found:
            return False
        # Ask the store again: one of these uploads may have made the dataset since the answer.
        current = store.incarnation(stored_as)
        lost = [one for one in found if _is_other(one.incarnation, current)]
        for one in lost:
            one.lose_rows(_lost(one))
        return bool(lost)

    def check_count(self, store: Store, upload: Upload) -> bool:
        """Fail a whole upload of which the store has fewer rows than it acknowledged.

        Only stores that can lose acknowledged rows, and that tell the rows of a group, are asked.
        The client may send the rows again: the store is asked then which of them it has.

        Returns:
            Whether the upload failed.

        Raises:
            FletcherError: The store does not answer.
        """
        can, num_rows = store.capabilities, upload.counts()["rows_stored"]
        if can.durable or not can.counts_groups or not upload.whole or upload.pending:
            return False
        ranges = store.stored_ranges(upload.stored_as, upload.upload_id)
        num_found = sum(last - first + 1 for first, last in ranges)
        is_short = num_found < num_rows
        if is_short:
            error = StoreUnavailableError(
                f"dataset `{upload.dataset}` has {num_found:,} of the {num_rows:,} rows of upload "
                f"{plain_id(upload.upload_id)!r} that the store acknowledged; send it again",
                field="dataset",
            )
            log.warning("%s", error)
            upload.lose_rows(error)
        return is_short

    def replace_dataset(
        self, store_name: str, upload: Upload, sink: DatasetSink, live: DatasetSink
    ) -> None:
        """Replace the upload's dataset by its staged dataset.

        `sink` is that of the staged dataset, `live` that of the dataset. May be called again after
        an error, and after a crash.

        Raises:
            FletcherError: The store does not answer, or does not replace the dataset.
        """
        name = plain_id(upload.upload_id)
        if not sink.wait_idle(self._timeout_s):
            raise StoreUnavailableError(
                f"the store has not taken all rows of upload {name!r} yet, and dataset "
                f"`{upload.dataset}` has its old rows; resume the upload later",
                field="store",
            )
        store = live.committer.destination.store
        incarnation = store.incarnation(upload.stored_as)
        settled = sink.journal.settled_groups.all_keys() if sink.journal is not None else []
        if sink.journal is not None:  # all rows are stored, so refused ones were sent again
            sink.journal.rejected.drop_replaced(upload.upload_id, upload.covers)
        self._end_sink(sink)
        if incarnation is not None:
            staged = Staged(upload.stored_as, incarnation, settled)
            self._wait(live.committer.request_replacement(staged))
        elif not is_replaced_by(store.incarnation(upload.dataset), upload.upload_id):
            raise StoreUnavailableError(
                f"the staged rows of upload {name!r} are gone; send the upload again",
                field="upload_id",
            )
        upload.note_replaced(store.incarnation(upload.dataset))
        replaced = self._uploads.find_uploads(
            store_name,
            lambda one: one.stored_as == upload.dataset and one.incarnation != upload.incarnation,
        )
        for one in replaced:
            one.lose_rows(_lost(one))

    def _wait(self, ready: Future[None]) -> None:
        try:
            ready.result(self._timeout_s)
        except TimeoutError:
            ready.cancel()
            raise StoreUnavailableError(
                "the store takes long to replace the dataset; resume the upload later"
            ) from None


def _is_other(begun: str | None, current: str | None) -> bool:
    """Whether a dataset has another incarnation. Those of a Longbow have none."""
    return begun is not None and begun != current and bool(begun or current)


def _lost(upload: Upload) -> UploadConflictError:
    return UploadConflictError(
        f"dataset `{upload.dataset}` was overwritten or deleted, and the rows of upload "
        f"{plain_id(upload.upload_id)!r} are gone; send the whole upload again",
        field="upload_id",
    )
