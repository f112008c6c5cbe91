"""Checks of columns before they become part of a LanceDB table."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from fletcher.errors import ColumnTypeError, InvalidCommandError
from fletcher.stores.lance.probe import is_readable
from fletcher.stores.schemas import check_storable

# Columns that LanceDB adds to results, or computes. Stored columns of these names break searches.
_OWN_COLUMNS = frozenset(
    [
        *("_distance", "_score", "_relevance_score", "_rowid", "_rowaddr", "_rowoffset"),
        *("_indices", "_fragid", "_row_created_at_version", "_row_last_updated_at_version"),
    ]
)
# Beginnings of keys in a field's metadata that LanceDB takes for instructions. With some of them it
# stores other columns, and with others it fails on all rows of the table from then on.
_OBEYED = (b"lance-encoding:", b"lance-schema:")


def check_new_columns(schema: pa.Schema) -> None:
    """Refuse columns that LanceDB cannot write or cannot find again.

    Raises:
        ColumnTypeError, InvalidCommandError: LanceDB does not support a type, a name or metadata.
    """
    check_storable(schema)
    for field in schema:
        name = field.name
        # Lance accepts some of these names and then does not find the column. `*` stands for all.
        if name in ("", "*") or any(character in name for character in ".`\0"):
            raise InvalidCommandError(
                f"`columns` has {name[:200]!r}, which LanceDB cannot store; expected a name "
                "without dots, backticks and zero bytes, and not `*`; rename it",
                field="columns",
            )
        if name.lower() in _OWN_COLUMNS:
            raise InvalidCommandError(
                f"`columns` has {name!r}, which LanceDB uses for a column of its search results; "
                "rename it",
                field="columns",
            )
        if key := next(_unwanted_keys(field), b""):
            raise InvalidCommandError(
                f"`columns` has `{name[:200]}` with {key.decode(errors='replace')[:100]!r} in its "
                "field's metadata, which LanceDB would act on or cannot store; send it without",
                field="columns",
            )
        if not is_readable(field.type):
            raise ColumnTypeError(
                f"`{name[:200]}` is {str(field.type)[:200]}, some values of which LanceDB cannot "
                "read back; send it as JSON text, or with fewer levels",
                field=name[:200],
            )


def _unwanted_keys(field: pa.Field) -> Iterator[bytes]:
    """Metadata keys of a field, and of those inside, that LanceDB cannot just keep."""
    for key, value in (field.metadata or {}).items():
        try:
            key.decode()
            value.decode()
        except UnicodeDecodeError:
            yield key
        if key.startswith(_OBEYED):
            yield key
    kind = getattr(field.type, "storage_type", field.type)
    for place in range(kind.num_fields):
        yield from _unwanted_keys(kind.field(place))
