"""Dividing calls among models."""

from __future__ import annotations

import pytest

from fletcher.config.model_alias import Alias

KEYS = [f"upload-{n}" for n in range(4000)]


def shares(alias: Alias) -> dict[str, float]:
    picked = [alias.pick_target(key) for key in KEYS]
    return {name: picked.count(name) / len(picked) for name, _ in alias.targets}


def test_calls_are_divided_by_weight_and_a_key_stays_where_it_is() -> None:
    alias = Alias.from_text("search=a:9,b@0123456789ab:1")
    assert shares(alias) == pytest.approx({"a": 0.9, "b@0123456789ab": 0.1}, abs=0.015)
    assert [alias.pick_target(key) for key in KEYS] == [alias.pick_target(key) for key in KEYS]
    turned = Alias.from_text("search=b@0123456789ab:0.1,a:0.9")
    assert [alias.pick_target(key) for key in KEYS] == [turned.pick_target(key) for key in KEYS]
    # Fixed for good: another answer after an upgrade would send resumed uploads elsewhere.
    assert [alias.pick_target(key) for key in KEYS].index("b@0123456789ab") == 5


def test_other_weights_move_as_few_as_they_must() -> None:
    before, after = Alias.from_text("s=a:0.9,b:0.1"), Alias.from_text("s=a:0.8,b:0.2")
    moved = [(before.pick_target(key), after.pick_target(key)) for key in KEYS]
    assert ("b", "a") not in moved
    assert moved.count(("a", "b")) / len(KEYS) == pytest.approx(0.1, abs=0.015)


def test_weights_may_be_left_out() -> None:
    assert Alias.from_text(" both=a, b:3 ") == Alias("both", (("a", 1.0), ("b", 3.0)))
    assert Alias.from_text("both=a,b:3").shares == "a:1,b:3"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "=a",
        "s=",
        "s=a:0",
        "s=a:-1",
        "s=a:nan",
        "s=a,a",
        "s=a:1:2",
        "s=../a",
        "s=a@z",
        "s=,",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (nothing to match)
        Alias.from_text(text)
