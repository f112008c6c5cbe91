"""`fletcher tune` with real processes, and what `fletcher doctor` says before and after."""

import json
import os

from fletcher.cli import main
from fletcher.tuning import trials


def test_the_command_measures_and_doctor_knows(tmp_path, tiny_bundle, monkeypatch, capsys):
    (tmp_path / "models").symlink_to(tiny_bundle.folder.parent)
    for name in [name for name in os.environ if name.startswith("FLETCHER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(trials, "ROUND_S", 0.01)
    argv = ["--model", tiny_bundle.name, "--home", str(tmp_path), "--backend", "onnxruntime"]
    argv += ["--threads", "1", "--max-batch-tokens", "256", "--device", "cpu", "--json"]

    def engine():
        assert main(["doctor", *argv]) == 0
        findings = json.loads(capsys.readouterr().out)["findings"]
        (chosen,) = [one for one in findings if (one["part"], one["name"]) == ("engine", "chosen")]
        return chosen

    assert engine()["value"] == "by rule"
    assert main(["tune", *argv]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chosen"]["backend"] == "onnxruntime"
    assert report["chosen"]["precision"] == "float32"
    assert report["chosen"]["lowest_cosine"] > 0.99999
    assert len(report["chosen"]["turns"]) == trials.NUM_ROUNDS
    assert report["chosen"]["replicas"] == [{"device": "cpu", "threads": 1}]
    assert engine()["value"] == f"by measurement, {report['measured_at']}"
