"""Random tables of all Arrow types, written to files, read, stored and read back."""

from __future__ import annotations

import datetime as dt
import json
import math
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, output_schema, vector_columns
from fletcher.errors import FletcherError
from fletcher.pipeline.input.column_types import check_readable
from fletcher.pipeline.input.columns import InputColumns
from fletcher.readers import open_source
from fletcher.stores.base import Store
from tests.doubles.table_files import write_file, write_without_columns
from tests.doubles.table_values import UNITS, csv_text, plain, same, stand_in

SPEC = VectorSpec("m@0", 4, "float32", 1, "mean", normalized=False)
TEXTS = [
    "",
    "a",
    "ü\u0301 🙂",
    "a\nb",
    "a\rb",
    "a\r\nb",
    " b ",
    'say "hi"',
    "tab\t",
    "\ufeff",
    "x" * 300,
    "NA",
    "007",
    "null",
]
NAMES = [
    "a b",
    "ü🙂",
    "a.b",
    "select",
    "x" * 60,
    "1",
    "Text",
    "a'b",
    'a"b',
    "a\nb",
    "_x",
    "`q`",
    "İ",
    "",
    " ",
    "a\tb",
    "null",
    "ID",  # differs from `id` by case alone, as `Text` does from `text`
    "é",
    "e\u0301",  # looks like the name before
    "\uff49d",  # a wide i
    "_distance",
    "_rowid",
    "a\0b",
]
TAKEN = ["vector", "timestamp", "batch_key", "score", "scale", "truncated", "token_count"]
MAX_DEPTH = 2
ZONES = (None, "UTC", "Europe/Berlin", "+02:00")

Draw = random.Random


def _integers(bits: int, *, signed: bool) -> Callable[[Draw], int]:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return lambda draw: draw.choice([low, high, 0, 1, draw.randint(low, high)])


def _floats(kind: Any) -> Callable[[Draw], Any]:
    odd = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.5]
    return lambda draw: kind(draw.choice([*odd, draw.uniform(-100, 100)])).item()


def _decimal(digits: int, scale: int) -> Callable[[Draw], Decimal]:
    return lambda draw: Decimal(draw.randint(-(10**digits) + 1, 10**digits - 1)).scaleb(-scale)


def _count(draw: Draw) -> int:
    return draw.choice([0, 1, -1, draw.randint(-(10**9), 10**9)])


SCALARS: list[tuple[pa.DataType, Callable[[Draw], Any]]] = [
    *((getattr(pa, f"int{bits}")(), _integers(bits, signed=True)) for bits in (8, 16, 32, 64)),
    *((getattr(pa, f"uint{bits}")(), _integers(bits, signed=False)) for bits in (8, 16, 32, 64)),
    (pa.float16(), _floats(np.float16)),
    (pa.float32(), _floats(np.float32)),
    (pa.float64(), _floats(np.float64)),
    (pa.bool_(), lambda draw: draw.random() < 0.5),
    *(
        (kind, lambda draw: draw.choice(TEXTS))
        for kind in (pa.utf8(), pa.large_utf8(), pa.string_view())
    ),
    *(
        (kind, lambda draw: draw.randbytes(draw.randint(0, 20)))
        for kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    ),
    (pa.binary(4), lambda draw: draw.randbytes(4)),
    (pa.binary(0), lambda _: b""),
    (pa.date32(), lambda draw: dt.date(1970, 1, 1) + dt.timedelta(draw.randint(-9999, 99999))),
    (pa.date64(), lambda draw: dt.date(1970, 1, 1) + dt.timedelta(draw.randint(-9999, 99999))),
    *((pa.timestamp(unit, zone), _count) for unit in UNITS for zone in ZONES),
    *((pa.duration(unit), _count) for unit in UNITS),
    *((pa.time32(unit), lambda draw: draw.randint(0, 86399)) for unit in ("s", "ms")),
    *((pa.time64(unit), lambda draw: draw.randint(0, 86_399_999_999)) for unit in ("us", "ns")),
    (pa.decimal32(7, 2), _decimal(7, 2)),
    (pa.decimal64(15, 3), _decimal(15, 3)),
    (pa.decimal128(9, 2), _decimal(9, 2)),
    (pa.decimal128(5, -2), _decimal(5, -2)),
    (pa.decimal256(50, 3), _decimal(18, 3)),
    (
        pa.month_day_nano_interval(),
        lambda draw: pa.MonthDayNano([draw.randint(-9, 9), _count(draw), _count(draw)]),
    ),
    (pa.null(), lambda _: None),
]


