"""Which backend, precision and replicas to run on a host."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from fletcher.errors import BackendError, ConfigError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.host import HostInfo, detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.onnx.packed import FAMILIES, can_pack

__all__ = ["HostInfo", "Resolution", "detect_host", "resolve"]

# One process runs this many cores at most, as one interpreter lock feeds them all; a second process
# costs another copy of the weights. Two cores showed no clear difference between one process and
# two; where the lock begins to matter has not been measured.
MAX_CORES_PER_REPLICA = 16

# all-MiniLM-L6-v2 on two Zen 5 cores, CPU ms a text at 512, 1024, 2048 and 4096 tokens: OpenVINO
# bfloat16 5.6 5.5 5.4 5.5, float32 9.9 10.1 10.2 10.5, ONNX Runtime float32 10.5 11.6 12.5 12.7. So
# more tokens gain nothing and add latency and memory. The figure for CUDA is a guess: a GPU needs
# more to be busy, it has not been tried.
CPU_BATCH_TOKENS = 1024
CUDA_BATCH_TOKENS = 32_768

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+(,\d+)*)?")
_BACKENDS = ("auto", "onnxruntime", "openvino", "null")
_PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_INSTALL_CPU = "pip install 'longbow-fletcher[cpu]'"
_INSTALL_GPU = (
    "pip uninstall onnxruntime, then pip install 'longbow-fletcher[gpu]' "
    "(both install the same Python module)"
)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What `resolve` chose.

    Attributes:
        configs: One for each replica.
        reason: One line for the log: what runs where, and why.
    """

    configs: list[BackendConfig]
    reason: str


def resolve(
    device: str,
    backend: str,
    precision: str,
    threads: int,
    host: HostInfo,
    bundle_folder: Path,
    max_batch_tokens: int = 0,
    *,
    replicas_per_device: int = 0,
    gpu_memory: int = 0,
    cuda_graphs: bool = False,
) -> Resolution:
    """Turns what was asked into what runs.

    `auto` takes the GPUs where there are some and ONNX Runtime's CUDA build is installed, else the
    CPU. On GPUs it takes float16 and no padding for models whose graph Fletcher writes, float32
    (TF32) for others. On the CPU it takes OpenVINO, in bfloat16 where the processor multiplies that
    natively, else in float32; ONNX Runtime where OpenVINO is not installed.

    Args:
        device: `auto`, `cpu`, `cuda` (all devices) or `cuda:N,...`.
        backend: `auto`, `onnxruntime`, `openvino` or `null`.
        precision: `auto`, `float32`, `bfloat16` or `float16`.
        threads: Cores for all replicas together; 0: all.
        host: What there is.
        bundle_folder: The model.
        max_batch_tokens: Padded tokens in one run at most; 0: the device's best.
        replicas_per_device: Replicas on each GPU; 0: one.
        gpu_memory: Bytes of its GPU that each of them may take; 0: all.
        cuda_graphs: Whether replicas on GPUs capture CUDA graphs for short texts.

    Raises:
        ConfigError: A value that is none of the above.
        BackendError: What was asked is not there; the message says how to get it.
    """
    _check("device", device, _DEVICE.fullmatch(device) is not None, "auto, cpu, cuda or cuda:N,...")
    _check("backend", backend, backend in _BACKENDS, ", ".join(_BACKENDS))
    _check("precision", precision, precision in _PRECISIONS, ", ".join(_PRECISIONS))
    _check("threads", str(threads), threads >= 0, "0 or more")
    _check("max_batch_tokens", str(max_batch_tokens), max_batch_tokens >= 0, "0 or more")
    if backend == "null":
        return _null(device, bundle_folder, max_batch_tokens)
    if device.startswith("cuda") or (device == "auto" and _can_cuda(backend, precision, host)):
        resolution = _cuda(device, backend, precision, host, bundle_folder, max_batch_tokens)
        return _shared(resolution, replicas_per_device or 1, gpu_memory, cuda_graphs)
    return _cpu(backend, precision, threads, host, bundle_folder, max_batch_tokens)


