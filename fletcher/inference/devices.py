"""Choice of backend, precision and replicas for a host, by rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fletcher.config.engine import EngineConfig
from fletcher.errors import BackendError
from fletcher.inference.backend import INSTALL_GPU, BackendConfig
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.onnx.float_indices import needs_float32
from fletcher.models.onnx.packed import FAMILIES, can_pack

# Largest number of cores of one replica. A replica's single interpreter lock feeds all its cores,
# but a second replica needs another copy of the weights. On two cores, one replica and two replicas
# showed no clear difference. The number of cores at which the lock matters has not been measured.
MAX_CORES_PER_REPLICA = 16

# all-MiniLM-L6-v2 on two Zen 5 cores, CPU ms a text at 512, 1024, 2048 and 4096 tokens: OpenVINO
# bfloat16 5.6 5.5 5.4 5.5, float32 9.9 10.1 10.2 10.5, ONNX Runtime float32 10.5 11.6 12.5 12.7. So
# more tokens bring no gain, but cost latency and memory. The number for CUDA is a guess and was not
# measured: a GPU needs more tokens to be busy.
CPU_BATCH_TOKENS = 1024
CUDA_BATCH_TOKENS = 32_768

_INSTALL_CPU = "pip install 'longbow-fletcher[cpu]'"


@dataclass(frozen=True, slots=True)
class Resolution:
    """Replicas to run, and the reason for the choice.

    Attributes:
        configs: One configuration for each replica.
        reason: One line for the log with the engine, its devices or cores, and the reason.
    """

    configs: list[BackendConfig]
    reason: str


def resolve_replicas(asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Resolution:
    """Choose the replicas that run a model, by fixed rules.

    The choice depends on the options `asked` and the host.

    `auto` takes the GPUs if the host has GPUs and ONNX Runtime's CUDA build is installed. Otherwise
    `auto` takes the CPU. On GPUs it takes float16 without padding for models that can have such a
    graph, and float32 (TF32) for other models. On the CPU it takes OpenVINO, or ONNX Runtime if
    OpenVINO is not installed. OpenVINO runs in bfloat16 if the processor multiplies bfloat16
    natively, else in float32.

    Raises:
        BackendError: The host lacks something that the options ask for; the message has the remedy.
    """
    if asked.backend == "null":
        return _null(asked, bundle)
    if asked.device.startswith("cuda") or (asked.device == "auto" and _can_cuda(asked, host)):
        return _shared(_cuda(asked, host, bundle), asked)
    return _cpu(asked, host, bundle)


def _null(asked: EngineConfig, bundle: ModelBundle) -> Resolution:
    if asked.device.startswith("cuda"):
        raise BackendError(
            f"`backend` null runs on the CPU, `device` is {asked.device}; leave one of them out",
            field="device",
            allowed=["auto", "cpu"],
        )
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
        bundle=str(bundle.folder),
        # The null backend serves to measure the rest of the server beside a fast device.
        max_batch_tokens=asked.max_batch_tokens or CUDA_BATCH_TOKENS,
        dim=bundle.dim,
    )
    return Resolution([config], "null backend: vectors without a model, as asked")


def _can_cuda(asked: EngineConfig, host: HostInfo) -> bool:
    return (
        host.num_cuda_devices > 0
        and host.cuda_provider
        and asked.backend in ("auto", "onnxruntime")
        and asked.precision in ("auto", "float32", "float16")
    )


def _cuda(asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Resolution:
    device = asked.device
    if asked.backend == "openvino":
        raise BackendError(
            f"`backend` openvino runs on the CPU, `device` is {device}; ask for onnxruntime",
            field="backend",
            allowed=["auto", "onnxruntime"],
        )
    if asked.precision == "bfloat16":
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
            f"`device` is {device}, but ONNX Runtime's CUDA build is not installed: {INSTALL_GPU}",
            field="device",
            allowed=["cpu"],
        )
    named = device.partition(":")[2]
    indices = [int(one) for one in named.split(",")] if named else range(host.num_cuda_devices)
    for index in indices:
        if index >= host.num_cuda_devices:
            raise BackendError(
                f"`device` names cuda:{index}, but the last of {host.num_cuda_devices} devices is "
                f"cuda:{host.num_cuda_devices - 1}",
                field="device",
                allowed=[f"cuda:{one}" for one in range(host.num_cuda_devices)],
            )
    precision, why = _cuda_precision(asked.precision, bundle)
    configs = [
        BackendConfig(
            backend="onnxruntime",
            device=f"cuda:{index}",
            bundle=str(bundle.folder),
            precision=precision,
            max_batch_tokens=asked.max_batch_tokens or CUDA_BATCH_TOKENS,
            gpu_memory=asked.gpu_memory,
        )
        for index in dict.fromkeys(indices)
    ]
    return Resolution(
        configs,
        f"onnxruntime {why} on {', '.join(one.device for one in configs)}: "
        f"{host.num_cuda_devices} NVIDIA devices, CUDA provider installed",
    )


def _cuda_precision(precision: str, bundle: ModelBundle) -> tuple[str, str]:
    """Choose the precision on a GPU; return it and its description."""
    kind = "" if bundle.output == "dense" else f"gives {bundle.output} vectors and "
    why = (
        f"graphs without padding exist only for dense models of {', '.join(FAMILIES)}, "
        f"{bundle.name} {kind}is of family {bundle.family}"
    )
    if bundle.has_exits:
        why = f"graphs without padding have no exits, but {bundle.name} has some"
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


def _shared(resolution: Resolution, asked: EngineConfig) -> Resolution:
    """Add the replicas for each GPU and the CUDA graphs that the options ask for."""
    num_replicas = asked.replicas_per_device or 1
    captures = asked.cuda_graphs and resolution.configs[0].precision == "float16"
    configs = [
        replace(one, cuda_graphs=captures)
        for one in resolution.configs
        for _ in range(num_replicas)
    ]
    reason = resolution.reason + (f", {num_replicas} replicas each" if num_replicas > 1 else "")
    if asked.cuda_graphs:
        reason += ", CUDA graphs" if captures else "; CUDA graphs need float16"
    return Resolution(configs, reason)


def _cpu(asked: EngineConfig, host: HostInfo, bundle: ModelBundle) -> Resolution:
    backend, precision = asked.backend, asked.precision
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
        if precision == "bfloat16" and needs_float32(bundle):
            precision, native = "float32", []
            why = (
                "the graph is an older Fletcher's, which bfloat16 would make wrong; add the model "
                "again with `fletcher model add` for more speed"
            )
    if precision == "bfloat16":
        why = ", ".join(name.upper() for name in native)
    elif engine == "openvino" and not native and not why:
        why = "no native bfloat16"
    cores = min(asked.threads or host.cores, host.cores)
    # As few replicas as MAX_CORES_PER_REPLICA allows, but at least one for each memory node.
    num_replicas = min(cores, max(-(-cores // MAX_CORES_PER_REPLICA), host.num_numa_nodes))
    configs = [
        BackendConfig(
            backend=engine,
            device="cpu",
            bundle=str(bundle.folder),
            precision=precision,
            threads=share,
            max_batch_tokens=asked.max_batch_tokens or CPU_BATCH_TOKENS,
        )
        for share in split_cores(cores, num_replicas)
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
        f"no engine is installed: {_INSTALL_CPU}, or 'longbow-fletcher[gpu]' on a host with an "
        "NVIDIA GPU",
        field="backend",
    )


def split_cores(cores: int, num_processes: int) -> list[int]:
    """Split cores between processes as evenly as possible; return each one's cores."""
    return [cores // num_processes + (n < cores % num_processes) for n in range(num_processes)]
