"""Driver of the conformance cases for the Python client."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

import fletcher
from fletcher.client.prompts import DOCUMENT_PROMPTS, QUERY_PROMPTS, default_prompt, served_model
from fletcher.errors import CancelledError, DeadlineExceededError, FletcherError

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.utf8()})


class _RowError(Exception):
    def __init__(self, row: fletcher.RowError) -> None:
        super().__init__(row.message)
        self.row = row


def main() -> None:
    """Run the cases on standard input."""
    for line in sys.stdin:
        print(json.dumps(_outcome(json.loads(line))), flush=True)


def _outcome(case: dict[str, Any]) -> dict[str, Any]:
    transfer = fletcher.TransferOptions(max_retries=case.get("max_retries", 0))
    token = case.get("token") or None
    try:
        with fletcher.connect(case["address"], token=token, transfer=transfer) as client:
            return {"answer": _run(client, case)}
    except _RowError as error:
        return {"row_error": {"row": error.row.row, "code": error.row.code}}
    except FletcherError as error:
        told = {"code": error.code, "message": error.message, "field": error.field or ""}
        return {"error": told}


def _run(client: fletcher.Client, case: dict[str, Any]) -> Any:
    command = case.get("command", {})
    if case["call"] == "put":
        options = fletcher.EmbedCommand.from_mapping({**command, "dataset": case["dataset"]})
        return _timed(case, lambda: _summary(client.put(_batches(case), options)))
    names = {"embed_queries": QUERY_PROMPTS, "embed_documents": DOCUMENT_PROMPTS}
    if case["call"] in names:
        model = served_model(client, command.get("model"))
        command = {"prompt": default_prompt(model, names[case["call"]]), **command}
    table = pa.table({"text": pa.array(case["texts"], pa.utf8())})
    wanted = fletcher.EmbedCommand.from_mapping({"dtype": "float32", **command})

    def embed() -> list[list[float]]:
        vectors: list[list[float]] = []
        with client.exchange(table, wanted) as answers:
            for batch in answers:
                for error in answers.errors:
                    raise _RowError(error)
                vectors += np.asarray(fletcher.dequantize(batch)).tolist()
        return vectors

    return _timed(case, embed)


def _timed(case: dict[str, Any], run: Any) -> Any:
    """Run a call on another thread, and leave it after the case's time.

    The Python client has no deadline for a whole call. Its user closes the client instead.
    """
    limit_ms = case.get("deadline_ms") or case.get("cancel_ms")
    if not limit_ms:
        return run()
    found: list[Any] = []

    def keep() -> None:
        try:
            found.append(run())
        except BaseException as error:  # noqa: BLE001 - raised below
            found.append(error)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    thread.join(limit_ms / 1000)
    if not found:
        kind = DeadlineExceededError if case.get("deadline_ms") else CancelledError
        raise kind("the case's time is over")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _batches(case: dict[str, Any]) -> pa.RecordBatchReader:
    nulls = set(case.get("null_texts", ()))

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, case["rows"], case["batch_rows"]):
            rows = range(first, min(case["rows"], first + case["batch_rows"]))
            texts = [None if row in nulls else f"text {row}" for row in rows]
            time.sleep(case.get("pause_ms", 0) / 1000)
            yield pa.record_batch([pa.array(rows, pa.int64()), pa.array(texts, pa.utf8())], SCHEMA)

    return pa.RecordBatchReader.from_batches(SCHEMA, batches())


def _summary(summary: fletcher.PutSummary) -> dict[str, Any]:
    return {
        "complete": summary.complete,
        "rows_received": summary.rows_received,
        "rows_stored": summary.rows_stored,
        "rows_failed": summary.rows_failed,
        "errors": [{"row": one.row, "code": one.code} for one in summary.errors],
    }


if __name__ == "__main__":
    main()
