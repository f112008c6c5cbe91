"""No value is narrowed: types by all values of all files, or an error with the place."""

import datetime as dt
import io
import json
import os
import re
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fletcher.errors import ColumnTypeError, FletcherError, InvalidUtf8Error, UnknownColumnError
from fletcher.readers import open_source


def rows_of(source):
    return pa.Table.from_batches(source.batches(), source.schema)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, *columns, **options):
    return rows_of(open_source(path, columns=columns, **options))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([10, 9.99], pa.float64()),
        ([2**63, 1], pa.uint64()),
        ([-1, 2**62], pa.int64()),
        ([None, True], pa.bool_()),
        ([0.1, 2**53], pa.float64()),
        ([float("nan"), 1], pa.float64()),
        ([2**60, None], pa.int64()),
        ([None, None], pa.utf8()),
    ],
)
def test_json_columns_have_the_type_of_all_values(tmp_path, values, kind):
    rows = [{"text": "t", "v": values[0]}] * 5000 + [{"text": "t", "v": values[1]}]
    column = read(jsonl(tmp_path / "t.jsonl", *rows), "v")["v"]
    assert column.type == kind
    assert str(column.to_pylist()) == str([row["v"] for row in rows]) or kind == pa.float64()
    assert column.to_pylist()[-1] == values[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, "x"], "line 2: `v` is a string, and an integer in .*line 1"),
        ([True, 7], "line 2: `v` is an integer, and true or false in"),
        ([2**53 + 1, 0.5], "line 1: `v` is 9007199254740993, which float64 cannot hold"),
        ([0.5, 2**53 + 1], "line 2: `v` is 9007199254740993, which float64 cannot hold"),
        ([2**63, -1], "line 2: `v` is an integer, and no integer type of 64 bits"),
        ([2**64], "line 1: `v` is an integer, and no integer type"),
        (["s", {"a": 1}], "line 2: `v` is an object, and a string in"),
        ([{"a": float("nan")}], "line 1: `v` is not JSON: it holds NaN"),
    ],
)
@pytest.mark.parametrize("apart", [0, 5000])
def test_json_values_without_a_common_type_are_named(tmp_path, values, said, apart):
    first, *rest = values
    rows = [
        {"text": "t", "v": first},
        *[{"text": "t"}] * apart,
        *({"text": "t", "v": one} for one in rest),
    ]
    said = said if not apart else said.replace("line 2", f"line {apart + 2}")
    with pytest.raises(ColumnTypeError, match=said):
        read(jsonl(tmp_path / "t.jsonl", *rows), "v")


@pytest.mark.parametrize("late", [9.99, "x", 2**63])
def test_a_pipe_has_the_types_of_its_first_rows_and_says_which_line_differs(late):
    rows = [{"text": "t", "v": 1}] * 4096 + [{"text": "t", "v": late}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    source = open_source("-", stdin=io.BytesIO(data), columns=["v"])
    with pytest.raises(ColumnTypeError, match=r"line 4097: `v` is .*give a file"):
        list(source.batches())


def test_an_id_that_a_later_row_of_a_pipe_has_is_no_row_without_one():
    rows = [{"text": "t"}] * 4096 + [{"text": "t", "id": 7}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with pytest.raises(ColumnTypeError, match="line 4097 has an `id`"):
        list(open_source("-", stdin=io.BytesIO(data)).batches())


@pytest.mark.parametrize(
    "data",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "a", "v": {"k": 1, "k": 2}}',
    ],
)
def test_json_that_python_would_read_with_a_loss_is_refused(tmp_path, data):
    (tmp_path / "t.jsonl").write_text(data)
    with pytest.raises(FletcherError, match=r"t\.jsonl: line 1: "):
        read(tmp_path / "t.jsonl", "v")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e-400", "0.0012e-399"])
@pytest.mark.parametrize("value", ["NUMBER", '{"k": [NUMBER]}'])
def test_a_json_number_beyond_float64_is_named_where_it_is_read(tmp_path, number, value):
    path = tmp_path / "t.jsonl"
    row = '{"text": "a", "v": ' + value + "}\n"
    path.write_text("".join(row.replace("NUMBER", one) for one in ("0.5", "-0.0e0001", number)))
    assert read(path).num_rows == 3
    said = rf"line 3: `v` is .*{re.escape(number)}, which is beyond the numbers of float64"
    with pytest.raises(ColumnTypeError, match=said):
        read(path, "v")
    with pytest.raises(ColumnTypeError, match=said):
        list(open_source("-", columns=["v"], stdin=io.BytesIO(path.read_bytes())).batches())


