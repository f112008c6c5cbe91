import gzip
import io
import json
import os
import threading

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    InvalidUtf8Error,
    UnknownColumnError,
)
from fletcher.readers import open_source
from fletcher.readers.sources import find_files

TABLE = pa.table(
    {
        "id": ["a", "b", "c"],
        "text": ["eins", 'zwei, "2"\nzweite Zeile', "drei ü"],
        "stars": [1, 2, 3],
        "other": [0.5, 1.5, 2.5],
    }
)


def rows_of(source):
    table = pa.Table.from_batches(list(source.batches()), source.schema)
    table.validate(full=True)
    return table


def compress(path, codec, suffix):
    target = path.with_name(path.name + suffix)
    with pa.output_stream(str(target), compression=codec) as out:
        out.write(path.read_bytes())
    path.unlink()
    return target


def write(table, path):
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    elif path.suffix == ".tsv":
        lines = [table.schema.names, *(map(str, row.values()) for row in table.to_pylist())]
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif path.suffix in (".arrow", ".arrows"):
        make = pa.ipc.new_file if path.suffix == ".arrow" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        raise AssertionError(path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl", ".arrow", ".arrows"])
@pytest.mark.parametrize("codec", [None, "gzip", "zstd"])
@pytest.mark.parametrize("batch_rows", [1, 4096])
def test_every_format_gives_the_same_rows(tmp_path, suffix, codec, batch_rows):
    table = TABLE
    if suffix == ".tsv":  # has no tabs and line ends in values
        texts = pa.array(["eins", '"zwei, ""2', "drei ü"])
        table = TABLE.set_column(1, "text", texts)
    path = write(table, tmp_path / f"t{suffix}")
    if codec:
        path = compress(path, codec, {"gzip": ".gz", "zstd": ".zst"}[codec])
    if codec and suffix in (".parquet", ".arrow"):
        with pytest.raises(InvalidCommandError, match="decompress it first"):
            open_source(path)
        return
    source = open_source(path, columns=["stars"], batch_rows=batch_rows)
    wanted = table.select(["id", "text", "stars"])
    for _ in range(2):
        batches = list(source.batches())
        assert max(batch.num_rows for batch in batches) <= batch_rows
        assert pa.Table.from_batches(batches) == wanted
        assert source.bytes_read == source.total_bytes == path.stat().st_size


def test_plain_text_is_one_text_a_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffeins\r\n\n  \nzwei, 2\nohne Ende".encode())
    source = open_source(path, text_column="body")
    assert rows_of(source).to_pydict() == {"body": ["eins", "zwei, 2", "ohne Ende"]}
    with pytest.raises(UnknownColumnError, match="plain text"):
        open_source(path, id_column="id")


def test_a_folder_is_read_in_order_and_knows_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write(TABLE.slice(0, 1), tmp_path / "a.parquet")
    write(TABLE.slice(1, 1), tmp_path / "b.jsonl")
    write(TABLE.slice(2, 1), tmp_path / "sub" / "a.csv")
    (tmp_path / ".hidden.jsonl").write_text("no")
    (tmp_path / "README").write_text("no")
    source = open_source([tmp_path])
    assert rows_of(source) == TABLE.select(["id", "text"])
    assert [file.path.name for file in source.files] == ["a.parquet", "b.jsonl", "a.csv"]


def test_files_that_a_folder_holds_in_vain_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    lines = []
    open_source(tmp_path, notice=lines.append)
    assert lines == []
    for name in ("README", "b.PDF", "c.pdf", "d.csv.bak", ".hidden"):
        (tmp_path / name).write_text("no")
    source = open_source(tmp_path, notice=lines.append)
    assert [file.path.name for file in source.files] == ["a.jsonl"]
    hidden, line = lines
    assert hidden == f"skipped in {tmp_path}: .hidden: are hidden; name one to read it"
    assert f"4 files of unknown kind in {tmp_path} are skipped" in line
    assert "(2 .pdf, 1 without a suffix, 1 .bak)" in line
    for number in range(9):
        (tmp_path / f"x.kind{number}").write_text("no")
    find_files([tmp_path], notice=lines.append)
    assert lines[-1].count(".kind") == 2
    assert "others)" in lines[-1]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (b"a\nb\n", ["a", "b"]),
        (gzip.compress(b"a\n", mtime=0) + gzip.compress(b"b\n", mtime=0), ["a", "b"]),
        (b"", []),
    ],
)
def test_standard_input_is_sniffed(data, wanted):
    source = open_source("-", stdin=io.BytesIO(data))
    assert not source.reiterable
    assert source.total_bytes is None
    assert rows_of(source)["text"].to_pylist() == wanted
    with pytest.raises(InvalidCommandError, match="once"):
        source.batches()
    with pytest.raises(InvalidCommandError, match="hash"):
        source.content_hash()


