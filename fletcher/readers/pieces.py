"""Streams whose bytes come in pieces of any size."""

from __future__ import annotations

import io
from typing import Any


class PieceStream(io.RawIOBase):
    """Base of streams whose bytes are made in pieces of any size."""

    _ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            piece = self._next_piece(len(buffer))
            if piece is None:
                return 0
            self._ready = memoryview(piece).cast("B")
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _next_piece(self, size: int) -> Any:
        """The next bytes, about `size` of them; None at the end."""
        raise NotImplementedError
