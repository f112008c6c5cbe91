"""Counts the calls of Fletcher's modules by call site, and makes one of them fail.

`install` makes Python compile Fletcher's modules with each call `f(x)` inside a function replaced
by `__call_site__(number, f)(x)`. In a process that called `attach`, `__call_site__` returns `f`,
except for the one call that is to fail. A file in memory that all processes of a run map holds the
counts, and whether the call failed.

Calls to Fletcher's own functions fail, and calls that may fail in an ordinary process: allocations
by pyarrow and NumPy, LanceDB, Flight, files, and thread starts. Calls to locks, clocks and plain
Python objects do not fail.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import mmap
import os
import pkgutil
import sys
import threading
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Packages with code on the way of a row.
PACKAGES = (
    *("core", "delivery", "flight", "inference", "net", "pipeline", "serving", "stores"),
    *("storeserver", "tokenization", "util", "vectors", "workers"),
)
# Modules that need engines, or that no test server imports.
_LEFT_OUT = ("fletcher.inference.openvino", "fletcher.inference.onnxruntime")
ROLES = ("front", "worker", "store")
KINDS = ("own", "pyarrow", "numpy", "lancedb", "flight", "file", "thread")
_FILE_CALLS = {
    *("open", "fopen", "fsync", "fdatasync", "rename", "replace", "unlink", "remove", "mkdir"),
    *("rmdir", "link", "symlink", "readlink", "stat", "exists", "is_file", "is_dir", "iterdir"),
    *("glob", "rglob", "listdir", "scandir", "read_bytes", "write_bytes", "read_text", "flock"),
    *("write_text", "touch", "truncate", "ftruncate", "rmtree", "read", "write", "seek", "flush"),
    *("fstat", "lockf", "sendfile", "copyfile"),
}
_FILE_MODULES = ("posix", "os", "io", "_io", "shutil", "pathlib", "fcntl", "tempfile")

# Layout of the mapped file: numbers of 32 bits.
_ARMED, _FIRED, _COUNTS = 0, 1, 2

_numbers: dict[int, int] = {}


@dataclass(frozen=True)
class Site:
    """A call in a module's text."""

    number: int
    module: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}:{self.column} {self.text}"


sites: list[Site] = []


class _Calls(ast.NodeTransformer):
    """Replaces the calls inside a module's functions."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._depth = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._depth += 1
        node.body = [self.visit(statement) for statement in node.body]
        self._depth -= 1
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self._depth += 1
        node.body = self.visit(node.body)
        self._depth -= 1
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        text = ast.unparse(node.func)
        self.generic_visit(node)
        if not self._depth or text in ("super", "isinstance", "len", "getattr", "hasattr"):
            return node
        number = len(sites)
        sites.append(Site(number, self._module, node.lineno, node.col_offset, text[:80]))
        hook = ast.Name("__call_site__", ast.Load())
        node.func = ast.copy_location(ast.Call(hook, [ast.Constant(number), node.func], []), node)
        return ast.fix_missing_locations(node)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(Path(path).read_bytes(), path)
        return compile(_Calls(fullname).visit(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        parts = fullname.split(".")
        if parts[0] != "fletcher" or len(parts) < 2 or parts[1] not in PACKAGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Import Fletcher's modules with their calls replaced. None may be imported before."""
    early = [name for name in sys.modules if name.startswith("fletcher.")]
    assert not early, f"imported before: {early}"
    builtins.__call_site__ = _pass  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder())
    root = importlib.util.find_spec("fletcher")
    assert root is not None
    assert root.submodule_search_locations is not None
    for package in PACKAGES:
        folder = str(Path(root.submodule_search_locations[0]) / package)
        for module in pkgutil.walk_packages([folder], f"fletcher.{package}."):
            if module.name not in _LEFT_OUT:
                importlib.import_module(module.name)


def _pass(_: int, function: Any) -> Any:
    return function


@dataclass(frozen=True)
class Fault:
    """A call that fails, and how.

    Attributes:
        site: Number of the call site.
        role: Process of the call.
        index: Which of the role's calls at this site: 1 is the first.
        how: `raise`: the call is not made. `after`: it is made, and then fails. `cut`, `empty` and
            `wrong`: it returns another answer.
    """

    site: int
    role: str
    index: int
    how: str


