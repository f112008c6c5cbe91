"""A process that served ends in time, with the code of its command."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import atexit, sys, threading
if {stuck}:
    atexit.register(threading.Event().wait)
from fletcher.cli import shutdown as leaving
leaving.leave_in_time(timeout_s=0.05)
sys.exit(leaving.leave_with(3))
"""


@pytest.mark.parametrize("stuck", [False, True])
def test_the_code_survives_whether_the_exit_hangs_or_not(stuck: bool) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(stuck=stuck)], check=False, timeout=60)
    assert done.returncode == 3


def test_a_command_that_does_not_end_is_ended() -> None:
    code = """
import threading
from fletcher.cli import shutdown as leaving
leaving.leave_in_time(timeout_s=0.05)
leaving.leave_soon(130)
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 130
