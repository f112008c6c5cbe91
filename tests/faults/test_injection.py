"""Single calls that fail on the way of a row; `scripts/soak --inject` tries them all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fletcher.models.bundle.bundle import ModelBundle
from fletcher.util.insist import insist
from tests.faults import callsites
from tests.faults.campaign import Campaign


@pytest.fixture(scope="module")
def campaign(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "work").mkdir()
    return Campaign(folder, tiny_bundle.folder.parent, folder / "work", jobs=2)


def test_calls_are_found_in_all_processes_and_libraries(campaign: Campaign) -> None:
    points = campaign.points(["fletcher"])
    wheres = [point.where for point in points]
    for part in (
        *("front fletcher.delivery.committer", "worker fletcher.inference", "[pyarrow]"),
        *("store fletcher.storeserver", "[numpy]", "[lancedb]", "[thread]", "[flight]"),
        *("store open _lancedb", "store write _lancedb", "store rename _lancedb"),
    ):
        assert any(part in where for where in wheres), part
    assert {point.how for point in points} >= {"raise", "after", "cut", "empty", "wrong", "ENOSPC"}
    assert {point.index for point in points} >= {1, 2}


def test_only_calls_inside_functions_are_replaced() -> None:
    text = "import os\nx = os.getcwd()\ndef f(y=os.getpid()):\n    return g(super().h(y))\n"
    before = len(callsites.sites)
    tree = callsites._Calls("m").visit(ast.parse(text))
    found = [str(site) for site in callsites.sites[before:]]
    del callsites.sites[before:]
    assert found == ["m:4:13 super().h", "m:4:11 g"]
    assert ast.unparse(tree).count("__call_site__") == 2


def test_which_calls_may_fail() -> None:
    import threading

    import numpy as np
    import pyarrow as pa

    kinds = {
        "own": [Campaign, callsites.kind_of],
        "pyarrow": [pa.array, pa.array([1]).slice, pa.RecordBatch.from_pylist],
        "numpy": [np.zeros, np.zeros(1).sum],
        "file": [Path().exists, open],
        "thread": [threading.Thread().start],
    }
    for kind, functions in kinds.items():
        for function in functions:
            number = callsites.kind_of(function)
            expected = -1 if kind == "own" else callsites.KINDS.index(kind)
            assert number == expected, function
    for function in (len, threading.Lock().acquire, threading.Event().set, [].append, insist):
        assert callsites.kind_of(function) == -1, function
