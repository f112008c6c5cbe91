"""Options of the network: address, tokens, TLS and compression of answers."""

# ruff: noqa: RUF009  (`option` makes a dataclass field, no default value)

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from fletcher.config.option import OptionGroup, option
from fletcher.errors import ConfigError

# Compression of Arrow's IPC bodies. The options of the client and of stores have the same values.
COMPRESSIONS = ("none", "lz4", "zstd", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig(OptionGroup):
    """Address of the server, access to it, and compression of its answers.

    Attributes:
        host: Address to listen on. 0.0.0.0 accepts calls from other machines, and needs
            --token-file or --insecure.
        port: TCP port. 0 picks a free port, which the server prints.
        token_file: File of bearer tokens, one per line. Without it every caller is accepted.
        tls_cert: PEM certificate; needs --tls-key. Calls are then encrypted, which costs some CPU
            time.
        tls_key: PEM private key of --tls-cert.
        tls_client_ca: PEM certificate of an authority (CA). Callers must then show a certificate
            that this authority signed.
        insecure: Accept calls from other machines without tokens. Anyone who reaches --host may
            call.
        compression: Compression of the answers, which hold vectors. auto measures each caller's
            connection. none suits most uses, because vectors shrink little. Texts in the answers
            shrink more.
    """

    host: str = option("127.0.0.1")
    port: int = option(8815, maximum=65535)
    token_file: Path | None = option(None)
    tls_cert: Path | None = option(None)
    tls_key: Path | None = option(None)
    tls_client_ca: Path | None = option(None)
    insecure: bool = option(False)
    compression: str = option("none", choices=COMPRESSIONS)

    def _check_together(self) -> None:
        if not (self.insecure or self.token_file or is_loopback(self.host)):
            raise ConfigError(
                f"`host` is {self.host!r}, which other machines can reach, without a "
                "`token_file`; give --token-file, or --insecure to accept every caller",
                field="host",
                allowed=["127.0.0.1", "::1", "localhost"],
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            there, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ConfigError(f"`{there}` needs `{missing}` with it", field=missing)
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("`tls_client_ca` needs `tls_cert` and `tls_key`", field="tls_cert")
        for name in ("token_file", "tls_cert", "tls_key", "tls_client_ca"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"`{name}` is {str(path)!r}, which is not a file", field=name)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
