"""Endless bulk work for a server, until standard input closes.

    python -m benchmarks.load ADDRESS [CORPUS]

Prints `loading` after the server has acknowledged the first rows.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from benchmarks.corpus import Corpus
from fletcher import EmbedCommand, connect
from fletcher.client import Ack

BATCH_ROWS = 1000


def main() -> None:
    address, *corpus = sys.argv[1:]

    def stop() -> None:
        sys.stdin.read()
        os._exit(0)  # in the middle of an upload, as clients do

    threading.Thread(target=stop, daemon=True).start()
    announced = False

    def on_ack(_: Ack) -> None:
        nonlocal announced
        if not announced:
            announced = True
            print("loading", flush=True)

    rows = Corpus.load(Path(corpus[0]) if corpus else None).recombined(None, batch_rows=BATCH_ROWS)
    with connect(address) as client:
        client.put(rows, EmbedCommand(dataset="load", durability="store"), on_ack=on_ack)


if __name__ == "__main__":
    main()
