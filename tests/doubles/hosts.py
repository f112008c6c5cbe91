"""Hosts that tests choose engines for."""

from __future__ import annotations

from fletcher.inference.host import HostInfo

BFLOAT16_HOST = HostInfo(
    cores=2,
    memory_bytes=1 << 33,
    cpu="a cpu",
    isa=frozenset(("avx512_bf16",)),
    num_numa_nodes=1,
    num_cuda_devices=0,
    cuda_provider=False,
    openvino=True,
    onnxruntime=True,
)
