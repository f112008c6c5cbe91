"""Tuning from the question to the record, with fakes for the processes."""

import pytest

from fletcher.cli.tune import _print
from fletcher.config.engine import EngineConfig
from fletcher.errors import BackendError, ConfigError
from fletcher.tuning import record as records
from fletcher.tuning.tuner import tune


def test_the_fastest_engine_is_arranged_and_kept(tmp_path, host, tiny_bundle, fake_group, capsys):
    started = []

    def start(configs):
        started.append((configs[0].backend, configs[0].precision, len(configs)))
        slow = configs[0].precision == "bfloat16" or len(configs) == 1
        return fake_group(configs[0].precision, seconds=(0.02 if slow else 0.01,))

    report = tune(tmp_path, EngineConfig(), host, tiny_bundle, lambda line: None, start)
    assert started[0] == ("onnxruntime", "float32", 1)  # the reference
    assert len(report.engines) == 3
    # Equally fast engines: the rules' own stays; two of its processes are as slow as one.
    assert report.chosen.candidate.engine == "openvino bfloat16"
    assert report.chosen.candidate.replicas == "cpu: 4 cores"
    key = records.Key.for_question(EngineConfig(), host, tiny_bundle)
    kept = records.load(tmp_path, key, tiny_bundle)
    assert kept == report.record

    again = tune(
        tmp_path, EngineConfig(precision="float32"), host, tiny_bundle, lambda line: None, start
    )
    assert again.chosen.candidate.replicas == "cpu: 2+2 cores"
    assert again.path != report.path
    _print(again)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == "engine replicas tokens/run texts/s rounds cosine".split()
    assert [line for line in table if line.endswith("  chosen")]
    assert "why: faster in every round, 2.00 times the first of its arrangements" in table
    assert table[-1] == f"kept in {again.path}"


def test_without_right_vectors_nothing_is_chosen(tmp_path, host, tiny_bundle, fake_group):
    groups = iter([fake_group(), *(fake_group(noise=1.0) for _ in range(3))])
    with pytest.raises(BackendError, match=r"no engine gives right vectors here.*refused: cosine"):
        tune(tmp_path, EngineConfig(), host, tiny_bundle, lambda line: None, lambda _: next(groups))
    assert not (tmp_path / "tune").exists()


def test_null_is_refused(tmp_path, host, tiny_bundle):
    with pytest.raises(ConfigError, match="`backend` is 'null'"):
        tune(tmp_path, EngineConfig(backend="null"), host, tiny_bundle, print)
