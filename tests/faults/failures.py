"""Choice of the calls that may fail in an ordinary process, and of their errors.

A call of one of Fletcher's functions fails at its start, as any call may if memory runs out. Calls
of clocks, of plain Python objects and of locks without a time limit do not fail.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import queue
import threading
import types
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

KINDS = (
    *("own", "pyarrow", "numpy", "lancedb", "flight", "file", "thread"),
    *("tokenizers", "pipe", "codec", "wait", "exit", "log"),
)
_FILE_CALLS = {
    *("open", "fopen", "fsync", "fdatasync", "rename", "replace", "unlink", "remove", "mkdir"),
    *("rmdir", "link", "symlink", "readlink", "stat", "exists", "is_file", "is_dir", "iterdir"),
    *("glob", "rglob", "listdir", "scandir", "read_bytes", "write_bytes", "read_text", "flock"),
    *("write_text", "touch", "truncate", "ftruncate", "rmtree", "read", "write", "seek", "flush"),
    *("fstat", "lockf", "sendfile", "copyfile", "pwrite", "readv", "walk", "close"),
}
_FILE_MODULES = ("posix", "os", "io", "_io", "shutil", "pathlib", "fcntl", "tempfile", "glob")
_TOP_MODULES = {
    "fletcher": "own",
    "lance": "lancedb",
    "_lancedb": "lancedb",
    **dict.fromkeys(("pyarrow", "numpy", "lancedb", "tokenizers"), ""),
    **dict.fromkeys(("msgspec", "json", "_pickle", "pickle", "google"), "codec"),
}
# Calls that wait, and the position of their timeout among the arguments.
_WAITS = {"wait": 0, "wait_for": 1, "get": 1, "put": 2, "result": 0, "join": 0, "acquire": 1}


class Panic(BaseException):
    """Stands for a panic of a Rust library, which is no Exception."""


def kind_of(function: Any) -> int:
    """Index in KINDS of a callable; -1 for a call that does not fail."""
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if owner is None or isinstance(owner, types.ModuleType):
        module = getattr(function, "__module__", None)
    else:
        module = getattr(owner if isinstance(owner, type) else type(owner), "__module__", None)
    if not isinstance(module, str):
        return -1
    top = module.partition(".")[0]
    if name in ("insist", "close_for_good") and module.startswith("fletcher.util."):
        return -1  # they never raise; the steps that they repeat may fail
    kind = ""
    if module.startswith("pyarrow._flight") or module == "pyarrow.flight":
        kind = "flight"
    elif top in _TOP_MODULES:
        kind = _TOP_MODULES[top] or top
    elif name == "start" and isinstance(owner, threading.Thread):
        kind = "thread"
    elif module.startswith("multiprocessing.connection") or module in ("socket", "_socket"):
        kind = "pipe"
    elif module.startswith(_FILE_MODULES) and name in _FILE_CALLS:
        kind = "file"
    elif top == "logging" and name not in ("getLogger", "isEnabledFor"):
        kind = "log"
    elif name in _WAITS and top in ("threading", "queue", "concurrent", "_thread", "_queue"):
        kind = "wait"
    return KINDS.index(kind) if kind else -1


def hows_of(name: str, kind: str, *, timed: bool) -> list[str]:
    """The ways in which a call fails; see `Fault`.

    Args:
        name: The call's text.
        timed: Whether the call is given a time limit.
    """
    if kind == "exit" or (name.rpartition(".")[2] == "close" and kind == "file"):
        return ["after"]  # the block has ended, and the file is closed, whatever the error
    if kind == "wait":
        return ["timeout"] if timed else []
    if kind in ("lancedb", "flight", "file", "pipe"):
        return ["raise", "after", "unlogged"]
    return ["raise", "unlogged"] if kind == "own" else ["raise"]


def exit_kind_of(manager: Any) -> int:
    """Kind of the end of a `with` statement; -1 if it does not fail."""
    own = type(manager).__module__.startswith("fletcher.")
    ours = (contextlib._GeneratorContextManager, contextlib.ExitStack, contextlib.closing)
    if own or isinstance(manager, (*ours, io.IOBase)):
        return KINDS.index("exit")
    return -1


def operand_kind_of(value: Any) -> int:
    """Kind of an operation on an array, which needs memory; -1 for other values."""
    module = type(value).__module__.partition(".")[0]
    return KINDS.index(module) if module in ("numpy", "pyarrow") else -1


def time_out(function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[bool, Any]:
    """Whether a waiting call has a time limit, and its answer if the limit passes."""
    name = function.__name__
    place = _WAITS[name]
    limit = named.get("timeout", args[place] if len(args) > place else None)
    if limit is None and named.get("blocking", True):
        return False, None
    if name == "get":
        raise queue.Empty
    if name == "put":
        raise queue.Full
    if name == "result" and isinstance(function.__self__, Future):
        raise FutureTimeoutError
    if name == "wait_for":
        return True, args[0]()
    if name == "wait" and isinstance(function.__self__, threading.Event):
        return True, function.__self__.is_set()
    return True, None if name == "join" else False


def error_for(site: str, index: int, how: str, kind: str) -> BaseException:
    """The error of a failing call. The same call always fails with the same error.

    The next call of the same site fails with another error, if there are several.
    """
    import pyarrow as pa
    from pyarrow import flight

    disk = [
        functools.partial(OSError, errno.EIO, "Input/output error (injected)"),
        functools.partial(OSError, errno.ENOSPC, "No space left on device (injected)"),
        functools.partial(OSError, errno.EMFILE, "Too many open files (injected)"),
    ]
    defects = [KeyError, RuntimeError, SystemError, ValueError]
    errors: dict[str, Sequence[Callable[..., BaseException]]] = {
        "own": (MemoryError, disk[0], *defects),
        "exit": (MemoryError, disk[0], *defects),
        "pyarrow": (pa.ArrowMemoryError,),
        "lancedb": (RuntimeError, OSError, MemoryError, Panic),
        "tokenizers": (MemoryError, Panic),
        "flight": (flight.FlightUnavailableError, flight.FlightInternalError, MemoryError),
        "file": disk,
        "pipe": (BrokenPipeError, functools.partial(OSError, errno.ENOMEM, "injected"), *disk[2:]),
        "thread": (functools.partial(RuntimeError, "can't start new thread (injected)"),),
    }
    choices = errors.get(kind, (MemoryError,))
    chosen = choices[(zlib.crc32(f"{site} {how}".encode()) + index) % len(choices)]
    return chosen() if isinstance(chosen, functools.partial) else chosen("injected")


def _cut(answer: Any) -> Any:
    """The first half of an answer."""
    if isinstance(answer, bytes | str | list | tuple):
        return answer[: len(answer) // 2]
    return None


def _empty(answer: Any) -> Any:
    return type(answer)() if isinstance(answer, bytes | str | list | tuple | dict) else None


def _wrong(answer: Any) -> Any:
    """An answer of another type, or with other words."""
    if isinstance(answer, bytes):
        return b'["nonsense", 7]'
    return [7] if not isinstance(answer, list) else {"nonsense": 7}


DISTORTIONS = {"cut": _cut, "empty": _empty, "wrong": _wrong}
