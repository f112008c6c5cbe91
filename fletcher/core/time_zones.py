"""Time zones of timestamp columns."""

from __future__ import annotations

import re
import zoneinfo
from functools import lru_cache

import pyarrow as pa

from fletcher.errors import ColumnTypeError

# https://github.com/apache/arrow/blob/main/format/Schema.fbs (table Timestamp)
_OFFSET = re.compile(r"[+-]([01]\d|2[0-3]):[0-5]\d")


def unknown_zone(kind: pa.DataType) -> str | None:
    """First unknown time zone in a type or its nested types.

    Arrow accepts any text as a zone, and fails when a value is converted. None if all zones are
    known or this machine has no zone database.
    """
    if pa.types.is_timestamp(kind):
        return None if kind.tz is None or _is_known(kind.tz) else str(kind.tz)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return unknown_zone(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return unknown_zone(kind.storage_type)
    inner = (unknown_zone(kind.field(place).type) for place in range(kind.num_fields))
    return next((zone for zone in inner if zone is not None), None)


def check_zones(kind: pa.DataType, column: str, field: str) -> None:
    """Refuse a column with an unknown time zone.

    `column` is its description in the error, `field` its name.

    Raises:
        ColumnTypeError: The type has, or contains, an unknown time zone.
    """
    if (zone := unknown_zone(kind)) is not None:
        raise ColumnTypeError(
            f"{column} has the time zone {zone[:100]!r}, expected a name such as Europe/Berlin or "
            "an offset such as +02:00; cast it to timestamp with such a zone, or leave it out",
            field=field,
        )


@lru_cache(1024)
def _is_known(zone: str) -> bool:
    return bool(_OFFSET.fullmatch(zone)) or _is_found(zone) or not _is_found("UTC")


def _is_found(zone: str) -> bool:
    try:
        zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True
