"""Measurements in separate processes, so that each has ended when the next one runs.

A job is a JSON file; the process that it is given to writes its answer where the job's `result`
says. `{"skipped": why}` is an answer, too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.corpus import ROOT

JOB_TIMEOUT_S = 3600


class JobError(Exception):
    """A measurement failed; the last output of its process."""


def run_job(
    command: Sequence[str],
    job: dict[str, Any],
    folder: Path,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a process with a job and returns its answer.

    Args:
        command: The process; gets the job's file as its last argument.
        job: What to do; JSON.
        folder: For the files of both.
        environ: Variables to add; what the process then prints is in the answer, as `printed`.

    Raises:
        JobError: It failed, or cannot be started.
    """
    request, answer = folder / "job.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps({**job, "result": str(answer)}), encoding="utf-8")
    try:
        done = subprocess.run(
            [*command, str(request)],
            cwd=ROOT,
            env=clean_environment() | dict(environ or {}),
            capture_output=True,
            text=True,
            timeout=JOB_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError(f"{command[0]}: {error}") from None
    if done.returncode or not answer.is_file():
        raise JobError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    printed = {"printed": done.stdout} if environ else {}
    return json.loads(answer.read_text(encoding="utf-8")) | printed


def clean_environment() -> dict[str, str]:
    """The environment without variables that would change a measurement."""
    environ = {name: value for name, value in os.environ.items() if "FLETCHER_" not in name}
    return environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
