"""Random tables of all Arrow types, written to files, read, stored and read back."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import random
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec, output_schema, vector_columns
from fletcher.errors import FletcherError
from fletcher.pipeline.input.columns import InputColumns
from fletcher.readers import TextSource, open_source
from fletcher.stores.base import Store

SPEC = VectorSpec("m@0", 4, "float32", 1, "mean", normalized=False)
TEXTS = [
    "",
    "a",
    "ü\u0301 🙂",
    "a\nb",
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
MS = pa.time32("ms")
UNITS = ("s", "ms", "us", "ns")
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


def _value(kind: pa.DataType, draw: Draw) -> Any:
    """A random value, null one time in six."""
    if draw.random() < 1 / 6:
        return None
    for scalar, make in SCALARS:
        if scalar == kind:
            return make(draw)
    if pa.types.is_struct(kind):
        return {field.name: _value(field.type, draw) for field in kind}
    if pa.types.is_map(kind):
        return [(f"k{n}", _value(kind.item_type, draw)) for n in range(draw.randint(0, 3))]
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else draw.randint(0, 3)
    return [_value(kind.value_type, draw) for _ in range(size)]


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
    numbers = pa.array([_value(pa.int8(), draw) for _ in range(num_rows)], pa.int8())
    words = pa.array([_value(pa.utf8(), draw) for _ in range(num_rows)]).dictionary_encode()
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
    array = pa.array([_value(kind, draw) for _ in range(num_rows)], kind)
    encoding = draw.random()
    flat = not pa.types.is_nested(kind) and not pa.types.is_null(kind)
    if encoding < 0.1 and flat and kind not in (pa.string_view(), pa.binary_view(), pa.float16()):
        with contextlib.suppress(pa.ArrowNotImplementedError):  # such as decimal64
            return array.dictionary_encode()
    if encoding < 0.15 and flat and kind not in (pa.string_view(), pa.binary_view()):
        ends = pa.array(range(1, num_rows + 1), pa.int32())
        return pa.RunEndEncodedArray.from_arrays(ends, array)
    return array


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


def write_file(table: pa.Table, folder: Path, draw: Draw) -> Path:
    """Write a table to a file of a random format that can hold it."""
    for suffix in draw.sample([".parquet", ".arrow", ".arrows", ".jsonl"], 4):
        path = folder / f"{len(list(folder.iterdir()))}{suffix}"
        try:
            _WRITERS[suffix](table, path)
        except (pa.ArrowException, OSError, TypeError, ValueError):
            path.unlink(missing_ok=True)
            continue
        return path
    raise AssertionError(f"no format holds {table.schema}")


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=7)
    found = pq.read_table(path)  # Parquet itself narrows some types
    kinds = [[stand_in(field.type) for field in one.schema] for one in (found, table)]
    if kinds[0] != kinds[1] or not same(found.to_pylist(), table.to_pylist()):
        raise ValueError


def _write_json(table: pa.Table, path: Path) -> None:
    plain = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not all(any(one(field.type) for one in plain) for field in table.schema):
        raise TypeError
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")


def _write_ipc(make: Callable[..., Any]) -> Callable[[pa.Table, Path], None]:
    def write(table: pa.Table, path: Path) -> None:
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=9)

    return write


_WRITERS = {
    ".parquet": _write_parquet,
    ".arrow": _write_ipc(pa.ipc.new_file),
    ".arrows": _write_ipc(pa.ipc.new_stream),
    ".jsonl": _write_json,
}


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; NaN is NaN, and UUIDs are their texts."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, uuid.UUID) or isinstance(other, uuid.UUID):
        return str(one) == str(other)
    return bool(one == other and isinstance(one, bool) == isinstance(other, bool))


def check_table(draw: Draw, folder: Path, stores: Sequence[Store], dataset: str) -> str:
    """Write a random table to files, read and store it, and compare the values.

    Returns `stored`, or `refused` if an error names what cannot be read or stored.

    Raises:
        AssertionError: A value was changed, or an error does not name a file or column.
    """
    table = random_table(draw)
    middle = draw.randint(0, table.num_rows)
    parts = [table] if draw.random() < 0.5 else [table.slice(0, middle), table.slice(middle)]
    if draw.random() < 0.1:
        parts.insert(draw.randint(0, len(parts)), table.slice(0, 0))
    paths = [write_file(part, folder, draw) for part in parts]
    carried = [name for name in table.schema.names if name not in ("text", "id")]
    try:
        source = open_source(paths, columns=carried, batch_rows=draw.choice([3, 4096]))
        read = pa.Table.from_batches(source.batches(), source.schema)
    except FletcherError as error:
        refused = error.message
    else:
        refused = None
    if refused is not None:
        assert _names_place(refused, table), refused
        return "refused"
    read.validate(full=True)
    exact = all(path.suffix != ".jsonl" for path in paths)
    _compare(table, read, exact=exact)
    for store in stores:
        if (refused := _store(source, store, dataset)) is not None:
            assert _names_place(refused, table), refused
            return "refused"
        _compare(table, store.scan(dataset).read_all().sort_by("token_count"), exact=exact)
    return "stored"


def _names_place(message: str, table: pa.Table) -> bool:
    names = {*table.schema.names, *(name.replace(".", "_") for name in table.schema.names)}
    if "" in names and message.startswith("`columns` has 0 characters"):
        return True
    return any(f"`{name}`" in message or repr(name) in message for name in names)


def _compare(table: pa.Table, found: pa.Table, *, exact: bool) -> None:
    """Check values and types; not `exact`: numbers may be wider, as JSON has no types."""
    for name in table.schema.names:
        column = found[name.replace(".", "_")]
        kind = table.schema.field(name).type
        sent, got = _values(table[name]), _values(column)
        assert same(sent, got), (name, kind, column.type, sent, got)
        if exact:
            assert stand_in(kind) == stand_in(column.type), (name, kind, column.type)


def _values(column: pa.ChunkedArray) -> list[Any]:
    encoded = pa.types.is_run_end_encoded(column.type)
    chunks = (pc.run_end_decode(one) if encoded else one for one in column.chunks)
    return [plain(scalar) for one in chunks for scalar in one]


def plain(scalar: pa.Scalar) -> Any:
    """A scalar as a Python value. Times are counts of ns, which Python's types lack."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        is_uuid = kind.extension_name == "arrow.uuid"
        return str(scalar.as_py()) if is_uuid else plain(scalar.value)
    if pa.types.is_dictionary(kind) or pa.types.is_union(kind):
        return plain(scalar.value)
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return scalar.value * 1000 ** (3 - UNITS.index(kind.unit))
    if pa.types.is_struct(kind):
        return {field.name: plain(scalar[index]) for index, field in enumerate(kind)}
    if pa.types.is_nested(kind):  # lists and maps
        return list(map(plain, scalar.values))
    return scalar.as_py()


