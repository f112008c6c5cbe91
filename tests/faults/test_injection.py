"""Single calls that fail on the way of a row; `scripts/soak --inject` tries them all."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import queue
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers

from fletcher.models.bundle.bundle import ModelBundle
from fletcher.util.closing import close_for_good
from fletcher.util.insist import insist
from tests.faults import callsites, failures
from tests.faults.campaign import Campaign, tenth
from tests.faults.points import STORES


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


@pytest.mark.timeout(400)
def test_a_tenth_of_the_call_sites_fails_and_no_promise_is_broken(campaign: Campaign) -> None:
    chosen = tenth(campaign.points(STORES), seed=12)
    results = list(campaign.run(chosen, limit_s=100))
    assert [f"{one.point}: {one.detail}" for one in results if one.status == "broken"] == []
    assert sum(one.status == "held" for one in results) > len(results) // 2


def test_only_calls_inside_functions_are_replaced() -> None:
    text = """
import os
x = os.getcwd()
class C:
    def f(self, y: list[int] = os.getpid()):
        with a(y) as b:
            match b:
                case C(-1): return g(super().h(y), y[1] + y[2])
        b[0] += g(timeout=1) is None
"""
    before = len(callsites.sites)
    tree = callsites._Calls("m").visit(ast.parse(text))
    found = [(site.text, site.place, site.timed) for site in callsites.sites[before:]]
    assert str(callsites.sites[before]).startswith("m:C.f ")
    del callsites.sites[before:]
    assert sorted(found) == [
        ("a", 1, True),
        ("g", 1, True),
        ("g", 2, True),
        ("super().h", 1, True),
        ("with a(y)", 1, False),
        ("y[1]", 1, False),
        ("y[1] + y[2]", 1, False),
        ("y[2]", 1, False),
    ]
    exec(compile(tree, "m", "exec"), {})


def test_a_call_that_waits_can_run_out_of_time() -> None:
    def outcome(function: Any, *args: Any, **named: Any) -> Any:
        try:
            return failures.time_out(function, args, named)
        except (queue.Empty, queue.Full, TimeoutError) as error:
            return type(error)

    waiting, event, items = threading.Condition(), threading.Event(), queue.Queue[int]()
    assert outcome(waiting.wait, 5.0) == (True, False)
    assert outcome(waiting.wait) == (False, None)
    assert outcome(waiting.wait, None) == (False, None)
    assert outcome(waiting.wait_for, lambda: 7, 5.0) == (True, 7)
    assert outcome(event.wait, timeout=5.0) == (True, False)
    assert outcome(threading.Lock().acquire, timeout=5.0) == (True, False)
    assert outcome(threading.Lock().acquire, blocking=False) == (True, False)
    assert outcome(items.get, timeout=5.0) is queue.Empty
    assert outcome(items.put, 1, timeout=5.0) is queue.Full
    assert issubclass(outcome(Future().result, 5.0), TimeoutError)
    assert outcome(threading.Thread().join, 5.0) == (True, None)


def test_the_end_of_a_with_statement_fails_after_its_work(tmp_path: Path) -> None:
    left = []
    stack = contextlib.ExitStack()
    stack.callback(left.append, 1)
    callsites.sites.append(callsites.Site("m", "f", "with stack", 1))
    fault = callsites.Fault(len(callsites.sites) - 1, "front", 1, "after")
    kind = failures.exit_kind_of(stack)
    assert failures.KINDS[kind] == "exit"
    with pytest.raises(Exception, match="injected"), callsites._FailingExit(stack, fault, kind):
        pass
    assert left == [1]
    with callsites._FailingExit(contextlib.ExitStack(), fault, kind):
        pass  # an empty one cannot fail
    callsites.sites.pop()
    assert failures.exit_kind_of(threading.Lock()) == -1


def test_which_calls_may_fail() -> None:
    import numpy as np
    import pyarrow as pa

    kinds = {
        "own": [Campaign, failures.kind_of],
        "pyarrow": [pa.array, pa.array([1]).slice, pa.RecordBatch.from_pylist],
        "numpy": [np.zeros, np.zeros(1).sum],
        "file": [Path().exists, open],
        "thread": [threading.Thread().start],
        "wait": [threading.Event().wait, threading.Condition().wait, queue.Queue().get],
        "pipe": [Connection.send_bytes],
        "codec": [json.loads, msgspec.json.encode],
        "tokenizers": [tokenizers.Tokenizer(tokenizers.models.BPE()).encode],
        "log": [logging.getLogger().warning],
    }
    for kind, functions in kinds.items():
        for function in functions:
            number = failures.kind_of(function)
            expected = -1 if kind == "own" else failures.KINDS.index(kind)
            assert number == expected, function
    for function in (len, threading.Lock().release, threading.Event().set, [].append):
        assert failures.kind_of(function) == -1, function
    assert failures.kind_of(insist) == failures.kind_of(close_for_good) == -1
