"""Types of input columns that cannot be read."""

from __future__ import annotations

import pyarrow as pa

from fletcher.core.command import EmbedCommand
from fletcher.core.time_zones import check_zones
from fletcher.errors import ColumnTypeError


def check_readable(schema: pa.Schema, command: EmbedCommand) -> None:
    """Check that pyarrow knows the types of the columns that a command uses.

    pyarrow takes batches with other types, and raises an error when such a column is looked at.

    Raises:
        ColumnTypeError: A used column has, or contains, such a type, or an unknown time zone.
    """
    used = {command.text_column, command.id_column, "metadata", *command.columns}
    for place, name in enumerate(schema.names):
        if name in used and not _is_readable(schema.field(place).type):
            raise ColumnTypeError(
                f"column {name!r} is, or contains, an interval of months or of days, which cannot "
                "be read; send a duration, an integer or text instead, or leave it out",
                field=name,
            )
        if name in used:
            check_zones(schema.field(place).type, f"column {name!r}", name)


def _is_readable(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) or pa.types.is_integer(kind):
        return True
    if pa.types.is_dictionary(kind):
        return _is_readable(kind.value_type)
    if kind.num_fields:
        return all(_is_readable(kind.field(place).type) for place in range(kind.num_fields))
    try:
        pa.nulls(0, kind)
    except KeyError:
        return False
    return True
