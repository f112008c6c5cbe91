"""The `embed` action: a few texts to vectors, without Arrow on the caller's side."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from fletcher.core.command import EmbedCommand
from fletcher.core.schema import ELEMENT_TYPES, output_schema
from fletcher.errors import BatchTooLargeError, InvalidCommandError
from fletcher.flight.call import Helper, Trace, submit
from fletcher.pipeline.assembly import Assembler
from fletcher.pipeline.input.intake import Intake
from fletcher.pipeline.input.row_slice import RowSlice
from fletcher.pipeline.stream import EmbedStream
from fletcher.serving.model_manager import ServedModel
from fletcher.serving.service import Service

MAX_TEXTS = 256
_UNUSED = (
    *("text_column", "id_column", "columns", "include_text", "store", "dataset", "dedupe"),
    *("chunking", "continuous"),  # of long texts, which DoExchange takes as they come
)


def embed(service: Service, fields: dict[str, Any], context: Any, trace: Trace) -> dict[str, Any]:
    """Answers `{"texts": [...], ...}` with `embeddings`, `token_count`, `truncated` and `model`.

    For int8 with a scale a row there is `scale`, too.

    Raises:
        BatchTooLargeError: More than MAX_TEXTS texts; DoExchange takes any number.
        InvalidCommandError: `texts` is no list of strings, or a field that has no meaning here.
        FletcherError: The first text that has no vector, why.
    """
    service.calls.check()
    texts = fields.pop("texts", None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidCommandError("`texts` is not a list of strings", field="texts")
    if len(texts) > MAX_TEXTS:
        raise BatchTooLargeError(
            f"`texts` has {len(texts)} texts, at most {MAX_TEXTS}; DoExchange takes any number",
            field="texts",
        )
    for name in _UNUSED:
        if name in fields:
            raise InvalidCommandError(f"`{name}` has no meaning in `embed`", field=name)
    options = EmbedCommand.from_mapping(fields)
    key, given_up = options.upload_id or "", context.is_cancelled
    with service.models.lease(options.model, key=key, given_up=given_up) as model:
        return _embed(service, model, options, texts, trace)


def _embed(
    service: Service, model: ServedModel, options: EmbedCommand, texts: list[str], trace: Trace
) -> dict[str, Any]:
    request = service.resolve(model, options, dtypes=tuple(ELEMENT_TYPES))
    try:
        batch = pa.record_batch({"text": pa.array(texts, pa.utf8())})
    except UnicodeEncodeError:
        raise InvalidCommandError("`texts` holds half a surrogate pair", field="texts") from None
    source = Intake(
        batch.schema,
        options,
        prompt=request.prompt,
        layers=request.layers,
        limits=model.limits,
        carry_text=False,
        small_is_interactive=True,
    )
    schema = output_schema(request.spec, id_type=pa.utf8())
    assembler = Assembler(schema, request.spec, "embed")
    answer: dict[str, Any] = {
        "model": request.spec.model,
        "embeddings": [],
        "token_count": [],
        "truncated": [],
        **({"scale": []} if request.spec.scaled else {}),
    }
    with service.admit(model, bulk=False), service.telemetry.span("embed", trace) as span:
        stream = model.embedder.open_stream(span)
        try:
            row_slices = list(source.row_slices(batch, 0, 0))
            if len(row_slices) == 1:
                _send(stream, row_slices)
            else:  # the last may find room when the first have left, and not before
                Helper("embed-submit", partial(_send, stream, row_slices), lambda _: stream.close())
            for result in stream.results():
                output = assembler.assemble(result.context, result.embeddings)
                assert output is not None  # no text is cut
                if output.errors:
                    raise output.errors[min(output.errors)]
                answer["embeddings"] += output.batch.column("vector").to_pylist()
                for name in {"token_count", "truncated", "scale"} & answer.keys():
                    answer[name] += output.batch.column(name).to_pylist()
                stream.release(result.num_bytes)
        finally:
            stream.close()
    return answer


def _send(stream: EmbedStream, row_slices: list[RowSlice]) -> None:
    submit(stream, row_slices)
    stream.end()
