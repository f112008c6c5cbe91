"""List of namespaces for Longbow's clients."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from msgspec.json import encode as to_json

from fletcher.core.command import check_dataset
from fletcher.errors import InvalidCommandError, UnknownDatasetError
from fletcher.storeserver.requests import EmptyRequest, NamespaceRequest
from fletcher.util.durable import write_atomically

# Namespace that is always there.
_DEFAULT = "default"


class Namespaces:
    """List of namespaces, kept in the file `path`. Thread-safe.

    Here a namespace is only a name: it contains no datasets.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()

    def create_name(self, request: NamespaceRequest) -> list[bytes]:
        """Create a namespace."""
        check_dataset(request.name)
        with self._mutex:
            names = self._read()
            if request.name in names:
                raise InvalidCommandError(
                    f"namespace already exists: {request.name}; choose another name", field="name"
                )
            self._write([*names, request.name])
        return [to_json({"status": "created"})]

    def delete_name(self, name: str) -> list[bytes]:
        """Delete a namespace."""
        if name == _DEFAULT:
            raise InvalidCommandError(
                f"the namespace `{_DEFAULT}` cannot be deleted; name another", field="name"
            )
        with self._mutex:
            names = self._read()
            if name not in names:
                raise UnknownDatasetError(
                    f"namespace not found: {name[:128]}; the action ListNamespaces lists all",
                    field="name",
                )
            self._write([one for one in names if one != name])
        return [to_json({"status": "deleted"})]

    def list_names(self, _: EmptyRequest) -> list[bytes]:
        """List all namespaces."""
        names = self._read()
        return [to_json({"count": len(names), "namespaces": names})]

    def count_names(self, _: EmptyRequest) -> list[bytes]:
        """Count all namespaces."""
        return [to_json({"count": len(self._read())})]

    def _read(self) -> list[str]:
        try:
            names = json.loads(self._path.read_text())
        except FileNotFoundError:
            names = []
        return [_DEFAULT, *(name for name in names if name != _DEFAULT)]

    def _write(self, names: list[str]) -> None:
        write_atomically(self._path, json.dumps(sorted(set(names) - {_DEFAULT})))
