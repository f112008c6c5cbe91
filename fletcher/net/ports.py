"""Whether a port can be listened on, asked before anything slow is loaded."""

from __future__ import annotations

import errno
import socket

from fletcher.errors import ConfigError


def check_port(host: str, port: int, *, field: str = "port") -> None:
    """Says that a port is in use at once; gRPC would say it later, and at length.

    Args:
        host: Address or name to listen on; one of IPv6 may have brackets.
        port: 0, which takes a free one, always passes.
        field: The option that the port came from, for the message.

    Raises:
        ConfigError: The port is taken, or the host is not this machine's.
    """
    if port == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = f"choose another `{field}`, 0 takes a free one"
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            remedy = "`host` is no address of this machine; 0.0.0.0 is all that it has"
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; {remedy}", field=field
        ) from None
