"""Clients that send poisoned, abandoned, huge and malformed work, or the same texts well-formed.

    python -m benchmarks.crowd ADDRESS {hostile|well-formed} CLIENTS SECONDS INTERVAL_S

Each client makes a request every INTERVAL_S seconds. If a request takes longer, the next one
follows at once. Both kinds of crowd draw the same texts for the same requests. Prints the number of
requests by kind, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks.corpus import Corpus

_SCHEMA = pa.schema({"id": pa.utf8(), "text": pa.utf8()})
_HUGE_BYTES = 4 << 20
_PATIENCE_S = 0.3
_CALL = flight.FlightCallOptions(timeout=120)
_MALFORMED = (
    b"{",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"texts": 7}',
    b'{"texts": ["a"], "dtype": "float7"}',
    b'{"texts": ["a"], "no_such_field": 1}',
    b'{"texts": ["a"], "model": "no-such-model"}',
    b'{"texts": [null]}',
)


@dataclass(frozen=True)
class Request:
    """A request's texts and its number among all of the crowd."""

    texts: list[str]
    number: int
    rng: np.random.Generator

    def batch(self, texts: Sequence[str | None] | None = None) -> pa.RecordBatch:
        rows = self.texts if texts is None else texts
        ids = [f"{self.number}-{row}" for row in range(len(rows))]
        return pa.record_batch([pa.array(ids), pa.array(rows, pa.utf8())], schema=_SCHEMA)


Send = Callable[[flight.FlightClient, Request], None]


def embed(client: flight.FlightClient, request: Request) -> None:
    """Embeds the texts by an action, and waits for the answer."""
    body = json.dumps({"texts": request.texts}).encode()
    list(client.do_action(flight.Action("embed", body), _CALL))


def abandoned_embed(client: flight.FlightClient, request: Request) -> None:
    body = json.dumps({"texts": request.texts}).encode()
    options = flight.FlightCallOptions(timeout=_PATIENCE_S)
    list(client.do_action(flight.Action("embed", body), options))


def malformed_action(client: flight.FlightClient, request: Request) -> None:
    body = _MALFORMED[int(request.rng.integers(len(_MALFORMED)))]
    list(client.do_action(flight.Action("embed", body), _CALL))


def huge_embed(client: flight.FlightClient, request: Request) -> None:
    text = " ".join(request.texts) + " "
    huge = text * (_HUGE_BYTES // len(text.encode()) + 1)
    body = json.dumps({"texts": [huge]}).encode()
    list(client.do_action(flight.Action("embed", body), _CALL))


def long_embed(client: flight.FlightClient, request: Request) -> None:
    """Embeds the start of the huge text, which is all that a model reads of it."""
    body = json.dumps({"texts": [" ".join(request.texts)]}).encode()
    list(client.do_action(flight.Action("embed", body), _CALL))


def exchange(client: flight.FlightClient, request: Request) -> None:
    """Embeds the texts by DoExchange, and reads all vectors."""
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"{}"), _CALL)
    writer.begin(_SCHEMA)
    writer.write_batch(request.batch())
    writer.done_writing()
    for _ in reader:
        pass
    writer.close()


def abandoned_exchange(client: flight.FlightClient, request: Request) -> None:
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"{}"), _CALL)
    writer.begin(_SCHEMA)
    writer.write_batch(request.batch())
    time.sleep(float(request.rng.random()) * _PATIENCE_S)
    reader.cancel()


def _upload(
    client: flight.FlightClient, batch: pa.RecordBatch, command: dict[str, Any], rows: int
) -> None:
    descriptor = flight.FlightDescriptor.for_command(json.dumps(command).encode())
    writer, reader = client.do_put(descriptor, batch.schema, _CALL)
    writer.write_with_metadata(batch, json.dumps({"row_offset": 0}).encode())
    writer.write_metadata(json.dumps({"end": True, "rows": rows}).encode())
    writer.done_writing()
    while reader.read() is not None:
        pass
    writer.close()


def upload(client: flight.FlightClient, request: Request) -> None:
    """Stores the texts by a whole upload."""
    _upload(client, request.batch(), {"dataset": "crowd"}, len(request.texts))


