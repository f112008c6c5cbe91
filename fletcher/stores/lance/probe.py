"""Check that LanceDB reads nested values as they were written.

LanceDB 0.40 accepts some nested types and then fails to read some of their values, for example a
list of structs of lists of lists. No list of such types exists, so small tables are written and
read back. Types of up to two levels were read back without failure and are not checked.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import types

from fletcher.stores.lance.library import import_lancedb

_log = logging.getLogger(__name__)

_MIN_LEVELS = 3
# Deeper types are refused without a check: a check of 60 levels took a minute, and uploads to the
# dataset wait for it.
_MAX_LEVELS = 16
# Pairs of rows that are tried, about 3 ms each.
_MAX_PAIRS = 256


def is_readable(kind: pa.DataType) -> bool:
    """Whether all values of a type are read back. Takes up to a second."""
    levels = _num_levels(kind)
    return levels < _MIN_LEVELS or (levels <= _MAX_LEVELS and _reads_back(kind))


@functools.lru_cache(maxsize=256)
def _reads_back(kind: pa.DataType) -> bool:
    database = import_lancedb().connect("memory://")
    values = list(_values(kind))
    # The failures depend on which of two neighbours is null or empty.
    pairs = itertools.islice(itertools.product(values, repeat=2), _MAX_PAIRS)
    for number, rows in enumerate([values, *pairs]):
        sent = pa.table({"value": pa.array(list(rows), kind)})
        try:
            table = database.create_table(f"probe{number}", schema=sent.schema)
            table.add(sent, write_parallelism=1)
            same = table.search().to_arrow().column("value").to_pylist()
            database.drop_table(f"probe{number}")
        except (ValueError, RuntimeError, OSError) as error:
            _log.debug("%s cannot be read back: %s", kind, error)
            return False
        if same != sent.column("value").to_pylist():
            return False
    return True


def _num_levels(kind: pa.DataType) -> int:
    kind = getattr(kind, "storage_type", kind)
    if not kind.num_fields:
        return 0
    return 1 + max(_num_levels(kind.field(place).type) for place in range(kind.num_fields))


def _values(kind: pa.DataType) -> Iterator[Any]:
    """Values of a type: null and empty at each level, and whole."""
    yield None
    kind = getattr(kind, "storage_type", kind)
    if types.is_fixed_size_list(kind):
        for value in _values(kind.value_type):
            yield [value] * kind.list_size
    elif types.is_map(kind):
        yield []
        key = next(one for one in _values(kind.key_type) if one is not None)
        for value in _values(kind.item_type):
            yield [(key, value)]
    elif types.is_list(kind) or types.is_large_list(kind):
        yield []
        for value in _values(kind.value_type):
            yield [value]
    elif types.is_struct(kind):
        fields = {field.name: list(_values(field.type)) for field in kind}
        for place in range(max(map(len, fields.values()))):
            yield {name: some[min(place, len(some) - 1)] for name, some in fields.items()}
    else:
        yield _whole_value(kind)


def _whole_value(kind: pa.DataType) -> Any:
    if types.is_fixed_size_binary(kind):
        return bytes(kind.byte_width)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return b"a"
    if types.is_string(kind) or types.is_large_string(kind):
        return "a"
    try:
        return pa.scalar(1, pa.int32()).cast(kind).as_py()
    except pa.ArrowException:  # such as a duration; null is tried instead
        return None
