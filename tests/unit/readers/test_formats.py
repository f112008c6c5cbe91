"""CSV, TSV and JSON as they are in the wild, encodings, compressions, templates, folders."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from fletcher.errors import (
    ColumnTypeError,
    FletcherError,
    InvalidCommandError,
    InvalidUtf8Error,
    UnknownColumnError,
)
from fletcher.readers import open_source
from fletcher.readers.csv_body import CSV_BLOCK_BYTES, CsvBody
from fletcher.readers.lines import raw_lines


def rows_of(source):
    return pa.Table.from_batches(source.batches(), source.schema)


def read(path, *columns, **options):
    return rows_of(open_source(path, columns=columns, **options))


def csv_column(tmp_path, *values):
    path = tmp_path / "t.csv"
    path.write_text("text,v\n" + "".join(f"t,{one}\n" for one in values))
    return read(path, "v")["v"]


@pytest.mark.parametrize(
    "values",
    [
        ["02134", "1"],
        ["12345678901234567890", "1"],
        ["+4930123"],
        ["NA", "1"],
        ["nan", "1.5"],
        ["1.10", "1.1"],
        ["1e5"],
        ["10:00:59"],
        ["true", "True"],
        ["true", "0"],
        ["2024-01-01", "2024-1-2"],
        ["2024-01-01 10:00:00", "2024-01-01T10:00:00"],
        ["10:00"],
        ["1", "x"],
    ],
)
def test_csv_values_that_cannot_be_written_back_stay_text(tmp_path, values):
    for order in (values, values[::-1], [values[0]] * 5000 + values):
        column = csv_column(tmp_path, *order)
        assert column.type == pa.utf8()
        assert column.to_pylist() == order


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20"], pa.int64()),
        (["1", "2.5"], pa.float64()),
        (["1.0", "2.5"], pa.float64()),
        (["true", "false"], pa.bool_()),
        (["True", "False"], pa.bool_()),
        (["2024-01-01"], pa.date32()),
        (["2024-01-01 10:00:00"], pa.timestamp("s")),
        (["2024-01-01T10:00:00.125Z"], pa.timestamp("ms", "UTC")),
    ],
)
def test_csv_values_have_a_type_and_only_empty_is_null(tmp_path, values, kind):
    column = csv_column(tmp_path, *values, "", values[0])
    assert column.type == kind
    assert column.null_count == 1
    assert column[0] == column[len(values) + 1]


def test_empty_csv_values_with_quotes_are_empty_texts(tmp_path):
    assert csv_column(tmp_path, '""', "", "a").to_pylist() == ["", None, "a"]
    assert csv_column(tmp_path, "", "").to_pylist() == [None, None]


def test_types_of_csv_are_those_of_all_files(tmp_path):
    (tmp_path / "a.csv").write_text("text,zip\nt,1\n")
    (tmp_path / "b.csv").write_text("text,zip\nt,02134\n")
    assert read(tmp_path, "zip")["zip"].to_pylist() == ["1", "02134"]


def test_a_csv_value_of_a_pipe_that_came_too_late_is_named(tmp_path):
    rows = b"a long text to fill blocks with,1\n" * (CSV_BLOCK_BYTES // 34 + 10)
    stdin = io.BytesIO(b"text,v\n" + rows + b"t,02134\n")
    with pytest.raises(ColumnTypeError, match=r"row \d+: `v` is '02134', which int64 cannot keep"):
        list(open_source("-", stdin=stdin, columns=["v"]).batches())


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".txt"])
def test_lines_end_in_three_ways(tmp_path, suffix, end):
    lines = {
        ".csv": ["text,n", "a,1", '"b",2'],
        ".tsv": ["text\tn", "a\t1", "b\t2"],
        ".jsonl": ['{"text": "a"}', "", '{"text": "b"}'],
        ".txt": ["a", "", "b"],
    }[suffix]
    for last in ("", end):
        (tmp_path / f"t{suffix}").write_bytes((end.join(lines) + last).encode())
        assert read(tmp_path / f"t{suffix}")["text"].to_pylist() == ["a", "b"]
    stdin = io.BytesIO(end.join(lines).encode())
    assert rows_of(open_source("-", stdin=stdin))["text"].to_pylist() == ["a", "b"]


def test_a_line_end_across_two_chunks_ends_one_line():
    chunks = [b"a\r", b"\nb\r", b"c\r\n", b"\nd", b""]
    stream = SimpleNamespace(read1=lambda _size: chunks.pop(0))
    assert list(raw_lines(stream, "name")) == [b"a", b"b", b"c", b"", b"d"]


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_quoted_line_end_across_two_blocks_is_kept(tmp_path, shift):
    path = tmp_path / "t.csv"
    body = b'id,text\r\n1,"' + b"x" * (CSV_BLOCK_BYTES // 2) + b'"\r\n2,"'
    body += b"y" * (CSV_BLOCK_BYTES - len(body) - 1 + shift) + b'\r\nafter\r\r"\r\n'
    path.write_bytes(body)
    texts = read(path)["text"].to_pylist()
    assert len(texts) == 2
    assert texts[1].lstrip("y") == "\r\nafter\r\r"


def test_a_header_is_cut_as_the_body_is(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbf\r\n"a ""b""\r\nc",text,5" disk,,\r1,x,2,,\r')
    assert read(tmp_path / "t.csv", 'a "b"\r\nc', '5" disk').to_pylist() == [
        {"text": "x", 'a "b"\r\nc': 1, '5" disk': 2}
    ]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("first", ["\ufeff", "\ufeffa", "\ufeff\ufeffa"])
def test_a_byte_order_mark_at_the_start_of_a_value_is_kept(tmp_path, start, suffix, first):
    path = tmp_path / f"t{suffix}"
    path.write_text(f"{start}text\n{first}\n{first}\n", encoding="utf-8")
    assert read(path)["text"].to_pylist() == [first, first]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('3,"a \\"quoted\\" b"', "row 3 has text after a closing quote: '3,\"a"),
        ('3,"a" ', "row 3 has text after a closing quote"),
        ('"3"x,a', "row 3 has text after a closing quote"),
        ('3,"a\nb"" c"d"', "row 3 has text after a closing quote"),
        ("3", "row 3 has 1 values, expected 2 as its header has: '3'"),
        ('3, "a, b"', "row 3 has 3 values, expected 2 as its header has"),
        ('3,"a', "row 3 opens a quote that is never closed"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_csv_rows_that_would_be_misread_are_named(tmp_path, row, said, end):
    path = tmp_path / "t.csv"
    for before in ('1,"well ""quoted"""\n\n2,5" pipe\n', "1,a\n2,b\n"):
        path.write_text(f"id,text\n{before}{row}\n4,c\n".replace("\n", end), newline="")
        with pytest.raises(InvalidCommandError, match=re.escape(f"t.csv: {said}")):
            read(path)
    path.write_text(f"id,text\n{row}{end}", newline="")
    with pytest.raises(InvalidCommandError, match=re.escape(said.replace("row 3", "row 1"))):
        read(path)


