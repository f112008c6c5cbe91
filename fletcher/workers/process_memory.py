"""Memory of processes, as the kernel counts it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def memory_bytes(process_ids: Iterable[int], proc: Path = Path("/proc")) -> int:
    """Returns the bytes of RAM that processes use together.

    The result is the sum of Linux' proportional set sizes (PSS). If four processes map a page, each
    counts a quarter of it, so no page counts twice in the sum. A process that has ended counts 0.
    """
    return sum(_pss(proc / str(one) / "smaps_rollup") for one in process_ids)


def _pss(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^Pss:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
