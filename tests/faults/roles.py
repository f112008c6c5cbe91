"""Roles of a schedule's processes: server, store, and clients."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fletcher import cli
from fletcher.client import TransferOptions, connect
from fletcher.client.messages import Ack, PutSummary
from fletcher.core.command import EmbedCommand
from fletcher.errors import FletcherError, UnavailableError
from tests.faults.ledger import SCHEMA, Diary, Upload
from tests.faults.powerloss import record_syncs
from tests.faults.rewrites import DATASET, Rewrites


def play(role: str, **arguments: Any) -> int:
    """Play a role to its end; returns the exit status."""
    roles = {"serve": serve, "store": store, "upload": upload, "rewrite": rewrite}
    return roles[role](**arguments)


def serve(argv: Sequence[str], constants: dict[str, Any], syncs: str | None = None) -> int:
    """Run `fletcher serve` with some module constants changed.

    `constants`: values by path, or arguments of a class that replace its defaults.
    """
    return _run("serve", argv, constants, syncs)


def store(argv: Sequence[str], constants: dict[str, Any], syncs: str | None = None) -> int:
    """Run `fletcher store` with some module constants changed."""
    return _run("store", argv, constants, syncs)


def _run(name: str, argv: Sequence[str], constants: dict[str, Any], syncs: str | None) -> int:
    for path, value in constants.items():
        name_of_module, _, constant = path.rpartition(".")
        module = importlib.import_module(name_of_module)
        default = getattr(module, constant)
        replaced = functools.partial(default, **value) if isinstance(value, dict) else value
        setattr(module, constant, replaced)
    if syncs is not None:
        record_syncs(Path(syncs))
    return cli.main([name, *argv])


def upload(
    address: str,
    diary: str,
    plan: dict[str, Any],
    *,
    first: int = 0,
    resume: bool = False,
    pause_s: float = 0.0,
    transfer: dict[str, Any],
) -> int:
    """Upload rows from `first` on by the client library, and keep a diary."""
    rows = Upload(**plan)
    book = Diary(Path(diary))

    def batches() -> Iterator[pa.RecordBatch]:
        start = first
        for batch in rows.batches(first):
            book.write(sent=[start, start + batch.num_rows])
            start += batch.num_rows
            yield batch
            time.sleep(pause_s)

    def note(ack: Ack) -> None:
        book.write(prefix=ack.rows_durable, range=[ack.row_first, ack.row_last + 1])

    options = EmbedCommand(
        dataset=rows.dataset,
        upload_id=rows.upload_id,
        columns=("n",),
        durability=rows.durability,
        dtype="float32",
    )
    try:
        with _connected(address, TransferOptions(**transfer)) as client:
            summary = client.put(
                pa.RecordBatchReader.from_batches(SCHEMA, batches()),
                options,
                row_offset=first,
                resume=resume,
                on_ack=note,
            )
    except FletcherError as error:
        book.write(error=error.code, message=error.message)
        return 1
    book.write(prefix=summary.rows_durable)
    book.write(summary=_fields(summary))
    return 0


def rewrite(address: str, diary: str, plan: dict[str, Any], transfer: dict[str, Any]) -> int:
    """Upload one version after the other, each until it is acknowledged to its end."""
    rewrites = Rewrites(plan["num_rows"], tuple(plan["durabilities"]))
    first = len(Path(diary).read_text().splitlines())
    book = Diary(Path(diary))
    for version, durability in list(enumerate(rewrites.durabilities))[first:]:
        options = EmbedCommand(
            dataset=DATASET,
            upload_id=rewrites.upload_id(version),
            mode="upsert",
            columns=("n",),
            durability=durability,
            dtype="float32",
        )
        while True:
            try:
                with _connected(address, TransferOptions(**transfer)) as client:
                    batch = rewrites.batch(version)
                    if client.put(pa.table(batch), options, resume=True).complete:
                        break
            except FletcherError:
                time.sleep(0.05)
        book.write(acknowledged=version)
    return 0


def _connected(address: str, transfer: TransferOptions) -> Any:
    """Connect to a server that may still be starting."""
    for _ in range(transfer.max_retries):
        try:
            return connect(address, transfer=transfer, timeout_s=5.0)
        except UnavailableError:
            time.sleep(0.05)
    return connect(address, transfer=transfer, timeout_s=5.0)


def _fields(summary: PutSummary) -> dict[str, Any]:
    names = ("complete", "rows_received", "rows_stored", "rows_failed", "rows_durable")
    return {name: getattr(summary, name) for name in names}
