"""The health check of the containers, against a server of one action."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import flight

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


class OneAction(flight.FlightServerBase):
    def __init__(self, name: str, answers: list[bytes]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._name = name
        self._answers = answers

    def do_action(self, _context: Any, action: flight.Action) -> Any:
        if action.type != self._name:
            raise flight.FlightUnavailableError("draining")
        return [flight.Result(one) for one in self._answers]


def check(
    server: flight.FlightServerBase | None, *arguments: str, **options: str
) -> tuple[int, str]:
    environ = {**os.environ, "FLETCHER_PORT": str(server.port if server else 1), **options}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        ([{"ready": True}], 0, ""),
        ([{"ready": False}], 1, "the server takes no calls now"),
        ([], 1, "values to unpack"),
    ],
)
def test_ready_says_whether_calls_are_taken(
    answers: list[dict[str, bool]], status: int, said: str
) -> None:
    with OneAction("ready", [json.dumps(one).encode() for one in answers]) as server:
        found, error = check(server, "ready")
        assert (found, said in error) == (status, True)
        assert check(server)[0] == 1  # `health` is refused


def test_health_needs_an_answer_of_any_content() -> None:
    with OneAction("health", [b""]) as server:
        assert check(server) == (0, "")
    assert check(None)[0] == 1
    status, error = check(None, FLETCHER_TOKEN_FILE="/no/such/file")
    assert (status, "FLETCHER_TOKEN_FILE: " in error) == (1, True)
