"""Results as a table on standard output, and as JSON and a plot in files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import draw


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def heading(hardware: dict[str, Any], versions: dict[str, str]) -> str:
    """The machine and the versions, above a table."""
    isa = ", ".join(hardware["isa"]) or "no vector extensions of use"
    memory_gib = f"{hardware['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores ({isa}), {memory_gib}, {hardware['system']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    load = hardware["load_average"]
    if load > 0.5:
        lines.append(f"NOTE: load average was {load} at the start: others' work is in the numbers")
    return "\n".join(lines)


def publish(folder: Path, result: dict[str, Any]) -> str:
    """Writes `folder/BENCHMARK-TIME.json` and draws the PNG; returns lines with their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"written to {path}\n{draw(result, path.with_suffix('.png'))}"


def say(line: str) -> None:
    """Prints progress on standard error; standard output is for the table."""
    print(line, file=sys.stderr, flush=True)
