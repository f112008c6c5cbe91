"""What the kernel says of processes' memory."""

from __future__ import annotations

import subprocess
import sys

from fletcher.workers.process_memory import memory_bytes

MIB = 1 << 20


def test_pages_count_where_they_are_and_those_who_are_gone_have_none() -> None:
    code = "data = b'x' * (64 << 20); print(len(data), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 64 * MIB < memory_bytes([process.pid]) < 90 * MIB
        process.communicate(b"\n")
    assert memory_bytes([process.pid]) == 0
