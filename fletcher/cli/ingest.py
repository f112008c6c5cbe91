"""`fletcher ingest`: files or standard input into a store, by a server here or elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fletcher.cli.connection import add_connection, local_config, open_client, refuse_local_flags
from fletcher.cli.parser import add_format, add_long_texts, add_paths, check_server, given_flags
from fletcher.cli.progress import Progress, Sample, Total
from fletcher.cli.terminal import cut, printable, say, terminal_width
from fletcher.core.command import CHOICES, EmbedCommand
from fletcher.errors import ConfigError, FletcherError

if TYPE_CHECKING:
    from fletcher.client import Ack, Client, PutSummary
    from fletcher.config.server import ServeConfig
    from fletcher.readers import TextSource

SHOWN_ERRORS = 5
# Some four minutes: a server elsewhere that is started again loads its model before it answers.
MAX_RETRIES = 35


def add_parser(subparsers: Any) -> None:
    """Adds `ingest`."""
    parser = subparsers.add_parser(
        "ingest",
        usage="fletcher ingest [options] PATH... --dataset NAME",
        help="embed files or standard input into a store",
        description="Embeds files, folders of them or standard input (-) into a dataset of a "
        "store. The same command again goes on where it was stopped and stores nothing twice.",
        example="fletcher ingest articles.parquet --text body --id slug --dataset articles",
    )
    add_paths(parser)
    group = parser.add_argument_group("input")
    add_format(group, "of the files")
    group.add_argument(
        "--text", default="text", metavar="COLUMN", help="column of texts (default: text)"
    )
    group.add_argument(
        "--id",
        metavar="COLUMN",
        help="column of row ids (default: id where there is one, else made up)",
    )
    group.add_argument(
        "--columns", type=_names, default=(), metavar="NAME,...", help="columns to carry along"
    )
    group.add_argument("--limit", type=int, metavar="N", help="rows to read at most")
    group = parser.add_argument_group("output")
    group.add_argument("--dataset", required=True, metavar="NAME", help="where the vectors go")
    group.add_argument(
        "--upload-id",
        metavar="NAME",
        help="the same name and input go on where it was stopped; other input under it is taken "
        "for what is there (default: made of the files' contents; new each time for -)",
    )
    group.add_argument(
        "--mode",
        choices=CHOICES["mode"],
        default="append",
        help="append, replace rows by id (upsert), replace the dataset (overwrite), or embed only "
        "rows that are new or changed (delta) (default: append)",
    )
    group.add_argument(
        "--dedupe",
        choices=CHOICES["dedupe"],
        default="off",
        help="drop rows whose id or text came before or is stored; reads that column of the "
        "dataset once (default: off)",
    )
    group.add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        help="of the vectors: float16 takes half the room of float32, int8 a quarter, ubinary a "
        "32nd, each at some loss (default: float16 where the store takes it)",
    )
    group.add_argument("--dims", type=int, metavar="N", help="leading dimensions to keep")
    group.add_argument(
        "--layers", type=int, metavar="N", help="exit layer; fewer: faster, at some loss"
    )
    group.add_argument(
        "--prompt",
        help="a prompt of the model, or text to put before each text; '' for none (default: the "
        "model's prompt for documents, if it has one)",
    )
    add_long_texts(group)
    group.add_argument(
        "--no-text", action="store_true", help="store vectors and ids without the texts"
    )
    group.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_connection(parser, ("store", "model"))


def run(args: argparse.Namespace) -> int:
    """Ingests; 0 when every row that was read is stored or was refused by itself."""
    from fletcher.readers import open_source

    check_server(args)
    options = _options(args)
    config = local_config(args)
    if args.server:
        refuse_local_flags(args)
    elif not config.store_addresses:
        raise ConfigError("`store` is none, which keeps no rows; give an address", field="store")
    source = open_source(
        args.paths,
        text_column=args.text,
        id_column=args.id,
        columns=args.columns,
        format_name=args.format,
        limit=args.limit,
        notice=_say,
    )
    started_s = time.monotonic()
    with open_client(args, config, max_retries=MAX_RETRIES) as client:
        started_s = time.monotonic()
        options = _with_prompt(client, options)
        try:
            summary = _upload(client, source, options, local=not args.server, limit=args.limit)
        except KeyboardInterrupt:
            # Said before the workers end, which takes seconds.
            resumable = source.reiterable or args.upload_id
            again = "; the same command goes on where this one was" if resumable else ""
            print(f"stopping{again}", file=sys.stderr)
            raise
    report = _report(summary, args, config, time.monotonic() - started_s)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
    return 0 if summary.complete else 1


def _options(args: argparse.Namespace) -> EmbedCommand:
    return EmbedCommand(
        dataset=args.dataset,
        upload_id=args.upload_id,
        model=given_flags(args).get("model") if args.server else None,
        store=_store_name(args) if args.server else None,
        text_column=args.text,
        id_column=args.id or "id",
        columns=args.columns,
        mode=args.mode,
        dedupe=args.dedupe,
        dtype=args.dtype,
        dims=args.dims,
        layers=args.layers,
        prompt=args.prompt,
        truncate=args.truncate,
        chunking=None if args.chunking == "none" else args.chunking,
        include_text=False if args.no_text else None,
        durability="store",  # the summary tells what the store has
    )


def _with_prompt(client: Client, options: EmbedCommand) -> EmbedCommand:
    if options.prompt is not None:
        return options
    return dataclasses.replace(options, prompt=client.prompt_for("document", options.model))


def _store_name(args: argparse.Namespace) -> str | None:
    given: list[str] = given_flags(args).get("store", [])
    if not given:
        return None
    if len(given) > 1 or ":" in given[0]:
        raise ConfigError(
            f"`store` is {', '.join(given)!r}, expected with --server the name of one of the "
            "server's stores",
            field="store",
        )
    return given[0]


def _upload(
    client: Client, source: TextSource, options: EmbedCommand, *, local: bool, limit: int | None
) -> PutSummary:
    meter = _Meter(client, source, local=local)
    with Progress(meter.sample, Total(rows=limit, num_bytes=source.total_bytes)):
        return client.ingest(source, options, on_ack=meter.on_ack)


class _Meter:
    """How far an upload is: what was acknowledged, and what the server says of its stages."""

    def __init__(self, client: Client, source: TextSource, *, local: bool) -> None:
        self._client = client
        self._source = source
        self._local = local
        self._lock = threading.Lock()
        self._rows = 0
        self._rows_received = 0

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
        # A server elsewhere counts everybody's rows and tokens.
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


def _report(
    summary: PutSummary, args: argparse.Namespace, config: ServeConfig, seconds: float
) -> dict[str, Any]:
    """The summary for people and machines, in the contract's words."""
    store = next(iter(config.store_addresses.values()), "")
    new = summary.rows_received - summary.rows_skipped
    return {
        "dataset": args.dataset,
        "store": args.server or store,
        "model": summary.model,
        "upload_id": summary.upload_id,
        "complete": summary.complete,
        "rows_received": summary.rows_received,
        "rows_stored": summary.rows_stored,
        "rows_failed": summary.rows_failed,
        "rows_deduplicated": summary.rows_deduplicated,
        "rows_skipped": summary.rows_skipped,
        "seconds": round(seconds, 3),
        "rows_per_s": round(new / seconds, 1) if seconds > 0 else 0.0,
        "errors": [dataclasses.asdict(error) for error in summary.errors],
    }