class Counter:
    """This process's end of the file that holds the counts of all processes of a run.

    Args:
        path: The file, made by `new_file`.
        fault: The call that fails, if any.
    """

    def __init__(self, path: Path, fault: Fault | None) -> None:
        with path.open("r+b") as file:
            self.numbers = memoryview(mmap.mmap(file.fileno(), 0)).cast("I")
        self.fault = fault
        self.role = "front"

    @property
    def role(self) -> str:
        """This process's role."""
        return self._role

    @role.setter
    def role(self, role: str) -> None:
        self._role = role
        self._place = _COUNTS + ROLES.index(role) * len(sites)
        here = self.fault if self.fault is not None and self.fault.role == role else None
        self._site = here.site if here is not None else -1

    def __call__(self, number: int, function: Any) -> Any:
        numbers = self.numbers
        if not numbers[_ARMED]:
            return function
        kind = _numbers.get(number)
        if kind is None:
            kind = _numbers[number] = kind_of(function)
        if kind < 0:
            return function
        place = self._place + number
        count = numbers[place] & 0x0FFFFFFF
        numbers[place] = count + 1 | (kind + 1) << 28
        if number != self._site or numbers[_FIRED]:
            return function
        assert self.fault is not None
        if count + 1 != self.fault.index:
            return function
        numbers[_FIRED] = 1
        return functools.partial(_fail, self.fault, kind, function)


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
    if (module, name) == ("fletcher.util.insist", "insist"):
        return -1  # it never raises; the step that it repeats may fail
    if module.startswith("pyarrow._flight") or module == "pyarrow.flight":
        kind = "flight"
    elif top in ("fletcher", "pyarrow", "numpy", "lancedb", "lance", "_lancedb"):
        kind = {"fletcher": "own", "lance": "lancedb", "_lancedb": "lancedb"}.get(top, top)
    elif name == "start" and isinstance(owner, threading.Thread):
        kind = "thread"
    elif module.startswith(_FILE_MODULES) and name in _FILE_CALLS:
        kind = "file"
    else:
        return -1
    return KINDS.index(kind)


def _fail(fault: Fault, kind: int, function: Any, *args: Any, **named: Any) -> Any:
    if fault.how == "raise":
        raise error_for(fault, KINDS[kind])
    answer = function(*args, **named)
    if fault.how == "after":
        raise error_for(fault, KINDS[kind])
    return _DISTORTIONS[fault.how](answer)


def error_for(fault: Fault, kind: str) -> BaseException:
    """The error of a failing call: each call's is always the same, and neighbours' differ."""
    import pyarrow as pa
    from pyarrow import flight

    errors: dict[str, Sequence[Callable[[], BaseException]]] = {
        "own": (
            MemoryError,
            lambda: OSError(errno.EIO, "Input/output error (injected)"),
            lambda: KeyError("injected"),
            lambda: RuntimeError("injected"),
        ),
        "pyarrow": (lambda: pa.ArrowMemoryError("malloc of size 64 failed (injected)"),),
        "numpy": (lambda: MemoryError("injected"),),
        "lancedb": (
            lambda: RuntimeError("lance error: injected"),
            lambda: OSError("LanceError(IO): injected"),
            lambda: MemoryError("injected"),
        ),
        "flight": (
            lambda: flight.FlightUnavailableError("injected"),
            lambda: flight.FlightInternalError("injected"),
            lambda: MemoryError("injected"),
        ),
        "file": (
            lambda: OSError(errno.EIO, "Input/output error (injected)"),
            lambda: OSError(errno.ENOSPC, "No space left on device (injected)"),
            lambda: OSError(errno.EMFILE, "Too many open files (injected)"),
        ),
        "thread": (lambda: RuntimeError("can't start new thread (injected)"),),
    }
    site = sites[fault.site]
    choice = zlib.crc32(f"{site.module} {site.text} {fault.index} {fault.how}".encode())
    return errors[kind][choice % len(errors[kind])]()


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


_DISTORTIONS = {"cut": _cut, "empty": _empty, "wrong": _wrong}


def new_file(path: Path, num_sites: int) -> None:
    """Make the file that the processes of a run map."""
    path.write_bytes(bytes(4 * (_COUNTS + len(ROLES) * num_sites)))


class Control:
    """The driver's end of a run's file."""

    def __init__(self, path: Path, num_sites: int) -> None:
        new_file(path, num_sites)
        self._num_sites = num_sites
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._numbers = memoryview(self._map).cast("I")

    def arm(self, *, on: bool) -> None:
        """Count calls and let one fail from now on, or no longer."""
        self._numbers[_ARMED] = int(on)

    @property
    def fired(self) -> bool:
        """Whether the call has failed."""
        return bool(self._numbers[_FIRED])

    def counts(self) -> dict[tuple[str, int], tuple[str, int]]:
        """Kind and number of calls by role and site."""
        found = {}
        for role_number, role in enumerate(ROLES):
            for number in range(self._num_sites):
                raw = self._numbers[_COUNTS + role_number * self._num_sites + number]
                if raw:
                    found[role, number] = (KINDS[(raw >> 28) - 1], raw & 0x0FFFFFFF)
        return found


def attach(role: str, calls: str, file_calls: str, fault: dict[str, Any] | None) -> None:
    """Count this process's calls, and those of its children, from now on.

    Args:
        role: This process's role, one of ROLES.
        calls: Path of the file that holds the counts of Python's calls.
        file_calls: Path of the control file of `filecalls.c`.
        fault: Fields of the `Fault`, if one of Python's calls is to fail.
    """
    counter = Counter(Path(calls), None if fault is None else Fault(**fault))
    counter.role = role
    builtins.__call_site__ = counter  # type: ignore[attr-defined]
    error = ctypes.CDLL(None).filecalls_attach(file_calls.encode(), role.encode())
    assert not error, os.strerror(error)


def become_worker() -> None:
    """Note that this process, a fork of an attached one, is a worker."""
    counter = getattr(builtins, "__call_site__", None)
    if isinstance(counter, Counter):
        counter.role = "worker"
        ctypes.CDLL(None).filecalls_role(b"worker")