def _null(device: str, bundle_folder: Path, max_batch_tokens: int) -> Resolution:
    if device.startswith("cuda"):
        raise BackendError(
            f"`backend` null runs on the CPU, `device` is {device}; leave one of them out",
            field="device",
            allowed=["auto", "cpu"],
        )
    bundle = ModelBundle.from_folder(bundle_folder)
    if bundle.output != "dense":
        raise BackendError(
            f"`backend` null makes dense vectors, {bundle.name} gives {bundle.output}; ask for "
            "auto",
            field="backend",
            allowed=["auto", "onnxruntime", "openvino"],
        )
    config = BackendConfig(
        backend="null",
        device="cpu",
        bundle=str(bundle_folder),
        # What is measured with it is what a fast device leaves to be done.
        max_batch_tokens=max_batch_tokens or CUDA_BATCH_TOKENS,
        dim=bundle.dim,
    )
    return Resolution([config], "null backend: vectors without a model, as asked")


def _can_cuda(backend: str, precision: str, host: HostInfo) -> bool:
    return (
        host.num_cuda_devices > 0
        and host.cuda_provider
        and backend in ("auto", "onnxruntime")
        and precision in ("auto", "float32", "float16")
    )


def _cuda(
    device: str,
    backend: str,
    precision: str,
    host: HostInfo,
    bundle_folder: Path,
    max_batch_tokens: int,
) -> Resolution:
    if backend == "openvino":
        raise BackendError(
            f"`backend` openvino runs on the CPU, `device` is {device}; ask for onnxruntime",
            field="backend",
            allowed=["auto", "onnxruntime"],
        )
    if precision == "bfloat16":
        raise BackendError(
            "`precision` bfloat16 is OpenVINO's, on the CPU; ask for float16 or float32 on cuda",
            field="precision",
            allowed=["auto", "float16", "float32"],
        )
    if not host.num_cuda_devices:
        raise BackendError(
            f"`device` is {device}, but no NVIDIA device is visible here; install the driver "
            "(nvidia-smi must list a device), give the container its GPUs, or unset "
            "CUDA_VISIBLE_DEVICES",
            field="device",
            allowed=["cpu"],
        )
    if not host.cuda_provider:
        raise BackendError(
            f"`device` is {device}, but ONNX Runtime's CUDA build is not installed: "
            + _INSTALL_GPU,
            field="device",
            allowed=["cpu"],
        )
    named = device.partition(":")[2]
    indices = [int(one) for one in named.split(",")] if named else range(host.num_cuda_devices)
    for index in indices:
        if index >= host.num_cuda_devices:
            raise BackendError(
                f"`device` names cuda:{index}, there are {host.num_cuda_devices}, counted from 0",
                field="device",
                allowed=[f"cuda:{one}" for one in range(host.num_cuda_devices)],
            )
    precision, why = _cuda_precision(precision, ModelBundle.from_folder(bundle_folder))
    configs = [
        BackendConfig(
            backend="onnxruntime",
            device=f"cuda:{index}",
            bundle=str(bundle_folder),
            precision=precision,
            max_batch_tokens=max_batch_tokens or CUDA_BATCH_TOKENS,
        )
        for index in dict.fromkeys(indices)
    ]
    return Resolution(
        configs,
        f"onnxruntime {why} on {', '.join(one.device for one in configs)}: "
        f"{host.num_cuda_devices} NVIDIA devices, CUDA provider installed",
    )


def _cuda_precision(precision: str, bundle: ModelBundle) -> tuple[str, str]:
    """What to run on a GPU, and how to say it."""
    kind = "" if bundle.output == "dense" else f"gives {bundle.output} vectors and "
    why = (
        f"graphs without padding are written for dense models of {', '.join(FAMILIES)} alone, "
        f"{bundle.name} {kind}is of family {bundle.family}"
    )
    if bundle.has_exits:
        why = f"graphs without padding have no exits, {bundle.name} has some"
    padded = bundle.has_exits or not can_pack(bundle)
    if precision == "float16" and padded:
        raise BackendError(
            f"`precision` is float16, but {why}; ask for float32, which runs as TF32 there",
            field="precision",
            allowed=["auto", "float32"],
        )
    if precision == "float32":
        return "float32", "float32 (TF32)"
    if padded:
        return "float32", f"float32 (TF32; {why})"
    return "float16", "float16 without padding"


