"""LanceDB table bound to one open folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fletcher.util.locks import is_at


class PinnedTable:
    """A LanceDB table for a writer, opened through a link to its open folder.

    Lance looks up the folder by name at each commit. Another program may have deleted the folder,
    and made another table of the same name. Lance would then create the folder again, or commit a
    version to the new table without that table's rows. Through the link, Lance still writes to the
    deleted folder, so the write fails.

    Args:
        folder: The table's folder `NAME.lance`.
        connect: Opens a database folder.
    """

    def __init__(self, folder: Path, connect: Callable[[Path], Any]) -> None:
        self._folder = folder
        with ExitStack() as undo:
            # While this is open, no other folder has the same inode.
            self._opened = os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, self._opened)
            database = _make_folder(beside=folder)
            undo.callback(shutil.rmtree, database, ignore_errors=True)
            (database / folder.name).symlink_to(f"/proc/self/fd/{self._opened}")
            self.table = connect(database).open_table(folder.stem)
            self._undo = undo.pop_all()

    @property
    def is_current(self) -> bool:
        """Whether the folder's name still leads to the opened folder."""
        return is_at(self._opened, self._folder)

    def close(self) -> None:
        """Remove the link. Idempotent."""
        self._undo.close()


def _make_folder(beside: Path) -> Path:
    """Make a folder in the temporary directory, or beside the table if that fails."""
    try:
        return Path(tempfile.mkdtemp(prefix="fletcher-"))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=".fletcher-", dir=beside.parent))