def pair(tmp_path, one, other):
    for name, column in (("a", one), ("b", other)):
        table = pa.table({"id": [name], "text": [name], "v": column})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (pa.array([1.5], pa.float32()), pa.array([0.1]), pa.float64()),
        (pa.array([1], pa.int8()), pa.array([300], pa.uint16()), pa.int64()),
        (pa.array([1], pa.int64()), pa.array([0.1]), pa.float64()),
        (pa.array([1], pa.timestamp("s")), pa.array([1], pa.timestamp("us")), pa.timestamp("us")),
        (pa.nulls(1), pa.array([dt.date(2024, 1, 1)]), pa.date32()),
        (pa.array(["a"]), pa.array(["b"]).dictionary_encode(), pa.utf8()),
        (
            pa.array([1], pa.decimal128(5, 2)),
            pa.array([1], pa.decimal128(9, 4)),
            pa.decimal128(9, 4),
        ),
    ],
)
def test_files_whose_types_differ_are_widened_without_loss(tmp_path, one, other, kind):
    table = read(pair(tmp_path, one, other), "v")
    assert table["v"].type == kind
    assert table["v"].to_pylist() == one.to_pylist() + other.to_pylist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([dt.date(2024, 1, 1)]), pa.array([dt.datetime(2020, 1, 2, 13, 14)])),  # noqa: DTZ001
        (pa.array([True]), pa.array([7])),
        (pa.array(["7"]), pa.array([7])),
        (pa.array([1], pa.uint64()), pa.array([-1])),
        (pa.array([1], pa.timestamp("s")), pa.array([1], pa.timestamp("s", "UTC"))),
        (pa.array([b"a"]), pa.array(["a"])),
        (pa.array([[1]]), pa.array([["a"]])),
    ],
)
def test_files_without_a_common_type_are_both_named(tmp_path, one, other):
    with pytest.raises(ColumnTypeError, match=r"b\.parquet: column `v` is .*a\.parquet"):
        open_source(pair(tmp_path, one, other), columns=["v"])


def test_a_value_that_the_common_type_cannot_hold_is_named(tmp_path):
    source = open_source(pair(tmp_path, pa.array([0.1]), pa.array([2**53 + 1])), columns=["v"])
    with pytest.raises(ColumnTypeError, match=r"b\.parquet: row 1: column `v`"):
        list(source.batches())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([1], pa.list_(pa.int8())),
        ([1, 2], pa.list_(pa.int8(), 2)),
        ({"x": 1}, pa.struct({"x": pa.int8()})),
        ([("k", 1)], pa.map_(pa.utf8(), pa.int8())),
        (b"ab", pa.binary(2)),
        (1, pa.duration("s")),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".arrow"])
def test_a_column_of_nulls_beside_one_of_any_type_is_null(tmp_path, suffix, value, kind):
    nulls = tmp_path / f"nulls{suffix}"
    if suffix == ".csv":
        nulls.write_text("text,v\na,\n")
    elif suffix == ".jsonl":
        jsonl(nulls, {"text": "a", "v": None})
    else:
        table = pa.table({"text": ["a"], "v": pa.nulls(1)})
        with pa.ipc.new_file(nulls, table.schema) as writer:
            writer.write_table(table)
    table = pa.table({"text": ["b"], "v": pa.array([value], kind)})
    pq.write_table(table, tmp_path / "z.parquet")
    found = read([nulls, tmp_path / "z.parquet"], "v")["v"]
    assert found.to_pylist() == [None, *pq.read_table(tmp_path / "z.parquet")["v"].to_pylist()]


@pytest.mark.parametrize("lacking", ["a", "b"])
def test_a_file_without_ids_beside_one_with_ids_is_named(tmp_path, lacking):
    for name in "ab":
        row = {"text": name} | ({} if name == lacking else {"id": 7})
        jsonl(tmp_path / f"{name}.jsonl", row)
    with pytest.raises(UnknownColumnError, match=rf"{lacking}\.jsonl has no column `id`, which"):
        open_source(tmp_path)


