"""What processes take of the machine's memory, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def memory_bytes(process_ids: Iterable[int], proc: Path = Path("/proc")) -> int:
    """Bytes of RAM that processes take together, pages they share with others in part.

    That is Linux' proportional set size (PSS): a page that four processes map counts a quarter for
    each, so that sums over all processes are right. A process that is gone takes nothing.

    Args:
        process_ids: The processes.
        proc: Where procfs is, for tests.
    """
    return sum(_pss(proc / str(one) / "smaps_rollup") for one in process_ids)


def _pss(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
