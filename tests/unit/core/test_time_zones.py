"""Time zones that can be read back, alone and inside other types."""

import pyarrow as pa
import pytest

from fletcher.core import time_zones
from fletcher.core.command import EmbedCommand
from fletcher.core.time_zones import unknown_zone
from fletcher.errors import ColumnTypeError
from fletcher.pipeline.input.column_types import check_readable
from fletcher.readers.arrays import plain_type
from fletcher.stores.schemas import check_storable

KNOWN = [None, "UTC", "Europe/Berlin", "Etc/GMT+5", "+02:00", "-11:45"]
UNKNOWN = ["Nowhere/Land", "utc ", "+0200", "-05", "+24:00", "Europe", "../x", "a\0b", "x" * 300]


@pytest.mark.parametrize("zone", KNOWN + UNKNOWN)
def test_known_zones_are_those_that_pyarrow_reads(zone):
    kind = pa.timestamp("us", tz=zone)
    assert unknown_zone(kind) == (None if zone in KNOWN else zone)
    if zone in KNOWN:
        assert pa.array([0], kind).to_pylist()
    else:
        with pytest.raises(pa.ArrowInvalid):
            pa.array([0], kind).to_pylist()


BAD = pa.timestamp("ms", tz="Nowhere/Land")


@pytest.mark.parametrize(
    "kind",
    [
        BAD,
        pa.list_(BAD),
        pa.list_(BAD, 2),
        pa.struct({"a": pa.int8(), "b": pa.map_(pa.utf8(), pa.large_list(BAD))}),
        pa.dictionary(pa.int8(), BAD),
    ],
)
def test_a_column_with_an_unknown_zone_is_refused_by_name(kind):
    # It was stored, and no program could read its values.
    schema = pa.schema({"text": pa.utf8(), "seen": kind})
    with pytest.raises(ColumnTypeError, match="'seen' has the time zone 'Nowhere/Land'"):
        check_readable(schema, EmbedCommand(columns=("seen",)))
    check_readable(schema, EmbedCommand())
    with pytest.raises(ColumnTypeError, match=r"t\.csv: column `seen` has the time zone"):
        plain_type(kind, "seen", "t.csv")
    if not pa.types.is_dictionary(kind) and not pa.types.is_fixed_size_list(kind):
        with pytest.raises(ColumnTypeError, match="`seen` has the time zone"):
            check_storable(schema)


def test_a_machine_without_zones_takes_all(monkeypatch):
    monkeypatch.setattr(time_zones, "_is_found", lambda _: False)
    time_zones._is_known.cache_clear()
    assert unknown_zone(BAD) is None
    time_zones._is_known.cache_clear()
