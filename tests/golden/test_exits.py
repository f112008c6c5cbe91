"""Exits give what a model of fewer layers would, and full depth what the model gives without."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from fletcher.config.engine import EngineConfig
from fletcher.core.batches import MicroBatch
from fletcher.errors import ModelError
from fletcher.inference.backend import Backend, BackendConfig
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import detect_host
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry

from .onnx_session import Array, cosines

GOLDEN = Path(__file__).parent
CHECKPOINTS = [GOLDEN / "tiny", *sorted(path for path in (GOLDEN / "families").glob("*/"))]
NAMES = [path.name for path in CHECKPOINTS]
ROWS = [[2, 7, 11, 3], [2, 3], [2, *range(5, 25), 3], [2, 9, 9, 9, 3]]
_LAYER = re.compile(r"layers?\.(\d+)\.")


def copied(checkpoint: Path, folder: Path, *, pooling: str = "", num_layers: int = 0) -> Path:
    """A checkpoint with another pooling, or with its first layers alone."""
    shutil.copytree(checkpoint, folder)
    if pooling:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    if num_layers:
        config = json.loads((folder / "config.json").read_text())
        counts = [name for name in ("num_hidden_layers", "n_layers") if name in config]
        config.update(dict.fromkeys(counts, num_layers))
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:num_layers]
        (folder / "config.json").write_text(json.dumps(config))
        _drop_layers(folder / "model.safetensors", num_layers)
    return folder


def _drop_layers(path: Path, first: int) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for name in list(header):
        match = _LAYER.search(name)
        if match and int(match[1]) >= first:
            del header[name]
    kept, body = {"__metadata__": header.pop("__metadata__", {})}, b""
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        part = data[8 + size + begin : 8 + size + end]
        kept[name] = {**entry, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(kept).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def add(checkpoint: Path, folder: Path, exits: Sequence[int] = ()) -> ModelBundle:
    return Registry(folder).add_model(str(checkpoint), name="m", exits=exits, progress=print)


def load(bundle: ModelBundle, engine: str = "onnxruntime") -> Backend:
    module = importlib.import_module(f"fletcher.inference.{engine}")
    config = BackendConfig(
        backend=engine, bundle=str(bundle.folder), threads=1, max_batch_tokens=16, device="cpu"
    )
    loaded: Backend = module.load(config)
    return loaded


def run(backend: Backend, layers: int = 0) -> Array:
    ids = np.concatenate([np.array(row, np.int32) for row in ROWS])
    lengths = np.array([len(row) for row in ROWS], np.int32)
    return backend.run(MicroBatch(ids, lengths, layers)).embeddings


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=NAMES)
def test_an_exit_equals_a_model_of_fewer_layers(checkpoint: Path, tmp_path: Path) -> None:
    whole = add(checkpoint, tmp_path / "whole")
    bundle = add(checkpoint, tmp_path / "exits", (1,))
    assert (bundle.hash, bundle.layers) == (whole.hash, (1, whole.num_layers))
    backend = load(bundle)
    np.testing.assert_allclose(run(backend), run(load(whole)), atol=1e-5)
    shallow = add(copied(checkpoint, tmp_path / "one", num_layers=1), tmp_path / "shallow")
    np.testing.assert_allclose(run(backend, 1), run(load(shallow)), atol=1e-5)
    assert np.array_equal(run(backend), run(backend, whole.num_layers))
    assert cosines(run(backend), run(backend, 1)).max() < 0.999


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_three_blocks_hand_on_their_hidden_states(
    engine: str, pooling: str, tmp_path: Path
) -> None:
    checkpoint = copied(GOLDEN / "families" / "modernbert", tmp_path / "c", pooling=pooling)
    bundle = add(checkpoint, tmp_path / "exits", (1, 3))
    assert [path.name for path in bundle.blocks] == [
        "model.1.onnx",
        "model.3.onnx",
        "model.4.onnx",
    ]
    backend = load(bundle, engine)
    np.testing.assert_allclose(
        run(backend), run(load(add(checkpoint, tmp_path / "whole"), engine)), atol=1e-5
    )
    for layers in (1, 3):
        short = copied(checkpoint, tmp_path / f"{layers}", num_layers=layers)
        expected = run(load(add(short, tmp_path / f"short{layers}"), engine))
        np.testing.assert_allclose(run(backend, layers), expected, atol=1e-5)


def test_weights_are_stored_once_and_graphs_are_valid(tmp_path: Path) -> None:
    whole = add(GOLDEN / "families" / "modernbert", tmp_path / "whole")
    bundle = add(GOLDEN / "families" / "modernbert", tmp_path / "exits", (1, 2, 3))
    for graph in bundle.blocks:
        onnx.checker.check_model(str(graph), full_check=True)

    def weights(one: ModelBundle) -> int:
        """Bytes of tensors, wherever they lie, of a page and more."""
        return sum(path.stat().st_size for path in one.folder.glob("*.weights"))

    # Each block has a table of rotary angles and the final norm, and no layer twice.
    assert weights(bundle) < 1.5 * weights(whole)
    (bundle.folder / "model.2.weights").unlink()
    with pytest.raises(ModelError, match=r"model\.2\.weights is missing"):
        ModelBundle.from_folder(bundle.folder)


def test_impossible_exits_are_refused(tmp_path: Path) -> None:
    for layer in (0, 3):
        with pytest.raises(ModelError, match=f"`exits` has {layer}, expected layers from 1 to 2"):
            add(GOLDEN / "tiny", tmp_path / "models", (layer,))
    add(GOLDEN / "tiny", tmp_path / "models", (2,))
    assert not Registry(tmp_path / "models").get_model("m").has_exits
    with pytest.raises(ModelError, match="same model with exits after layers 2;"):
        add(GOLDEN / "tiny", tmp_path / "models", (1,))
    onnx_file = tmp_path / "models" / "m" / "model.onnx"
    with pytest.raises(ModelError, match=r"`exits` is given, but the graph of an \.onnx file"):
        Registry(tmp_path / "models").add_model(
            str(onnx_file), name="n", exits=(1,), progress=print
        )


def test_a_gpu_runs_exits_padded(tmp_path: Path) -> None:
    bundle = add(GOLDEN / "tiny", tmp_path, (1,))
    host = replace(detect_host(), num_cuda_devices=1, cuda_provider=True)
    chosen = resolve_replicas(EngineConfig(device="cuda"), host, bundle)
    assert chosen.configs[0].precision == "float32"
    assert "have no exits" in chosen.reason
