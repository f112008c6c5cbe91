"""Detection of the resources of the machine that this process may use."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """Resources of the machine that this process may use.

    Attributes:
        cores: Number of logical cores, limited by affinity and cgroup quota; at least 1.
        memory_bytes: RAM or the cgroup's limit, whichever is smaller; 0 if unknown.
        cpu: Name of the processor.
        isa: The flags in ISA_FLAGS that the processor has.
        num_numa_nodes: Number of memory nodes; at least 1.
        num_cuda_devices: Number of NVIDIA devices visible to this process.
        cuda_provider: Whether ONNX Runtime's CUDA build is installed.
        openvino: Whether OpenVINO is installed.
        onnxruntime: Whether any build of ONNX Runtime is installed.
    """

    cores: int
    memory_bytes: int
    cpu: str
    isa: frozenset[str]
    num_numa_nodes: int
    num_cuda_devices: int
    cuda_provider: bool
    openvino: bool
    onnxruntime: bool


def detect_host(root: Path = Path("/")) -> HostInfo:
    """Inspect the machine through /proc, /sys and /dev, without loading an engine.

    `root` is the folder that contains /proc, /sys and /dev.
    """
    cpuinfo = _read(root / "proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split())
    groups = _cgroups(root)
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    return HostInfo(
        cores=_cores(groups),
        memory_bytes=_memory_bytes(root, groups),
        cpu=_field(cpuinfo, "model name") or platform.machine(),
        isa=frozenset(flags & set(ISA_FLAGS)),
        num_numa_nodes=max(1, len(nodes)),
        num_cuda_devices=_num_cuda_devices(root, os.environ.get("CUDA_VISIBLE_DEVICES")),
        cuda_provider=bool(installed_version("onnxruntime-gpu")),
        openvino=importlib.util.find_spec("openvino") is not None,
        onnxruntime=importlib.util.find_spec("onnxruntime") is not None,
    )


def _cores(groups: list[Path]) -> int:
    """Number of cores, limited by affinity and by the quota of the control groups.

    The quota is cpu.max in cgroup v2 and cpu.cfs_quota_us in v1. It is rounded up to full cores.
    """
    cores = len(os.sched_getaffinity(0))
    for group in groups:
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not period:
            quota = _read(group / "cpu.cfs_quota_us")
            period = _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _memory_bytes(root: Path, groups: list[Path]) -> int:
    total = _field(_read(root / "proc/meminfo"), "MemTotal").partition(" ")[0]
    limits = [int(total) * 1024] if total.isdigit() else []
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(group / name)
            if limit.isdigit():  # without a limit, v2 has "max", and v1 a number near 2**63
                limits.append(int(limit))
    return min(limits, default=0)


def _cgroups(root: Path) -> list[Path]:
    """Folders of this process's control groups and their parents, v1 and v2.

    In a container, this process's folder is often missing, and the root of the mount is the
    container's group. So the result may include missing folders, which are harmless.
    """
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and not {"cpu", "memory"} & set(controllers.split(",")):
            continue
        base = root / "sys/fs/cgroup" / controllers
        group = base / path.lstrip("/")
        folders += [one for one in (group, *group.parents) if one.is_relative_to(base)]
    return folders


def _num_cuda_devices(root: Path, visible: str | None) -> int:
    """Number of devices that CUDA shows to this process, found without loading CUDA.

    `visible` is the variable CUDA_VISIBLE_DEVICES, a list of numbers or UUIDs, or None if the
    variable is not set. Entries from the first -1 on do not count.
    """
    present = len(list((root / "dev").glob("nvidia[0-9]*")))
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",")]
    shown = names[: names.index("-1")] if "-1" in names else names
    return min(present, sum(1 for name in shown if name))


def cuda_names(root: Path = Path("/")) -> list[str]:
    """Names of the NVIDIA devices as the driver reports them, without loading CUDA."""
    paths = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    return [name for path in paths if (name := _field(_read(path), "Model"))]


def installed_version(distribution: str) -> str:
    """Version of an installed distribution; empty if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """Value of the first line `name : value`; empty if there is no such line."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""
