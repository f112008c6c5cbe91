"""Random calls to two servers, one with an embedding cache, that must answer the same.

A seed gives the calls. Their texts come from a small pool, so that most texts repeat, and rows with
too long, missing or repeated texts are among them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from fletcher.stores.staging import INCARNATION, incarnation_of
from tests.integration.flight_calls import action, exchange, put

MAX_ROW_BYTES = 4096
_WORDS = "debian packages hold programs that people use every day and night, süß 漢字 🙂".split()
_CHUNKINGS = (
    *("tokens:8", "tokens:16/4:mean", "tokens:12:none", "sentences:16:weighted", "paragraphs:16"),
    *("each-sentence", "each-paragraph:16:hierarchical", "tokens:8:max", "tokens:8:mean:late"),
    *("tokens:40:none", "nonsense", "tokens:10/3:none"),
)
_STRINGS = (pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int32(), pa.utf8()))


def _pool(chance: random.Random) -> list[str | None]:
    """Texts to choose from."""
    texts: list[str | None] = ["", " ", "a", "\n\n", None, "x" * (MAX_ROW_BYTES + 1)]
    for length in (*range(1, 12), 20, 30, 40, 60, 150):
        words = chance.choices(_WORDS, k=length)
        texts += [" ".join(words), ". ".join(words).capitalize(), "\n\n".join(words)]
    return texts


@dataclass(frozen=True)
class Call:
    """One call: `way` is exchange, embed or put."""

    number: int
    way: str
    fields: dict[str, Any]
    batches: list[pa.RecordBatch]


def calls(seed: int, models: tuple[str, ...]) -> Iterator[Call]:
    """Endless random calls."""
    chance = random.Random(seed)
    pool = _pool(chance)
    number = 0
    while True:
        way = chance.choices(["exchange", "embed", "put"], [6, 2, 2])[0]
        fields = _fields(chance, way, models)
        texts = [chance.choice(pool) for _ in range(round(10 ** chance.uniform(0, 1.8)))]
        if way == "embed":
            texts = [text for text in texts if text is not None] or ["a"]
        elif way == "put":
            fields["dataset"] = f"d{number}"
        if way != "embed":
            fields["upload_id"] = f"u{number}"
        yield Call(number, way, fields, _batches(chance, fields, texts))
        number += 1


def _fields(chance: random.Random, way: str, models: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a command; some do not fit together, and then both servers say so."""
    fields: dict[str, Any] = {}

    def some(name: str, share: float, *values: Any) -> None:
        if chance.random() < share:
            fields[name] = chance.choice(values)

    some("model", 0.3, *models)
    some("prompt", 0.3, "query", "query", "passage", "search for: ", "süß ", "word " * 12)
    some("dims", 0.3, 8, 8, 16, 16, 24, 24, 32, 33)
    some("layers", 0.2, 1, 2, 2, 2, 3)
    some("dtype", 0.6, "float32", "float16", "int8", "ubinary")
    some("normalize", 0.4, True, False)
    some("truncate", 0.4, "end", "start", "error")
    some("output", 0.1, "dense", "dense", "dense", "sparse", "multi")
    some("priority", 0.3, "bulk", "interactive")
    if way == "embed":
        return fields
    some("chunking", 0.3, *_CHUNKINGS)
    some("columns", 0.3, ["n"], ["n"], ["n"], ["missing"])
    some("include_text", 0.3, True, False)
    some("on_error", 0.15, "abort")
    some("text_column", 0.1, "body")
    some("id_column", 0.1, "key")
    if way == "exchange":
        some("continuous", 0.1, True)
    else:
        some("durability", 0.3, "store", "journal", "memory")
        some("dedupe", 0.2, "text", "id")
        some("mode", 0.2, "upsert", "overwrite", "delta")
        fields["dtype"] = fields.get("dtype", "float32")
    return fields


def _batches(
    chance: random.Random, fields: dict[str, Any], texts: list[str | None]
) -> list[pa.RecordBatch]:
    names = [fields.get("id_column", "id"), fields.get("text_column", "text"), "n"]
    kind = chance.choice(_STRINGS)
    ids: list[int | None] = list(range(len(texts)))
    if chance.random() < 0.1:
        ids[chance.randrange(len(ids))] = None
    whole = pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.int64()), pa.array(texts, kind), pa.array(range(len(texts)))], names
    )
    if chance.random() < 0.2:
        whole = whole.drop_columns([names[0]])
    step = max(1, round(len(texts) * 10 ** chance.uniform(-1, 0)))
    return [whole.slice(first, step) for first in range(0, len(texts), step)]


