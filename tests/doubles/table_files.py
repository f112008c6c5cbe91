"""Files of random formats that tables are written to."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.doubles.table_values import csv_text, same, stand_in

Draw = random.Random


def write_file(table: pa.Table, folder: Path, draw: Draw) -> Path:
    """Write a table to a file of a random format that can hold it."""
    for suffix in draw.sample([".parquet", ".arrow", ".arrows", ".jsonl", ".csv", ".tsv"], 6):
        path = folder / f"{len(list(folder.iterdir()))}{suffix}"
        try:
            if suffix in (".csv", ".tsv"):
                path.write_bytes(_delimited(table, draw, quoted=suffix == ".csv"))
            else:
                _WRITERS[suffix](table, path)
        except (pa.ArrowException, OSError, TypeError, ValueError):
            path.unlink(missing_ok=True)
            continue
        return path
    raise AssertionError(f"no format holds {table.schema}")


def write_without_columns(folder: Path, draw: Draw) -> Path:
    """Write a file that has no columns, or no content at all."""
    suffix = draw.choice([".parquet", ".arrow", ".arrows", ".jsonl", ".csv"])
    path = folder / f"{len(list(folder.iterdir()))}{suffix}"
    if suffix in (".jsonl", ".csv"):
        path.write_bytes(draw.choice([b"", b"\n", b"\xef\xbb\xbf"]))
    else:
        _WRITERS[suffix](pa.table({}), path)
    return path


def _delimited(table: pa.Table, draw: Draw, *, quoted: bool) -> bytes:
    """A table as CSV, or as TSV, which has no quotes.

    A text that is null is written as an empty one, because CSV has no null texts.

    Raises:
        ValueError: A value has no text, or TSV cannot hold it.
    """
    all_quoted = quoted and draw.random() < 0.3
    delimiter, line_end = "," if quoted else "\t", draw.choice(["\n", "\r\n", "\r"])

    def cell(text: str | None) -> str:
        if text is None:
            return ""
        if not quoted:
            if text == "" or text.startswith('"') or set(text) & set("\t\r\n"):
                raise ValueError(text)
            return text
        plain = text and not set(text) & set(',"\r\n') and text.strip() == text
        return text if plain and not all_quoted else '"' + text.replace('"', '""') + '"'

    columns = [[csv_text(scalar) for scalar in column] for column in table.columns]
    place = table.schema.names.index("text")
    columns[place] = [text or "" for text in columns[place]]
    rows = [tuple(table.schema.names), *zip(*columns, strict=True)]
    start = "\ufeff" if draw.random() < 0.2 else ""
    lines = (delimiter.join(map(cell, row)) for row in rows)
    return (start + "".join(line + line_end for line in lines)).encode()


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
