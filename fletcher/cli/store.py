"""`fletcher store`: serve a folder of LanceDB tables as a vector store."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from fletcher.cli.command_line import command, option
from fletcher.cli.options import json_option
from fletcher.cli.shutdown import Signals, end_within, leave_now
from fletcher.cli.terminal import print_json
from fletcher.config.network import is_loopback
from fletcher.errors import ConfigError

# Time limit for commits at shutdown. They take less than a second unless the disk is slow.
SHUTDOWN_S = 10.0
# Time limit for closing the ports after the commits. Then the process is ended.
CLOSE_S = 5.0
_PORT = click.IntRange(0, 65535)
_log = logging.getLogger(__name__)


@command(
    "store",
    "fletcher store --path /data/vectors",
    "fletcher ingest articles.parquet --text body --dataset articles --store grpc://localhost:3000",
)
@option("--path FOLDER", required=True)
@option("--host TEXT", default="127.0.0.1")
@option("--port N", type=_PORT, default=3000)
@option("--meta-port N", type=_PORT, default=3001)
@option("--insecure", is_flag=True)
@json_option("Print the ready line as JSON, for programs.")
def cli(path: Path, host: str, port: int, meta_port: int, insecure: bool, as_json: bool) -> int:
    """Serve a folder of LanceDB tables with Longbow's Flight calls.

    Rows are acknowledged when they are committed and synced to disk. The store has no
    authentication. It runs until SIGTERM or SIGINT.

    Args:
        path: Folder of the tables, created if it does not exist. Only one server can use a folder.
        host: Address to listen on. An address that other machines can reach needs --insecure.
        port: Port for data. With 0, a free port is chosen and printed to standard output.
        meta_port: Port for the list of datasets. With 0, a free port is chosen and printed.
        insecure: Accept connections from other machines. Anyone who reaches --host may read and
            write.
    """
    from fletcher.storeserver.server import StoreServer

    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"`host` is {host}, which other machines can reach, and this store has no "
            "authentication; listen on 127.0.0.1, or pass --insecure on a network you trust",
            field="host",
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Signals are handled before the server listens, so that none gets the default handling.
    with Signals(_log) as signals:
        server = StoreServer(path, host=host, port=port, meta_port=meta_port)
        signals.mark_ready()
        if as_json:
            print_json({"address": server.address, "meta_address": server.meta_address})
        else:
            print(f"listening on {server.address} (meta {server.meta_address})")
        sys.stdout.flush()
        signals.stop.wait()
        with end_within(SHUTDOWN_S + CLOSE_S, _log):
            if not server.close(SHUTDOWN_S):
                _log.warning("left calls open that their clients do not end")
            leave_now(0)
