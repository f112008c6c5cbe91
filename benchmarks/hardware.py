"""What a measurement ran on: numbers mean nothing without it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.corpus import ROOT
from fletcher.inference.host import detect_host

PACKAGES = (
    "longbow-fletcher",
    "pyarrow",
    "numpy",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "lancedb",
)


def facts() -> dict[str, Any]:
    """Processor, cores, instruction sets, memory, system and the load from others."""
    host = detect_host()
    return {
        "cpu": host.cpu,
        "cores": host.cores,
        "isa": sorted(host.isa),
        "memory_bytes": host.memory_bytes,
        "numa_nodes": host.num_numa_nodes,
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of Python, of the packages that are measured, and of the source."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if commit := _git("rev-parse", "HEAD"):
        changed = _git("status", "--porcelain", "--untracked-files=no")
        found["commit"] = commit[:12] + (" with changes" if changed else "")
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that processes have used so far, all their threads; 0 for those that are gone."""
    ticks = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # After the name, which may hold anything: field 3 on; 14 and 15 are user and system time.
        fields = stat.rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def limit_cores(num_cores: int | None) -> None:
    """Keeps this process, and all that it starts, on so many of its cores; None: on all."""
    if num_cores is not None:
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[: max(1, num_cores)])


def _git(*argv: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *argv], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
