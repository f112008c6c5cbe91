"""`fletcher ingest`: embed files or standard input into a store."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli.command_line import Choice, command, option
from fletcher.cli.connection import EmbedTarget, target_options
from fletcher.cli.options import (
    INPUT,
    OUTPUT,
    format_option,
    json_option,
    paths_argument,
    split_names,
    text_option,
    vector_options,
)
from fletcher.cli.progress import Progress, Sample, Total
from fletcher.cli.terminal import cut, print_json, printable, say, terminal_width
from fletcher.config.delivery import NO_STORE
from fletcher.core.command import CHOICES, EmbedCommand
from fletcher.errors import ConfigError, FletcherError

if TYPE_CHECKING:
    from fletcher.cli.ingest_job import DryRun, IngestJob, SingleUpload
    from fletcher.cli.job_place import JobPlace
    from fletcher.client import Ack, Client, PutSummary
    from fletcher.config.server import ServeConfig
    from fletcher.readers import TextSource

SHOWN_ERRORS = 5
# Time in which a remote store must answer at the start.
STORE_TIMEOUT_S = 3.0
# Retries for about four minutes, as a restarted server loads its model before it answers, and a
# store may be away.
MAX_RETRIES = 35
_REPORTED = (
    *("model", "upload_id", "complete", "rows_received", "rows_stored", "rows_failed"),
    *("rows_deduplicated", "rows_skipped"),
)


@command(
    "ingest",
    "fletcher ingest articles.parquet --text body --id slug --dataset articles",
    "fletcher ingest folder/ --dataset notes --store grpc://localhost:3000",
    "zcat log.jsonl.gz | fletcher ingest - --dataset log --server grpc://localhost:8815",
)
@paths_argument()
@json_option("Print the summary as JSON.")
@text_option()
@option("--id COLUMN", "id_column", heading=INPUT)
@option("--columns NAME,...", callback=split_names, heading=INPUT)
@option("--source", is_flag=True, heading=INPUT)
@option("--whole-files", is_flag=True, heading=INPUT)
@format_option("files")
@option("--delimiter CHARACTER", heading=INPUT)
@option("--encoding NAME", heading=INPUT)
@option("--limit N", heading=INPUT)
@option("--on-bad-row", type=Choice(("fail", "skip")), default="fail", heading=INPUT)
@option("--rejects FILE", heading=INPUT)
@option("--dry-run", is_flag=True)
@option("--price AMOUNT", type=float)
@option("--dataset NAME", required=True, heading=OUTPUT)
@option("--job FOLDER", heading=OUTPUT)
@option("--verify-content", is_flag=True, heading=INPUT)
@option("--upload-id NAME", heading=OUTPUT)
@option("--mode", type=Choice(CHOICES["mode"]), default="append", heading=OUTPUT)
@option("--dedupe", type=Choice(CHOICES["dedupe"]), default="off", heading=OUTPUT)
@option("--no-text", is_flag=True, heading=OUTPUT)
@vector_options(
    prompt="Prompt of the model, or text to put before each text; '' for none. "
    "Default: the model's prompt for documents, if it has one."
)
@target_options(
    "store",
    "model",
    store="Store to write to, as NAME=ADDRESS or ADDRESS: "
    "lance:PATH, parquet:PATH or grpc://HOST:PORT. With --server, the name of one of its stores. "
    "Default: lance: in the home folder.",
)
def cli(
    target: EmbedTarget,
    paths: tuple[str, ...],
    format_name: str | None,
    limit: int | None,
    source: bool,
    whole_files: bool,
    delimiter: str | None,
    encoding: str | None,
    on_bad_row: str,
    rejects: Path | None,
    job: Path | None,
    verify_content: bool,
    dry_run: bool,
    price: float | None,
    no_text: bool,
    as_json: bool,
    **fields: Any,
) -> int:
    """Embed files, folders of them or standard input into a dataset of a store.

    Run the same command again to continue after a stop, or after a file was changed or added. No
    row is stored twice, and the rows of a changed file replace its former rows. The exit status is
    0 if all files are stored, even if single rows could not be embedded or were skipped.

    Args:
        id_column: Column of row ids. Default: id if it exists, else ids are generated.
        columns: Columns to store with the vectors. A name with dots leads into objects:
            meta.author is stored as meta_author.
        source: Store the path of each row's file in a column named source.
        whole_files: Take each file as one text, with its path as the id. Files of a folder are
            taken whatever their names end in.
        delimiter: Character between the values of CSV and TSV files, or tab. Default: comma for
            CSV, tab for TSV. TSV has no quotes; for quoted values give --format csv.
        encoding: Encoding of text files, such as latin-1 or utf-16. Default: utf-8.
        limit: Maximum number of rows to read.
        on_bad_row: End at a line of JSON lines or plain text that is not JSON or not UTF-8 (fail),
            or leave it out (skip). Other formats always fail.
        rejects: New file for the lines that --on-bad-row skip leaves out, as JSON lines.
        dry_run: Store nothing. Read the files that are not stored yet, embed a sample of their
            texts, and print the number of rows and tokens, the time, and the space on disk.
        price: Price of this machine for an hour, from which --dry-run computes the cost.
        dataset: Dataset to write to.
        job: Folder of the job's manifest, which says what is stored of which file. Default: beside
            the dataset if the store is a folder here, else in the home folder.
        verify_content: Read all files again, also those with the known size and time.
        upload_id: Name of one upload for all files. Run the command again with the same name and
            input to resume. Warning: other input under the same name counts as already uploaded.
            Default: names that the job chooses, or a random name for - and for --mode delta.
        mode: append rows, replace rows by id (upsert), replace the dataset (overwrite), or embed
            only new and changed rows (delta).
        dedupe: Drop rows whose id or text was uploaded or stored before. The server reads the id or
            text column of the dataset once for this.
        no_text: Store ids and vectors without the texts. This saves space, but searches then show
            no text.
    """
    from fletcher.cli.ingest_job import DryRun, IngestInput, open_ingest
    from fletcher.cli.job_place import JobPlace
    from fletcher.client.files import source_options
    from fletcher.readers.bad_rows import RejectedLines, fail_on_bad_line
    from fletcher.readers.columns import Selection
    from fletcher.readers.file_reader import ReadOptions
    from fletcher.readers.source import find_inputs

    options = EmbedCommand(
        **{**fields, "id_column": fields["id_column"] or "id"},
        model=target.asked_model,
        store=_store_name(target),
        include_text=False if no_text else None,
        durability="store",  # so that the summary counts stored rows
    )
    config = target.resolve()
    if target.server:
        target.refuse_local_flags()
    elif not config.store_addresses:
        raise ConfigError("`store` is none, which keeps no rows; give an address", field="store")
    else:
        _check_store(config)
    rejected = RejectedLines(rejects) if on_bad_row == "skip" else None
    if rejects is not None and rejected is None:
        raise ConfigError("`rejects` needs --on-bad-row skip", field="rejects")
    selection = Selection(
        fields["text_column"],
        fields["id_column"],
        fields["columns"],
        limit=limit,
        source=source,
        whole_files=whole_files,
    )
    read = ReadOptions(
        delimiter,
        encoding,
        notice=lambda line: say(f"fletcher ingest: {line}"),
        on_bad_line=rejected.add_line if rejected else fail_on_bad_line,
    )
    excluded = () if target.server else tuple(_store_folders(config, fields["dataset"]))
    files = find_inputs(paths, selection, read, format_name, excluded)
    given = IngestInput(files, selection, read, format_name, verify_content)
    options = source_options(options, selection)
    place = JobPlace.of(job, target, config, options)
    if price is not None and not dry_run:
        raise ConfigError("`price` needs --dry-run", field="price")
    if dry_run:
        return _estimate(DryRun(given, place), place, price, as_json=as_json)
    with open_ingest(given, job, place) as work:
        started_s = time.monotonic()
        if work.source is not None:
            with target.open_client(config, max_retries=MAX_RETRIES) as client:
                started_s = time.monotonic()
                _send(work, client, options, _Meter(client, work.source, local=not target.server))
        seconds = time.monotonic() - started_s
        work.record_checksums()
        report = _report(work.summary, fields["dataset"], place.address, seconds) | work.report()
    report["rows_rejected"] = rejected.num_lines if rejected else 0
    if as_json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["complete"] else 1


def _estimate(work: DryRun, place: JobPlace, price: float | None, *, as_json: bool) -> int:
    from fletcher.cli.dry_run import print_estimate

    config = place.config.with_options(store=(NO_STORE,))
    with place.target.open_client(config) as client:
        report = work.estimate(client, _with_prompt(client, place.options), price)
    if as_json:
        print_json(report)
    else:
        print_estimate(report)
    return 0


def _with_prompt(client: Client, options: EmbedCommand) -> EmbedCommand:
    """The options with the model's prompt for documents, unless they name a prompt."""
    if options.prompt is not None:
        return options
    return dataclasses.replace(options, prompt=client.prompt_for("document", options.model))