def random_value(kind: pa.DataType, draw: Draw) -> Any:
    """A random value, null one time in six."""
    if draw.random() < 1 / 6:
        return None
    for scalar, make in SCALARS:
        if scalar == kind:
            return make(draw)
    if pa.types.is_struct(kind):
        return {field.name: random_value(field.type, draw) for field in kind}
    if pa.types.is_map(kind):
        return [(f"k{n}", random_value(kind.item_type, draw)) for n in range(draw.randint(0, 3))]
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else draw.randint(0, 3)
    return [random_value(kind.value_type, draw) for _ in range(size)]


def _kind(draw: Draw, depth: int = 0) -> pa.DataType:
    if depth >= MAX_DEPTH or draw.random() < 0.7:
        return draw.choice(SCALARS)[0]
    inner = _kind(draw, depth + 1)
    makers = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
    choice = draw.randrange(7)
    if choice < 4:
        return makers[choice](inner)
    if choice == 4:
        return pa.list_(inner, draw.randint(1, 3))
    if choice == 5:
        return pa.map_(pa.utf8(), inner)
    return pa.struct([("x", inner), ("y z", _kind(draw, depth + 1))])


def _odd_column(draw: Draw, num_rows: int) -> pa.Array:
    """A column of a type that Python values cannot name: unions, extensions, nested encodings."""
    numbers = pa.array([random_value(pa.int8(), draw) for _ in range(num_rows)], pa.int8())
    words = pa.array([random_value(pa.utf8(), draw) for _ in range(num_rows)]).dictionary_encode()
    ends = pa.array(range(num_rows + 1), pa.int32())
    uuids = pa.array([uuid.UUID(int=n).bytes for n in range(num_rows)], pa.uuid())
    pairs = pa.array([[1.0, float(n)] for n in range(num_rows)], pa.list_(pa.float32(), 2))
    makers: list[Callable[[], pa.Array]] = [
        lambda: pa.UnionArray.from_sparse(pa.array([0] * num_rows, pa.int8()), [numbers]),
        lambda: pa.UnionArray.from_dense(
            pa.array([0] * num_rows, pa.int8()), pa.array(range(num_rows), pa.int32()), [numbers]
        ),
        lambda: pa.ListArray.from_arrays(ends, words),
        lambda: pa.StructArray.from_arrays([words, numbers], ["w", "n"]),
        lambda: pa.ListArray.from_arrays(ends, uuids),
        lambda: uuids,
        lambda: pa.ExtensionArray.from_storage(
            pa.json_(pa.utf8()), pa.array([json.dumps(n) for n in range(num_rows)], pa.utf8())
        ),
        lambda: pa.ExtensionArray.from_storage(pa.bool8(), numbers),
        lambda: pa.ExtensionArray.from_storage(pa.opaque(pa.int8(), "t", "v"), numbers),
        lambda: pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), pairs),
        lambda: pa.array([{}] * num_rows, pa.struct([])),
        lambda: pa.array([[]] * num_rows, pa.list_(pa.int8(), 0)),
    ]
    return draw.choice(makers)()


