"""A Flight server that ends calls with any gRPC status; pyarrow's server offers only some."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc


class Refusals(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Has no dataset, and answers calls that do not ask for one with `status` and `text`."""

    def __init__(self, status: grpc.StatusCode, text: str) -> None:
        self._status = status
        self._text = text
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self,))
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def __enter__(self) -> Refusals:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(5)

    def service(self, details: Any) -> Any:
        def answer(_: Any, context: Any) -> Iterator[bytes]:
            if details.method.endswith("DoGet"):
                context.abort(grpc.StatusCode.NOT_FOUND, "dataset d not found")
            if not details.method.endswith("ListFlights"):
                context.abort(self._status, self._text)
            return iter(())

        kind = (
            grpc.unary_stream_rpc_method_handler
            if details.method.endswith(("ListFlights", "DoGet", "DoAction"))
            else grpc.stream_stream_rpc_method_handler
        )
        return kind(answer)
