"""One run of a job: new fragments are sent, and former ones are deleted."""

from __future__ import annotations

import bisect
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from fletcher.client.client import Client
from fletcher.client.files import UploadTotal, content_id, put_source
from fletcher.client.messages import PutSummary, RowError
from fletcher.client.put import OnAck
from fletcher.core.command import EmbedCommand
from fletcher.errors import ConfigError, FletcherError, InvalidCommandError
from fletcher.jobs.manifest import Manifest, now
from fletcher.jobs.plan import Plan, PlannedFragment
from fletcher.jobs.records import Fragment, JobRecord, StampsRecord, StateRecord
from fletcher.readers import TextSource
from fletcher.readers.files import InputFile
from fletcher.readers.source import rows_hash

# Options that change vectors.
VECTOR_OPTIONS = (
    *("prompt", "dims", "layers", "dtype", "normalize", "truncate", "chunking", "output"),
)
# Options that all uploads of a job have in common.
JOB_OPTIONS = (*VECTOR_OPTIONS, "include_text", "dedupe")


@dataclass(frozen=True, slots=True)
class FailedFile:
    """A file that cannot be read.

    Attributes:
        file: Name of the file.
        error: Why it cannot be read.
    """

    file: str
    error: FletcherError


def check_asked(job: JobRecord | None, asked: Mapping[str, Any], model: str | None) -> None:
    """Refuse options of a command that are not those of the job.

    Args:
        job: The job; None: it was not begun.
        asked: Options of `job_options`; those that are not set are not compared.
        model: A model's name; None: the default.

    Raises:
        ConfigError: An option differs.
    """
    if job is None:
        return
    for name, value in asked.items():
        if value != job.options.get(name):
            raise _other_option(job, name, value, job.options.get(name))
    if model is not None and job.model and not _is_model(model, job.model):
        raise _other_option(job, "model", model, job.model)


def begin(manifest: Manifest, record: JobRecord) -> None:
    """Write a job's first line, or compare it.

    Raises:
        ConfigError: The job has other options.
    """
    job = manifest.state.job
    if job is None:
        manifest.append(msgspec.structs.replace(record, created=now()))
        return
    for name in ("dataset", "store", "server", "model"):
        given, known = getattr(record, name), getattr(job, name)
        if given != known:
            raise _other_option(job, name, given, known)
    for name in JOB_OPTIONS:
        given, known = record.options.get(name), job.options.get(name)
        if given != known:
            raise _other_option(job, name, given, known)


