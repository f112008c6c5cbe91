import dataclasses
import re

import msgspec
import pytest

from fletcher.config.engine import EngineConfig
from fletcher.errors import BackendError, ConfigError
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import HostInfo, detect_host

PLAIN = HostInfo(
    cores=4,
    memory_bytes=8 << 30,
    cpu="Some CPU",
    isa=frozenset({"avx2"}),
    num_numa_nodes=1,
    num_cuda_devices=0,
    cuda_provider=False,
    openvino=True,
    onnxruntime=True,
)
BF16 = dataclasses.replace(PLAIN, isa=frozenset({"avx512_bf16"}))
BARE = dataclasses.replace(PLAIN, openvino=False, onnxruntime=False)
NO_OPENVINO = dataclasses.replace(BF16, openvino=False)
GPUS = dataclasses.replace(PLAIN, num_cuda_devices=2, cuda_provider=True, openvino=False)
GPU_WITHOUT_ENGINE = dataclasses.replace(PLAIN, num_cuda_devices=1)


@pytest.fixture
def ask(tiny_bundle):
    """Resolves options, which are fields of EngineConfig, for a host and the tiny bundle."""

    def resolve(host, device="auto", bundle=tiny_bundle, **fields):
        return resolve_replicas(EngineConfig(device=device, **fields), host, bundle)

    return resolve


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (PLAIN, "openvino float32 on 4 cores: no native bfloat16"),
        (BF16, "openvino bfloat16 on 4 cores: AVX512_BF16"),
        (NO_OPENVINO, "onnxruntime float32 on 4 cores: OpenVINO is not installed"),
        (
            GPUS,
            (
                "onnxruntime float16 without padding on cuda:0, cuda:1: "
                "2 NVIDIA devices, CUDA provider installed"
            ),
        ),
        (GPU_WITHOUT_ENGINE, "openvino float32 on 4 cores: no native bfloat16"),
    ],
)
def test_auto_says_what_it_took_and_why(ask, host, reason):
    assert ask(host).reason == reason


def test_a_config_holds_what_was_asked(ask, tiny_bundle):
    (config,) = ask(
        BF16, "cpu", backend="openvino", precision="float32", threads=2, max_batch_tokens=77
    ).configs
    assert (config.backend, config.device, config.precision) == ("openvino", "cpu", "float32")
    assert (config.threads, config.max_batch_tokens) == (2, 77)
    assert config.bundle == str(tiny_bundle.folder)


def test_named_devices_get_a_replica_each_once(ask):
    configs = ask(GPUS, "cuda:1,0,1").configs
    assert [config.device for config in configs] == ["cuda:1", "cuda:0"]


def test_a_gpu_may_run_several_replicas_with_a_share_of_its_memory(ask):
    resolution = ask(GPUS, "cuda", replicas_per_device=2, gpu_memory=1 << 30)
    assert [one.device for one in resolution.configs] == ["cuda:0"] * 2 + ["cuda:1"] * 2
    assert {one.gpu_memory for one in resolution.configs} == {1 << 30}
    assert resolution.reason.endswith(", 2 replicas each")


@pytest.mark.parametrize(
    ("precision", "captures", "reason"),
    [("auto", True, ", CUDA graphs"), ("float32", False, "; CUDA graphs need float16")],
)
def test_graphs_are_captured_in_float16(ask, precision, captures, reason):
    resolution = ask(GPUS, "cuda:0", precision=precision, cuda_graphs=True)
    assert [one.cuda_graphs for one in resolution.configs] == [captures]
    assert resolution.reason.endswith(reason)
    assert not any(one.cuda_graphs for one in ask(GPUS, "cuda").configs)


@pytest.mark.parametrize(
    ("family", "asked", "precision", "reason"),
    [
        ("bert", "auto", "float16", "float16 without padding"),
        ("bert", "float16", "float16", "float16 without padding"),
        ("bert", "float32", "float32", r"float32 \(TF32\)"),
        ("onnx", "auto", "float32", r"TF32; graphs without padding .* tiny is of family onnx"),
        ("onnx", "float32", "float32", r"float32 \(TF32\)"),
    ],
)
def test_a_gpu_runs_the_graph_of_the_models_family(
    ask, tiny_bundle, family, asked, precision, reason
):
    bundle = msgspec.structs.replace(tiny_bundle, family=family)
    resolution = ask(GPUS, "cuda:0", bundle, precision=asked)
    assert [one.precision for one in resolution.configs] == [precision]
    assert re.search(reason, resolution.reason)


def test_float16_on_a_gpu_is_refused_where_there_is_no_such_graph(ask, tiny_bundle):
    bundle = msgspec.structs.replace(tiny_bundle, family="onnx")
    with pytest.raises(BackendError, match=r"`precision` is float16, but .* of family onnx"):
        ask(GPUS, bundle=bundle, precision="float16")


