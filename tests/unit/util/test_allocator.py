"""Freed memory is used again, and returned to the system once the process is idle."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fletcher.util.allocator import IdleTrimmer

MIB = 1 << 20

# A block of 8 MiB again and again, as the arrays of a window are.
AGAIN = """
import resource, sys
import numpy as np
from fletcher.util.allocator import keep_large_blocks, trim_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

keep_large_blocks()
np.ones(1 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
before = resident()
trim_heap()
print(faults, before - resident())
"""


def test_a_freed_block_is_used_again_and_can_be_given_back():
    # In a process of its own: the settings are there to stay.
    run = subprocess.run(
        [sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True, timeout=60
    )
    faults, given_back = map(int, run.stdout.split())
    assert faults < 2048  # pages of a single block; all of them have 40,960
    assert given_back > 4 * MIB


class IdleHeap:
    """A trimmer over a simulated clock and heap."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self.now = 0.0
        self.trims: list[float] = []
        self.trimmer = IdleTrimmer(
            lambda: self.used_bytes, lambda: self.trims.append(self.now), lambda: self.now
        )

    def check_at(self, now: float, used_bytes: int = 0) -> None:
        self.now, self.used_bytes = now, used_bytes
        self.trimmer.trim_if_idle()


@pytest.fixture
def heap() -> IdleHeap:
    return IdleHeap()


def test_memory_goes_back_once_nothing_was_in_use_for_a_while(heap: IdleHeap):
    heap.check_at(0, 100 * MIB)
    heap.check_at(1, 1)
    heap.check_at(5)
    assert heap.trims == []  # a pause between two batches
    heap.check_at(6)
    heap.check_at(60)
    assert heap.trims == [6]


def test_memory_in_use_stays(heap: IdleHeap):
    for now in range(60):
        heap.check_at(now, 100 * MIB)
    assert heap.trims == []


def test_what_a_few_texts_leave_behind_stays(heap: IdleHeap):
    heap.check_at(0, MIB)
    heap.check_at(60)
    assert heap.trims == []
