"""Facts about the package's source that the layout rules need, read by `ast`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fletcher"


@dataclass(frozen=True)
class ClassShape:
    """One class: its bases by their last name, and its methods by name."""

    module: str
    name: str
    bases: tuple[str, ...]
    methods: dict[str, ast.FunctionDef | ast.AsyncFunctionDef]
    attributes: frozenset[str]
    is_dataclass: bool

    @property
    def is_protocol(self) -> bool:
        return "Protocol" in self.bases

    @property
    def is_public(self) -> bool:
        return not self.name.startswith("_")


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """All modules that people write, by full name."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in sorted(package.rglob("*.py"))
        if not path.match("*_pb2.py")
    }


def classes(module: str, tree: ast.Module) -> Iterator[ClassShape]:
    """All classes of a module, wherever they are defined in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield ClassShape(
                module=module,
                name=node.name,
                bases=tuple(_last_name(base) for base in node.bases),
                methods={
                    item.name: item
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                },
                attributes=frozenset(_attributes(node)),
                is_dataclass=any(_last_name(one) == "dataclass" for one in node.decorator_list),
            )


def num_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments of a method without `self`."""
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1


def verb_definers(shapes: list[ClassShape]) -> dict[str, set[str]]:
    """Public methods of one word, and the classes that introduce them.

    A class does not introduce a method that a base class has, nor one of a Protocol of at least two
    methods all of which it has. Properties are no verbs.
    """
    by_name: dict[str, list[ClassShape]] = {}
    for shape in shapes:
        by_name.setdefault(shape.name, []).append(shape)
    protocols = [one for one in shapes if one.is_protocol and len(_public(one)) > 1]
    definers: dict[str, set[str]] = {}
    for shape in shapes:
        inherited = _inherited(shape, by_name, set())
        for protocol in protocols:
            if protocol is not shape and _public(protocol) <= _public(shape) | shape.attributes:
                inherited |= _public(protocol)
        for name, method in shape.methods.items():
            if re.fullmatch(r"[a-z]+", name) and name not in inherited and not _is_property(method):
                definers.setdefault(name, set()).add(f"{shape.module}.{shape.name}")
    return definers


def defined_names(tree: ast.Module) -> set[str]:
    """Names that a module defines: classes, functions, arguments, variables, attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.alias) and node.asname:
            names.add(node.asname)
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}


def words(name: str) -> set[str]:
    """The words of an identifier, in lower case: `max_rows` and `MaxRows` have the same."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    """Names that a class body assigns or annotates, and those assigned on `self`."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id
        elif isinstance(item, ast.Assign):
            yield from (one.id for one in item.targets if isinstance(one, ast.Name))
    for item in ast.walk(node):
        if (
            isinstance(item, ast.Attribute)
            and isinstance(item.ctx, ast.Store)
            and isinstance(item.value, ast.Name)
            and item.value.id == "self"
        ):
            yield item.attr


def _public(shape: ClassShape) -> set[str]:
    return {name for name in shape.methods if not name.startswith("_")}


def _inherited(shape: ClassShape, by_name: dict[str, list[ClassShape]], seen: set[str]) -> set[str]:
    names: set[str] = set()
    for base in set(shape.bases) - seen:
        for parent in by_name.get(base, []):
            names |= set(parent.methods) | _inherited(parent, by_name, seen | {base})
    return names


def _is_property(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(
        _last_name(one) in ("property", "cached_property", "setter")
        for one in method.decorator_list
    )


def _last_name(node: ast.expr) -> str:
    """`b` of `a.b`, `a.b(...)` and `a.b[...]`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
