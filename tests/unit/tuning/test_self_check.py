"""The self-check: engines that compute other vectors than float32 do not serve a model."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from fletcher.config.engine import EngineConfig
from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError
from fletcher.inference import budget
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning import self_check
from fletcher.tuning.decision import Decision
from fletcher.tuning.self_check import SelfCheck, check_rows, lowest_cosine
from tests.doubles.hosts import BFLOAT16_HOST

AUTO = EngineConfig()


class Engine:
    """ONNX Runtime, with a fault in `faulty` precisions: the mask of a row has other rows' end."""

    faulty: tuple[str, ...] = ()
    loads: list[str] = []  # noqa: RUF012

    def __init__(self, config: BackendConfig) -> None:
        real = dataclasses.replace(config, backend="onnxruntime", precision="float32")
        self._engine: Backend = budget._engine(real).load(real)
        self._config = config
        self.concurrency = self.urgent_concurrency = 1

    def run(self, batch: MicroBatch) -> InferenceResult:
        result = self._engine.run(batch)
        if self._config.precision in self.faulty and len(batch.lengths) > 1:
            turned = np.roll(result.embeddings, 1, axis=1)
            return dataclasses.replace(result, embeddings=turned)
        return result

    def describe(self) -> dict[str, str]:
        return {}


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: BackendConfig) -> Engine:
        Engine.loads.append(f"{config.backend} {config.precision}")
        return Engine(config)

    monkeypatch.setattr(Engine, "faulty", ("bfloat16",))
    monkeypatch.setattr(Engine, "loads", [])
    monkeypatch.setattr(self_check, "load_engine", load)


def decision(bundle: ModelBundle, precision: str, backend: str = "openvino") -> Decision:
    config = BackendConfig(backend, "cpu", str(bundle.folder), precision=precision, threads=1)
    return Decision([config], "by rule")


def test_what_differs_from_float32_falls_back_to_it_and_says_so(
    tiny_bundle: ModelBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check = SelfCheck(tmp_path, BFLOAT16_HOST)
    with caplog.at_level(logging.WARNING):
        checked = check.checked(decision(tiny_bundle, "bfloat16"), AUTO, tiny_bundle)
    assert checked.configs[0].precision == "float32"
    assert "bfloat16 gives wrong vectors" in checked.reason
    assert checked.reason in caplog.text
    assert checked.check is not None
    assert checked.check.passed
    stats = checked.describe()
    assert stats["reason"] == checked.reason
    assert stats["self_check"]["lowest_cosine"] == pytest.approx(1, abs=1e-5)


def test_what_was_asked_for_by_name_is_refused(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    check = SelfCheck(tmp_path, BFLOAT16_HOST)
    asked = EngineConfig(precision="bfloat16")
    with pytest.raises(BackendError, match=r"wrong vectors for tiny: the lowest cosine") as info:
        check.checked(decision(tiny_bundle, "bfloat16"), asked, tiny_bundle)
    assert info.value.field == "precision"


def test_float32_that_differs_is_refused(
    tiny_bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "faulty", ("float32",))
    check = SelfCheck(tmp_path, BFLOAT16_HOST)
    wrong = dataclasses.replace(decision(tiny_bundle, "float32").configs[0])
    # The reference has the same fault, but it runs each text alone.
    with pytest.raises(BackendError, match="openvino float32 on cpu gives wrong vectors"):
        check.checked(Decision([wrong], ""), AUTO, tiny_bundle)


def test_a_result_is_kept_for_this_engine_precision_bundle_and_host(
    tiny_bundle: ModelBundle, tmp_path: Path
) -> None:
    check = SelfCheck(tmp_path, BFLOAT16_HOST)
    (config,) = decision(tiny_bundle, "float32").configs
    first = check.check_engine(config, tiny_bundle)
    assert Engine.loads == ["onnxruntime float32", "openvino float32"]
    assert check.check_engine(config, tiny_bundle) == first
    assert len(Engine.loads) == 2
    (path,) = (tmp_path / "tune" / "checks").iterdir()
    assert json.loads(path.read_text())["lowest_cosine"] > 0.99999
    check.check_engine(dataclasses.replace(config, precision="bfloat16"), tiny_bundle)
    other = dataclasses.replace(BFLOAT16_HOST, cpu="another cpu")
    SelfCheck(tmp_path, other).check_engine(config, tiny_bundle)
    assert len(Engine.loads) == 6
    path.write_text("{")  # a damaged file is made anew
    assert check.check_engine(config, tiny_bundle) is not None
    assert len(Engine.loads) == 8


def test_there_is_nothing_to_compare_for_the_reference_and_for_no_model(
    tiny_bundle: ModelBundle, tmp_path: Path
) -> None:
    check = SelfCheck(tmp_path, BFLOAT16_HOST)
    for one in (decision(tiny_bundle, "float32", "onnxruntime"), decision(tiny_bundle, "", "null")):
        assert check.checked(one, AUTO, tiny_bundle) == one
    assert Engine.loads == []


def test_probe_texts_are_short_and_long(tiny_bundle: ModelBundle) -> None:
    assert [len(row) for row in check_rows(tiny_bundle)] == [8, tiny_bundle.max_length]


def test_a_vector_that_is_missing_or_not_finite_is_wrong() -> None:
    one, zero = np.array([[1.0, 0]], np.float32), np.zeros((1, 2), np.float32)
    assert lowest_cosine([one, zero], [one, zero]) == 1
    assert lowest_cosine([zero], [one]) == lowest_cosine([one], [zero]) == 0
    assert lowest_cosine([-one], [one]) == -1
    assert lowest_cosine([one * np.nan], [one]) == -1
    assert lowest_cosine([one[:0]], [one]) == -1
