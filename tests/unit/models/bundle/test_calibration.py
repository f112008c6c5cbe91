from __future__ import annotations

import json

import numpy as np
import pytest

from fletcher.core.quantization import Ranges
from fletcher.errors import ModelError
from fletcher.models.bundle.calibration import CALIBRATION, Calibration, Cut
from fletcher.models.bundle.registry import Registry
from fletcher.models.bundle.spec import MANIFEST
from tests.conftest import GOLDEN

CUT = Cut(layers=2, dims=32, normalized=True)


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path)
    registry.add_model(str(GOLDEN / "tiny"), progress=print)
    return registry


def calibration(width=1.0):
    numbers = np.random.default_rng(3).standard_normal(32).astype(np.float32)
    return Calibration(1000, {CUT: Ranges.between(numbers, numbers + np.float32(width))})


def test_ranges_are_frozen_in_the_bundle_and_do_not_change_its_hash(registry):
    before = registry.get_model("tiny")
    assert before.calibration.ranges == {}
    given = calibration()
    after = registry.save_calibration("tiny", given)
    assert after.hash == before.hash
    for bundle in (after, registry.verify_model("tiny")):
        (found,) = bundle.calibration.ranges.items()
        assert bundle.calibration.num_texts == 1000
        assert found[0] == CUT
        assert found[1].hash == given.ranges[CUT].hash
        np.testing.assert_array_equal(found[1].step, given.ranges[CUT].step)
    other = registry.save_calibration("tiny", calibration(2.0))
    assert other.calibration.ranges[CUT].hash != given.ranges[CUT].hash
    registry.verify_model("tiny")


def test_ranges_that_were_changed_are_found_out(registry, tmp_path):
    registry.save_calibration("tiny", calibration())
    path = tmp_path / "tiny" / CALIBRATION
    text = path.read_text()
    path.write_text(text.replace("1000", "1001"))
    with pytest.raises(ModelError, match=r"calibration\.json has a wrong SHA-256"):
        registry.verify_model("tiny")
    path.write_text(json.dumps({"num_texts": 1, "ranges": [{}]}))
    with pytest.raises(ModelError, match=r"calibration\.json has"):
        registry.get_model("tiny")


def test_a_crash_during_calibration_leaves_a_bundle_that_loads(registry, tmp_path):
    registry.save_calibration("tiny", calibration())
    manifest = tmp_path / "tiny" / MANIFEST
    fields = json.loads(manifest.read_text())
    fields["files"].pop(CALIBRATION)
    manifest.write_text(json.dumps(fields))
    assert registry.verify_model("tiny").calibration.ranges == {}
