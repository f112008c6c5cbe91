"""Parquet and Arrow files of other writers: encrypted, damaged, delta encodings, INT96."""

import contextlib
import datetime as dt
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from fletcher.errors import BatchTooLargeError, ColumnTypeError, FletcherError, InvalidCommandError
from fletcher.readers import open_source


def read(path, *columns, **options):
    source = open_source(path, columns=columns, **options)
    return pa.Table.from_batches(source.batches(), source.schema)


class _Keys(pe.KmsClient):
    def __init__(self, _config):
        super().__init__()

    def wrap_key(self, key, _master):
        return key

    def unwrap_key(self, key, _master):
        return key


def write_encrypted(path, table, column, *, plaintext_footer):
    encryption = pe.EncryptionConfiguration(
        footer_key="k", column_keys={"k": [column]}, plaintext_footer=plaintext_footer
    )
    properties = pe.CryptoFactory(_Keys).file_encryption_properties(
        pe.KmsConnectionConfig(), encryption
    )
    pq.write_table(table, path, encryption_properties=properties)


@pytest.mark.parametrize("column", ["text", "v"])
@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_encrypted_columns_are_refused_and_others_are_read(tmp_path, column, plaintext_footer):
    # pyarrow ends the process when it is asked for the metadata of an encrypted column.
    path = tmp_path / "t.parquet"
    table = pa.table({"text": ["a"], "v": [1], "w": [2]})
    write_encrypted(path, table, column, plaintext_footer=plaintext_footer)
    with pytest.raises(InvalidCommandError, match=r"t\.parquet.*(is encrypted|encrypted metadata)"):
        read(path, "v")
    if plaintext_footer and column == "v":
        assert read(path, "w").to_pylist() == [{"text": "a", "w": 2}]


def test_a_page_that_contradicts_its_checksum_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"text number {n}" for n in range(1000)]})
    options = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, path, write_page_checksum=True, **options)
    path.write_bytes(path.read_bytes().replace(b"text number 77", b"text numbeR 77", 1))
    with pytest.raises(InvalidCommandError, match=r"t\.parquet cannot be read: .*CRC"):
        read(path)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("kind", [pa.utf8(), pa.large_utf8(), pa.string_view()])
def test_texts_in_delta_encodings_are_read(tmp_path, encoding, kind):
    texts = ["same start one", "same start two", None, ""] * 100
    table = pa.table({"text": pa.array(texts, kind), "v": pa.array(texts, kind)})
    encodings = {"text": encoding, "v": "PLAIN"}
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, use_dictionary=False, column_encoding=encodings, row_group_size=99)
    assert read(path, "v", batch_rows=7).to_pydict() == {"text": texts, "v": texts}


@pytest.mark.parametrize("nested", [False, True])
def test_int96_times_that_nanoseconds_cannot_hold_are_named(tmp_path, nested):
    def column(*times):
        array = pa.array(times, pa.timestamp("us"))
        return pa.array([[one] for one in times], pa.list_(array.type)) if nested else array

    path = tmp_path / "t.parquet"
    good = [dt.datetime(1700, 1, 1, tzinfo=dt.UTC), dt.datetime(2262, 1, 1, tzinfo=dt.UTC), None]
    for last in (dt.datetime(9999, 12, 31, tzinfo=dt.UTC), dt.datetime(1, 1, 1, tzinfo=dt.UTC)):
        table = pa.table({"text": ["a"] * 4, "v": column(*good, last)})
        pq.write_table(table, path, use_deprecated_int96_timestamps=True)
        with pytest.raises(ColumnTypeError, match=r"t\.parquet: row 4: `v` is an INT96 time"):
            read(path, "v", batch_rows=2)
        pq.write_table(table.slice(0, 3), path, use_deprecated_int96_timestamps=True)
        assert read(path, "v", batch_rows=2)["v"].to_pylist() == table["v"].to_pylist()[:3]


@pytest.mark.parametrize("tail", ["stream", "byte"])
def test_bytes_after_the_end_of_an_arrow_stream_are_refused(tmp_path, tail):
    table, data = pa.table({"text": ["a"]}), io.BytesIO()
    with pa.ipc.new_stream(data, table.schema) as writer:
        writer.write_table(table)
    whole = data.getvalue()
    (tmp_path / "t.arrows").write_bytes(whole)
    assert read(tmp_path / "t.arrows").num_rows == 1
    more = whole + (whole if tail == "stream" else b"\0")
    (tmp_path / "t.arrows").write_bytes(more)
    for given in (tmp_path / "t.arrows", "-"):
        with pytest.raises(InvalidCommandError, match="goes on after the end of its Arrow stream"):
            read(given, stdin=io.BytesIO(more))


def arrow_file(table, **options):
    data = io.BytesIO()
    with pa.ipc.new_file(data, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return data.getvalue()


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", [pa.utf8(), pa.dictionary(pa.int8(), pa.utf8())])
def test_an_arrow_file_is_read_by_its_index(tmp_path, compression, kind, monkeypatch):
    # Polars leaves bytes after the magic number that are no message.
    table = pa.table({"text": pa.array(["a", "b", "c"]).cast(kind)})
    path = tmp_path / "t.arrow"
    data = bytearray(arrow_file(table, compression=compression))
    data[8:16] = b"\x04\0\0\0\xf2\xff\xff\xff"
    path.write_bytes(data)
    assert read(path).to_pydict() == {"text": ["a", "b", "c"]}
    monkeypatch.setattr("fletcher.readers.ipc_sizes.MAX_DECODED_BYTES", 1)
    if compression is None:
        assert read(path).num_rows == 3
        return
    with pytest.raises(BatchTooLargeError, match=r"t\.arrow: message 1 stands for"):
        read(path)


def test_an_arrow_file_with_a_damaged_end_is_refused(tmp_path):
    path = tmp_path / "t.arrow"
    data = arrow_file(pa.table({"text": ["a", "b", "c"]}))
    for end in (b"", b"ARROW2", b"\xff\xff\xff\x7fARROW1", b"\xff\xff\xff\xffARROW1"):
        path.write_bytes(data[: -max(len(end), 1)] + end)
        with pytest.raises(InvalidCommandError, match=r"t\.arrow cannot be read"):
            read(path)
    for place in range(len(data) - 200, len(data) - 10, 4):
        path.write_bytes(data[:place] + b"\xff\xff\xff\x7f" + data[place + 4 :])
        with contextlib.suppress(FletcherError):
            read(path)


def test_version_1_of_feather_is_refused_by_name(tmp_path):
    (tmp_path / "t.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    with pytest.raises(InvalidCommandError, match=r"t\.feather is of Feather's version 1"):
        read(tmp_path / "t.feather")


def test_an_arrow_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    # The file was mapped, and the process got SIGBUS.
    path = tmp_path / "t.arrow"
    table = pa.table({"text": ["x" * 20_000] * 1000, "n": list(range(1000))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    path.write_bytes(sink.getvalue())
    batches = open_source(path, columns=["n"]).batches()
    assert next(batches).column("n")[0].as_py() == 0
    os.truncate(path, 4096)
    with pytest.raises(InvalidCommandError, match=r"t\.arrow cannot be read"):
        list(batches)
