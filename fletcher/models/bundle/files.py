"""Small file work that every part of a bundle needs: JSON, checksums, safe names."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fletcher.errors import ModelError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A model's name, or one version of it.
VERSION_NAME = re.compile(rf"({MODEL_NAME.pattern})(?:@([0-9a-f]{{12}}))?")


def check_name(name: str) -> str:
    """Refuses a model name that could not be a folder's: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`."""
    if not MODEL_NAME.fullmatch(name):
        raise ModelError(
            f"`name` is {name[:200]!r}, expected letters, digits, `.`, `_` and `-`, at most 128, "
            "starting with a letter or digit; choose one with --name",
            field="name",
            allowed=[MODEL_NAME.pattern],
        )
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: There is no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing") from None
    except (OSError, ValueError):
        raise ModelError(f"{path.name} is not readable JSON") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return value


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(name: str) -> bool:
    """Whether a relative name, `/` between its parts, stays inside the folder it is joined to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file; one process (and thread) at a time. It goes with its holder."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