@pytest.mark.parametrize(
    ("data", "format_name", "said", "wanted"),
    [
        (b'\xef\xbb\xbf {"text": "a"}\n', None, "JSON lines", ["a"]),
        (b"text\tn\na\t1\n", None, "TSV with a header", ["a"]),
        (b"n,text\n1,a\n", None, "CSV with a header", ["a"]),
        (b'"n","text"\r\n1,"a,b"\r\n', None, "CSV with a header", ["a,b"]),
        (b",text\n0,a\n", None, "CSV with a header", ["a"]),  # as pandas writes its index
        (gzip.compress(b"n,text\n1,a\n", mtime=0), None, "CSV with a header", ["a"]),
        (b"x" * 99 + b",text\na,b\n", None, "CSV with a header", ["b"]),  # longer than the magic
        (b"Well, this is a text\n", None, "plain text", ["Well, this is a text"]),
        (b"1,two\n", None, "plain text", ["1,two"]),
        (b"", None, "plain text", []),
        (b"n,text\n", "text", None, ["n,text"]),
        (b"text\na\n", "csv", None, ["a"]),
    ],
)
def test_what_standard_input_is_taken_for_is_said(data, format_name, said, wanted):
    lines = []
    source = open_source("-", stdin=io.BytesIO(data), format_name=format_name, notice=lines.append)
    assert rows_of(source)["text"].to_pylist() == wanted
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert f"read as {said}" in line
        assert "--format" in line


@pytest.mark.parametrize(
    "data",
    [
        b"id,body\n1,a\n",  # a CSV whose text column has another name
        b"id\tbody\n1\ta\n",
        b"id;text\n1;a\n",
        b"id, text\n1, a\n",
        b"text\na\n",
        b",Package,Long description\n0,a,b\n",
        gzip.compress(b"id,body\n1,a\n", mtime=0),
    ],
)
def test_a_first_line_that_may_be_a_header_is_not_embedded(data):
    with pytest.raises(InvalidCommandError, match="--format") as caught:
        open_source("-", stdin=io.BytesIO(data))
    assert caught.value.field == "format"


def test_an_array_of_json_by_standard_input_is_no_text():
    source = open_source("-", stdin=io.BytesIO(b'[{"text": "a"},\n{"text": "b"}]'))
    assert rows_of(source)["text"].to_pylist() == ["a", "b"]


def test_a_header_that_trickles_is_seen_whole(tmp_path):
    reading, writing = os.pipe()
    names = b",".join(b"n%d" % number for number in range(50))
    data = names + b",text\n" + b"1," * 50 + b"a\n"

    def feed():
        with os.fdopen(writing, "wb", buffering=0) as out:
            for byte in data:
                out.write(bytes([byte]))

    feeder = threading.Thread(target=feed)
    feeder.start()
    with os.fdopen(reading, "rb") as stdin:
        assert rows_of(open_source("-", stdin=stdin))["text"].to_pylist() == ["a"]
    feeder.join()


def test_standard_input_takes_an_arrow_stream_and_refuses_a_parquet_file(tmp_path):
    stream = write(TABLE, tmp_path / "t.arrows").read_bytes()
    assert rows_of(open_source("-", stdin=io.BytesIO(stream))) == TABLE.select(["id", "text"])
    parquet = write(TABLE, tmp_path / "t.parquet").read_bytes()
    with pytest.raises(InvalidCommandError, match="not through a pipe"):
        open_source("-", stdin=io.BytesIO(parquet))


