"""Tensors of pytorch_model.bin, read without running anything of the file.

A pickle is a program: it names functions and calls them. Here, two checks keep it from doing so.
First, every opcode is looked at before any is executed, so that only those of plain data pass, and
none can ask for more memory than the file has bytes. Then the names that PyTorch writes stand for
objects of this module that only note their arguments. Any other name is an error.

PyTorch writes two formats (https://pytorch.org/docs/stable/notes/serialization.html): an
uncompressed zip archive since release 1.6, and several pickles followed by raw data before that.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fletcher.errors import ModelError
from fletcher.models.bundle.files import damage_named

_MAX_PICKLE_BYTES = 100_000_000
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# Element types by the storage classes that PyTorch names. bfloat16 is the upper half of a float32.
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2
    LONG LONG1 LONG4 BINFLOAT FLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT
    MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""


class _Storage(NamedTuple):
    """Raw data: its key, PyTorch's name of its type, and its size in elements."""

    key: str
    kind: str
    size: int


class _Tensor(NamedTuple):
    """A tensor inside a storage; shape and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Kind(str):
    """Name of a storage class."""

    __slots__ = ()


class _Rebuilt:
    """Stands for the functions of `torch._utils` that make a tensor."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, first: Any, *rest: Any) -> Any:
        if self._name == "_rebuild_parameter":
            return first
        offset, shape, strides = rest[:3]
        return _Tensor(first, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Unpickler that knows no functions and classes but those of plain tensors.

    Attributes:
        kinds: Kinds of the storages that were read, by their keys.
    """

    kinds: dict[str, str]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _Kind(name)
        rebuilds = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
        if module == "torch._utils" and name in rebuilds:
            return _Rebuilt(name)
        raise ModelError(
            f"it names {module[:100]}.{name[:100]}, which no file of weights needs: do not use it"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, size, *view = pid
        if tag != "storage" or not isinstance(kind, _Kind) or any(one is not None for one in view):
            raise ValueError("a storage has an unknown form")
        self.kinds[str(key)] = str(kind)
        return _Storage(str(key), str(kind), size)


class PickledFile:
    """The tensors of one file that `torch.save` wrote, mapped and read on demand.

    Raises:
        ModelError: The file has another format, is damaged, or names code to run.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._path = path
        self._offsets: dict[str, int] = {}
        try:
            with damage_named(path.name), path.open("rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                found = self._read(file)
        except (ModelError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError) as error:
            reason = error.message if isinstance(error, ModelError) else str(error)
            if not reason.startswith(path.name):
                reason = f"{path.name} is no whole file of PyTorch weights: {reason[:300]}"
            raise ModelError(
                f"{reason}; a model.safetensors is read instead, if there is one"
            ) from error
        self._tensors = {
            str(name): tensor for name, tensor in found.items() if isinstance(tensor, _Tensor)
        }

    def tensor_names(self) -> list[str]:
        return sorted(self._tensors)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, before any check."""
        return self._tensors[name].shape

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """Read one tensor as float32; a contiguous float32 tensor is a view of the file.

        Raises:
            ModelError: The tensor points outside of the file, or is not a floating-point tensor.
        """
        tensor = self._tensors[name]
        kind = tensor.storage.kind
        dtype = np.dtype(_STORAGES[kind])
        if dtype.kind != "f" and kind != "BFloat16Storage":
            raise ModelError(
                f"tensor `{name}` of {self._name} is a {kind}, expected a floating-point type; "
                "convert the checkpoint to float32"
            )
        with damage_named(f"{self._name}: tensor `{name}`"):
            values = self._values(tensor, dtype)
            if kind == "BFloat16Storage":
                return (values.astype(np.uint32) << 16).view(np.float32)
            with np.errstate(over="ignore"):  # `Weights` refuses infinity
                return values.astype(np.float32, copy=False)

    def _values(self, tensor: _Tensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        storage, offset, shape, strides = tensor
        numbers = (storage.size, offset, *shape, *strides)
        if not all(type(one) is int and one >= 0 for one in numbers) or len(shape) != len(strides):
            raise ValueError("its shape is invalid")
        if 0 in shape:
            return np.empty(shape, dtype)
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        start = self._offsets[storage.key]
        end = start + storage.size * dtype.itemsize
        if last >= storage.size or end > self._size or math.prod(shape) > storage.size:
            raise ValueError("it does not lie inside the file")
        # Mapped for the reasons given in `SafetensorsFile`.
        data = np.memmap(self._path, dtype=np.uint8, mode="r", offset=start, shape=(end - start,))
        flat = np.frombuffer(data, dtype=dtype)[offset:]
        steps = tuple(stride * dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

    def _read(self, file: IO[bytes]) -> Mapping[Any, Any]:
        start = file.read(2)
        file.seek(0)
        found = self._read_archive(file) if start == b"PK" else self._read_legacy(file)
        if not isinstance(found, dict):
            raise ModelError("it holds no tensors by name")
        inner = found.get("state_dict", found)
        return inner if isinstance(inner, dict) else found

    def _read_archive(self, file: IO[bytes]) -> Any:
        archive = zipfile.ZipFile(file)
        entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
        if any(one.compress_type != zipfile.ZIP_STORED for one in entries.values()):
            raise ModelError("it is compressed")
        order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        if order != b"little":
            raise ModelError("its numbers are not little-endian")
        main = entries["data.pkl"]
        if main.file_size > _MAX_PICKLE_BYTES:
            raise ModelError("its list of tensors is too long")
        for name, entry in entries.items():
            if name.startswith("data/"):
                file.seek(entry.header_offset + 26)  # the lengths of the local header's last fields
                lengths = np.frombuffer(file.read(4), "<u2")
                place = entry.header_offset + 30 + int(lengths.sum())
                self._offsets[name.removeprefix("data/")] = place
        return _load(io.BytesIO(archive.read(main)), main.file_size)

    def _read_legacy(self, file: IO[bytes]) -> Any:
        # In memory, where reading more than there is allocates nothing.
        head = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
        if _load(head, self._size) != _MAGIC or _load(head, self._size) != _PROTOCOL:
            raise ModelError("it does not begin like a file of torch.save")
        system = _load(head, self._size)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ModelError("its numbers are not little-endian")
        kinds: dict[str, str] = {}
        found, keys = _load(head, self._size, kinds), _load(head, self._size)
        file.seek(head.tell())
        for key in keys:
            size = int.from_bytes(file.read(8), "little")
            self._offsets[str(key)] = file.tell()
            file.seek(size * np.dtype(_STORAGES[kinds[str(key)]]).itemsize, os.SEEK_CUR)
        return found


def _load(file: io.BytesIO, limit: int, kinds: dict[str, str] | None = None) -> Any:
    """Load one pickle; add the kinds of its storages, by key, to `kinds`."""
    start, allowed = file.tell(), set(_OPCODES.split())
    for opcode, argument, place in pickletools.genops(file):
        if opcode.name not in allowed:
            raise ModelError(f"it has the opcode {opcode.name}, which no file of weights needs")
        if "PUT" in opcode.name and not 0 <= int(argument or 0) <= limit:
            raise ModelError("it asks for more memory than its size")
        if (place or 0) - start > _MAX_PICKLE_BYTES:
            raise ModelError("its list of tensors is too long")
    end = file.tell()
    file.seek(start)
    data = io.BytesIO(file.read(end - start))
    unpickler = _Unpickler(data, encoding="utf-8")
    unpickler.kinds = {} if kinds is None else kinds
    return unpickler.load()