def _print(report: Mapping[str, Any]) -> None:
    state = "" if report["complete"] else "INCOMPLETE: "
    there = report["rows_deduplicated"] + report["rows_skipped"]
    already = f", {there:,} were there already" if there else ""
    # Stores that take a null vector have the failed rows, too, among those stored.
    settled = report["rows_stored"] + report["rows_failed"] + report["rows_deduplicated"]
    both = settled - report["rows_received"]
    without = " (stored without a vector)" if 0 < both == report["rows_failed"] else ""
    print(
        f"{state}{report['rows_received']:,} rows received, {report['rows_stored']:,} stored, "
        f"{report['rows_failed']:,} failed{without}{already}"
    )
    print(f"{report['seconds']:,.1f} s, {report['rows_per_s']:,.0f} rows/s")
    for name in ("dataset", "store", "model", "upload_id"):
        print(f"{name.removesuffix('_id'):<8} {report[name]}")
    for error in report["errors"][:SHOWN_ERRORS]:
        named = f" (id {printable(error['id'])})" if error.get("id") is not None else ""
        line = f"row {error['row']}{named}: {error['code']}: {printable(error['message'])}"
        print(cut(line, terminal_width()))
    more = report["rows_failed"] - len(report["errors"][:SHOWN_ERRORS])
    if more > 0:
        print(f"and {more:,} more failed rows; --json lists those that the server named")


def _say(line: str) -> None:
    say(f"fletcher ingest: {line}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))
