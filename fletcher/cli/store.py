"""`fletcher store`: a vector store server over a folder of LanceDB tables."""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from fletcher.errors import ConfigError
from fletcher.storeserver.server import StoreServer

# What was received is committed in well under a second; a disk may be slower than that.
SHUTDOWN_S = 10.0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the command `store` to a parser's subcommands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "store",
        help="serve a folder of LanceDB tables over Arrow Flight, as Longbow does",
        description="Serves a folder of LanceDB tables with Longbow's Flight calls. Rows are "
        "acknowledged when they are committed and synced to disk. It has no authentication.",
    )
    parser.add_argument(
        "--path",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the tables; made if it is not there; one server a folder",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others can reach anything but loopback (%(default)s)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        metavar="N",
        default=3000,
        help="data port; 0 takes a free one, which standard output names (%(default)s)",
    )
    parser.add_argument(
        "--meta-port",
        type=_port,
        metavar="N",
        default=3001,
        help="port of the dataset list; 0 takes a free one (%(default)s)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen on a host that is not loopback although anybody there may read and write",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the ready line as JSON, for machines"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; answers the exit status.

    Raises:
        ConfigError: A host that is not loopback without `--insecure`, or a port that is taken.
        StoreError: The folder cannot be used, or another server serves it.
    """
    if not args.insecure and not _is_loopback(args.host):
        raise ConfigError(
            f"`host` is {args.host}, which others can reach, and this store has no "
            "authentication; listen on 127.0.0.1, or pass --insecure on a network you trust",
            field="host",
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    # The handlers are set before anything listens, so that no signal finds the default.
    previous = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    server = StoreServer(args.path, host=args.host, port=args.port, meta_port=args.meta_port)
    _announce(server, as_json=args.json)
    stop.wait()
    ended = server.close(SHUTDOWN_S)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if not ended:
        # pyarrow cannot end a call that a client keeps open, and Python would wait for it.
        logging.getLogger(__name__).warning("left calls open that their clients do not end")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _announce(server: StoreServer, *, as_json: bool) -> None:
    if as_json:
        line = json.dumps({"address": server.address, "meta_address": server.meta_address})
    else:
        line = f"listening on {server.address} (meta {server.meta_address})"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, expected 0 to 65535")
    return int(text)
