"""Settings of checkpoints change vectors as they do in the reference.

The reference's vectors are tests/golden/variants, made by scripts/make_golden_variants.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fletcher.core.batches import TextBatch
from fletcher.models.bundle.registry import Registry
from fletcher.models.checkpoint.pickled import PickledFile
from fletcher.tokenization.tokenizer import Tokenizer

from .onnx_session import cosines
from .test_families import load, run
from .variants import FOLDER, TEXTS, VARIANTS, make_variant

TABLE = pq.read_table(FOLDER / "vectors.parquet").to_pylist()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_vectors_equal_the_reference(name: str, engine: str, tmp_path: Path) -> None:
    checkpoint = make_variant(name, tmp_path)
    bundle = Registry(tmp_path / "models").add_model(str(checkpoint), progress=print)
    data = [text.encode() for text in TEXTS]
    batch = TextBatch(b"".join(data), np.cumsum([0, *map(len, data)]))
    encoded = Tokenizer.from_bundle(bundle.folder).encode(batch)
    rows = [ids.tolist() for ids in np.split(encoded.input_ids, encoded.offsets[1:-1])]
    actual = run(load(bundle, engine), rows)[:, : bundle.usual_dims]
    expected = np.array([row["vector"] for row in TABLE if row["variant"] == name], np.float32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4
    has_length = np.linalg.norm(expected, axis=1) > 0
    assert cosines(actual[has_length], expected[has_length]).min() >= 0.99999


def test_every_variant_has_a_hash_that_no_other_has(tmp_path: Path) -> None:
    bundles = {
        name: Registry(tmp_path / name / "models").add_model(
            str(make_variant(name, tmp_path / name)), name="x", progress=print
        )
        for name in VARIANTS
    }
    # Only these are the same setting in other words.
    assert bundles["older name"].hash == bundles["tokenizer arguments"].hash
    assert len({bundle.hash for bundle in bundles.values()}) == len(VARIANTS) - 1


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_files_of_torch_are_read_as_torch_reads_them(name: str) -> None:
    file = PickledFile(FOLDER / name)
    expected = json.loads((FOLDER / "tensors.json").read_text())
    assert file.tensor_names() == sorted(expected)
    for tensor in sorted(expected.keys() - {"ids"}):
        wanted = np.array(expected[tensor], np.float32).reshape(file.tensor_shape(tensor))
        assert np.array_equal(file.float32(tensor), wanted), tensor
