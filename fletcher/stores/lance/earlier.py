"""Reading of a table whose newest versions are incomplete after a power loss.

Lance opens a table at its newest version first, and fails if that is incomplete. Only a writer may
rename files of the table. A reader therefore gets a folder of links to the table's files, with the
manifest of the newest complete version.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


class EarlierVersions:
    """Folders of links, by table. Not thread-safe. `close` deletes them."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._made: dict[Path, Path] = {}

    def folder_of(self, manifest: Path) -> Path:
        """A database folder with the table at the version of `manifest`, under its name."""
        if manifest in self._made:
            return self._made[manifest]
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="fletcher-"))
        table = manifest.parent.parent
        database = Path(tempfile.mkdtemp(dir=self._root))
        view = database / table.name
        (view / "_versions").mkdir(parents=True)
        for path in table.iterdir():
            if path.is_dir() and path.name != "_versions":
                (view / path.name).symlink_to(path)
        shutil.copyfile(manifest, view / "_versions" / manifest.name)
        self._made[manifest] = database
        return database

    def close(self) -> None:
        root, self._root = self._root, None
        self._made.clear()
        if root is not None:
            shutil.rmtree(root, ignore_errors=True)
