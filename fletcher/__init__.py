"""Python API of Fletcher: embed text over Arrow Flight, or store its vectors.

    with fletcher.connect("grpc://127.0.0.1:8815") as client:
        vectors = client.embed(["a text", "another"])
        summary = client.put(table, "articles")

The public names are those in `__all__`. A name's module is imported when the name is first used.
docs/python.md is the guide to this API.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fletcher.client import (
        Ack,
        Chunk,
        Client,
        DocumentStream,
        Exchange,
        PutSummary,
        RowError,
        TlsOptions,
        TransferOptions,
        connect,
        dequantize,
        rescore,
    )
    from fletcher.core.command import EmbedCommand
    from fletcher.errors import (
        BatchTooLargeError,
        CancelledError,
        ColumnTypeError,
        DeadlineExceededError,
        DimensionMismatchError,
        DrainingError,
        FletcherError,
        InternalError,
        InvalidCommandError,
        InvalidUtf8Error,
        JournalFullError,
        ModelMismatchError,
        NotFiniteError,
        OverloadedError,
        RequestError,
        RowTooLargeError,
        StoreUnavailableError,
        UnauthenticatedError,
        UnauthorizedError,
        UnavailableError,
        UnknownColumnError,
        UnknownDatasetError,
        UnknownFieldError,
        UnknownModelError,
        UploadConflictError,
    )
    from fletcher.readers import TextSource, open_source

    __version__: str

__all__ = [
    "Ack",
    "BatchTooLargeError",
    "CancelledError",
    "Chunk",
    "Client",
    "ColumnTypeError",
    "DeadlineExceededError",
    "DimensionMismatchError",
    "DocumentStream",
    "DrainingError",
    "EmbedCommand",
    "Exchange",
    "FletcherError",
    "InternalError",
    "InvalidCommandError",
    "InvalidUtf8Error",
    "JournalFullError",
    "ModelMismatchError",
    "NotFiniteError",
    "OverloadedError",
    "PutSummary",
    "RequestError",
    "RowError",
    "RowTooLargeError",
    "StoreUnavailableError",
    "TextSource",
    "TlsOptions",
    "TransferOptions",
    "UnauthenticatedError",
    "UnauthorizedError",
    "UnavailableError",
    "UnknownColumnError",
    "UnknownDatasetError",
    "UnknownFieldError",
    "UnknownModelError",
    "UploadConflictError",
    "__version__",
    "connect",
    "dequantize",
    "open_source",
    "rescore",
]

_MODULES = {
    "EmbedCommand": "fletcher.core.command",
    **dict.fromkeys(("TextSource", "open_source"), "fletcher.readers"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "fletcher.errors"),
    "RowError": "fletcher.client",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("longbow-fletcher")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "fletcher.client")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
