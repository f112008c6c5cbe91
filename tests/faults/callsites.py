"""Counts the calls of Fletcher's modules by call site, and makes one of them fail.

`install` makes Python compile Fletcher's modules with each call `f(x)` inside a function replaced
by `__call_site__(number, f)(x)`. In a process that called `attach`, `__call_site__` returns `f`,
except for the one call that is to fail. All processes of a run map one file in memory. It holds the
counts, and whether the call failed. The end of a `with` statement and an operation on an array,
such as `a[b]` or `a + b`, are call sites, too: `with __exit_site__(number, f(x))`, and
`__operand_site__(number, a)[b]`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import mmap
import os
import pkgutil
import sys
import types
from collections import Counter as Tally
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.failures import (
    DISTORTIONS,
    KINDS,
    error_for,
    exit_kind_of,
    kind_of,
    operand_kind_of,
    time_out,
)

# Packages with code on the way of a row.
PACKAGES = (
    *("core", "delivery", "flight", "inference", "net", "pipeline", "serving", "stores"),
    *("storeserver", "tokenization", "util", "vectors", "workers"),
)
# Modules that need engines, or that no test server imports.
_LEFT_OUT = ("fletcher.inference.openvino", "fletcher.inference.onnxruntime")
ROLES = ("front", "worker", "store")
# Layout of the mapped file: numbers of 32 bits.
_ARMED, _FIRED, _COUNTS = 0, 1, 2

_LOG = KINDS.index("log")
_HOOKS = ("__call_site__", "__exit_site__", "__operand_site__")

_numbers: dict[int, int] = {}


@dataclass(frozen=True)
class Site:
    """A call in a module's text.

    Attributes:
        scope: Names of the classes and functions around it.
        text: The call's function.
        place: Its place among the calls of the same text in its scope, from 1.
        timed: Whether it may be given a time limit.
    """

    module: str
    scope: str
    text: str
    place: int
    timed: bool = False

    def __str__(self) -> str:
        return f"{self.module}:{self.scope} {self.text} {self.place}"


sites: list[Site] = []


class _Calls(ast.NodeTransformer):
    """Replaces the calls inside a module's functions."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._depth = 0
        self._scope: list[str] = []
        self._places: Tally[tuple[str, str]] = Tally()

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self._scope.append(node.name)
        self._depth += 1
        node.body = [self.visit(statement) for statement in node.body]
        self._depth -= 1
        self._scope.pop()
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

    def visit_match_case(self, node: ast.match_case) -> ast.AST:
        node.guard = node.guard and self.visit(node.guard)
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        text = ast.unparse(node.func)
        self.generic_visit(node)
        if not self._depth or text in ("super", "isinstance", "len", "getattr", "hasattr"):
            return node
        timed = bool(node.args or node.keywords)
        node.func = self._replaced("__call_site__", node.func, text, timed=timed)
        return ast.fix_missing_locations(node)

    def visit_withitem(self, node: ast.withitem) -> ast.AST:
        text = f"with {ast.unparse(node.context_expr)}"
        self.generic_visit(node)
        if self._depth:
            node.context_expr = self._replaced("__exit_site__", node.context_expr, text)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        text = ast.unparse(node)
        self.generic_visit(node)
        if self._depth and isinstance(node.ctx, ast.Load):
            node.value = self._replaced("__operand_site__", node.value, text)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        text = ast.unparse(node)
        self.generic_visit(node)
        if self._depth:
            node.left = self._replaced("__operand_site__", node.left, text)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        text = ast.unparse(node)
        self.generic_visit(node)
        plain = (ast.Is, ast.IsNot, ast.In, ast.NotIn)
        if self._depth and not isinstance(node.ops[0], plain):
            node.left = self._replaced("__operand_site__", node.left, text)
        return node

    def _replaced(self, hook: str, node: ast.expr, text: str, *, timed: bool = False) -> ast.Call:
        text, scope = text[:80], ".".join(self._scope)
        self._places[scope, text] += 1
        sites.append(Site(self._module, scope, text, self._places[scope, text], timed))
        arguments = [ast.Constant(len(sites) - 1), node]
        call = ast.Call(ast.Name(hook, ast.Load()), arguments, [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


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
    for hook in _HOOKS:
        setattr(builtins, hook, _pass)
    sys.meta_path.insert(0, _Finder())
    root = importlib.util.find_spec("fletcher")
    assert root is not None
    assert root.submodule_search_locations is not None
    for package in PACKAGES:
        folder = str(Path(root.submodule_search_locations[0]) / package)
        for module in pkgutil.walk_packages([folder], f"fletcher.{package}."):
            if module.name not in _LEFT_OUT:
                importlib.import_module(module.name)


def _pass(_: int, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Fault:
    """A call that fails, and how.

    Attributes:
        site: Number of the call site.
        role: Process of the call.
        index: Which of the role's calls at this site: 1 is the first.
        how: `raise`: the call is not made. `after`: it is made, and then fails. `cut`, `empty` and
            `wrong`: it returns another answer. `timeout`: its time limit passes at once.
            `unlogged`: as `raise`, and the process's next call of a logger fails, too.
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
        self._log_fails = False

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

    def call(self, number: int, function: Any) -> Any:
        """The function of a call, or a function that fails."""
        if self.numbers[_ARMED] and (kind := self._failing(number, function, kind_of)) >= 0:
            assert self.fault is not None
            return functools.partial(_fail, self.fault, kind, self, function)
        return function

    def exit(self, number: int, manager: Any) -> Any:
        """The context manager of a `with` statement, or one whose end fails."""
        if self.numbers[_ARMED] and (kind := self._failing(number, manager, exit_kind_of)) >= 0:
            assert self.fault is not None
            return _FailingExit(manager, self.fault, kind)
        return manager

    def operand(self, number: int, value: Any) -> Any:
        """The operand of an operation, unless the operation fails."""
        if self.numbers[_ARMED] and self._failing(number, value, operand_kind_of) >= 0:
            raise MemoryError("injected")
        return value

    def _failing(self, number: int, value: Any, kind_of_value: Any) -> int:
        """Count a call; returns its kind if it fails, else -1."""
        numbers = self.numbers
        kind = _numbers.get(number)
        if kind is None:
            kind = kind_of_value(value)
            if (
                kind_of_value is not operand_kind_of or kind >= 0
            ):  # operands differ from call to call
                _numbers[number] = kind
        if kind < 0:
            return -1
        place = self._place + number
        count = numbers[place] & 0x0FFFFFFF
        numbers[place] = count + 1 | (kind + 1) << 28
        if numbers[_FIRED]:
            if self._log_fails and kind == _LOG:
                self._log_fails = False
                return kind
            return -1
        if number != self._site:
            return -1
        assert self.fault is not None
        if count + 1 != self.fault.index:
            return -1
        numbers[_FIRED] = 1
        self._log_fails = self.fault.how == "unlogged"
        return kind


def _fail(
    fault: Fault, kind: int, counter: Counter, function: Any, *args: Any, **named: Any
) -> Any:
    if fault.how in DISTORTIONS:
        return DISTORTIONS[fault.how](function(*args, **named))
    if fault.how == "timeout":
        limited, answer = time_out(function, args, named)
        if not limited:  # this call has no time limit
            counter.numbers[_FIRED] = 0
            return function(*args, **named)
        return answer
    if fault.how == "after":
        function(*args, **named)
    raise error_for(str(sites[fault.site]), fault.index, fault.how, KINDS[kind])


class _FailingExit:
    """A context manager whose end fails after it has done its work."""

    def __init__(self, manager: Any, fault: Fault, kind: int) -> None:
        self._manager, self._fault, self._kind = manager, fault, kind

    def __enter__(self) -> Any:
        return self._manager.__enter__()

    def __exit__(self, *failure: Any) -> None:
        idle = isinstance(self._manager, contextlib.ExitStack) and not self._manager._exit_callbacks
        self._manager.__exit__(*failure)
        fault = self._fault
        if idle:  # an empty stack has nothing to do, so it cannot fail
            return
        raise error_for(str(sites[fault.site]), fault.index, fault.how, KINDS[self._kind])


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
    for hook, count in zip(_HOOKS, (counter.call, counter.exit, counter.operand), strict=True):
        setattr(builtins, hook, count)
    error = ctypes.CDLL(None).filecalls_attach(file_calls.encode(), role.encode())
    assert not error, os.strerror(error)


def become_worker() -> None:
    """Note that this process, a fork of an attached one, is a worker."""
    counter = getattr(getattr(builtins, "__call_site__", None), "__self__", None)
    if isinstance(counter, Counter):
        counter.role = "worker"
        ctypes.CDLL(None).filecalls_role(b"worker")
