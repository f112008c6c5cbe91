"""Check of a server's port, for use before the slow part of a start."""

from __future__ import annotations

import errno
import socket

from fletcher.errors import ConfigError


def check_port(host: str, port: int, *, field: str = "port") -> None:
    """Raise an error if a server cannot listen on a port.

    gRPC would fail later and with a long message. An IPv6 `host` may have brackets. Port 0 stands
    for any free port, so it always passes. The error names the option `field`.

    Raises:
        ConfigError: The port is in use, or the host is not an address of this machine.
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
        remedy = f"choose another `{field}`, or 0 for a free one"
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            remedy = "`host` is not an address of this machine; 0.0.0.0 stands for all of them"
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; {remedy}", field=field
        ) from None
