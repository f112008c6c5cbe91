"""Columns in the names of folders, such as `year=2024/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import unquote

import pyarrow as pa

NULL = "__HIVE_DEFAULT_PARTITION__"
_MAX_INTEGER = 2**63

# Values by column; None is null.
Values = Mapping[str, str | None]


def partition_values(path: str, names: Iterable[str]) -> dict[str, str | None]:
    """Values of columns by the folders of a path, for those of `names` that it has."""
    wanted, found = set(names), {}
    for folder in path.split("/")[:-1]:
        name, sign, value = folder.partition("=")
        name = unquote(name)
        if sign and name in wanted:
            found[name] = None if value == NULL else unquote(value)
    return found


class PartitionTypes:
    """Types of columns in folders: integers if all values of a column are, else texts."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def observe_values(self, values: Values) -> None:
        self._texts |= {name for name, value in values.items() if not _is_integer(value)}

    def folder_schema(self, values: Values) -> pa.Schema:
        """The types of some columns, by the values observed so far."""
        return pa.schema({name: self._kind(name) for name in values})

    def add_columns(self, batch: pa.RecordBatch, values: Values) -> pa.RecordBatch:
        """The batch with a constant column for each value."""
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for name, value in values.items():
            kind = self._kind(name)
            one = int(value) if value is not None and pa.types.is_integer(kind) else value
            columns[name] = pa.repeat(pa.scalar(one, kind), batch.num_rows)
        return pa.RecordBatch.from_pydict(columns)

    def _kind(self, name: str) -> pa.DataType:
        return pa.utf8() if name in self._texts else pa.int64()


def _is_integer(value: str | None) -> bool:
    """Whether an integer is written back as the same text. A null fits every type."""
    if value is None:
        return True
    digits = value.removeprefix("-")
    plain = digits.isascii() and digits.isdecimal() and str(int(digits[:20])) == digits
    return plain and value != "-0" and -_MAX_INTEGER <= int(value) < _MAX_INTEGER