def _shared(
    resolution: Resolution, num_replicas: int, gpu_memory: int, cuda_graphs: bool
) -> Resolution:
    """The same with several replicas on each GPU."""
    captures = cuda_graphs and resolution.configs[0].precision == "float16"
    configs = [
        replace(one, gpu_memory=gpu_memory, cuda_graphs=captures)
        for one in resolution.configs
        for _ in range(num_replicas)
    ]
    reason = resolution.reason + (f", {num_replicas} replicas each" if num_replicas > 1 else "")
    if cuda_graphs:
        reason += ", CUDA graphs" if captures else "; CUDA graphs are for float16 alone"
    return Resolution(configs, reason)


def _cpu(
    backend: str,
    precision: str,
    threads: int,
    host: HostInfo,
    bundle_folder: Path,
    max_batch_tokens: int,
) -> Resolution:
    if precision == "float16":
        raise BackendError(
            "`precision` float16 is for CUDA; on the CPU ask for bfloat16 or float32",
            field="precision",
            allowed=["auto", "float32", "bfloat16"],
        )
    native = sorted(host.isa & {"amx_bf16", "avx512_bf16"})
    if precision == "bfloat16" and not native:
        raise BackendError(
            f"`precision` is bfloat16, but this processor ({host.cpu}) has neither AMX_BF16 nor "
            "AVX512_BF16; ask for float32",
            field="precision",
            allowed=["auto", "float32"],
        )
    if precision == "bfloat16" and backend == "onnxruntime":
        raise BackendError(
            "`precision` bfloat16 needs `backend` openvino, onnxruntime has none on this CPU",
            field="backend",
            allowed=["auto", "openvino"],
        )
    engine, why = _cpu_engine(backend, precision, host)
    if precision == "auto":
        precision = "bfloat16" if engine == "openvino" and native else "float32"
    if precision == "bfloat16":
        why = ", ".join(name.upper() for name in native)
    elif engine == "openvino" and not native and not why:
        why = "no native bfloat16"
    cores = min(threads or host.cores, host.cores)
    configs = [
        BackendConfig(
            backend=engine,
            device="cpu",
            bundle=str(bundle_folder),
            precision=precision,
            threads=share,
            max_batch_tokens=max_batch_tokens or CPU_BATCH_TOKENS,
        )
        for share in _shares(cores, host.num_numa_nodes)
    ]
    where = f"{cores} core{'s' if cores > 1 else ''}"
    if len(configs) > 1:
        where += f" in {len(configs)} processes"
    return Resolution(configs, f"{engine} {precision} on {where}: {why or 'as asked'}")


def _cpu_engine(backend: str, precision: str, host: HostInfo) -> tuple[str, str]:
    installed = {"openvino": host.openvino, "onnxruntime": host.onnxruntime}
    if backend != "auto":
        if not installed[backend]:
            raise BackendError(
                f"`backend` {backend} is not installed: {_INSTALL_CPU}", field="backend"
            )
        return backend, ""
    if host.openvino:
        return "openvino", ""
    if precision == "bfloat16":
        raise BackendError(
            f"`precision` bfloat16 needs OpenVINO, which is not installed: {_INSTALL_CPU}",
            field="precision",
        )
    if host.onnxruntime:
        return "onnxruntime", "OpenVINO is not installed"
    raise BackendError(
        f"no engine is installed: {_INSTALL_CPU}, or 'longbow-fletcher[gpu]' where there is an "
        "NVIDIA GPU",
        field="backend",
    )


def _shares(cores: int, num_nodes: int) -> list[int]:
    """Cores of each replica: as few as `MAX_CORES_PER_REPLICA` and the memory nodes allow."""
    num_replicas = min(cores, max(-(-cores // MAX_CORES_PER_REPLICA), num_nodes))
    return [cores // num_replicas + (n < cores % num_replicas) for n in range(num_replicas)]


def _check(field: str, value: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"`{field}` is {value!r}, expected {expected}", field=field)
