import dataclasses
import json
import logging
from importlib import metadata

import msgspec
import pytest

from fletcher.config.engine import EngineConfig
from fletcher.errors import ConfigError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import cuda_names
from fletcher.models.bundle.spec import MANIFEST
from fletcher.tuning import record as records
from fletcher.tuning.candidates import TuningCandidate
from fletcher.tuning.decision import decide
from fletcher.tuning.record import Key, Record, load, save
from tests.doubles.bundles import another


@pytest.fixture
def winner(candidate, tiny_bundle):
    configs = candidate("onnxruntime", "float32", threads=2, tokens=512).configs * 2
    folder = str(tiny_bundle.folder)
    configs = tuple(dataclasses.replace(one, bundle=folder) for one in configs)
    return Record(TuningCandidate(configs), "2026-01-02T03:04:05+00:00", 123.4)


def test_servers_take_what_was_measured_for_the_same_question(tmp_path, host, tiny_bundle, winner):
    save(tmp_path, Key.for_question(EngineConfig(), host, tiny_bundle), tiny_bundle, winner)
    decision = decide(tmp_path, EngineConfig(), host, tiny_bundle)
    assert decision.measured == winner
    assert decision.configs == list(winner.candidate.configs)
    assert decision.reason == (
        "onnxruntime float32 on cpu: 2+2 cores, 512 tokens a run: 123 texts/s, measured "
        "2026-01-02T03:04:05+00:00"
    )
    about = decision.describe()
    assert (about["chosen_by"], about["texts_per_s"]) == ("measurement", 123.4)
    assert about["measured_at"] == winner.measured_at


def test_versions_of_a_model_are_measured_each_for_itself(tmp_path, host, tiny_bundle, winner):
    kept = another(tiny_bundle, tmp_path / "models" / "tiny@0", tiny_bundle.name, "another")
    for bundle in (tiny_bundle, kept):
        save(tmp_path, Key.for_question(EngineConfig(), host, bundle), bundle, winner)
    for bundle in (tiny_bundle, kept):
        assert load(tmp_path, Key.for_question(EngineConfig(), host, bundle), bundle) is not None


@pytest.mark.parametrize(
    "asked",
    [EngineConfig(threads=2), EngineConfig(backend="openvino"), EngineConfig(max_batch_tokens=9)],
)
def test_another_question_is_decided_by_rule(tmp_path, host, tiny_bundle, winner, asked):
    save(tmp_path, Key.for_question(EngineConfig(), host, tiny_bundle), tiny_bundle, winner)
    decision = decide(tmp_path, asked, host, tiny_bundle)
    assert decision.measured is None
    assert decision.configs == resolve_replicas(asked, host, tiny_bundle).configs
    assert decision.reason.endswith("by rule, `fletcher tune` measures")
    assert decision.describe()["chosen_by"] == "rule"


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "Another CPU"},
        {"cores": 3},
        {"isa": frozenset({"avx2"})},
        {"num_numa_nodes": 2},
        {"num_cuda_devices": 1},
    ],
)
def test_another_host_is_decided_by_rule(tmp_path, host, tiny_bundle, winner, change, caplog):
    save(tmp_path, Key.for_question(EngineConfig(), host, tiny_bundle), tiny_bundle, winner)
    other = dataclasses.replace(host, **change)
    assert load(tmp_path, Key.for_question(EngineConfig(), other, tiny_bundle), tiny_bundle) is None
    assert caplog.records == []
    # Homes may be shared: what one host measures leaves the other's alone.
    save(tmp_path, Key.for_question(EngineConfig(), other, tiny_bundle), tiny_bundle, winner)
    assert (
        load(tmp_path, Key.for_question(EngineConfig(), host, tiny_bundle), tiny_bundle) == winner
    )


