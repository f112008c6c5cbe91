"""Forms of store addresses, and opening of the store at an address."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fletcher.config.option import nearest
from fletcher.errors import ConfigError
from fletcher.net.address import FlightAddress
from fletcher.stores.base import Store
from fletcher.util.paths import check_local

FORMS = ("lance:PATH", "parquet:PATH", "grpc://HOST:PORT", "grpcs://HOST:PORT")
PROFILES = ("auto", "longbow", "fletcher")


@dataclass(frozen=True, slots=True)
class FlightStoreAddress:
    """Address of a Flight store.

    Attributes:
        text: The address as the user wrote it.
        data: Address of the port for rows and searches.
        meta: Address of the port for the dataset list. None: the port that the store's capabilities
            name, or else the port after that of `data`, as is Longbow's default.
        profile: `auto`, `longbow` or `fletcher`.
    """

    text: str
    data: FlightAddress
    meta: FlightAddress | None
    profile: str

    @classmethod
    def from_text(cls, text: str) -> FlightStoreAddress:
        """Parse `grpc://HOST:PORT?meta=PORT&profile=NAME`; both options may be left out.

        Raises:
            ConfigError: The address has another form.
        """
        try:
            data = FlightAddress.from_uri(text)
            options = dict(data.options)
            meta = int(options.pop("meta")) if "meta" in options else None
        except ValueError:
            raise _bad(text) from None
        profile = options.pop("profile", "auto")
        if options or (meta is not None and not 0 < meta < 65536):
            raise _bad(text)
        if profile not in PROFILES:
            raise ConfigError(
                f"`profile` is {profile[:200]!r} in the store's address, expected one of "
                f"{', '.join(PROFILES)}",
                field="store",
                allowed=PROFILES,
            )
        return cls(text, data, data.with_port(meta) if meta is not None else None, profile)

    @property
    def meta_uri(self) -> str:
        """URI of the port for the dataset list."""
        return (self.meta or self.data.with_port(self.data.port + 1)).uri


def open_store(
    address: str,
    *,
    timeout_s: float = 60.0,
    compression: str = "none",
    message_bytes: int = 2 << 20,
) -> Store:
    """Open the store at an address. A Flight store connects on first use.

    Args:
        address: One of FORMS.
        timeout_s: Deadline of one call to a Flight store. It must suffice for a group of rows. A
            shorter deadline detects a stalled store sooner.
        compression: Compression of rows sent to a Flight store; one of
            `fletcher.config.network.COMPRESSIONS`.
        message_bytes: Approximate size of a message to a Flight store. A client blocks after 4 to 7
            MiB that the server has not read, so 1 to 4 MiB keep the rows flowing.

    Raises:
        ConfigError: The address has another form.
        StoreError: The folder cannot be used, or LanceDB is not installed.
    """
    scheme, colon, _ = address.partition(":")
    folder = folder_of(address)
    if folder is not None:
        if scheme == "lance":
            from fletcher.stores.lance.store import LanceStore

            return LanceStore(folder)
        from fletcher.stores.parquet import ParquetStore

        return ParquetStore(folder)
    if colon and scheme in ("grpc", "grpcs"):
        from fletcher.stores.flight.connection import FlightConnection
        from fletcher.stores.flight.store import FlightStore

        return FlightStore(
            FlightConnection(
                FlightStoreAddress.from_text(address),
                timeout_s=timeout_s,
                compression=compression,
                message_bytes=message_bytes,
            )
        )
    raise _bad(address)


def folder_of(address: str) -> Path | None:
    """Folder of an embedded store; None for other addresses.

    Raises:
        ConfigError: The folder is a URI, such as `lance:s3://bucket/folder`.
    """
    scheme, _, rest = address.partition(":")
    embedded = rest and scheme in ("lance", "parquet")
    if embedded:
        check_local(rest, "store")
    return Path(rest).expanduser().absolute() if embedded else None


def _bad(address: str) -> ConfigError:
    scheme, colon, _ = address.partition(":")
    hint = ""
    if address.startswith(("/", "./", "../", "~")):
        hint = f"; for a folder, lance:{address[:200]}"
    elif colon and scheme in ("grpc", "grpcs"):
        hint = ", and after it at most ?meta=PORT&profile=auto, longbow or fletcher"
    elif scheme in ("lance", "parquet"):
        hint = f"; a folder is missing: {scheme}:./vectors"
    elif colon:
        hint = nearest(scheme, ("lance", "parquet", "grpc", "grpcs"))
    return ConfigError(
        f"`store` is {address[:200]!r}, expected {', '.join(FORMS[:-1])} or {FORMS[-1]}{hint}",
        field="store",
        allowed=FORMS,
    )