def _column(draw: Draw, num_rows: int) -> pa.Array:
    if draw.random() < 0.15:
        return _odd_column(draw, num_rows)
    kind = _kind(draw)
    encoding = draw.random()
    if encoding < 0.1:
        return _dictionary(draw, kind, num_rows)
    array = pa.array([random_value(kind, draw) for _ in range(num_rows)], kind)
    flat = not pa.types.is_nested(kind) and not pa.types.is_null(kind)
    if encoding < 0.15 and flat and kind not in (pa.string_view(), pa.binary_view()):
        ends = pa.array(range(1, num_rows + 1), pa.int32())
        return pa.RunEndEncodedArray.from_arrays(ends, array)
    return array


def _dictionary(draw: Draw, kind: pa.DataType, num_rows: int) -> pa.Array:
    """A dictionary of any type of values, some of them null, repeated or unused."""
    values = pa.array([random_value(kind, draw) for _ in range(draw.randint(1, 5))], kind)
    codes = [draw.choice([*range(len(values)), None]) for _ in range(num_rows)]
    code_types = [getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32)]
    indices = pa.array(codes, draw.choice([*code_types, pa.int64()]))
    return pa.DictionaryArray.from_arrays(indices, values)


def random_table(draw: Draw) -> pa.Table:
    """A table with `text`, perhaps ids and metadata, and further columns."""
    num_rows = draw.choice([1, 2, 3, 10, 40])
    texts = [draw.choice([*TEXTS, None]) for _ in range(num_rows)]
    kinds = [pa.utf8(), pa.large_utf8(), pa.string_view(), pa.dictionary(pa.int32(), pa.utf8())]
    columns: dict[str, pa.Array] = {"text": pa.array(texts, draw.choice(kinds))}
    if draw.random() < 0.6:
        columns["id"] = draw.choice(
            [
                pa.array([f"id{n}" for n in range(num_rows)], draw.choice(kinds)),
                pa.array(range(num_rows), draw.choice([pa.int8(), pa.uint64(), pa.int32()])),
                pa.array([uuid.UUID(int=n).bytes for n in range(num_rows)], pa.binary(16)),
            ]
        )
        if columns["id"].type == pa.binary(16):
            columns["id"] = pa.ExtensionArray.from_storage(pa.uuid(), columns["id"])
    names = [
        *draw.sample(NAMES, draw.randint(0, 3)),
        *(draw.sample(TAKEN, 1) if draw.random() < 0.05 else []),
    ]
    for name in names:
        columns[name] = _column(draw, num_rows)
    return pa.table(columns)


def check_table(draw: Draw, folder: Path, stores: Sequence[Store], dataset: str) -> str:
    """Write a random table to files, read and store it, and compare the values.

    Returns `stored`, or `refused` if an error names what cannot be read or stored.

    Raises:
        AssertionError: A value was changed, or an error does not name a file or column.
    """
    table = random_table(draw)
    if draw.random() < 0.2:  # as a client sends it, in one batch
        stored = [
            _check_stored(table, table.combine_chunks().to_batches(), store, dataset, exact=True)
            for store in stores
        ]
        return "stored" if all(stored) else "refused"
    middle = draw.randint(0, table.num_rows)
    parts = [table] if draw.random() < 0.5 else [table.slice(0, middle), table.slice(middle)]
    if draw.random() < 0.1:
        parts.insert(draw.randint(0, len(parts)), table.slice(0, 0))
    paths = [write_file(part, folder, draw) for part in parts]
    if without_columns := draw.random() < 0.05:
        paths.insert(draw.randint(0, len(paths)), write_without_columns(folder, draw))
    carried = [name for name in table.schema.names if name not in ("text", "id")]
    refused = None
    try:
        source = open_source(paths, columns=carried, batch_rows=draw.choice([3, 4096]))
        read = pa.Table.from_batches(source.batches(), source.schema)
    except FletcherError as error:
        refused = error.message
    if refused is not None:
        named = _names_place(refused, table)
        assert named or (without_columns and "no column" in refused), refused
        return "refused"
    read.validate(full=True)
    exact = all(path.suffix not in (".jsonl", ".csv", ".tsv") for path in paths)
    _compare(table, read, exact=exact)
    stored = [
        _check_stored(table, list(source.batches()), store, dataset, exact=exact)
        for store in stores
    ]
    return "stored" if all(stored) else "refused"


