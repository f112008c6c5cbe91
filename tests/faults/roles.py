"""Roles of a schedule's processes: server, store, and clients."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import flight

from fletcher import cli
from fletcher.client import TransferOptions, connect
from fletcher.client.connection import descriptor
from fletcher.client.messages import Ack, PutSummary
from fletcher.core.command import EmbedCommand
from fletcher.errors import FletcherError, UnavailableError
from tests.faults.ledger import Diary, Upload
from tests.faults.overwrites import DATASET as OVERWRITTEN
from tests.faults.overwrites import Overwrites
from tests.faults.powerloss import record_syncs
from tests.faults.refusals import install
from tests.faults.rewrites import DATASET, Rewrites
from tests.faults.rewrites import SCHEMA as REWRITE_SCHEMA


def play(role: str, **arguments: Any) -> int:
    """Play a role to its end; returns the exit status."""
    roles = {
        "serve": serve,
        "store": store,
        "command": command,
        "upload": upload,
        "leave": leave,
        "rewrite": rewrite,
        "overwrite": overwrite,
    }
    return roles[role](**arguments)


def serve(argv: Sequence[str], constants: dict[str, Any], **faults: Any) -> int:
    """Run `fletcher serve` with some module constants changed.

    `constants`: values by path, or arguments of a class that replace its defaults.
    """
    return _run("serve", argv, constants, **faults)


def store(argv: Sequence[str], constants: dict[str, Any], **faults: Any) -> int:
    """Run `fletcher store` with some module constants changed."""
    return _run("store", argv, constants, **faults)


def command(
    argv: Sequence[str], status: str | None = None, constants: dict[str, Any] | None = None
) -> int:
    """Run a command with some module constants changed, and write its exit status to a file."""
    _change(constants or {})
    code = cli.main(list(argv))
    if status is not None:
        Path(status).write_text(str(code))
    return code


def _run(
    name: str,
    argv: Sequence[str],
    constants: dict[str, Any],
    syncs: str | None = None,
    refusals: tuple[str, Sequence[str]] | Literal[False] = False,
) -> int:
    _change(constants)
    if syncs is not None:
        record_syncs(Path(syncs))
    if refusals:
        path, datasets = refusals
        install(Path(path), datasets)
    return cli.main([name, *argv])


def _change(constants: dict[str, Any]) -> None:
    for path, value in constants.items():
        name_of_module, _, constant = path.rpartition(".")
        module = importlib.import_module(name_of_module)
        default = getattr(module, constant)
        replaced = functools.partial(default, **value) if isinstance(value, dict) else value
        setattr(module, constant, replaced)


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

    options = _command(rows)
    try:
        with _connected(address, TransferOptions(**transfer)) as client:
            summary = client.put(
                pa.RecordBatchReader.from_batches(rows.schema, batches()),
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


def overwrite(address: str, diary: str, plan: dict[str, Any], transfer: dict[str, Any]) -> int:
    """Replace the dataset by each version in turn. Each is sent until it is complete."""
    versions = Overwrites(**plan)
    book = Diary(Path(diary))
    lines = Path(diary).read_text().splitlines()
    first = max((json.loads(one).get("complete", -1) for one in lines), default=-1) + 1
    for version, durability in list(enumerate(versions.durabilities))[first:]:
        options = EmbedCommand(
            dataset=OVERWRITTEN,
            upload_id=versions.upload_id(version),
            mode="overwrite",
            columns=("n",),
            durability=durability,
            dtype="float32",
        )

        def batches(version: int = version) -> Iterator[pa.RecordBatch]:
            for batch in versions.batches(version):
                yield batch
                time.sleep(versions.pause_s)

        book.write(begun=version)
        while True:
            try:
                with _connected(address, TransferOptions(**transfer)) as client:
                    rows = pa.RecordBatchReader.from_batches(REWRITE_SCHEMA, batches())
                    if client.put(rows, options, resume=True).complete:
                        break
            except FletcherError as error:
                book.write(error=error.code, message=error.message)
                time.sleep(0.05)
        book.write(complete=version)
    return 0


def leave(address: str, diary: str, plan: dict[str, Any], number: int) -> int:
    """Send some rows of an upload, then leave the call at a random point, in a random way."""
    chance = random.Random(number)
    rows = Upload(**plan)
    book = Diary(Path(diary))
    how = chance.choice(["deadline", "vanish", "close", "reset", "silence"])
    num_batches, ends, done, reads = chance.randint(0, 6), *chance.choices([True, False], k=3)
    timeout_s = chance.choice([0.02, 0.1, 0.3]) if how == "deadline" else 60.0
    book.write(leaves=how, batches=num_batches, ends=ends, done=done, reads=reads)
    client = flight.connect(address)
    with contextlib.suppress(flight.FlightError, pa.ArrowException, OSError):
        options = flight.FlightCallOptions(timeout=timeout_s)
        writer, reader = client.do_put(descriptor(_command(rows)), rows.schema, options)
        first = chance.randrange(rows.num_rows)
        start = first
        for batch in itertools.islice(rows.batches(first), num_batches):
            book.write(sent=[start, start + batch.num_rows])
            place = {"batch_id": start, "row_offset": start}
            writer.write_with_metadata(batch, json.dumps(place).encode())
            start += batch.num_rows
            time.sleep(chance.choice([0.0, 0.01]))
        if ends:
            writer.write_metadata(json.dumps({"end": True, "rows": rows.num_rows}).encode())
        if done:
            writer.done_writing()
        if reads and num_batches:
            reader.read()
        if how == "deadline":
            while reader.read() is not None:
                pass
        elif how == "close":
            writer.close()
        elif how == "reset":
            _shut_down_sockets()
        elif how == "silence":
            time.sleep(chance.choice([0.2, 1.0, 3.0]))
    os._exit(0)  # as a process that dies without ending its calls


def _shut_down_sockets() -> None:
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                one.shutdown(socket.SHUT_RDWR)


def _command(rows: Upload) -> EmbedCommand:
    return EmbedCommand(
        dataset=rows.dataset,
        upload_id=rows.upload_id,
        columns=rows.columns,
        durability=rows.durability,
        dtype="float32",
    )


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
