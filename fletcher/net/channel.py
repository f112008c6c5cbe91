"""Connections to Flight servers, with gRPC's channel options."""

from __future__ import annotations

from typing import Any

from pyarrow import flight

# https://grpc.github.io/grpc/core/group__grpc__arg__keys.html
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # By default a channel whose connection was refused waits up to two minutes before it connects
    # again. Until then all calls fail, even if the server is available again.
    # https://github.com/grpc/grpc/blob/master/doc/connection-backoff.md
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def connect(uri: str, **credentials: Any) -> flight.FlightClient:
    """A Flight client for the server at `uri`; gRPC connects on the first call.

    `uri` has the form of `FlightAddress.uri`. Credentials are `tls_root_certs`, `cert_chain` and
    `private_key`, each as PEM bytes or None.

    Raises:
        pyarrow.ArrowException: The address cannot be resolved, or a certificate is malformed.
    """
    return flight.FlightClient(uri, generic_options=CHANNEL_OPTIONS, **credentials)
