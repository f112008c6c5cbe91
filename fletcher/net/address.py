"""Addresses of Flight servers: `grpc[s]://HOST:PORT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, urlsplit

from fletcher.errors import InvalidCommandError

# Accepted schemes, and whether a connection with the scheme is encrypted.
SCHEMES = {"grpc": False, "grpc+tcp": False, "grpcs": True, "grpc+tls": True}


@dataclass(frozen=True, slots=True)
class FlightAddress:
    """Host, port and encryption of a Flight server."""

    host: str  # name or IP address; IPv6 without brackets
    port: int
    encrypted: bool = False
    options: Mapping[str, str] = field(default_factory=dict)  # parameters after the `?`

    @property
    def uri(self) -> str:
        """The address in the form for pyarrow and gRPC, without options."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'grpc+tls' if self.encrypted else 'grpc'}://{host}:{self.port}"

    def with_port(self, port: int) -> FlightAddress:
        """The same host and encryption on another port."""
        return replace(self, port=port, options={})

    @classmethod
    def from_uri(cls, uri: str) -> FlightAddress:
        """Parse an address.

        Raises:
            ValueError: The address has an unknown scheme, no host, no port, a path, a user, a
                fragment, or a repeated or malformed option.
        """
        parts = urlsplit(uri)
        encrypted = SCHEMES.get(parts.scheme)
        fields = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        options = dict(fields)
        extra = parts.path.strip("/") or parts.username is not None or parts.fragment
        repeated = len(options) != len(fields)
        if encrypted is None or not parts.hostname or not parts.port or extra or repeated:
            raise ValueError(uri)
        return cls(parts.hostname, parts.port, encrypted, options)


def parse_address(uri: str, *, field: str = "uri") -> FlightAddress:
    """Parse the address of a server, which must not have options.

    The error names `field`, the option or argument that holds the address.

    Raises:
        InvalidCommandError: The text is not the address of a Flight server.
    """
    address = _without_options(uri)
    if address is None:
        meant = f"grpc://{uri}"
        is_near = "://" not in uri and _without_options(meant)
        hint = f"; did you mean {meant[:200]}?" if is_near else ""
        raise InvalidCommandError(
            f"`{field}` is {uri[:200]!r}, expected grpc://HOST:PORT or grpc+tls://HOST:PORT{hint}",
            field=field,
            allowed=sorted(f"{scheme}://HOST:PORT" for scheme in SCHEMES),
        )
    return address


def _without_options(uri: str) -> FlightAddress | None:
    try:
        address = FlightAddress.from_uri(uri)
    except ValueError:
        return None
    return None if address.options else address
