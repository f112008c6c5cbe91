"""The server that a command uses: a remote one, or one in this process."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli.command_line import Choice, Decorator, combine, option
from fletcher.cli.options import ConfigFlags, config_options
from fletcher.cli.shutdown import EXIT_INTERRUPTED, leave_in_time, leave_soon
from fletcher.cli.terminal import say
from fletcher.config.network import COMPRESSIONS
from fletcher.config.server import ServeConfig
from fletcher.errors import ConfigError, UnauthenticatedError
from fletcher.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from fletcher.client import Client

# Flags of every command that can embed in its own process.
LOCAL_FLAGS = ("device", "backend", "precision", "threads", "home", "log_level")
# Flags that are refused with --server: the remote server has its own values for them.
_SERVERS_OWN = {"device", "backend", "precision", "threads", "allow_undeclared", "int8"}
# Options that a server in this process also takes from the environment and the TOML file.
LOCAL_OPTIONS = (
    *LOCAL_FLAGS,
    *("model", "store", "tokenizer_workers", "max_batch_tokens", "allow_undeclared", "int8"),
    *("max_queue_delay_ms", "group_rows", "group_delay_ms", "store_timeout", "store_compression"),
    *("store_retry", "max_memory", "max_message_bytes", "max_row_bytes", "log_format"),
    "otlp_endpoint",
)
ELSEWHERE = "A server elsewhere"
_LOCAL_TEXT = {
    "model": "Model that embeds the texts.",
    "threads": "CPU cores for the model, 0: all.",
    "log_level": "Least severe level of the log on standard error. Default here: warning.",
}


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """Address of a remote server, grpc://HOST:PORT or grpc+tls://HOST:PORT."""

    uri: str
    token_file: Path | None = None
    tls_ca: Path | None = None

    def __post_init__(self) -> None:
        from fletcher.net.address import parse_address

        parse_address(self.uri, field="server")

    def connect(self, compression: str | None = None, max_retries: int | None = None) -> Client:
        """Connect a client, which the caller must close.

        A parameter that is None takes the client's default. Raises FletcherError if the server
        cannot be reached or refuses the token.
        """
        from fletcher.client import TlsOptions, TransferOptions, connect

        transfer = None if max_retries is None else TransferOptions(max_retries=max_retries)
        token = _read_token(self.token_file) if self.token_file else None
        tls = TlsOptions(ca=self.tls_ca) if self.tls_ca else None
        try:
            return connect(
                self.uri, token=token, tls=tls, transfer=transfer, compression=compression
            )
        except UnauthenticatedError as error:
            reason = "the token is not valid; check" if token else "it asks for a token; give"
            raise UnauthenticatedError(
                f"{self.uri} refuses the call: {reason} --token-file"
            ) from error


