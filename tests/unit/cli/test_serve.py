"""`fletcher serve` around a runtime that only notes what is asked of it: output, signals, codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Prints a line on standard error for each call; behaves as MODE says.
FAKE = """
import sys, threading, types

class Runtime:
    address = "grpc://127.0.0.1:12345"

    def __init__(self, config, progress=None):
        self.closed = threading.Event()

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def __enter__(self):
        if MODE == "fails":
            from fletcher.errors import BackendError
            raise BackendError("`backend` is not there")
        if MODE == "slow start":
            self.say("starting")
            threading.Event().wait()
        if MODE == "ends":
            self.closed.set()
        return self

    def __exit__(self, kind, error, trace):
        self.say("exit")

    def wait(self, timeout_s=None):
        return self.closed.wait(timeout_s)

    def drain(self, timeout_s):
        self.say(f"drain {timeout_s:g}")
        if MODE == "stuck":
            threading.Event().wait()
        return MODE != "rows left"

    def close(self):
        self.say("close")
        self.closed.set()
        return True

module = types.ModuleType("fletcher.runtime")
module.Runtime = Runtime
sys.modules["fletcher.runtime"] = module
import fletcher.cli.serve
fletcher.cli.serve.CLOSE_S = 0.1
from fletcher.cli import main
sys.exit(main(["serve", "--log-format", "json", *sys.argv[1:]]))
"""


@contextmanager
def serving(mode: str, *argv: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", FAKE.replace("MODE", repr(mode)), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stderr
    while (got := process.stderr.readline()) != f"{line}\n":
        assert got, f"{line!r} never came"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(number: signal.Signals) -> None:
    with serving("fine", "--drain-timeout", "7") as process:
        assert process.stdout
        assert process.stdout.readline() == "listening on grpc://127.0.0.1:12345\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("{")]
    assert lines == ["drain 7", "close", "exit"]
    logged = [json.loads(line)["message"] for line in err.splitlines() if line.startswith("{")]
    assert logged == ["draining", "stopped"]


def test_rows_that_did_not_reach_the_store_are_a_failure() -> None:
    with serving("rows left") as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 1


def test_a_second_signal_ends_at_once() -> None:
    with serving("stuck") as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        read_until(process, "drain 30")
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_drain_that_never_returns_ends_all_the_same() -> None:
    with serving("stuck", "--drain-timeout", "0.1") as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "not ended in time" in err


def test_a_signal_before_it_is_ready_ends_the_start() -> None:
    with serving("slow start") as process:
        read_until(process, "starting")
        process.terminate()
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == ""


def test_a_server_that_ends_by_itself_is_a_failure() -> None:
    with serving("ends") as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ended by itself" in err


def test_a_start_that_fails_is_one_line() -> None:
    with serving("fails") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == "fletcher serve: `backend` is not there\n"


def test_a_misspelt_variable_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLETCHER_MAX_STREAM", "3")
    with serving("ends") as process:
        _, err = process.communicate(timeout=20)
    assert "did you mean FLETCHER_MAX_STREAMS?" in err
