"""The job of `fletcher ingest`: its folder, what it knows, and one run of it."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fletcher.cli.job_place import JobPlace
from fletcher.cli.terminal import printable, say
from fletcher.core.command import EmbedCommand
from fletcher.errors import ConfigError, FletcherError
from fletcher.jobs.manifest import MANIFEST, JobState, Manifest, read_manifest
from fletcher.jobs.plan import Plan, Planner
from fletcher.jobs.records import ChecksumRecord, SchemaRecord
from fletcher.jobs.run import JobRun, begin, check_asked, forget_stored, job_options
from fletcher.readers.columns import Selection
from fletcher.readers.file_reader import FileReader, ReadOptions
from fletcher.readers.files import InputFile
from fletcher.readers.source import TextSource

if TYPE_CHECKING:
    from fletcher.client import Client, PutSummary
    from fletcher.client.put import OnAck

MAX_NAMES = 5


@dataclass(frozen=True, slots=True)
class IngestInput:
    """The input files, and how to read them.

    Attributes:
        files: The files, or standard input.
        selection: Columns and rows to read.
        read: Options for reading.
        format_name: The format that was asked for; None: that of each file.
        verify_content: Hash all files, also those with the known size and time.
    """

    files: list[InputFile]
    selection: Selection
    read: ReadOptions
    format_name: str | None = None
    verify_content: bool = False

    @property
    def reading(self) -> dict[str, Any]:
        """Options that decide rows, as in the manifest."""
        selection, read = self.selection, self.read
        values = {
            "text": selection.text,
            "id": selection.id,
            "format": self.format_name,
            "source": selection.source or None,
            "whole_files": selection.whole_files or None,
            "delimiter": read.delimiter,
            "encoding": read.encoding,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def columns(self) -> dict[str, Any]:
        """Options that decide rows and columns, as in the manifest."""
        return {**self.reading, "columns": list(self.selection.carried)}

    def plan(self, state: JobState) -> Plan:
        """The fragments of the files, compared with what a manifest says."""
        holds_paths = self.selection.source or self.selection.whole_files
        planner = Planner(
            state,
            self.reading,
            holds_paths=holds_paths,
            cuts_lines=not holds_paths and self.read.encoding is None,
            verify_content=self.verify_content,
        )
        return planner.plan(self.files)

    def source(self, files: list[InputFile], state: JobState | None = None) -> TextSource:
        """The rows of some files. `state` has the types of earlier files of the job."""
        known = None if state is None else state.schema(self.columns)
        earlier = None
        if known is not None:
            earlier = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(known)))
        return TextSource(files, FileReader(self.selection, self.read), earlier=earlier)


class SingleUpload:
    """An ingest of all files as uploads that no manifest knows.

    Attributes:
        source: The rows to send.
        summary: The result, after `send_rows`.
    """

    def __init__(self, given: IngestInput) -> None:
        self.source: TextSource | None = given.source(given.files)
        self.summary: PutSummary

    def send_rows(self, client: Client, options: EmbedCommand, on_ack: OnAck) -> None:
        """Send the rows."""
        assert self.source is not None
        self.summary = client.ingest(self.source, options, on_ack=on_ack)

    def record_checksums(self) -> None:
        """Do nothing, as no manifest keeps checksums."""

    def report(self) -> dict[str, Any]:
        """Facts for the command's report."""
        return {"job": None}


class IngestJob:
    """An open job, with the plan of one run.

    Attributes:
        source: The rows to send; None: all are stored.
    """

    def __init__(self, manifest: Manifest, place: JobPlace, given: IngestInput) -> None:
        self._manifest = manifest
        self._place = place
        plan = given.plan(manifest.state)
        if plan.replaced:
            state = manifest.state
            names = dict.fromkeys(file.path for one in plan.replaced for file in one.files)
            former = sum(state.states[one.id].rows_stored for one in plan.replaced)
            say(
                f"fletcher ingest: changed since the last run: {_listed(names)}; the former rows "
                f"({former:,}) are deleted once the new ones are stored"
            )
        if plan.lost:
            say(
                f"fletcher ingest: {_listed(plan.lost)} no longer exist, and were sent "
                "together with a file that has changed; their rows are deleted"
            )
        self._run = JobRun(manifest, plan, given.reading, given.selection.limit)
        self._run.record_stamps()
        self._columns = given.columns
        self.source: TextSource | None = None
        if self._run.todo or self._run.has_former:
            self.source = given.source(self._run.inputs(), manifest.state)

    def send_rows(self, client: Client, options: EmbedCommand, on_ack: OnAck) -> None:
        """Send what is not stored, and delete what was replaced.

        Raises:
            FletcherError: The job has other options, or the server refuses or fails.
        """
        from fletcher.client.prompts import served_model

        assert self.source is not None
        model = served_model(client, options.model)
        begin(self._manifest, self._place.record(f"{model['name']}@{model['hash']}", options))
        schema = base64.b64encode(self.source.plain_schema.serialize()).decode()
        if self._run.todo and schema != self._manifest.state.schema(self._columns):
            self._manifest.append(SchemaRecord(reading=self._columns, schema=schema))
        self._run.send_fragments(client, self.source, options, on_ack)
        for one in self._run.failed:
            reason = printable(one.error.message)
            say(f"fletcher ingest: {printable(one.file)} is left out: {reason}")
        self._run.delete_former(client, options)

    def record_checksums(self) -> None:
        """Read the rows that were stored, and write their checksums to the manifest.

        Nothing is read from a server's store or from a Longbow, and failures are only said.
        """
        if self._place.target.server is not None:
            return
        state = self._manifest.state
        new = [
            one
            for one in state.current()
            if state.state(one) == "done" and one.id not in state.checksums
        ]
        try:
            found = self._place.sum_rows({one.upload_id for one in new}) if new else {}
        except FletcherError as error:
            say(f"fletcher ingest: the stored rows cannot be read for checksums: {error.message}")
            return
        records = [
            ChecksumRecord(fragment=one.id, rows=sums.num_rows, checksums=sums.to_text())
            for one in new
            if (sums := found.get(one.upload_id)) is not None
        ]
        if records:
            self._manifest.append(*records)

    @property
    def summary(self) -> PutSummary:
        """The result of all fragments, those of earlier runs included."""
        found = self._run.total.summary
        job = self._manifest.state.job
        (_, only), *others = found.uploads or (("", ""),)
        return replace(
            found,
            upload_id="" if others else only,
            model=found.model or (job.model if job else ""),
            complete=found.complete and not self._run.failed,
        )

    def report(self) -> dict[str, Any]:
        """Facts about the job for the command's report."""
        return {
            "job": str(self._place.folder),
            "rows_deleted": self._run.num_deleted,
            "failed_files": [
                {"file": one.file, "code": one.error.code, "message": one.error.message}
                for one in self._run.failed
            ],
        }