@dataclass
class Server:
    """One of the two servers.

    Attributes:
        client: Its client.
        read: Returns the rows of a dataset; None if there is no dataset.
    """

    client: flight.FlightClient
    read: Callable[[str], pa.Table | None]

    def answer(self, call: Call) -> list[Any]:
        """The call's answers, or its error, without what differs from call to call."""
        try:
            if call.way == "embed":
                texts = [text for one in call.batches for text in one.column(-2).to_pylist()]
                found = [action(self.client, "embed", {"texts": texts, **call.fields})]
            elif call.way == "exchange":
                schema = call.batches[0].schema
                found = [
                    part
                    for batch, metadata in exchange(
                        self.client, call.batches, schema, **call.fields
                    )
                    for part in (metadata, _without_time(batch))
                ]
            else:
                num_rows = sum(batch.num_rows for batch in call.batches)
                answers = put(
                    self.client, call.batches, call.batches[0].schema, end=num_rows, **call.fields
                )
                # How many rows the store has by now differs from time to time.
                found = [{**answers[-1], "rows_stored": None}]
        except flight.FlightError as error:
            return [_error(error)]
        return found

    def stored(self, call: Call) -> pa.Table | None:
        """Rows that a put has stored, in their order."""
        table = self.read(call.fields["dataset"])
        if table is None:
            return None
        order = [("batch_key", "ascending")] + [
            (name, "ascending") for name in ("id", "text", "chunk") if name in table.column_names
        ]
        return _without_chance(_without_time(table.sort_by(order)).drop_columns(["batch_key"]))


def _without_chance(table: pa.Table) -> pa.Table:
    """The table without the random part of the name of its incarnation."""
    upload, _, chance = incarnation_of(table.schema).rpartition("-")
    assert chance, "every dataset has an incarnation"
    kept = {**(table.schema.metadata or {}), INCARNATION: upload.encode()}
    return table.replace_schema_metadata(kept)


def _without_time(table: Any) -> Any:
    return table.drop_columns([name for name in ("timestamp",) if name in table.schema.names])


def _error(error: flight.FlightError) -> Any:
    try:
        return json.loads(error.extra_info)
    except ValueError:
        return str(error)


class DisagreementError(AssertionError):
    """Two servers that answer differently."""


def compare(one: Any, other: Any, least_cosine: float | None, where: str) -> None:
    """Check that two answers agree.

    Args:
        one: An answer: JSON, or a table or batch.
        other: The other server's.
        least_cosine: Least cosine of two vectors; None: all bits are equal.
        where: Description for the error.

    Raises:
        DisagreementError: They differ.
    """
    if isinstance(one, pa.Table | pa.RecordBatch) and isinstance(other, type(one)):
        _require(one.schema.equals(other.schema, check_metadata=True), where, "schema")
        _require(one.num_rows == other.num_rows, where, "number of rows")
        for name in one.schema.names:
            left, right = (_flat(table.column(name)) for table in (one, other))
            if name == "vector" and least_cosine is not None:
                _compare_vectors(left, right, least_cosine, where)
            elif not (name == "scale" and least_cosine is not None):
                _require(left.equals(right), where, f"column {name}: {left} and {right}")
    elif isinstance(one, dict) and isinstance(other, dict) and "embeddings" in one:
        rest = [
            {k: v for k, v in each.items() if k not in ("embeddings", "scale")}
            for each in (one, other)
        ]
        _require(rest[0] == rest[1], where, f"{rest}")
        left, right = (np.array(each["embeddings"]) for each in (one, other))
        if least_cosine is None:
            _require(np.array_equal(left, right), where, "embeddings")
        else:
            _require_close(left, right, least_cosine, where)
    else:
        _require(one == other, where, f"{str(one)[:600]}\nand\n{str(other)[:600]}")


def _compare_vectors(left: pa.Array, right: pa.Array, least_cosine: float, where: str) -> None:
    _require(left.is_null().equals(right.is_null()), where, "rows without a vector")
    if pa.types.is_uint8(left.type.value_type):
        return  # bits of values near 0 may differ
    rows = [
        np.stack(one.drop_null().to_numpy(zero_copy_only=False))
        if len(one.drop_null())
        else np.zeros((0, 1))
        for one in (left, right)
    ]
    _require_close(rows[0], rows[1], least_cosine, where)


def _require_close(left: Any, right: Any, least_cosine: float, where: str) -> None:
    _require(left.shape == right.shape, where, "shape of vectors")
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = (left * right).sum(axis=1) / np.maximum(norms, 1e-30)
    wrong = (cosines < least_cosine) & ((norms > 0) | (left != right).any(axis=1))
    _require(not wrong.any(), where, f"cosines {cosines[wrong][:5]}")


def _flat(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise DisagreementError(f"{where}: {what}")


def play(
    cached: Server, plain: Server, chosen: Iterator[Call], least_cosine: float | None
) -> Counter[str]:
    """Send each call to both servers, and check that they agree; returns counts of answers."""
    counts: Counter[str] = Counter()
    for call in chosen:
        fields = call.fields
        where = f"call {call.number} by {call.way}: {fields}"
        answers = cached.answer(call), plain.answer(call)
        _require(len(answers[0]) == len(answers[1]), where, "number of answers")
        for one, other in zip(*answers, strict=True):
            compare(one, other, least_cosine, where)
        first = answers[0][0] if answers[0] else {}
        refused = isinstance(first, dict) and "code" in first
        counts[f"{call.way} {'refused' if refused else 'answered'}"] += 1
        # Rows in memory are on their way to the store when the call ends.
        if call.way == "put" and not refused and fields.get("durability") != "memory":
            compare(cached.stored(call), plain.stored(call), least_cosine, where)
    return counts