def test_quoted_csv_is_read_the_same_however_it_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    texts = ['a "b" c', '""', "x\r\ny", "\n", 'end"', '"', "", ",", '5" pipe', "é\r", "plain"]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["id", "text"], *enumerate(texts)])
        stream.write('11,5" x 3"\r\n')
    read_part = CsvBody.read
    for size in range(60, 90):
        monkeypatch.setattr(CsvBody, "read", lambda body, _, n=size: read_part(body, n))
        assert read(path)["text"].to_pylist() == [*texts, '5" x 3"']


def test_a_csv_row_that_is_too_long_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"id,text\n1,a\n2,b\n3," + b"x" * (CSV_BLOCK_BYTES + (1 << 20)))
    with pytest.raises(InvalidCommandError, match=r"t\.csv: row 3 has more than 32 MiB"):
        read(path)


def test_tsv_has_no_quotes_unless_asked(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('text\tn\n"Stay\t1\nhungry"\t2\n')
    assert read(path)["text"].to_pylist() == ['"Stay', 'hungry"']
    path.write_text('text\tn\n"a\tb\nc"\t2\n')
    quoted = read(path, format_name="csv", delimiter="tab")
    assert quoted["text"].to_pylist() == ["a\tb\nc"]
    path.write_text('"text"\t"n"\n"a"\t2\n')
    with pytest.raises(InvalidCommandError, match="--format csv --delimiter tab"):
        read(path)


def test_other_delimiters_and_encodings(tmp_path):
    path = tmp_path / "t.csv"
    for encoding in ("latin-1", "utf-16", "cp1252", "utf-8-sig"):
        path.write_bytes("text;n\nschön;1\n".encode(encoding))
        table = read(path, "n", delimiter=";", encoding=encoding)
        assert table.to_pylist() == [{"text": "schön", "n": 1}]
        (tmp_path / "t.jsonl").write_bytes('{"text": "schön"}'.encode(encoding))
        assert read(tmp_path / "t.jsonl", encoding=encoding)["text"].to_pylist() == ["schön"]
    path.write_bytes("text;n\nschön;1\n".encode("utf-16"))
    with pytest.raises(InvalidUtf8Error, match="--encoding utf-16"):
        read(path)
    path.write_bytes("text,v,w\na,b,c\nx,schön,y\n".encode("latin-1"))
    with pytest.raises(InvalidUtf8Error, match=r"t\.csv: row 2: `v` is not UTF-8"):
        read(path, "v")
    path.write_bytes(b"text\n\xff\n")
    with pytest.raises(InvalidUtf8Error, match=r"t\.csv is not ascii: near byte 6"):
        read(path, encoding="ascii")
    for options in ({"encoding": "klingon"}, {"delimiter": ",,"}, {"delimiter": "ü"}):
        with pytest.raises(InvalidCommandError, match=next(iter(options))):
            read(path, **options)


@pytest.mark.parametrize("codec", [bz2, lzma, gzip])
def test_members_padding_and_damage_of_compressed_files(tmp_path, codec):
    path = tmp_path / "t.txt"
    whole = codec.compress(b"a\n") + codec.compress(b"b\n" * 50_000)
    for padding in (b"", bytes(512)):
        path.write_bytes(whole + padding)
        assert read(path).num_rows == 50_001
    for broken in (whole[:-6], whole + b"garbage"):
        path.write_bytes(broken)
        with pytest.raises(InvalidCommandError, match=r"t\.txt cannot be read"):
            read(path)


def test_a_zstd_file_may_begin_with_a_skippable_frame(tmp_path):
    path = tmp_path / "t.txt.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + pa.compress(b"a\n", "zstd", asbytes=True))
    assert read(path)["text"].to_pylist() == ["a"]


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_of_json_objects(tmp_path, indent):
    rows = [{"text": f"ü {n} " * 200, "v": n, "m": {"k": [n]}} for n in range(3000)]
    path = tmp_path / "t.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent) + "\n")
    table = read(path, "v", "m")
    assert table["text"].to_pylist() == [row["text"] for row in rows]
    assert [json.loads(one) for one in table["m"].to_pylist()] == [row["m"] for row in rows]
    path.write_text("[]")
    assert read(path).num_rows == 0
    for broken in (
        "[{}] x",
        "[{} {}]",
        "[{},]",
        "[{}",
        '[{"a": tru}]',
        "[1]",
        '[{"a": 1, "a": 2}]',
    ):
        path.write_text(broken)
        with pytest.raises(FletcherError, match=r"t\.json"):
            read(path)


def test_fields_inside_objects(tmp_path):
    rows = [{"meta": {"text": "a", "by": {"id": 7}}, "a.b": 1}, {"meta": {"text": None}}]
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrow = tmp_path / "t.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(arrow), table.schema) as writer:
        writer.write_table(table)
    for path in (jsonl, arrow):
        found = read(path, "a.b", text_column="meta.text", id_column="meta.by.id")
        assert found.to_pylist() == [
            {"meta.by.id": 7, "meta.text": "a", "a_b": 1},
            {"meta.by.id": None, "meta.text": None, "a_b": None},
        ]
        by_id = read(path, "meta.by.id", text_column="meta.text")
        assert by_id["meta_by_id"].to_pylist() == [7, None]
        with pytest.raises(UnknownColumnError, match=r"no column `meta\.tex`"):
            read(path, text_column="meta.tex")


def test_a_template_makes_one_text_of_several_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,title,body\n1,A,eins\n2,B,\n")
    table = read(path, text_column=r"{{{title}}}\n{body}")
    assert table.to_pylist() == [{"id": "1", "text": "{A}\neins"}, {"id": "2", "text": "{B}\n"}]
    (tmp_path / "t.jsonl").write_text('{"t": "a", "n": 1, "f": 0.5}\n{"t": null, "n": null}\n')
    table = read(tmp_path / "t.jsonl", text_column="{t}: {n}")
    assert table["text"].to_pylist() == ["a: 1", None]
    with pytest.raises(ColumnTypeError, match="column `f` of the text is double"):
        read(tmp_path / "t.jsonl", text_column="{f}")
    with pytest.raises(UnknownColumnError, match="`x`"):
        read(path, text_column="{title}{x}")
    with pytest.raises(InvalidCommandError, match="brace"):
        read(path, text_column="{title} }")
    with pytest.raises(InvalidCommandError, match="`text` is asked for"):
        read(path, "text", text_column="{title}")


def test_the_text_may_be_the_id_and_repeated_names_matter_only_if_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("t,x,x,,\na,1,2,3,4\n")
    assert read(path, text_column="t", id_column="t").to_pylist() == [{"t": "a"}]
    with pytest.raises(InvalidCommandError, match="2 columns `x`"):
        read(path, "x", text_column="t")


def test_whole_files_and_sources(tmp_path):
    for name, text in (("a.md", "# A\n\nText\n"), ("b.py", "\ufeffx = 1\r\n")):
        (tmp_path / name).write_bytes(text.encode())
    table = read(tmp_path, whole_files=True)
    assert table.to_pylist() == [
        {"id": str(tmp_path / "a.md"), "text": "# A\n\nText\n"},
        {"id": str(tmp_path / "b.py"), "text": "x = 1\r\n"},
    ]
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    with pytest.raises(InvalidUtf8Error, match=r"c\.png is not UTF-8: byte 1 is 0x89"):
        read(tmp_path, whole_files=True)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    path = tmp_path / "t.jsonl"
    assert read(path, source=True).to_pylist() == [{"text": "a", "source": str(path)}]


def test_folders_name_what_they_leave_out(tmp_path):
    folder, other = tmp_path / "in", tmp_path / "other"
    for one in (folder, other, folder / "store", folder / "x.lance", folder / "store" / "d"):
        one.mkdir()
    for one in (folder, other, folder / "store" / "d", folder / "x.lance"):
        (one / "a.jsonl").write_text('{"text": "a"}')
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (folder / "linked").symlink_to(other)
    (folder / "file.jsonl").symlink_to(other / "a.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / ".hidden.jsonl").write_text('{"text": "a"}')
    (folder / ".folder").mkdir()
    lines = []
    source = open_source(folder, notice=lines.append, excluded=[folder / "store"])
    assert [file.path.name for file in source.files] == ["a.jsonl", "file.jsonl"]
    said = "\n".join(lines)
    for part in (
        "gone.jsonl: are links to nowhere",
        "linked: are links to folders",
        "pipe.jsonl: are no regular files",
        ".folder, .hidden.jsonl: are hidden",
        "store, x.lance: belong to a store",
    ):
        assert part in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_an_error(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(InvalidCommandError, match=r"cannot read the folder .*locked"):
        open_source(tmp_path)


def test_an_unreadable_folder_of_root_is_an_error_too(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("fletcher.readers.folders.os.scandir", scandir)
    with pytest.raises(InvalidCommandError, match=r"cannot read the folder .*locked: Permission"):
        open_source(tmp_path)


def arrow(path):
    table = pa.table({"text": [path.name]})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def test_hugging_face_folders_are_read_by_their_list(tmp_path):
    arrow(tmp_path / "data-00000-of-00001.arrow")
    arrow(tmp_path / "cache-1.arrow")
    (tmp_path / "dataset_info.json").write_text('{\n "features": {}\n}\n')
    lines = []
    assert read(tmp_path, notice=lines.append).num_rows == 2
    assert "dataset_info.json: are no data" in lines[0]
    data = [{"filename": "data-00000-of-00001.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": data}))
    assert read(tmp_path)["text"].to_pylist() == ["data-00000-of-00001.arrow"]


@pytest.mark.parametrize("mark", ["_delta_log", ".hoodie", "metadata/v1.metadata.json"])
def test_tables_with_deleted_rows_are_refused(tmp_path, mark):
    (tmp_path / "data").mkdir()
    (tmp_path / mark).parent.mkdir(exist_ok=True)
    (tmp_path / mark).write_text("")
    with pytest.raises(InvalidCommandError, match=r"is an? (Delta|Hudi|Iceberg) table"):
        open_source(tmp_path)