def _check_stored(
    table: pa.Table, batches: list[pa.RecordBatch], store: Store, dataset: str, *, exact: bool
) -> bool:
    """Store batches and compare what the store has then; False if they are refused."""
    if (refused := _store(batches, store, dataset)) is not None:
        assert _names_place(refused, table), refused
        return False
    _compare(table, store.scan(dataset).read_all().sort_by("token_count"), exact=exact)
    return True


def _names_place(message: str, table: pa.Table) -> bool:
    names = {*table.schema.names, *(name.replace(".", "_") for name in table.schema.names)}
    if "" in names and message.startswith("`columns` has 0 characters"):
        return True
    return any(f"`{name}`" in message or repr(name) in message for name in names)


def _compare(table: pa.Table, found: pa.Table, *, exact: bool) -> None:
    """Check values and types; not `exact`: files may have had texts only, or other numbers."""
    for name in table.schema.names:
        column = found[name if name in found.schema.names else name.replace(".", "_")]
        kind = table.schema.field(name).type
        sent, got = _values(table[name]), _values(column)
        if exact:
            assert same(sent, got), (name, kind, column.type, sent, got)
            assert stand_in(kind) == stand_in(column.type), (name, kind, column.type)
        else:
            pairs = zip(_scalars(table[name]), _scalars(column), sent, got, strict=True)
            for one, other, value, found_value in pairs:
                kept = same(value, found_value) or _text(one) == _text(other)
                assert kept or (name == "text" and value is None and found_value == ""), (
                    name, kind, column.type, value, found_value,
                )  # fmt: skip


def _text(scalar: pa.Scalar) -> str | None:
    """The text of a value in CSV; the value's `repr` if it has none."""
    try:
        return csv_text(scalar)
    except ValueError:
        return repr(scalar)


def _values(column: pa.ChunkedArray) -> list[Any]:
    return list(map(plain, _scalars(column)))


def _scalars(column: pa.ChunkedArray) -> Iterator[pa.Scalar]:
    encoded = pa.types.is_run_end_encoded(column.type)
    for one in column.chunks:
        yield from pc.run_end_decode(one) if encoded else one


def _store(batches: list[pa.RecordBatch], store: Store, dataset: str) -> str | None:
    """Store the rows as delivery does; the message if they are refused."""
    try:
        schema = batches[0].schema
        carried = tuple(name for name in schema.names if name not in ("text", "id"))
        options = EmbedCommand(columns=carried)
        check_readable(schema, options)
        columns = InputColumns(schema, options, 1 << 30)
        schema = output_schema(
            SPEC, id_type=columns.id_type, carried=columns.carried, text=True, batch_key=True
        )
        writer = store.open_writer(dataset, schema, "append")
        try:
            row = 0
            for batch in batches:
                writer.append([_output(columns.checked(batch), schema, row)])
                row += batch.num_rows
        finally:
            writer.close()
    except FletcherError as error:
        return error.message
    return None


def _output(used: pa.RecordBatch, schema: pa.Schema, row: int) -> pa.RecordBatch:
    size = used.num_rows
    vectors = vector_columns(np.ones((size, SPEC.dims), np.float32), SPEC, None)
    made = {
        "id": pa.array([f"u:{row + n}" for n in range(size)]),
        "timestamp": pa.array([0] * size, schema.field("timestamp").type),
        "token_count": pa.array(range(row, row + size), pa.int32()),  # the row's number
        "truncated": pa.array([False] * size),
        "batch_key": pa.array([f"u:{row}-{row + size - 1}"] * size),
        **vectors,
    }
    for name in used.schema.names:
        made[name.removeprefix("carried:")] = used.column(name)
    arrays = [
        made[field.name].cast(field.type)
        if made[field.name].type != field.type
        else made[field.name]
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