def test_another_engine_or_model_makes_it_stale_with_one_line(
    tmp_path, host, tiny_bundle, winner, caplog
):
    key = Key.for_question(EngineConfig(), host, tiny_bundle)
    save(tmp_path, key, tiny_bundle, winner)
    for name, line in [
        ("openvino", "out of date (openvino 2031.1 then"),
        ("fletcher", "out of date (fletcher 2031.1 then"),
        ("model", "out of date (another model)"),
    ]:
        other = dataclasses.replace(key, holds={**key.holds, name: "2031.1"})
        save(tmp_path, other, tiny_bundle, winner)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert load(tmp_path, key, tiny_bundle) is None
        assert len(caplog.records) == 1
        assert line in caplog.text


def test_the_key_follows_the_bundle_and_the_engines(tmp_path, host, tiny_bundle, monkeypatch):
    key = Key.for_question(EngineConfig(), host, tiny_bundle)
    assert key.holds["openvino"]
    assert key.holds["onnxruntime"] or key.holds["onnxruntime-gpu"]
    (tmp_path / MANIFEST).write_text("{}")
    moved = msgspec.structs.replace(tiny_bundle, folder=tmp_path)
    assert Key.for_question(EngineConfig(), host, moved).holds["model"] != key.holds["model"]
    monkeypatch.setattr(metadata, "version", lambda package: "9")
    assert Key.for_question(EngineConfig(), host, tiny_bundle).holds["openvino"] == "9"


def damaged(text):
    content = json.loads(text)
    first = content["replicas"][0]
    yield ""
    yield text[: len(text) // 2]
    yield "[]"
    yield "null"
    yield json.dumps({**content, "format": 99})
    yield json.dumps({**content, "replicas": []})
    yield json.dumps({**content, "replicas": 5})
    yield json.dumps({**content, "max_batch_tokens": "512"})
    yield json.dumps({**content, "holds": None})
    yield json.dumps({**content, "replicas": [{**first, "layers": 1}]})
    yield json.dumps({**content, "replicas": [{**first, "dim": None}]})
    for name, value in {
        "backend": "os",
        "device": "cuda:0; rm",
        "precision": "int8",
        "threads": -1,
    }.items():
        yield json.dumps({**content, "replicas": [{**first, name: value}]})


def test_a_corrupt_file_is_ignored_with_one_line(tmp_path, host, tiny_bundle, winner, caplog):
    key = Key.for_question(EngineConfig(), host, tiny_bundle)
    path = save(tmp_path, key, tiny_bundle, winner)
    whole = path.read_text()
    for text in damaged(whole):
        path.write_text(text)
        caplog.clear()
        assert load(tmp_path, key, tiny_bundle) is None, text
        assert len(caplog.records) == 1, text
        assert "`fletcher tune` writes it anew" in caplog.text
    path.write_bytes(b"\xff\xfe")
    assert load(tmp_path, key, tiny_bundle) is None
    save(tmp_path, key, tiny_bundle, winner)
    assert path.read_text() == whole
    assert [one.name for one in path.parent.iterdir()] == [path.name]  # nothing half written


def test_a_home_that_cannot_be_written_is_named(tmp_path, host, tiny_bundle, winner):
    (tmp_path / "tune").write_text("a file")
    with pytest.raises(ConfigError, match=r"`home`.*cannot be written"):
        save(tmp_path, Key.for_question(EngineConfig(), host, tiny_bundle), tiny_bundle, winner)


def test_devices_are_known_by_their_names(tmp_path):
    folder = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA Some\nIRQ:   9\n")
    assert cuda_names(tmp_path) == ["NVIDIA Some"]


def test_the_null_backend_has_nothing_to_measure(tmp_path, host, tiny_bundle):
    assert "tune" not in decide(tmp_path, EngineConfig(backend="null"), host, tiny_bundle).reason


def test_all_of_a_replica_but_its_bundle_is_recorded(winner):
    fields = {field.name for field in dataclasses.fields(BackendConfig)}
    assert set(records._Replica.__struct_fields__) == fields - {"bundle", "max_batch_tokens"}