def _send(
    work: SingleUpload | IngestJob, client: Client, options: EmbedCommand, meter: _Meter
) -> None:
    source = work.source
    assert source is not None
    options = _with_prompt(client, options)
    try:
        with Progress(meter.sample, Total(source.limit, source.total_bytes)):
            work.send_rows(client, options, meter.on_ack)
    except KeyboardInterrupt:
        # Printed before the workers are stopped, which takes seconds.
        again = "; the same command continues" if source.reiterable or options.upload_id else ""
        print(f"stopping{again}", file=sys.stderr)
        raise


def _check_store(config: ServeConfig) -> None:
    """Ask a remote store for its capabilities, before files and a model are loaded.

    Raises:
        StoreUnavailableError: The store does not answer.
    """
    from fletcher.stores.address import folder_of, open_store

    address = next(iter(config.store_addresses.values()))
    if folder_of(address) is None:
        timeout_s = min(STORE_TIMEOUT_S, config.delivery.store_timeout_s)
        with contextlib.closing(open_store(address, timeout_s=timeout_s)) as store:
            assert store.capabilities


def _store_folders(config: ServeConfig, dataset: str) -> list[Path]:
    """Folders of the stores in this process, which may lie inside an input folder."""
    from fletcher.stores.address import folder_of

    folders: list[Path] = []
    for address in config.store_addresses.values():
        if (folder := folder_of(address)) is not None:
            folders += [folder, folder / dataset]
    return folders


