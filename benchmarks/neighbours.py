"""One client's waiting times beside clients that send bad work, and beside good ones.

A crowd of clients sends poisoned, abandoned, huge and malformed requests (`benchmarks.crowd`). One
more client embeds short texts and uploads ten rows at a time, and is measured. It is measured again
beside a crowd that sends the same texts well-formed. Two things are expected: each p99 beside the
hostile crowd is at most twice the p99 beside the well-formed crowd, and every acknowledged row is
stored once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks import report
from benchmarks.arguments import add_common, positive, seconds
from benchmarks.corpus import ROOT
from benchmarks.jobs import JobError
from benchmarks.serving import Served, serve
from benchmarks.setting import Setting
from fletcher.stores.lance.library import import_lancedb

ROWS_PER_UPLOAD = 10
BOUND = 2.0
_EMBED_EVERY_S, _UPLOAD_EVERY_S = 0.5, 1.0
_STORING_TIMEOUT_S = 60.0
_DATASET = "ninth"
_SCHEMA = pa.schema({"id": pa.utf8(), "text": pa.utf8()})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--clients", type=positive, default=8, help="clients in the crowd (default: 8)"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=300.0, help="time beside each crowd (default: 300)"
    )
    parser.add_argument(
        "--interval-s",
        type=seconds,
        default=3.0,
        help="time between two requests of one client in the crowd (default: 3)",
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Measures both crowds. Returns 1 if rows were lost or doubled, or an upload failed."""
    setting = Setting.of(args)
    titles = setting.corpus.sample_titles(1000)
    rows = [
        _measure(args, setting.bundle.name, kind, titles) for kind in ("well-formed", "hostile")
    ]
    print(setting.heading())
    print(_table(rows))
    for row in rows:
        print(f"{row['crowd']}: {row['requests']}")
    ratios = {name: rows[1][name] / rows[0][name] for name in ("embed_p99_ms", "ack_p99_ms")}
    embed, ack = ratios.values()
    print(
        f"hostile / well-formed, p99: embed {embed:.2f}, first ack {ack:.2f}; at most {BOUND:.0f}"
    )
    result = {**setting.about("neighbours"), "rows": rows, "ratios": ratios}
    print("\n" + report.publish(args.out, result))
    return int(any(row["lost"] or row["doubled"] or row["failed"] for row in rows))


def _measure(args: argparse.Namespace, model: str, kind: str, titles: list[str]) -> dict[str, Any]:
    with serve(args.home, model, arguments=args.serve_args) as served:
        ninth = _Ninth(served.address, titles)
        ninth.embed(0)
        ninth.upload(0)
        command = [sys.executable, "-m", "benchmarks.crowd", served.address, kind]
        command += [str(args.clients), str(args.seconds), str(args.interval_s)]
        crowd = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        until = time.monotonic() + args.seconds
        uploads = threading.Thread(
            target=_repeat, args=(ninth.upload, _UPLOAD_EVERY_S, until, ninth.ack_ms)
        )
        uploads.start()
        _repeat(ninth.embed, _EMBED_EVERY_S, until, ninth.embed_ms)
        uploads.join()
        assert crowd.stdout is not None
        printed = crowd.stdout.read()  # the crowd's input stays open until the crowd ends
        if crowd.wait(600):
            raise JobError(f"the crowd ended with {crowd.returncode}")
        lost, doubled = ninth.compare(served)
        return {
            "crowd": kind,
            "embed_p50_ms": float(np.percentile(ninth.embed_ms, 50)),
            "embed_p99_ms": float(np.percentile(ninth.embed_ms, 99)),
            "ack_p50_ms": float(np.percentile(ninth.ack_ms, 50)),
            "ack_p99_ms": float(np.percentile(ninth.ack_ms, 99)),
            "calls": len(ninth.embed_ms) + len(ninth.ack_ms),
            "failed": ninth.failed,
            "lost": lost,
            "doubled": doubled,
            "requests": json.loads(printed),
        }


def _repeat(
    call: Callable[[int], float], every_s: float, until: float, times_ms: list[float]
) -> None:
    """Calls at fixed times, or at once if the last call took longer."""
    turn, due = 1, time.monotonic()
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        times_ms.append(call(turn))
        turn += 1
        due = max(due + every_s, time.monotonic())


class _Ninth:
    """The client that is measured."""

    def __init__(self, address: str, titles: list[str]) -> None:
        self._address = address
        self._titles = titles
        self._client = flight.connect(address)
        self.embed_ms: list[float] = []
        self.ack_ms: list[float] = []
        self.sent: list[str] = []
        self.failed = 0

    def embed(self, turn: int) -> float:
        """Embeds a short text; returns the milliseconds that it took."""
        body = json.dumps({"texts": [self._titles[turn % len(self._titles)]]}).encode()
        started = time.perf_counter()
        list(self._client.do_action(flight.Action("embed", body)))
        return (time.perf_counter() - started) * 1000

    def upload(self, turn: int) -> float:
        """Uploads ten rows; returns the milliseconds to the first acknowledgement."""
        ids = [f"{turn}-{row}" for row in range(ROWS_PER_UPLOAD)]
        texts = [self._titles[(turn * 10 + row) % len(self._titles)] for row in range(len(ids))]
        batch = pa.record_batch([pa.array(ids), pa.array(texts)], schema=_SCHEMA)
        command = json.dumps({"dataset": _DATASET}).encode()
        with flight.connect(self._address) as client:
            started = time.perf_counter()
            descriptor = flight.FlightDescriptor.for_command(command)
            writer, reader = client.do_put(descriptor, _SCHEMA)
            writer.write_with_metadata(batch, json.dumps({"row_offset": 0}).encode())
            reader.read()
            elapsed = (time.perf_counter() - started) * 1000
            writer.write_metadata(json.dumps({"end": True, "rows": len(ids)}).encode())
            writer.done_writing()
            last: Any = None
            while (message := reader.read()) is not None:
                last = json.loads(message.to_pybytes())
            writer.close()
        if not (last and last.get("complete")):
            self.failed += 1
        self.sent += ids
        return elapsed

    def compare(self, served: Served) -> tuple[int, int]:
        """Numbers of acknowledged rows that the store lacks, and that it has more than once."""
        until = time.monotonic() + _STORING_TIMEOUT_S  # rows in the journal are stored later
        while served.count(_DATASET) < len(self.sent) and time.monotonic() < until:
            time.sleep(0.2)
        table = import_lancedb().connect(served.vectors).open_table(_DATASET)
        stored = Counter(table.search().select(["id"]).to_arrow().column("id").to_pylist())
        return sum(not stored[one] for one in self.sent), sum(n > 1 for n in stored.values())


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ("embed_p50_ms", "embed_p99_ms", "ack_p50_ms", "ack_p99_ms")
    return report.table(
        ("beside", "embed p50, ms", "p99", "first ack p50, ms", "p99", "lost", "doubled", "failed"),
        [
            (
                row["crowd"],
                *(f"{row[name]:.0f}" for name in columns),
                *(str(row[name]) for name in ("lost", "doubled", "failed")),
            )
            for row in rows
        ],
    )