@dataclass(frozen=True, slots=True)
class EmbedTarget:
    """The server that embeds: the remote `server`, or one in this process if None."""

    server: RemoteServer | None
    compression: str
    flags: ConfigFlags

    @property
    def asked_model(self) -> str | None:
        """`--model` for a remote server; None: its default model, or no remote server."""
        return self.flags.given.get("model") if self.server else None

    def resolve(self, *, own_store: bool = False, **flags: Any) -> ServeConfig:
        """Configuration of a server in this process; logging is set up with it.

        With `own_store`, this process opens the store even if a remote server embeds. The store
        must then be given, as the default store is hardly the one that the remote server writes to.
        `flags` replace given flags: texts by option name. Raises ConfigError.
        """
        resolved = self.flags.resolve(LOCAL_OPTIONS, **flags)
        config = resolved.config
        if own_store and self.server and "store" not in resolved.sources:
            raise ConfigError(
                "`store` is missing: with --server the query is embedded there, but this command "
                "reads the rows itself; give the store that the server writes to, --store "
                "lance:PATH or grpc://HOST:PORT",
                field="store",
            )
        if "log_level" not in resolved.sources:
            # A server's ordinary log lines would disturb a command's output.
            config = config.with_options(log_level="warning")
        set_up_logging(config.telemetry.log_level, config.telemetry.log_format)
        return config

    @contextlib.contextmanager
    def open_client(
        self, config: ServeConfig, *, max_retries: int | None = None
    ) -> Iterator[Client]:
        """Context manager of a client of the remote server, or of one in this process.

        A server in this process runs until the context ends. `config` applies to a server in this
        process. `max_retries` applies to uploads; without it, uploads to a server in this process
        are not retried. Raises FletcherError if the server cannot be reached or started.
        """
        if self.server:
            self.refuse_local_flags()
            with self.server.connect(self.compression, max_retries) as client:
                yield client
            return
        from fletcher.client import TransferOptions, connect
        from fletcher.runtime import Runtime

        leave_in_time()
        # Any program on this machine can reach the port; only this process knows the token.
        token = secrets.token_urlsafe()
        private = config.with_options(
            host="127.0.0.1",
            port=0,
            max_journal=0,  # no journal: rows are acknowledged when stored
            # An engine in the server's own process would speed up only single short texts.
            isolate_engine=True,
        )
        with (
            Runtime(private, progress=say, own_token=token) as runtime,
            # The server retries writes to a failing store itself, for --store-retry. It does not
            # retry the opening of an upload.
            connect(
                runtime.address, token=token, transfer=TransferOptions(max_retries=max_retries or 0)
            ) as client,
        ):
            try:
                yield client
            except KeyboardInterrupt:
                leave_soon(EXIT_INTERRUPTED)
                raise

    def refuse_local_flags(self) -> None:
        """Raise ConfigError for a given flag that a remote server sets itself."""
        for name in sorted(self.flags.given.keys() & _SERVERS_OWN):
            raise ConfigError(
                f"`{name}` has no meaning with --server, which has its own; leave one out",
                field=name,
            )


def server_options(*, required: bool = False) -> Decorator:
    """Add the flags of a remote server.

    The command gets them as the parameter `server`: a RemoteServer, or None without --server.
    """

    def collect(params: dict[str, Any]) -> None:
        address = [params.pop(name) for name in ("server", "token_file", "tls_ca")]
        params["server"] = RemoteServer(*address) if address[0] else None

    local = " Without it a server in this process does, which loads the model first."
    add = functools.partial(option, heading=ELSEWHERE)
    return combine(
        add(
            "--server URI",
            required=required,
            help="Server that does the work, grpc://HOST:PORT or grpc+tls://HOST:PORT."
            + ("" if required else local),
        ),
        add("--token-file FILE", help="File with the server's bearer token."),
        add(
            "--tls-ca FILE",
            help="PEM CA of the server's certificate, if it is not one that the system trusts.",
        ),
        collect=collect,
    )


def target_options(*names: str, **text: str) -> Decorator:
    """Add the flags of a remote server and of one in this process.

    The command gets them as the parameter `target`: an EmbedTarget. A server in this process has
    flags for LOCAL_FLAGS and for the server options `names`. `text` holds help texts by option
    name, which replace those of the options.
    """

    def collect(params: dict[str, Any]) -> None:
        params["target"] = EmbedTarget(
            params.pop("server"), params.pop("compression"), params.pop("flags")
        )

    return combine(
        server_options(),
        option(
            "--compression",
            type=Choice(COMPRESSIONS),
            default="auto",
            heading=ELSEWHERE,
            help="Compression of what is sent there. auto measures the text and the connection.",
        ),
        config_options(*names, *LOCAL_FLAGS, text={**_LOCAL_TEXT, **text}),
        collect=collect,
    )


def _read_token(path: Path) -> str:
    try:
        words = path.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"`token_file` is {str(path)!r}, which cannot be read: {reason}", field="token_file"
        ) from None
    if not words:
        raise ConfigError(
            f"`token_file` {str(path)!r} holds no token; write one into it", field="token_file"
        )
    return words[0]
