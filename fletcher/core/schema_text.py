"""Check of the texts inside Arrow schemas, which Arrow does not check."""

from __future__ import annotations

import pyarrow as pa

from fletcher.errors import ColumnTypeError


def check_schema_text(schema: pa.Schema, *, metadata: bool = False) -> None:
    """Refuse names and time zones that are not UTF-8, also nested ones.

    Python would fail on such texts of outer fields, and LanceDB on those of nested fields.
    `metadata`: check the schema's metadata, too.

    Raises:
        ColumnTypeError: A text is not UTF-8.
    """
    try:
        for field in schema:
            _decode(field)
        if metadata:
            for pair in (schema.metadata or {}).items():
                b"".join(pair).decode()
    except UnicodeDecodeError as error:
        raise ColumnTypeError(f"the stream's schema cannot be read: {error}") from None


def _decode(field: pa.Field) -> None:
    _ = field.name
    kind = getattr(field.type, "storage_type", field.type)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_timestamp(kind):
        _ = kind.tz
    for place in range(kind.num_fields):
        _decode(kind.field(place))