@pytest.mark.parametrize(
    ("cores", "nodes", "threads", "shares"),
    [
        (4, 1, 0, [4]),
        (4, 1, 9, [4]),
        (4, 1, 3, [3]),
        (37, 1, 0, [13, 12, 12]),
        (6, 4, 0, [2, 2, 1, 1]),
    ],
)
def test_cores_are_shared_out_whole(ask, cores, nodes, threads, shares):
    host = dataclasses.replace(PLAIN, cores=cores, num_numa_nodes=nodes)
    assert [one.threads for one in ask(host, threads=threads).configs] == shares


@pytest.mark.parametrize(
    ("host", "asked", "message"),
    [
        (PLAIN, {"device": "cuda"}, "no NVIDIA device is visible.*nvidia-smi"),
        (GPU_WITHOUT_ENGINE, {"device": "cuda"}, r"CUDA build is not installed.*\[gpu\]"),
        (GPUS, {"device": "cuda:2"}, "names cuda:2, but the last of 2 devices is cuda:1"),
        (GPUS, {"device": "cuda", "backend": "openvino"}, "openvino runs on the CPU"),
        (GPUS, {"device": "cuda", "precision": "bfloat16"}, "bfloat16 is OpenVINO's"),
        (PLAIN, {"precision": "bfloat16"}, "neither AMX_BF16 nor AVX512_BF16"),
        (PLAIN, {"precision": "float16"}, "float16 is for CUDA"),
        (BF16, {"precision": "bfloat16", "backend": "onnxruntime"}, "needs `backend` openvino"),
        (NO_OPENVINO, {"precision": "bfloat16"}, r"needs OpenVINO.*\[cpu\]"),
        (NO_OPENVINO, {"backend": "openvino"}, r"openvino is not installed.*\[cpu\]"),
        (BARE, {}, r"no engine is installed.*\[cpu\].*\[gpu\]"),
        (GPUS, {"device": "cuda", "backend": "null"}, "null runs on the CPU"),
    ],
)
def test_what_is_not_there_is_refused_with_the_remedy(ask, host, asked, message):
    with pytest.raises(BackendError, match=message):
        ask(host, **asked)


@pytest.mark.parametrize("field", ["device", "backend", "precision", "threads"])
def test_nonsense_is_refused_by_name(ask, field):
    value = -1 if field == "threads" else "tpu"
    with pytest.raises(ConfigError, match=f"`{field}` is"):
        ask(PLAIN, **{field: value})


def test_null_takes_its_width_from_the_bundle(ask, tiny_bundle):
    (config,) = ask(BARE, backend="null").configs
    assert (config.backend, config.dim) == ("null", tiny_bundle.dim)


@pytest.fixture
def machine(tmp_path):
    """Writes files of a pretended machine."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_the_host_is_detected():
    host = detect_host()
    assert host.cores >= 1
    assert host.memory_bytes > 0
    assert host.openvino
    assert host.onnxruntime


def test_flags_and_memory_are_read(machine):
    root = machine(
        proc__cpuinfo="model name\t: Some CPU\nflags\t\t: sse avx2 amx_bf16 other\n",
        proc__meminfo="MemTotal:       1024 kB\nMemFree: 1 kB\n",
    )
    host = detect_host(root)
    assert (host.cpu, host.isa, host.memory_bytes) == (
        "Some CPU",
        frozenset({"avx2", "amx_bf16"}),
        1 << 20,
    )


def test_a_quota_of_a_group_above_bounds_cores_and_memory(machine):
    root = machine(proc__self__cgroup="0::/a/b\n", proc__meminfo="MemTotal: 1024 kB\n")
    group = root / "sys/fs/cgroup/a"
    (group / "b").mkdir(parents=True)
    (group / "b" / "cpu.max").write_text("max 100000\n")
    (group / "cpu.max").write_text("50000 100000\n")
    (group / "memory.max").write_text("4096\n")
    host = detect_host(root)
    assert (host.cores, host.memory_bytes) == (1, 4096)


def test_a_quota_of_version_one_counts_too(machine):
    root = machine(proc__self__cgroup="3:memory:/x\n1:cpu:/\n", proc__meminfo="MemTotal: 99 kB\n")
    for folder, name, text in [
        ("cpu", "cpu.cfs_quota_us", "100000"),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("memory/x", "memory.limit_in_bytes", "5000"),
    ]:
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    host = detect_host(root)
    assert (host.cores, host.memory_bytes) == (1, 5000)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,-1,1", 1), ("0,1,7", 2)]
)
def test_visible_devices_are_counted(machine, monkeypatch, visible, count):
    root = machine(dev__nvidia0="", dev__nvidia1="", dev__nvidiactl="")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_host(root).num_cuda_devices == count
