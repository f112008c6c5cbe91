"""Choice of the engine that runs a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fletcher.config.server import ServeConfig
from fletcher.errors import BackendError
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.serving.model_loader import _decide


def host(num_cuda_devices: int) -> HostInfo:
    return HostInfo(
        cores=2,
        memory_bytes=1 << 34,
        cpu="a processor",
        isa=frozenset({"amx_bf16"}),
        num_numa_nodes=1,
        num_cuda_devices=num_cuda_devices,
        cuda_provider=True,
        openvino=True,
        onnxruntime=True,
    )


def devices(bundle: ModelBundle, num_cuda: int, **options: str) -> tuple[list[str], list[str]]:
    config = ServeConfig.from_options(home=Path("/nonexistent"), **options)  # type: ignore[arg-type]
    decision, standby = _decide(config, bundle, host(num_cuda))
    running = [one.device for one in decision.configs]
    return running, [f"{one.device} {one.precision}" for one in standby]


def test_the_cpu_stands_by_only_where_asked_and_only_for_gpus(tiny_bundle: ModelBundle) -> None:
    gpus = ["cuda:0", "cuda:1"]
    assert devices(tiny_bundle, 2) == (gpus, [])
    assert devices(tiny_bundle, 2, device_fallback="cpu") == (gpus, ["cpu float32"])
    assert devices(tiny_bundle, 0, device_fallback="cpu") == (["cpu"], [])


def test_without_gpus_at_the_start_the_fallback_is_what_runs(tiny_bundle: ModelBundle) -> None:
    assert devices(tiny_bundle, 0, device="cuda", device_fallback="cpu") == (["cpu"], [])
    with pytest.raises(BackendError, match="no NVIDIA device"):
        devices(tiny_bundle, 0, device="cuda")