def test_a_named_pipe_that_trickles_is_sniffed_all_the_same(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def feed():
        with path.open("wb", buffering=0) as out:
            for byte in b'{"text": "a"}\n':
                out.write(bytes([byte]))

    feeder = threading.Thread(target=feed)
    feeder.start()
    source = open_source(path)
    feeder.join()
    assert rows_of(source)["text"].to_pylist() == ["a"]
    assert not source.reiterable


def test_strings_of_every_kind_become_utf8(tmp_path):
    table = pa.table(
        {
            "id": pa.array([1, 2, None], pa.uint32()),
            "text": pa.array(["a", None, "c"]).dictionary_encode(),
            "more": pa.array(["x", "y", "z"], pa.large_utf8()),
            "none": pa.nulls(3),
        }
    )
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = open_source(tmp_path / "t.arrow", columns=["more", "none"])
    types = {"id": pa.uint32(), "text": pa.utf8(), "more": pa.utf8(), "none": pa.utf8()}
    assert source.schema == pa.schema(types)
    assert rows_of(source)["text"].to_pylist() == ["a", None, "c"]


def test_csv_ids_keep_their_zeros_and_types_stay_those_of_the_first_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,n,text\n007,1,12\n8,2,\n")
    assert rows_of(open_source(path, columns=["n"])).to_pydict() == {
        "id": ["007", "8"],
        "text": ["12", ""],
        "n": [1, 2],
    }


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("last", ['5" disk', '"quoted\n"', '""""', "(end of file)"])
def test_csv_files_end_in_many_ways(tmp_path, last, end):
    path = tmp_path / "t.csv"
    path.write_bytes(f"n,text\n1,a\n2,{last}{end}".encode())
    value = last[1:-1].replace('""', '"') if last.startswith('"') else last
    assert rows_of(open_source(path, columns=["n"])).to_pydict() == {
        "text": ["a", value],
        "n": [1, 2],
    }


def test_json_values_that_are_nested_travel_as_json(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "m": {"k": [1]}}\n{"text": "b", "m": [2]}\n{"text": null}\n')
    assert rows_of(open_source(path, columns=["m"]))["m"].to_pylist() == ['{"k": [1]}', "[2]", None]


@pytest.mark.parametrize(
    ("name", "data", "kind", "said"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": }\n', InvalidCommandError, "line 2 is not JSON"),
        ("t.jsonl", b"3\n", InvalidCommandError, "line 1 is not a JSON object"),
        ("t.jsonl", b'[{"text": "a"},\n3]', InvalidCommandError, "element 2 is not a JSON object"),
        ("t.jsonl", b'[{"text": "a"},\n{}', InvalidCommandError, "ends early"),
        ("t.jsonl", b'{"text": 3}\n', ColumnTypeError, "line 1: `text` is an integer"),
        ("t.jsonl", b'{"text": "\\ud800"}', InvalidUtf8Error, "line 1.*surrogate"),
        ("t.jsonl", b'{"text": "\xff"}', InvalidUtf8Error, "line 1 is not UTF-8.*0xff"),
        ("t.jsonl", b'{"body": "a"}', UnknownColumnError, "`text`; it has `body`"),
        (
            "t.jsonl",
            b'{"text": "a", "id": 1}\n\n{"text": "b", "id": "x"}',
            ColumnTypeError,
            "line 3",
        ),
        ("t.jsonl", b'{"text": "a", "id": 1.5}', ColumnTypeError, "line 1: `id` is a number"),
        ("t.jsonl", b'{"text": "a", "id": %d}' % 2**70, ColumnTypeError, "line 1: `id`"),
        ("t.jsonl", b"[" * 100000, InvalidCommandError, "element 1 is not JSON"),
        ("t.jsonl", b'{"a":' * 100000, InvalidCommandError, "line 1 is not JSON"),
        ("t.txt", b"a\n\xff\n", InvalidUtf8Error, "line 2 is not UTF-8"),
        ("t.csv", b"text,n\na,1\nb,2,3\n", InvalidCommandError, "row 2 has 3 values, expected 2"),
        ("t.csv", b"text,text\na,1\n", InvalidCommandError, "2 columns `text`"),
        ("t.csv", b"body,n\na,1\n", UnknownColumnError, "`text`; it has `body`, `n`"),
        ("t.csv", b'text\na\n"b\nc\n', InvalidCommandError, "row 2 opens a quote"),
        ("t.csv", b'text,n\na,"1\nb,2', InvalidCommandError, "row 1 opens a quote"),
        ("t.csv", b"text\n\xff\n", InvalidUtf8Error, "row 1: `text` is not UTF-8"),
        ("t.csv", b"te\xffxt\na\n", InvalidUtf8Error, "header"),
        ("t.parquet", b"PAR1 no parquet at all", InvalidCommandError, "Parquet"),
        ("t.parquet", b"nothing of the kind", InvalidCommandError, "Parquet"),
        ("t.arrow", b"ARROW1\0\0 no more", InvalidCommandError, "cannot be read"),
        ("t.arrow", b"\xff\xff\xff\xff\x10\x00", InvalidCommandError, "cannot be read"),
        (
            "t.txt.gz",
            gzip.compress(b"a\n" * 9999, mtime=0)[:-20],
            InvalidCommandError,
            "cannot be read",
        ),
        ("t.what", b"a\n", InvalidCommandError, "name one"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path, name, data, kind, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FletcherError, match=said) as caught:
        list(open_source(path).batches())
    assert type(caught.value) is kind
    assert name in caught.value.message


def test_a_truncated_zstd_file_is_no_shorter_file(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(os.urandom(3 << 20).hex().encode())
    path = compress(path, "zstd", ".zst")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InvalidCommandError, match=r"t\.txt\.zst"):
        list(open_source(path).batches())


@pytest.mark.parametrize("skippable", [b"", b"\x50\x2a\x4d\x18\x03\0\0\0abc"])
def test_a_zstd_file_of_several_frames_is_read_whole(tmp_path, skippable):
    # As `zstd -T0` and concatenation write it.
    frames = [pa.compress(text, codec="zstd", asbytes=True) for text in (b"a\nb\n", b"c\n")]
    path = tmp_path / "t.txt.zst"
    path.write_bytes(frames[0] + skippable + frames[1])
    assert rows_of(open_source(path))["text"].to_pylist() == ["a", "b", "c"]
    path.write_bytes(frames[0] + skippable + frames[1][:-1])
    with pytest.raises(InvalidCommandError, match=r"t\.txt\.zst"):
        list(open_source(path).batches())


def test_a_text_column_of_numbers_is_refused(tmp_path):
    path = write(pa.table({"text": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(ColumnTypeError, match="`text` is int64"):
        open_source(path)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    write(pa.table({"id": [1], "text": ["a"]}), tmp_path / "a.parquet")
    write(pa.table({"id": ["x"], "text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ColumnTypeError, match=r"b\.parquet: column `id` is string"):
        list(open_source(tmp_path).batches())
    write(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UnknownColumnError, match=r"b\.parquet has no column `id`"):
        list(open_source(tmp_path).batches())


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["/no/such/file"], "No such file"),
        ([], "no file"),
        (["-", "-"], "twice"),
    ],
)
def test_paths_that_cannot_be_read(paths, said):
    with pytest.raises(InvalidCommandError, match=said):
        open_source(paths, stdin=io.BytesIO())


def test_an_empty_folder_says_what_it_could_hold(tmp_path):
    with pytest.raises(InvalidCommandError, match=r"\.parquet"):
        find_files([tmp_path])
    with pytest.raises(InvalidCommandError, match="`format`"):
        find_files([tmp_path], "xml")


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 9])
def test_limit(tmp_path, limit):
    path = write(TABLE, tmp_path / "t.parquet")
    source = open_source(path, limit=limit)
    assert rows_of(source)["id"].to_pylist() == ["a", "b", "c"][:limit]


def test_the_hash_is_of_contents_and_of_what_decides_the_rows(tmp_path):
    one = write(TABLE, tmp_path / "one.jsonl")
    two = write(TABLE, tmp_path / "two.jsonl")
    same = [
        open_source(one),
        open_source(two),
        open_source(one, columns=["stars"]),
        open_source(one, limit=2),
        open_source([one, two]).by_file()[1],
    ]
    assert len({source.content_hash() for source in same}) == 1
    others = [
        open_source(one),
        open_source([one, two]),
        open_source(one, id_column="stars"),
        open_source(one, text_column="id"),
        open_source(one, text_column="{id}: {text}"),
        open_source(one, encoding="latin-1"),
        open_source(one, source=True),
        open_source(two, source=True),
        open_source(write(TABLE.slice(1), tmp_path / "3.jsonl")),
    ]
    assert len({source.content_hash() for source in others}) == len(others)


def test_large_rows_make_small_batches(tmp_path):
    table = pa.table({"text": ["x" * 1_000_000 + str(n) for n in range(20)]})
    for suffix in (".parquet", ".jsonl"):
        path = write(table, tmp_path / f"t{suffix}")
        batches = list(open_source(path).batches())
        assert max(batch.nbytes for batch in batches) <= 6 << 20
        assert sum(batch.num_rows for batch in batches) == 20


def test_a_limit_reads_no_further_than_it_must(tmp_path):
    path = write(pa.table({"text": [str(n) for n in range(100)]}), tmp_path / "t.parquet")
    source = open_source(path, limit=1, batch_rows=1)
    assert rows_of(source).num_rows == 1
    assert source.bytes_read < source.total_bytes / 2


@pytest.mark.parametrize("moment", ["hash", "read", "resume"])
def test_a_file_that_changes_in_an_upload_is_named(tmp_path, moment):
    # The upload is named after the content, so other rows would count as those of that content.
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    source = open_source(path, batch_rows=1)
    source.content_hash()
    batches = source.batches()
    if moment != "hash":
        next(batches)
    if moment == "resume":
        assert len(list(batches)) == 1
        batches = source.batches()
    os.truncate(path, 14)
    with pytest.raises(InvalidCommandError, match=r"t\.jsonl changed while it was read"):
        list(batches)


def test_names_that_are_not_utf8_are_refused_where_rows_hold_them(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text('{"text": "a"}\n')
    assert rows_of(open_source(path)).num_rows == 1
    for options in ({"source": True}, {"whole_files": True}):
        with pytest.raises(InvalidUtf8Error, match=r"the name of .*dcff\.jsonl' is not UTF-8"):
            open_source(tmp_path, **options)
