"""Health check of the server in this container: exits with 0 if it answers.

    healthcheck.py [ACTION]      (default: health; `fletcher store` has `capabilities`)

`ready` exits with 1 while the server drains, or has no workers to serve calls.

Reads the server's own settings: FLETCHER_PORT, FLETCHER_TOKEN_FILE and FLETCHER_TLS_CERT. A server
that asks callers for certificates (FLETCHER_TLS_CLIENT_CA) needs another check.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import flight

TIMEOUT_S = 4.0


def main() -> int:
    scheme = "grpc+tls" if os.environ.get("FLETCHER_TLS_CERT") else "grpc+tcp"
    headers = []
    if token_file := os.environ.get("FLETCHER_TOKEN_FILE"):
        try:
            lines = [line.strip() for line in Path(token_file).read_text().splitlines()]
        except OSError as error:
            print(f"FLETCHER_TOKEN_FILE: {error}", file=sys.stderr)
            return 1
        token = next((line for line in lines if line and not line.startswith("#")), "")
        headers.append((b"authorization", f"Bearer {token}".encode()))
    # The certificate names the server's public address, not this one, so it is not verified.
    client = flight.FlightClient(
        f"{scheme}://127.0.0.1:{os.environ.get('FLETCHER_PORT', '8815')}",
        disable_server_verification=scheme == "grpc+tls",
    )
    action = sys.argv[1] if len(sys.argv) > 1 else "health"
    options = flight.FlightCallOptions(timeout=TIMEOUT_S, headers=headers)
    try:
        (answer,) = client.do_action(action, options)
        fields = json.loads(answer.body.to_pybytes()) if action == "ready" else {}
    except (flight.FlightError, pa.ArrowException, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if fields.get("ready", True) is not True:
        print("the server takes no calls now", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