def _store_name(target: EmbedTarget) -> str | None:
    given: list[str] = target.flags.given.get("store", [])
    if not given or not target.server:
        return None
    if len(given) > 1 or ":" in given[0]:
        raise ConfigError(
            f"`store` is {', '.join(given)!r}, expected with --server the name of one of the "
            "server's stores",
            field="store",
        )
    return given[0]


class _Meter:
    """Progress of an upload, from acknowledgements and the server's statistics."""

    def __init__(self, client: Client, source: TextSource, *, local: bool) -> None:
        self._client, self._source, self._local = client, source, local
        self._lock = threading.Lock()
        self._rows = self._rows_received = 0

    def on_ack(self, ack: Ack) -> None:
        with self._lock:
            self._rows = ack.rows_stored + ack.rows_failed
            self._rows_received = ack.rows_received

    def sample(self) -> Sample:
        stats: Mapping[str, Any] = {}
        with contextlib.suppress(FletcherError):
            stats = self._client.stats()
        with self._lock:
            rows, received = self._rows, self._rows_received
        # A remote server counts the rows and tokens of all clients, so its counters are not used.
        counted = stats if self._local else {}
        done = counted.get("fletcher.rows.stored", 0) + counted.get("fletcher.rows.failed", 0)
        tokens = counted.get("fletcher.device.tokens")
        return Sample(
            rows=max(rows, done),
            tokens=None if tokens is None else sum(tokens.values()),
            num_bytes=self._source.bytes_read,
            rows_read=max(received, counted.get("fletcher.rows.received", 0)) or None,
            queues=stats.get("fletcher.queue.depth") or {},
        )


def _report(summary: PutSummary, dataset: str, store: str, seconds: float) -> dict[str, Any]:
    """The result of the upload as a JSON object."""
    new = summary.rows_received - summary.rows_skipped
    return {
        "dataset": dataset,
        "store": store,
        **{name: getattr(summary, name) for name in _REPORTED},
        "uploads": [{"file": file, "upload_id": name} for file, name in summary.uploads],
        "seconds": round(seconds, 3),
        "rows_per_s": round(new / seconds, 1) if seconds > 0 else 0.0,
        "errors": [dataclasses.asdict(error) for error in summary.errors],
    }


def _print(report: Mapping[str, Any]) -> None:
    state = "" if report["complete"] else "INCOMPLETE: "
    there = report["rows_deduplicated"] + report["rows_skipped"]
    already = f", {there:,} were there already" if there else ""
    # Stores that accept null vectors store failed rows too, which then count as failed and stored.
    settled = report["rows_stored"] + report["rows_failed"] + report["rows_deduplicated"]
    both = settled - report["rows_received"]
    without = " (stored without a vector)" if 0 < both == report["rows_failed"] else ""
    print(
        f"{state}{report['rows_received']:,} rows received, {report['rows_stored']:,} stored, "
        f"{report['rows_failed']:,} failed{without}{already}"
    )
    if report["rows_rejected"]:
        print(f"{report['rows_rejected']:,} lines left out, which could not be read")
    print(f"{report['seconds']:,.1f} s, {report['rows_per_s']:,.0f} rows/s")
    if report.get("rows_deleted"):
        print(f"former rows of changed files deleted: {report['rows_deleted']:,}")
    for name in ("dataset", "store", "model", "job", "upload_id"):
        if report[name]:
            print(f"{name.removesuffix('_id'):<8} {report[name]}")
    for error in report["errors"][:SHOWN_ERRORS]:
        named = f" (id {printable(error['id'])})" if error.get("id") is not None else ""
        named_file = error.get("file") and len(report["uploads"]) > 1
        place = f"{printable(error['file'])}, " if named_file else ""
        line = f"{place}row {error['row']}{named}: {error['code']}: {printable(error['message'])}"
        print(cut(line, terminal_width()))
    more = report["rows_failed"] - len(report["errors"][:SHOWN_ERRORS])
    if more > 0:
        print(f"and {more:,} more failed rows; --json lists those that the server reported")