def stand_in(kind: pa.DataType) -> pa.DataType:
    """The type as which a column comes back; docs/python.md and docs/wire.md list them.

    Parquet has neither seconds nor date64, and its lists have other names of fields.
    """
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return pa.utf8() if kind.extension_name in ("arrow.uuid", "arrow.json") else kind
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return stand_in(kind.value_type)
    if types.is_null(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.utf8()
    if types.is_struct(kind):
        return pa.struct([(field.name, stand_in(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(stand_in(kind.key_type), stand_in(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(pa.field("item", stand_in(kind.value_type)), kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(pa.field("item", stand_in(kind.value_type)))
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(pa.field("item", stand_in(kind.value_type)))
    if types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    simple = {pa.binary_view(): pa.binary(), pa.date64(): pa.date32(), pa.time32("s"): MS}
    return simple.get(kind, kind)


def _store(source: TextSource, store: Store, dataset: str) -> str | None:
    """Store the rows as delivery does; the message if they are refused."""
    try:
        options = EmbedCommand(columns=source.selection.carried_columns)
        columns = InputColumns(source.schema, options, 1 << 30)
        schema = output_schema(
            SPEC, id_type=columns.id_type, carried=columns.carried, text=True, batch_key=True
        )
        writer = store.open_writer(dataset, schema, "append")
        try:
            row = 0
            for batch in source.batches():
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
