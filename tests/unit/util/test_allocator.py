"""What is freed is used again, and goes back to the system when there is nothing to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fletcher.util.allocator import Returning

MIB = 1 << 20

# A block of 8 MiB again and again, as the arrays of a window are.
AGAIN = """
import resource, sys
import numpy as np
from fletcher.util.allocator import give_back, keep_large_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

keep_large_blocks()
np.ones(1 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
before = resident()
give_back()
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


class House:
    """What is in use, and when."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self.now = 0.0
        self.given_back: list[float] = []
        self.returning = Returning(
            lambda: self.used_bytes,
            lambda: self.given_back.append(self.now),
            lambda: self.now,
        )

    def look_at(self, now: float, used_bytes: int = 0) -> None:
        self.now, self.used_bytes = now, used_bytes
        self.returning.look()


@pytest.fixture
def house() -> House:
    return House()


def test_memory_goes_back_once_nothing_was_in_use_for_a_while(house: House):
    house.look_at(0, 100 * MIB)
    house.look_at(1, 1)
    house.look_at(5)
    assert house.given_back == []  # a pause between two batches
    house.look_at(6)
    house.look_at(60)
    assert house.given_back == [6]


def test_memory_in_use_stays(house: House):
    for now in range(60):
        house.look_at(now, 100 * MIB)
    assert house.given_back == []


def test_what_a_few_texts_leave_behind_stays(house: House):
    house.look_at(0, MIB)
    house.look_at(60)
    assert house.given_back == []
