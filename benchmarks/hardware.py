"""Machine and versions of a measurement."""

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
    """Processor, cores, instruction sets, memory, system and load by other processes."""
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


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, by nvidia-smi; empty without one."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def versions() -> dict[str, str]:
    """Versions of Python, of the measured packages, and of the source."""
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
    """CPU seconds of processes so far, all threads; 0 for processes that have ended."""
    ticks = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # After the name, which may contain anything. Fields 14 and 15 are user and system time.
        fields = stat.rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def limit_cores(num_cores: int | None) -> None:
    """Limits this process and its children to a number of cores; None: all."""
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
