"""The Flight client library: `connect`, and the types of its calls."""

from __future__ import annotations

from fletcher.client.client import Client, connect
from fletcher.client.connection import TlsOptions, TransferOptions
from fletcher.client.exchange import Exchange
from fletcher.client.messages import Ack, PutSummary, RowError
from fletcher.client.quantized import dequantize, rescore
from fletcher.client.stream import Chunk, DocumentStream

__all__ = [
    "Ack",
    "Chunk",
    "Client",
    "DocumentStream",
    "Exchange",
    "PutSummary",
    "RowError",
    "TlsOptions",
    "TransferOptions",
    "connect",
    "dequantize",
    "rescore",
]