class DryRun:
    """The plan of an ingest, of which nothing is stored or written.

    Attributes:
        source: The rows that are not stored.
    """

    def __init__(self, given: IngestInput, place: JobPlace) -> None:
        state = JobState()
        is_job = _not_a_job(given, place.options) is None
        if is_job and (place.folder / MANIFEST).exists():
            state = read_manifest(place.folder)
            check_asked(state.job, job_options(place.options), place.options.model)
        files = given.files
        self._before = {"files_known": 0, "rows_known": 0, "rows_to_delete": 0}
        if is_job:
            plan = given.plan(state)
            todo = plan.unfinished(state, given.selection.limit)
            files = [part for one in todo for part in one.parts]
            done = [one for one in plan.fragments if one.rows_done(state) is not None]
            self._before = {
                "files_known": sum(len(one.files) for one in done),
                "rows_known": sum(one.rows_done(state) or 0 for one in done),
                "rows_to_delete": sum(state.states[one.id].rows_stored for one in plan.replaced),
            }
        self._num_files = len({file.name for file in files})
        self.source = given.source(files, state)

    def estimate(
        self, client: Client, options: EmbedCommand, price: float | None
    ) -> dict[str, Any]:
        """The estimate as a JSON object. `price` is that of this machine for an hour."""
        from fletcher.cli.dry_run import drifts, estimate

        found = estimate(client, self.source, options)
        return {
            "dry_run": True,
            "dataset": options.dataset,
            "files": self._num_files,
            **found,
            **self._before,
            "columns": {one.name: str(one.type) for one in self.source.schema},
            "drifts": drifts(self.source),
            "cost": None if price is None else round(found["seconds"] / 3600 * price, 4),
        }


def _listed(names: Iterable[str]) -> str:
    """The first names, for messages."""
    listed = list(names)
    return ", ".join(listed[:MAX_NAMES]) + (" and others" if listed[MAX_NAMES:] else "")


def _not_a_job(given: IngestInput, options: EmbedCommand) -> str | None:
    """Reason for which an ingest cannot be continued file by file; None if it can."""
    reasons = {
        "standard input and pipes can be read only once": any(
            one.size is None for one in given.files
        ),
        f"`mode` is {options.mode}": options.mode != "append",
        "`upload_id` names one upload for all files": options.upload_id is not None,
    }
    return next((text for text, holds in reasons.items() if holds), None)


@contextlib.contextmanager
def open_ingest(
    given: IngestInput, job: Path | None, place: JobPlace
) -> Iterator[SingleUpload | IngestJob]:
    """Context of an ingest, and of its job if it can be continued file by file.

    Raises:
        ConfigError: A job is asked for where there can be none, another process runs the job, it
            has other options, or its manifest is damaged.
        FletcherError: A file or the store cannot be read.
    """
    options = place.options
    reason = _not_a_job(given, options)
    if reason is not None:
        if job is not None:
            raise ConfigError(f"`job` cannot be used: {reason}", field="job")
        yield SingleUpload(given)
        return
    with Manifest(place.folder) as manifest:
        state = manifest.state
        check_asked(state.job, job_options(options), options.model)
        done = [one for one in state.current() if state.states[one.id].rows_stored]
        if done and not place.is_stored(done[-1].upload_id):
            say(
                f"fletcher ingest: dataset {options.dataset} no longer has the rows of the job, so "
                "they are sent again"
            )
            forget_stored(manifest)
        yield IngestJob(manifest, place, given)
