from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fletcher.storeserver.key_ledger import KeyLedger

extents = st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda one: (one[0], sum(one)))


@given(st.lists(extents, max_size=20), st.lists(extents, max_size=20), extents)
def test_a_key_is_held_exactly_when_its_rows_are_covered(loaded, added, asked):
    ledger = KeyLedger(f"u:{first}-{last}" for first, last in loaded)
    for first, last in added:
        ledger.add_key(f"u:{first}-{last}")
    rows = {row for first, last in loaded + added for row in range(first, last + 1)}
    covered = all(row in rows for row in range(asked[0], asked[1] + 1))
    assert ledger.holds(f"u:{asked[0]}-{asked[1]}") is covered
    assert {row for first, last in ledger.ranges("u") for row in range(first, last + 1)} == rows


def test_an_upload_in_order_is_one_range():
    ledger = KeyLedger()
    for first in range(0, 1000, 10):
        ledger.add_key(f"u:{first}-{first + 9}")
    assert ledger.ranges("u") == [(0, 999)]
    assert not ledger.holds("u:990-1000")
    assert not ledger.holds("v:0-0")


def test_other_keys_are_kept_as_they_are():
    ledger = KeyLedger(["a", "u:x-1", "u:0-9"])
    ledger.add_key("b")
    assert [ledger.holds(key) for key in ("a", "b", "u:x-1", "c")] == [True, True, True, False]
    assert not any(ledger.holds(key) for key in ("u:5-3", "u:\N{SUPERSCRIPT TWO}-3"))
