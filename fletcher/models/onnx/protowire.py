"""Protobuf's wire format, as much of it as reading and writing ONNX files takes.

Writing ONNX by hand keeps the `onnx` package out of an installation; the encoding is documented at
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_MAX_VARINT_BYTES = 10


class WireError(ValueError):
    """The bytes are no protobuf message."""


def varint(value: int) -> bytes:
    """An integer as 1 to 10 bytes; negative ones as two's complement of 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def int_field(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value)


def float_field(number: int, value: float) -> bytes:
    return varint(number << 3 | FIXED32) + struct.pack("<f", value)


def bytes_field(number: int, value: bytes | str) -> bytes:
    """A string, bytes or an embedded message."""
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | BYTES) + varint(len(data)) + data


class WireMessage:
    """One message, taken apart one level deep; its bytes are views, so large tensors cost nothing.

    Raises:
        WireError: The bytes end early or hold something that protobuf does not write.
    """

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def messages(self, number: int) -> list[WireMessage]:
        """The messages of a field, in their order."""
        return [WireMessage(one) for one in self._bytes(number)]

    def text(self, number: int) -> str:
        """A string field; empty where it is not set."""
        values = self._bytes(number)
        try:
            return bytes(values[-1]).decode() if values else ""
        except UnicodeDecodeError:
            raise WireError(f"field {number} is no text") from None

    def number(self, number: int) -> int:
        """An integer field; 0 where it is not set."""
        value = self._fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise WireError(f"field {number} is no number")
        return value

    def numbers(self, number: int) -> list[int]:
        """A repeated integer field, written one by one as `int_field` does."""
        values = self._fields.get(number, [])
        found = [one for one in values if isinstance(one, int)]
        if len(found) != len(values):
            raise WireError(f"field {number} is no list of numbers")
        return found

    def float32(self, number: int) -> float:
        """A float field; 0 where it is not set."""
        values = self._bytes(number)
        if values and len(values[-1]) != 4:
            raise WireError(f"field {number} is no float")
        return float(struct.unpack("<f", values[-1])[0]) if values else 0.0

    def data(self, number: int) -> memoryview:
        """A bytes field; empty where it is not set."""
        values = self._bytes(number)
        return values[-1] if values else memoryview(b"")

    def _bytes(self, number: int) -> list[memoryview]:
        values = self._fields.get(number, [])
        found = [one for one in values if isinstance(one, memoryview)]
        if len(found) != len(values):
            raise WireError(f"field {number} is no text and no message")
        return found


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position, end = 0, len(data)
    while position < end:
        tag, position = _read_varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, position = _read_varint(data, position)
            yield number, value
            continue
        if kind == BYTES:
            size, position = _read_varint(data, position)
        elif kind == FIXED32:
            size = 4
        elif kind == FIXED64:
            size = 8
        else:
            raise WireError(f"wire type {kind} at byte {position}")
        if number == 0 or position + size > end:
            raise WireError(f"field {number} at byte {position} is cut off")
        yield number, data[position : position + size]
        position += size


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise WireError(f"the number at byte {position} is cut off")