def job_options(options: EmbedCommand) -> dict[str, Any]:
    """Options that all uploads of a job have in common, if they are set."""
    values = {name: getattr(options, name) for name in JOB_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def forget_stored(manifest: Manifest) -> None:
    """Note that no fragment is stored, as the dataset was deleted or replaced."""
    state = manifest.state
    done = [one for one in state.current() if state.state(one) == "done"]
    manifest.append(*(StateRecord(fragment=one.id, state="pending", at=now()) for one in done))


class JobRun:
    """One run of a job. Not thread-safe.

    Args:
        manifest: The job's manifest, which `begin` has seen.
        plan: The plan of the input.
        reading: Options that decide rows.
        limit: Maximum number of rows in all; None: no limit.

    Attributes:
        todo: Fragments of the plan that are not done.
        failed: Files that cannot be read.
        total: Results of all fragments.
    """

    def __init__(
        self, manifest: Manifest, plan: Plan, reading: dict[str, Any], limit: int | None = None
    ) -> None:
        self._manifest = manifest
        self._plan = plan
        self._reading = reading
        self._limit = limit
        self.failed: list[FailedFile] = []
        self.num_deleted = 0
        self.todo = plan.unfinished(manifest.state, limit)
        self.total = UploadTotal()
        for one in plan.fragments:
            if one.rows_done(manifest.state) is not None:
                assert one.known is not None
                self.total.add(one.name, self._known_summary(one.known))

    @property
    def has_former(self) -> bool:
        """Whether rows of former fragments are to be deleted."""
        state = self._manifest.state
        return bool(self._plan.replaced) or "replaced" in map(state.state, state.fragments.values())

    def inputs(self) -> list[InputFile]:
        """The input files, or parts of them, that are to be sent."""
        return [part for one in self.todo for part in one.parts]

    def record_stamps(self) -> None:
        """Write new sizes and times of files whose bytes are the same."""
        records = [
            StampsRecord(fragment=one.known.id, files=one.stamps)
            for one in self._plan.fragments
            if one.known is not None and one.known.files != one.stamps
        ]
        if records:
            self._manifest.append(*records)

    def send_fragments(
        self, client: Client, source: TextSource, options: EmbedCommand, on_ack: OnAck | None
    ) -> None:
        """Send the fragments of `todo`, the parts of `source`, in order.

        A file that cannot be read ends its fragment alone.

        Raises:
            FletcherError: The server refuses or fails.
        """
        self._check_deletion(client, options)
        self._write_plan(source, options)
        parts = iter(source.split(one.parts for one in self.todo))
        self.total.on_ack = on_ack
        left = self._limit
        for planned in self._plan.fragments:
            if left is not None and left <= 0:
                return
            rows = planned.rows_done(self._manifest.state)
            if rows is None:
                part = next(parts)
                part.limit = left
                summary = self._send_one(client, planned, part, options)
                rows = part.rows_read
                if summary is not None:
                    self.total.add(planned.name, summary)
            if left is not None:
                left -= rows

    def delete_former(self, client: Client, options: EmbedCommand) -> None:
        """Delete the rows of fragments whose successors are all done."""
        state = self._manifest.state
        assert options.dataset is not None
        for old in self._deletable():
            name = old.upload_id
            self.num_deleted += client.delete_upload(name, options.dataset, options.store)
            self._manifest.set_state(old, "deleted", rows=state.states[old.id].rows)

    def _check_deletion(self, client: Client, options: EmbedCommand) -> None:
        """Refuse changed files whose former rows cannot or must not be deleted.

        With `dedupe`, other rows may be left out because a former row has their id or text. They
        would be nowhere after the deletion.

        Raises:
            InvalidCommandError: The message names a file.
        """
        if not self._plan.replaced:
            return
        assert options.dataset is not None
        path = self._plan.replaced[0].files[0].path
        if options.dedupe != "off":
            raise InvalidCommandError(
                f"{path} has changed since it was stored, and `dedupe` is {options.dedupe}: rows "
                "that were left out as duplicates of its former rows would be lost with them; "
                "ingest into another dataset, or without --dedupe",
                field="dedupe",
            )
        try:  # no upload has this id
            client.delete_upload(uuid.uuid4().hex, options.dataset, options.store)
        except InvalidCommandError as error:
            raise InvalidCommandError(
                f"{path} has changed since it was stored, and its "
                f"former rows cannot be deleted: {error.message}; ingest into another dataset",
                field="store",
            ) from error

    def _send_one(
        self,
        client: Client,
        planned: PlannedFragment,
        part: TextSource,
        options: EmbedCommand,
    ) -> PutSummary | None:
        """The result of a fragment; None if its file cannot be read."""
        fragment = planned.known
        assert fragment is not None
        self._manifest.set_state(fragment, "running")
        try:
            summary = put_source(
                client.put,
                part,
                replace(options, upload_id=fragment.upload_id),
                self.total.take_ack,
            )
        except FletcherError as error:
            if part.failure is None:
                error.add_note(f"while sending {planned.name}")
                raise
            self.failed.append(FailedFile(planned.name, part.failure))
            self._manifest.set_state(fragment, "failed", error=str(part.failure))
            return None
        whole = summary.complete and (part.limit is None or part.rows_read < part.limit)
        self._manifest.set_state(
            fragment,
            "done" if whole else "pending",
            rows=summary.rows_received,
            rows_stored=summary.rows_stored,
            rows_failed=summary.rows_failed,
            model=summary.model,
        )
        return replace(summary, errors=_by_file(summary.errors, part))

    def _write_plan(self, source: TextSource, options: EmbedCommand) -> None:
        """Write the new fragments and the replaced ones to the manifest."""
        state = self._manifest.state
        number = max(state.fragments, default=-1) + 1
        seen = Counter(one.content for one in state.fragments.values())
        records: list[Any] = []
        for planned in self._plan.fragments:
            if planned.known is not None:
                continue
            planned.known = Fragment(
                id=number,
                files=planned.stamps,
                lines=planned.lines,
                content=planned.content,
                reading=self._reading,
                upload_id=_upload_id(planned, source, options, seen[planned.content]),
                replaces=planned.replaces,
                contents=planned.contents,
            )
            records.append(planned.known)
            seen[planned.content] += 1
            number += 1
        for old in self._plan.replaced:
            counts = state.states[old.id]
            records.append(
                StateRecord(fragment=old.id, state="replaced", rows=counts.rows, at=now())
            )
        if records:
            self._manifest.append(*records)

    def _known_summary(self, fragment: Fragment) -> PutSummary:
        counts = self._manifest.state.states[fragment.id]
        return PutSummary(
            upload_id=fragment.upload_id,
            complete=True,
            rows_received=counts.rows,
            rows_stored=counts.rows_stored,
            rows_failed=counts.rows_failed,
            rows_durable=counts.rows,
            rows_skipped=counts.rows,
            model=counts.model,
        )

    def _deletable(self) -> list[Fragment]:
        """Replaced fragments, all of whose successors are done."""
        state = self._manifest.state
        unfinished = [one for one in state.current() if state.state(one) != "done"]
        waiting = {old for one in unfinished for old in one.replaces}
        return [
            one
            for one in state.fragments.values()
            if state.state(one) == "replaced" and one.id not in waiting
        ]


def _upload_id(
    planned: PlannedFragment, source: TextSource, options: EmbedCommand, occurrence: int
) -> str:
    """Name of a fragment's upload.

    A whole file has the name that `Client.ingest` gives it.
    """
    found = rows_hash(planned.files, [planned.content], source.selection, source.options)
    if not planned.is_whole_file:
        start = planned.lines.start if planned.lines else None
        found = f"{found} {start} {len(planned.files)}"
    return content_id(found, options, occurrence)


def _by_file(errors: Sequence[RowError], part: TextSource) -> tuple[RowError, ...]:
    """Errors with the files of their rows, and the rows' numbers in these files."""
    names, firsts = list(part.first_rows), list(part.first_rows.values())
    found = []
    for error in errors:
        place = bisect.bisect_right(firsts, error.row) - 1 if error.row is not None else -1
        if place < 0:
            found.append(replace(error, file=part.files[0].name))
        else:
            assert error.row is not None
            row = error.row - firsts[place]
            found.append(replace(error, row=row, file=names[place]))
    return tuple(found)


def _is_model(asked: str, known: str) -> bool:
    return asked in (known, known.partition("@")[0])


def _other_option(job: JobRecord, name: str, given: Any, known: Any) -> ConfigError:
    return ConfigError(
        f"`{name}` is {_shown(given)}, and the job {job.job} was begun with {_shown(known)}; give "
        "the same, or begin another job by --job FOLDER",
        field=name,
    )


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value)
