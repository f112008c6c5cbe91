"""A pickle of weights is read as data: nothing in it runs, and none takes the machine's memory."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fletcher.errors import ModelError
from fletcher.models.bundle.registry import Registry
from fletcher.models.checkpoint.pickled import PickledFile
from tests.unit.models.conftest import GOLDEN, EditCheckpoint

REAL = GOLDEN / "variants" / "zip.bin"
LEGACY = GOLDEN / "variants" / "legacy.bin"


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/byteorder", b"little")
        made.writestr("archive/data/0", np.arange(8, dtype="<f4").tobytes())
    return path


class Caller:
    """Pickled as a call of any function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def mark(path: str) -> None:
    Path(path).write_text("this was run")


@pytest.mark.parametrize(
    "function", [eval, exec, print, getattr, __import__, pickle.loads, mark, io.open]
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_function_of_a_pickle_is_called(
    tmp_path: Path, function: Callable[..., object], protocol: int
) -> None:
    ran = tmp_path / "ran"
    argument = f"open({str(ran)!r}, 'w')" if function in (eval, exec) else str(ran)
    arguments = (argument, "w") if function is io.open else (argument,)
    data = pickle.dumps({"x": Caller(function, *arguments)}, protocol)
    with pytest.raises(ModelError, match=r"which no file of weights needs"):
        PickledFile(archive(tmp_path / "pytorch_model.bin", data))
    (tmp_path / "raw.bin").write_bytes(data)
    with pytest.raises(ModelError, match=r"raw\.bin is no whole file"):
        PickledFile(tmp_path / "raw.bin")
    assert not ran.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00echoo.",  # OBJ
        b"(S'echo'\nios\nsystem\n.",  # INST
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on ours
        b"\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00popoK\x01sb.",  # BUILD on a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x16FloatStorage.__class__\x93.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of gigabytes
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes of terabytes
        b"\x80\x05\x97.",  # a buffer out of band
        b"\x80\x02}.",
        b"\x80\x02K\x01.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"",
        b"PK",
    ],
)
def test_crafted_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    path = archive(tmp_path / "pytorch_model.bin", data)
    with contextlib.suppress(ModelError):  # or a file without tensors
        assert PickledFile(path).tensor_names() == []
    assert OrderedDict(a=1).pop("a") == 1


def state(tmp_path: Path, *tensor: object) -> PickledFile:
    """A file with one tensor: storage size, offset, shape and strides."""
    size, offset, shape, strides = tensor

    # Written by hand, as PyTorch's names cannot be pickled without PyTorch.
    def number(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number(size)
        + b"tQ"
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + number(shape)
    call += number(strides) + b"\x89}tR"
    data = b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."
    return PickledFile(archive(tmp_path / "pytorch_model.bin", data))


def test_a_tensor_by_hand_is_read(tmp_path: Path) -> None:
    file = state(tmp_path, 8, 1, (2, 3), (3, 1))
    assert file.float32("a").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert state(tmp_path, 8, 0, (2, 4), (1, 2)).float32("a").tolist() == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]


@pytest.mark.parametrize(
    "tensor",
    [
        (8, 0, (9,), (1,)),
        (8, 1, (8,), (1,)),
        (8, -1, (2,), (1,)),
        (8, 4, (2,), (-1,)),
        (8, 0, (-1,), (1,)),
        (2**40, 0, (2**40,), (1,)),
        (2**70, 0, (4,), (1,)),
        (8, 0, (2, 2), (1,)),
        (8, 0, (2**40, 1), (0, 1)),
        (8.0, 0, (2,), (1,)),
        (8, 0, ("2",), (1,)),
        (8, None, (2,), (1,)),
    ],
)
def test_a_tensor_outside_of_its_file_is_refused(tmp_path: Path, tensor: Any) -> None:
    file = state(tmp_path, *tensor)
    with pytest.raises(ModelError, match=r"^pytorch_model\.bin: tensor `a` is damaged"):
        file.float32("a")


@pytest.mark.parametrize("path", [REAL, LEGACY], ids=["zip", "legacy"])
def test_damaged_files_give_errors_of_the_tree(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    generator = np.random.default_rng(5)
    broken = tmp_path / "pytorch_model.bin"
    for round_number in range(300):
        damaged = bytearray(content)
        for place in generator.integers(0, len(damaged), 1 + round_number % 3):
            damaged[place] = generator.integers(0, 256)
        if round_number % 5 == 0:
            del damaged[int(generator.integers(0, len(damaged))) :]
        broken.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            file = PickledFile(broken)
            for name in file.tensor_names():
                file.float32(name)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "pytorch_model.bin", b"\x80\x02}.", zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="it is compressed"):
        PickledFile(path)


def test_safetensors_are_preferred_to_a_pickle(checkpoint: EditCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Caller(print, "this was run")))
    Registry(tmp_path / "models").add_model(str(folder), progress=print)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        Registry(tmp_path / "others").add_model(str(folder), progress=print)