def poisoned_upload(client: flight.FlightClient, request: Request) -> None:
    """Rows without text, without id and with too long a text, among good ones."""
    texts: list[str | None] = [*request.texts, None, "", None]
    batch = request.batch(texts)
    ids = batch.column("id").to_pylist()
    ids[-2:] = ["", None]
    batch = pa.record_batch([pa.array(ids, pa.utf8()), batch.column("text")], schema=_SCHEMA)
    _upload(client, batch, {"dataset": "crowd"}, len(texts))


def invalid_upload(client: flight.FlightClient, request: Request) -> None:
    """Texts that are not UTF-8, in a column that says they are."""
    data = b"".join(text.encode() + b"\xff" for text in request.texts)
    sizes = [len(text.encode()) + 1 for text in request.texts]
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    texts = pa.StringArray.from_buffers(
        len(sizes), pa.py_buffer(offsets.tobytes()), pa.py_buffer(data)
    )
    batch = pa.record_batch([request.batch().column("id"), texts], schema=_SCHEMA)
    _upload(client, batch, {"dataset": "crowd"}, len(sizes))


def wrong_upload(client: flight.FlightClient, request: Request) -> None:
    """An upload whose end announces other rows, or whose command or schema is wrong."""
    kind = int(request.rng.integers(3))
    if kind == 0:
        _upload(client, request.batch(), {"dataset": "crowd"}, len(request.texts) + 5)
    elif kind == 1:
        _upload(client, request.batch(), {"dataset": "../crowd"}, len(request.texts))
    else:
        numbers = pa.record_batch({"text": pa.array(range(len(request.texts)), pa.int64())})
        _upload(client, numbers, {"dataset": "crowd"}, len(request.texts))


def abandoned_upload(client: flight.FlightClient, request: Request) -> None:
    """An upload without an end, whose deadline passes."""
    options = flight.FlightCallOptions(timeout=0.05 + float(request.rng.random()) * _PATIENCE_S)
    descriptor = flight.FlightDescriptor.for_command(b'{"dataset": "crowd"}')
    writer, reader = client.do_put(descriptor, _SCHEMA, options)
    writer.write_with_metadata(request.batch(), json.dumps({"row_offset": 0}).encode())
    while reader.read() is not None:
        pass


# For each kind of request: its name, its number of texts, the function by which a hostile client
# sends it, and the function by which a well-formed client does.
KINDS: tuple[tuple[str, int, Send, Send], ...] = (
    ("poisoned rows", 10, poisoned_upload, upload),
    ("invalid UTF-8", 10, invalid_upload, upload),
    ("wrong upload", 10, wrong_upload, upload),
    ("malformed action", 8, malformed_action, embed),
    ("huge text", 8, huge_embed, long_embed),
    ("abandoned action", 32, abandoned_embed, embed),
    ("abandoned exchange", 16, abandoned_exchange, exchange),
    ("abandoned upload", 48, abandoned_upload, upload),
)


def run_client(
    address: str, number: int, *, hostile: bool, until: float, interval_s: float
) -> Counter[str]:
    """Makes requests until a time, and counts them: by kind, texts, and errors."""
    corpus, counts = Corpus.load(), Counter[str]()
    texts = corpus.sample(4000, seed=number)
    turn = 0
    while time.monotonic() < until:
        due = time.monotonic() + interval_s
        rng = np.random.default_rng([number, turn])
        name, num_texts, send_hostile, send_well_formed = KINDS[int(rng.integers(len(KINDS)))]
        first = int(rng.integers(len(texts) - num_texts))
        request = Request(texts[first : first + num_texts], number * 1_000_000 + turn, rng)
        counts[name] += 1
        counts["texts"] += num_texts
        try:
            with flight.connect(address) as client:
                (send_hostile if hostile else send_well_formed)(client, request)
        except (pa.ArrowException, OSError):
            counts["refused or given up"] += 1
        turn += 1
        time.sleep(max(0.0, min(due, until) - time.monotonic()))
    return counts


def main() -> None:
    address, kind, clients, seconds, interval_s = sys.argv[1:]
    until = time.monotonic() + float(seconds)
    threading.Thread(target=_end_with_input, daemon=True).start()
    with ThreadPoolExecutor(int(clients)) as threads:
        runs = [
            threads.submit(
                run_client,
                address,
                number,
                hostile=kind == "hostile",
                until=until,
                interval_s=float(interval_s),
            )
            for number in range(int(clients))
        ]
        total = sum((run.result() for run in runs), Counter[str]())
    print(json.dumps(total))


def _end_with_input() -> None:
    """Ends this process when the one that started it has ended."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
