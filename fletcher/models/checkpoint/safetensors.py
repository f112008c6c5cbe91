"""Reads safetensors files without copying: 8 bytes of length, a JSON header, raw data.

Format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fletcher.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: the upper half of a float32
}


class SafetensorsFile:
    """The tensors of one file, read when asked for.

    Raises:
        ModelError: The file is no safetensors file, is cut off, or its offsets lie outside it.
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
            except ValueError:
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

    def names(self) -> list[str]:
        return sorted(self._entries)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor as float32: a view of the file where it is stored so.

        Raises:
            ModelError: The entry is broken or its element type is no floating-point type.
        """
        try:
            entry = self._entries[name]
            kind, shape = str(entry["dtype"]), [int(size) for size in entry["shape"]]
            begin, end = (int(one) for one in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"its entry for tensor `{name}` is not valid") from None
        if kind not in _DTYPES:
            raise ModelError(
                f"tensor `{name}` of {self._name} has type {kind}, expected one of "
                f"{', '.join(_DTYPES)}; convert the checkpoint to float32",
                allowed=list(_DTYPES),
            )
        dtype = _DTYPES[kind]
        count = int(np.prod(shape, dtype=np.int64))
        fits = 0 <= begin <= end <= len(self._data) and end - begin == count * dtype.itemsize
        if not fits or min(shape, default=0) < 0:
            raise self._broken(f"tensor `{name}` does not lie inside the file")
        # A copy only where a tensor is not aligned, which writers of the format avoid.
        values = np.frombuffer(self._data[begin:end], dtype=dtype).reshape(shape)
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)

    def _broken(self, why: str) -> ModelError:
        return ModelError(f"{self._name} is not a whole safetensors file: {why}; get it again")
