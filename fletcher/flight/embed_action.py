"""The `embed` action: vectors of a few texts, as JSON."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fletcher.core.command import MAX_ANSWER_BYTES, EmbedCommand
from fletcher.errors import BatchTooLargeError, InvalidCommandError
from fletcher.flight.commands import refuse_unused
from fletcher.flight.middleware import embed_call
from fletcher.flight.requests import parse_json, to_json
from fletcher.pipeline.interactive.single_row import vector_lists
from fletcher.serving.callers import Caller
from fletcher.serving.service import Service
from fletcher.serving.session import EmbedSession

MAX_TEXTS = 256


def embed(service: Service, body: bytes, caller: Caller) -> list[bytes]:
    """Embed the texts of `{"texts": [...], ...}`, with fields of EmbedCommand.

    Returns:
        JSON with `embeddings`, `token_count`, `truncated` and `model`. For int8 vectors with one
        scale per row, also `scale`. If it takes more than MAX_ANSWER_BYTES, several such answers
        with a part of the texts each, in their order.

    Raises:
        BatchTooLargeError: There are more than MAX_TEXTS texts.
        InvalidCommandError: `texts` is not a list of strings, or a field has no meaning here.
        FletcherError: A text has no vector. The first retryable error is raised, or else the first
            error.
    """
    service.admission.check_draining()
    fields = parse_json(body)
    batch = _batch_of(fields.pop("texts", None))
    refuse_unused("embed", fields)
    command = EmbedCommand.from_mapping(fields)
    if "on_error" in fields and command.on_error != "abort":
        raise InvalidCommandError(
            f"`on_error` is {command.on_error}, but embed answers all texts or none; leave it out, "
            "or use DoExchange",
            field="on_error",
            allowed=["abort"],
        )
    call = embed_call("embed", command, caller, abort=True)
    with EmbedSession(service, call) as session:
        session.open_input(batch.schema)
        session.admit(bulk=False)
        columns = ("token_count", "truncated", *(("scale",) if session.spec.scaled else ()))
        answer: dict[str, Any] = {name: [] for name in ("embeddings", *columns)}
        for result in session.embed_batch(batch, "embed"):
            answer["embeddings"] += vector_lists(result.batch.column("vector"))
            for name in columns:
                answer[name] += result.batch.column(name).to_pylist()
        return _cut(session.spec.model, answer)


def _cut(model: str, answer: dict[str, list[Any]]) -> list[bytes]:
    """The answer as JSON, in parts that clients with the default limits can receive."""
    whole = to_json({"model": model, **answer})
    num_rows = len(answer["embeddings"])
    if len(whole) <= MAX_ANSWER_BYTES or num_rows == 1:
        return [whole]
    halves = [slice(num_rows // 2), slice(num_rows // 2, None)]
    parts = [{name: values[rows] for name, values in answer.items()} for rows in halves]
    return [one for part in parts for one in _cut(model, part)]


def _batch_of(texts: Any) -> pa.RecordBatch:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidCommandError("`texts` is missing or not a list of strings", field="texts")
    if len(texts) > MAX_TEXTS:
        raise BatchTooLargeError(
            f"`texts` has {len(texts)} texts, at most {MAX_TEXTS}; DoExchange takes any number",
            field="texts",
        )
    try:
        return pa.record_batch({"text": pa.array(texts, pa.utf8())})
    except UnicodeEncodeError:
        raise InvalidCommandError(
            "`texts` holds half a surrogate pair, expected Unicode text", field="texts"
        ) from None
