"""A server that finds a measurement of its own question runs what was measured."""

from __future__ import annotations

from pathlib import Path

from fletcher.config.server import ServeConfig
from fletcher.inference.backend import BackendConfig
from fletcher.inference.host import detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tuning.candidates import TuningCandidate
from fletcher.tuning.record import Key, Record, save
from tests.integration.conftest import StartServer


def test_a_server_runs_what_was_measured(
    start_server: StartServer, tiny_bundle: ModelBundle, tmp_path: Path
) -> None:
    (tmp_path / "models").symlink_to(tiny_bundle.folder.parent)
    options = {"home": tmp_path, "device": "cpu", "backend": "auto", "threads": 2}
    asked = ServeConfig.from_options(**options).engine
    folder = str(tmp_path / "models" / tiny_bundle.name)
    one = BackendConfig("onnxruntime", "cpu", folder, "float32", threads=1, max_batch_tokens=96)
    # By rule it would be one process, of OpenVINO.
    record = Record(TuningCandidate((one, one)), "2026-01-02T03:04:05+00:00", 99.0)
    save(tmp_path, Key.for_question(asked, detect_host(), tiny_bundle), tiny_bundle, record)
    stats = start_server(**options).service.statistics()
    assert [(one["backend"], one["state"]) for one in stats["replicas"]] == [
        ("onnxruntime", "healthy"),
        ("onnxruntime", "healthy"),
    ]
    assert stats["engine"]["chosen_by"] == "measurement"
    assert stats["engine"]["measured_at"] == record.measured_at
