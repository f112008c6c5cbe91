"""Where a command's embeddings come from: a server elsewhere, or the same one in this process."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli.parser import add_options, given_flags, read_config
from fletcher.cli.shutdown import leave_in_time
from fletcher.cli.terminal import say
from fletcher.config.delivery import NO_STORE
from fletcher.config.network import COMPRESSIONS
from fletcher.config.server import ServeConfig
from fletcher.errors import ConfigError, UnauthenticatedError
from fletcher.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from fletcher.client import Client

# Flags of every command that can embed in its own process.
LOCAL_FLAGS = ("device", "backend", "precision", "threads", "home", "log_level")
# Of these and others, those that a server elsewhere has decided.
_SERVERS_OWN = {"device", "backend", "precision", "threads", "allow_undeclared", "int8"}
# What such a process takes from the environment and the file: all but the network's options.
LOCAL_OPTIONS = (
    *LOCAL_FLAGS,
    "model",
    "store",
    "tokenizer_workers",
    "max_batch_tokens",
    "allow_undeclared",
    "int8",
    "max_queue_delay_ms",
    "group_rows",
    "group_delay_ms",
    "store_timeout",
    "store_compression",
    "store_retry",
    "max_memory",
    "max_message_bytes",
    "max_row_bytes",
    "log_format",
    "otlp_endpoint",
)


def add_connection(parser: argparse.ArgumentParser, options: Sequence[str] = ()) -> None:
    """Adds the flags of a server elsewhere and those of one in this process.

    Args:
        options: Options of ServeConfig that get a flag besides LOCAL_FLAGS.
    """
    add_server(parser).add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default="auto",
        help="of what is sent there; auto measures the text and the connection (default: auto)",
    )
    add_options(parser, (*options, *LOCAL_FLAGS))


def add_server(parser: argparse.ArgumentParser, *, required: bool = False) -> Any:
    """Adds the flags of a server elsewhere alone, and gives their group."""
    group = parser.add_argument_group("a server elsewhere")
    group.add_argument(
        "--server",
        metavar="URI",
        required=required,
        help="grpc://HOST:PORT, or grpc+tls://HOST:PORT",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the server's bearer token"
    )
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM CA of the server's certificate"
    )
    return group


def local_config(args: argparse.Namespace, *, own_store: bool = False, **flags: Any) -> ServeConfig:
    """The configuration of a server in this process, and logging as it says.

    Args:
        own_store: This process opens the store even where a server elsewhere embeds; the default
            one is hardly that server's.
        flags: Texts of options, by name, in place of flags.

    Raises:
        ConfigError: As `fletcher.config.server.resolve`.
    """
    resolved = read_config(args, os.environ, LOCAL_OPTIONS, **flags)
    config = resolved.config
    if own_store and args.server and "store" not in resolved.sources:
        raise ConfigError(
            "`store` is missing: --server has the query's vector made there, and the rows are "
            "looked for in a store that this command opens itself; give the one that the server "
            "writes to, --store lance:PATH or grpc://HOST:PORT",
            field="store",
        )
    if "log_level" not in resolved.sources:
        # What a server says in its normal course would only disturb a command's output.
        config = config.with_options(log_level="warning")
    set_up_logging(config.telemetry.log_level, config.telemetry.log_format)
    return config


@contextlib.contextmanager
def open_client(
    args: argparse.Namespace, config: ServeConfig, *, max_retries: int | None = None
) -> Iterator[Client]:
    """A client of the server that was asked for, or of one in this process until it is left.

    Args:
        max_retries: Of calls to a server elsewhere; None: the client's default.

    Raises:
        FletcherError: The server cannot be reached or started.
    """
    if args.server:
        refuse_local_flags(args)
        with open_server(args, args.compression, max_retries) as client:
            yield client
        return
    from fletcher.client import TransferOptions, connect
    from fletcher.runtime import Runtime

    leave_in_time()
    # Anybody on this machine can reach the port; only this process knows the token.
    token = secrets.token_urlsafe()
    with tempfile.NamedTemporaryFile("w", prefix="fletcher-", encoding="utf-8") as file:
        file.write(token + "\n")
        file.flush()
        private = config.with_options(
            host="127.0.0.1",
            port=0,
            token_file=Path(file.name),
            max_journal=0,  # rows are acknowledged when the store has them, and nothing is left
            isolate_engine=True,  # a model in this process, too, is for many single texts
        )
        with (
            Runtime(private, progress=say) as runtime,
            # It tries a failing store for --store-retry itself: the client need not again.
            connect(
                runtime.address, token=token, transfer=TransferOptions(max_retries=0)
            ) as client,
        ):
            yield client


def open_server(
    args: argparse.Namespace, compression: str | None = None, max_retries: int | None = None
) -> Client:
    """A client of the server elsewhere; close it in the end.

    Raises:
        FletcherError: It cannot be reached, or does not let us in.
    """
    from fletcher.client import TlsOptions, TransferOptions, connect

    transfer = None if max_retries is None else TransferOptions(max_retries=max_retries)
    token = _read_token(args.token_file) if args.token_file else None
    tls = TlsOptions(ca=args.tls_ca) if args.tls_ca else None
    try:
        return connect(
            args.server, token=token, tls=tls, transfer=transfer, compression=compression
        )
    except UnauthenticatedError as error:
        raise UnauthenticatedError(
            f"{args.server} does not let us in: "
            + ("the token is not valid; check" if token else "it asks for a token; give")
            + " --token-file"
        ) from error


def without_store(config: ServeConfig) -> ServeConfig:
    """The same configuration for vectors that are only sent back."""
    return config.with_options(store=(NO_STORE,))


def refuse_local_flags(args: argparse.Namespace) -> None:
    """Refuses flags of servers where one elsewhere does the work. Raises ConfigError."""
    for name in sorted(given_flags(args).keys() & _SERVERS_OWN):
        raise ConfigError(
            f"`{name}` has no meaning with --server, which has its own; leave one out", field=name
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
        raise ConfigError(f"`token_file` {str(path)!r} holds no token", field="token_file")
    return words[0]
