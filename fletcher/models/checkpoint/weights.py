"""Weights of a checkpoint, mapped from one or several files.

The `safetensors` package is not used, because it cannot read bfloat16 into NumPy arrays. A file has
8 bytes with the header's length, a JSON header and raw data:
https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.errors import ModelError
from fletcher.models.bundle.files import is_inside, read_json
from fletcher.models.checkpoint.pickled import PickledFile

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # NumPy has no bfloat16, which is the upper half of a float32
}


class Weights:
    """All tensors of a checkpoint under canonical names, from one or several files.

    Prefixes such as `bert.` are removed from names. TensorFlow's name `gamma` becomes `weight`, and
    `beta` becomes `bias`.
    """

    def __init__(self, folder: Path, prefixes: Iterable[str]) -> None:
        self._places: dict[str, tuple[SafetensorsFile | PickledFile, str]] = {}
        self._digests: dict[str, str] = {}
        for file in _weight_files(folder):
            is_pickled = file.endswith(".bin")
            tensors = (PickledFile if is_pickled else SafetensorsFile)(folder / file)
            for stored in tensors.tensor_names():
                self._places[_canonical(stored, prefixes)] = (tensors, stored)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor called `name`."""
        return name in self._places

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelError if its entry is damaged."""
        file, stored = self._places[name]
        return file.tensor_shape(stored)

    def tensor_names(self) -> list[str]:
        """Sorted names of all tensors."""
        return sorted(self._places)

    def unread(self) -> list[str]:
        """Sorted names of the tensors that were not read yet."""
        return sorted(self._places.keys() - self._digests.keys())

    def read_tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Read a tensor as float32; check that it has the given shape.

        Raises:
            ModelError: The tensor is missing, has another shape, or holds NaN or infinity.
        """
        if name not in self._places:
            raise ModelError(
                f"the checkpoint has no tensor `{name}`; check that `model_type` in config.json is "
                "the model's"
            )
        file, stored = self._places[name]
        if (found := file.tensor_shape(stored)) != shape:
            raise ModelError(
                f"tensor `{stored}` has shape {str(list(found))[:200]}, config.json asks for "
                f"{list(shape)}"
            )
        tensor = file.float32(stored)
        if name not in self._digests:
            if not np.isfinite(tensor).all():
                raise ModelError(
                    f"tensor `{stored}` holds NaN or infinity; get the checkpoint again"
                )
            digest = hashlib.sha256(np.ascontiguousarray(tensor).data.cast("B")).hexdigest()
            self._digests[name] = digest
        return tensor

    def digest(self, architecture: Mapping[str, Any]) -> str:
        """SHA-256 over all tensors read so far and over `architecture`.

        `architecture` has the numbers that define how the tensors are used.
        """
        parts = json.dumps([self._digests, architecture], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


class SafetensorsFile:
    """The tensors of one safetensors file, mapped and read on demand.

    Mapped, because a large model need not fit into memory. If somebody cuts the file meanwhile, a
    signal ends `fletcher model add`, which has added nothing by then.

    Raises:
        ModelError: The file is not a safetensors file, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise self._broken("its header is cut off")
            try:
                header = json.loads(file.read(length))
            except (ValueError, RecursionError):
                raise self._broken("its header is no JSON") from None
        if not isinstance(header, dict):
            raise self._broken("its header is no JSON object")
        header.pop("__metadata__", None)
        self._entries: Mapping[str, Any] = header
        self._data = (
            np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
            if (size > 8 + length)
            else np.empty(0, np.uint8)
        )

    def tensor_names(self) -> list[str]:
        return sorted(self._entries)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelError if its entry in the header is damaged."""
        return self._entry(name)[1]

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """Read one tensor as float32; a tensor stored as float32 is a view of the file.

        Raises:
            ModelError: The tensor's entry in the header is damaged or points outside of the file,
                or its element type is not a supported floating-point type.
        """
        kind, shape, begin, end = self._entry(name)
        if kind not in _DTYPES:
            raise ModelError(
                f"tensor `{name}` of {self._name} has type {kind}, expected one of "
                f"{', '.join(_DTYPES)}; convert the checkpoint to float32",
                allowed=list(_DTYPES),
            )
        dtype = _DTYPES[kind]
        count = math.prod(shape)
        fits = 0 <= begin <= end <= len(self._data) and end - begin == count * dtype.itemsize
        if not fits or min(shape, default=0) < 0:
            raise self._broken(f"tensor `{name}` does not lie inside the file")
        # This copies only unaligned tensors, which writers of the format avoid.
        values = np.frombuffer(self._data[begin:end], dtype=dtype).reshape(shape)
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # `Weights` refuses infinity
            return values.astype(np.float32, copy=False)

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """Element type, shape, and first and end byte of a tensor."""
        try:
            entry = self._entries[name]
            kind, shape = str(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"its entry for tensor `{name}` is invalid") from None
        if not all(type(one) is int for one in (*shape, begin, end)):
            raise self._broken(f"its entry for tensor `{name}` is invalid")
        return kind, shape, begin, end

    def _broken(self, why: str) -> ModelError:
        return ModelError(f"{self._name} is not a whole safetensors file: {why}; get it again")


def _weight_files(folder: Path) -> list[str]:
    """Names of the files with the weights; safetensors are preferred to pickles."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return [file]
        index = folder / f"{file}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(type(one) is str for one in places.values()):
                raise ModelError(f"{index.name}: `weight_map` is missing or no object of names")
            names = sorted(set(places.values()))
            for name in names:
                inside = is_inside(name) and name.endswith(Path(file).suffix)
                if not inside or not (folder / name).is_file():
                    raise ModelError(
                        f"{index.name} names {name[:200]}, which is missing; get it again"
                    )
            return names
    raise ModelError(
        f"{folder.name or 'the checkpoint'} has neither model.safetensors nor pytorch_model.bin; "
        "convert weights in another format once with transformers' save_pretrained"
    )


def _canonical(name: str, prefixes: Iterable[str]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}{ {'gamma': 'weight', 'beta': 'bias'}.get(last, last) }"
