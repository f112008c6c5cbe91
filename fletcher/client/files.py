"""Uploads of files: their names, and one upload for each file."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from fletcher.client.messages import Ack, PutSummary
from fletcher.client.put import OnAck
from fletcher.core.command import EmbedCommand
from fletcher.errors import FletcherError
from fletcher.readers import TextSource
from fletcher.readers.columns import Selection

# Uploads in which the order of files does not matter, so that each file can be one.
_UNORDERED_MODES = ("append",)


def ingest_id(source: TextSource, options: EmbedCommand, occurrence: int = 0) -> str:
    """The `upload_id` of files: a hash, or random if the source can be read only once.

    The name covers what identifies rows: the content of the files, the dataset and the prompt. It
    covers neither the limit nor the carried columns, so that rows are not stored twice if these
    change. Options of the vectors are not covered either: the server refuses other ones.

    With `mode=upsert` and `mode=delta`, the id is also random. With a hash, files that were changed
    and later changed back would count as sent, although the store has other rows by then. With
    `mode=overwrite`, the limit is part of the name, as the dataset then has just these rows.

    Args:
        source: The files.
        options: Options of the upload.
        occurrence: Number of earlier files of the same content in this call.
    """
    if not source.reiterable or options.mode in ("upsert", "delta"):
        return uuid.uuid4().hex
    return content_id(source.content_hash(), options, occurrence, source.limit)


def content_id(
    content_hash: str, options: EmbedCommand, occurrence: int, limit: int | None = None
) -> str:
    """The `upload_id` of rows with a hash of `rows_hash`; see `ingest_id`."""
    named: list[str | int | None] = [
        options.dataset,
        options.store,
        options.mode,
        options.prompt,
        occurrence,
    ]
    if options.mode == "overwrite":
        named.append(limit)
    digest = hashlib.sha256(content_hash.encode())
    digest.update(json.dumps(named).encode())
    return digest.hexdigest()[:40]


def source_options(options: EmbedCommand, selection: Selection) -> EmbedCommand:
    """Options of uploads of the columns that are read from files."""
    return replace(
        options,
        text_column=selection.text_column,
        id_column=selection.id or "id",
        columns=selection.carried_columns,
    )


def ingest_files(
    put: Callable[..., PutSummary],
    source: TextSource,
    options: EmbedCommand,
    on_ack: OnAck | None,
) -> PutSummary:
    """Send files by `put`, each as one upload unless `options` names the upload.

    Raises:
        FletcherError: The server refused a file, or a file cannot be read. Earlier files are stored
            by then, and are not stored again by the same call.
    """
    single = options.upload_id is not None or not source.reiterable or len(source.files) == 1
    if single or options.mode not in _UNORDERED_MODES:
        given = options.upload_id or ingest_id(source, options)
        summary = put_source(put, source, replace(options, upload_id=given), on_ack)
        again = options.mode == "overwrite" and source.reiterable and options.upload_id is None
        if again and summary.complete and summary.rows_skipped == summary.rows_received:
            # The dataset had these rows once, and perhaps other rows since.
            return put_source(put, source, replace(options, upload_id=uuid.uuid4().hex), on_ack)
        return summary
    total = UploadTotal(on_ack)
    left = source.limit
    for name, part, upload_id in _named_parts(source, options):
        part.limit = left
        try:
            summary = put_source(put, part, replace(options, upload_id=upload_id), total.take_ack)
        except FletcherError as error:
            error.add_note(f"while sending {name}")
            raise
        total.add(name, summary)
        if left is not None:
            left -= part.rows_read
            if left <= 0:
                break
    return total.summary


def put_source(
    put: Callable[..., PutSummary], source: TextSource, options: EmbedCommand, on_ack: OnAck | None
) -> PutSummary:
    """Send a source as one upload.

    With a limit, the end of the upload is not announced, as more of its rows may follow in another
    call or be there from an earlier one. An overwrite has no others.
    """
    if source.limit is None or options.mode == "overwrite":
        return put(source, options, resume=True, on_ack=on_ack)
    summary = put(source, options, resume=True, on_ack=on_ack, end=False)
    arrived = summary.rows_received if options.durability == "memory" else summary.rows_durable
    failed = any(error.row is None for error in summary.errors)
    return replace(summary, complete=arrived >= source.rows_read and not failed)


def _named_parts(
    source: TextSource, options: EmbedCommand
) -> Iterator[tuple[str, TextSource, str]]:
    """Each file with its name and `upload_id`, also for files of the same content."""
    seen: Counter[str] = Counter()
    for part in source.by_file():
        content = part.content_hash()
        yield part.files[0].name, part, ingest_id(part, options, seen[content])
        seen[content] += 1


class UploadTotal:
    """Results of several uploads as one."""

    def __init__(self, on_ack: OnAck | None = None) -> None:
        self.on_ack = on_ack
        self.summary = PutSummary("", True, 0, 0, 0, 0)

    def take_ack(self, ack: Ack) -> None:
        """Call `on_ack` with the counts of all uploads."""
        if self.on_ack is None:
            return
        before = self.summary
        self.on_ack(
            replace(
                ack,
                rows_received=before.rows_received + ack.rows_received,
                rows_stored=before.rows_stored + ack.rows_stored,
                rows_failed=before.rows_failed + ack.rows_failed,
                rows_durable=before.rows_durable + ack.rows_durable,
            )
        )

    def add(self, name: str, one: PutSummary) -> None:
        """Add the result of the upload of a file."""
        before = self.summary
        self.summary = PutSummary(
            upload_id="",
            complete=before.complete and one.complete,
            rows_received=before.rows_received + one.rows_received,
            rows_stored=before.rows_stored + one.rows_stored,
            rows_failed=before.rows_failed + one.rows_failed,
            rows_durable=before.rows_durable + one.rows_durable,
            rows_deduplicated=before.rows_deduplicated + one.rows_deduplicated,
            model=one.model or before.model,
            errors=before.errors
            + tuple(replace(error, file=error.file or name) for error in one.errors),
            errors_truncated=before.errors_truncated or one.errors_truncated,
            rows_skipped=before.rows_skipped + one.rows_skipped,
            uploads=(*before.uploads, (name, one.upload_id)),
        )
