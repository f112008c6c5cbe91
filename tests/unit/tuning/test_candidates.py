import dataclasses

import pytest

from fletcher.config.engine import EngineConfig
from fletcher.config.server import ServeConfig
from fletcher.errors import BackendError
from fletcher.tuning.candidates import BACKENDS, PRECISIONS, arrangements, engines


def names(candidates):
    return [one.engine for one in candidates]


def test_auto_tries_every_engine_here_and_the_rules_choice_first(host, tiny_bundle):
    found = engines(EngineConfig(), host, tiny_bundle)
    assert names(found) == ["openvino bfloat16", "openvino float32", "onnxruntime float32"]
    plain = dataclasses.replace(host, isa=frozenset())
    assert names(engines(EngineConfig(), plain, tiny_bundle)) == [
        "openvino float32",
        "onnxruntime float32",
    ]


def test_what_is_fixed_stays_fixed(host, tiny_bundle):
    found = engines(
        EngineConfig(backend="openvino", precision="float32", threads=2), host, tiny_bundle
    )
    assert names(found) == ["openvino float32"]
    assert found[0].replicas == "cpu: 2 cores"
    for tokens in (0, 77):
        budgets = [
            one.max_batch_tokens
            for one in arrangements(
                found[0].with_tokens(tokens or 1024), EngineConfig(max_batch_tokens=tokens)
            )
        ]
        assert set(budgets) == ({77} if tokens else {512, 1024, 2048})


def test_gpus_and_the_cpu_are_compared_where_the_device_is_open(gpus, tiny_bundle):
    found = engines(EngineConfig(), gpus, tiny_bundle)
    assert {one.replicas for one in found} == {"cuda:0, cuda:1", "cpu: 4 cores"}
    assert found[0].engine == "onnxruntime float16"
    only = engines(EngineConfig(device="cuda:1"), gpus, tiny_bundle)
    assert {one.replicas for one in only} == {"cuda:1"}
    doubled = {one.replicas for one in arrangements(only[0], EngineConfig())}
    assert doubled == {"cuda:1", "cuda:1, cuda:1"}
    fixed = arrangements(only[0], EngineConfig(replicas_per_device=1))
    assert {one.replicas for one in fixed} == {"cuda:1"}


def test_cores_are_shared_by_fewer_and_more_processes(host, tiny_bundle):
    (engine, *_) = engines(EngineConfig(max_batch_tokens=64), host, tiny_bundle)
    found = arrangements(engine, EngineConfig(max_batch_tokens=64))
    assert [one.replicas for one in found] == ["cpu: 4 cores", "cpu: 2+2 cores"]
    again = arrangements(found[1], EngineConfig(max_batch_tokens=64))
    assert [one.replicas for one in again] == [
        "cpu: 2+2 cores",
        "cpu: 4 cores",
        "cpu: 1+1+1+1 cores",
    ]
    single = dataclasses.replace(host, cores=1)
    (alone,) = arrangements(
        engines(EngineConfig(), single, tiny_bundle)[0], EngineConfig(max_batch_tokens=64)
    )
    assert alone.replicas == "cpu: 1 core"


def test_engines_that_cannot_run_are_refused_with_the_reason(host, tiny_bundle):
    with pytest.raises(BackendError, match="no NVIDIA device"):
        engines(EngineConfig(device="cuda"), host, tiny_bundle)


def test_auto_never_becomes_int8():
    assert ServeConfig.from_options().engine == EngineConfig()
    assert not [one for one in (*BACKENDS, *PRECISIONS) if "int8" in one]