def test_uuids_runs_views_and_json_columns_have_stand_ins(tmp_path):
    ids = [uuid.UUID(int=n) for n in range(3)]
    storage = pa.array([one.bytes for one in ids], pa.binary(16))
    nested = pa.array([["a"], ["bb", "c"], None], pa.list_view(pa.string_view()))
    structs = pa.StructArray.from_arrays([nested, pa.array([1, 2, 3])], ["l", "n"])
    table = pa.table(
        {
            "id": pa.ExtensionArray.from_storage(pa.uuid(), storage),
            "text": pa.RunEndEncodedArray.from_arrays(
                pa.array([2, 3], pa.int32()), pa.array(["x", "y"])
            ),
            "views": pa.array(["a", None, "long enough for a buffer"], pa.string_view()),
            "lists": nested,
            "structs": structs,
        }
    ).slice(1)
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = read(tmp_path / "t.arrow", "views", "lists", "structs")
    assert found["id"].to_pylist() == [str(one) for one in ids[1:]]
    assert found["text"].to_pylist() == ["x", "y"]
    assert found["views"].to_pylist() == table["views"].to_pylist()
    assert found["lists"].to_pylist() == table["lists"].to_pylist()
    assert found["structs"].to_pylist() == table["structs"].to_pylist()
    assert [field.type for field in found.schema][:4] == [pa.utf8()] * 3 + [pa.list_(pa.utf8())]


@pytest.mark.parametrize("dictionary", [True, False])
def test_invalid_utf8_in_parquet_names_file_and_row(tmp_path, dictionary):
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.utf8(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "t.parquet", use_dictionary=dictionary)
    with pytest.raises(InvalidUtf8Error, match=r"t\.parquet: column `text` is not UTF-8 in row 2"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".arrows"])
def test_one_long_text_for_many_rows_is_not_decoded_at_once(tmp_path, suffix):
    codes = pa.array([0] * 3000, pa.int32())
    texts = pa.DictionaryArray.from_arrays(codes, pa.array(["x" * (1 << 20)]))
    table = pa.table({"text": texts})
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, dictionary_pagesize_limit=1 << 30)
    else:
        with (pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream)(
            str(path), table.schema
        ) as out:
            out.write_table(table)
    before = pa.total_allocated_bytes()
    batches = open_source(path, limit=20).batches()
    sizes = [
        (batch.num_rows, batch.nbytes, pa.total_allocated_bytes() - before) for batch in batches
    ]
    assert sum(rows for rows, _, _ in sizes) == 20
    assert max(size for _, size, _ in sizes) <= 5 << 20
    assert max(held for _, _, held in sizes) <= 40 << 20


@pytest.mark.parametrize("suffix", [".arrow", ".arrows"])
def test_a_small_record_batch_that_stands_for_gigabytes_is_refused(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("fletcher.readers.ipc_sizes.MAX_DECODED_BYTES", 1 << 20)
    table = pa.table({"text": ["x" * 100_000] * 20})
    path, options = tmp_path / f"t{suffix}", pa.ipc.IpcWriteOptions(compression="zstd")
    make = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
    with make(str(path), table.schema, options=options) as writer:
        writer.write_table(table)
    assert path.stat().st_size < 10_000
    with pytest.raises(FletcherError, match=r"message 1 stands for 2,000,0.. bytes"):
        read(path)
    with make(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=5)
    assert read(path).num_rows == 20


def test_a_wide_header_is_read_in_linear_time(tmp_path):
    names = [f"c{n}" for n in range(20_000)]
    path = tmp_path / "t.csv"
    path.write_text(",".join([*names, "text"]) + "\n" + "1," * len(names) + "hello\n")
    assert read(path)["text"].to_pylist() == ["hello"]
    assert os.path.getsize(path) > 100_000  # noqa: PTH202


@pytest.mark.parametrize("nested", ["list", "struct", "map"])
def test_dictionaries_inside_nested_columns_of_several_row_groups(tmp_path, nested):
    """Arrow joined no such values of two row groups: the file could not be read."""
    words = pa.array(["a", "b", None, "b"] * 5).dictionary_encode()
    ends = pa.array(range(21), pa.int32())
    keys = pa.array(range(20), pa.int8())
    column = {
        "list": pa.ListArray.from_arrays(ends, words),
        "struct": pa.StructArray.from_arrays([words], ["w"]),
        "map": pa.MapArray.from_arrays(ends, keys, words),
    }[nested]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["x"] * 20, "v": column}), path, row_group_size=7)
    source = open_source([path], columns=["v"])
    found = pa.Table.from_batches(source.batches(), source.schema)
    assert found["v"].to_pylist() == column.to_pylist()
