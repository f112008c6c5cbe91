"""Another program that drops datasets and damages files while the server runs."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from fletcher.stores.address import open_store
from fletcher.stores.lance.repair import newest_version
from fletcher.stores.staging import INCARNATION, with_incarnation
from tests.faults.launching import Process
from tests.faults.ledger import FOREIGN, MOST_ROWS
from tests.integration.processes import eventually

_SYNCED = "_fletcher_synced"


@dataclass
class Damage:
    """A data file that is lost or cut.

    Attributes:
        dataset: The dataset of the file.
        path: The file.
        kept: Path at which the complete file is kept.
        cut: Whether the file was cut. Otherwise it was moved away.
        files: Sizes of the dataset's other files before the damage.
        synced: Newest version that was synced before the damage.
    """

    dataset: str
    path: Path
    kept: Path
    cut: bool
    files: dict[Path, int]
    synced: int

    @property
    def is_silent(self) -> bool:
        """Whether nobody can notice: nothing lists the files of a Parquet dataset."""
        return self.path.suffix == ".parquet" and not self.cut


class Intruder:
    """Drops and damages datasets in one folder.

    Args:
        scheme: `lance` or `parquet`.
        vectors: The store's folder.
        hidden: Folder for files that are moved away.

    Attributes:
        damage: The damaged file.
    """

    def __init__(self, scheme: str, vectors: Path, hidden: Path) -> None:
        self._scheme = scheme
        self._vectors = vectors
        self._hidden = hidden
        self.damage: Damage | None = None

    def folder_of(self, dataset: str) -> Path:
        return self._vectors / (f"{dataset}.lance" if self._scheme == "lance" else dataset)

    def schema_of(self, dataset: str) -> pa.Schema | None:
        with self._opened() as store:
            info = store.dataset(dataset)
        return None if info is None else info.schema

    def drop(self, dataset: str) -> None:
        """Delete a dataset's folder."""
        shutil.rmtree(self.folder_of(dataset))

    def make_anew(self, dataset: str, schema: pa.Schema, num_rows: int, *, named: bool) -> None:
        """Make a dataset with some rows of another program.

        `named`: give the dataset another incarnation, as another Fletcher server would.
        """
        metadata = {key: one for key, one in schema.metadata.items() if key != INCARNATION}
        schema = schema.with_metadata(metadata)
        if named:
            schema = with_incarnation(dataset, schema)
        rows = foreign_rows(schema, num_rows)
        if self._scheme == "lance":
            database = lancedb.connect(str(self._vectors))
            database.create_table(dataset, data=rows, schema=schema)
            return
        folder = self.folder_of(dataset)
        folder.mkdir()
        pq.write_metadata(schema, folder / "_common_metadata")
        pq.write_table(pa.Table.from_batches([rows]), folder / f"foreign:0-{num_rows - 1}.parquet")

    def damage_file(self, dataset: str, number: int) -> bool:
        """Lose or cut one of a dataset's files; False if it has none."""
        assert self.damage is None
        folder = self.folder_of(dataset)
        pattern = "data/*.lance" if self._scheme == "lance" else "*.parquet"
        paths = sorted(folder.glob(pattern))
        if not paths:
            return False
        chance = random.Random(number)
        path, cut = chance.choice(paths), chance.random() < 0.5
        files = {
            one: one.stat().st_size
            for one in folder.rglob("*")
            if one.is_file() and one != path and one.suffix in (".lance", ".manifest", ".parquet")
        }
        synced, _ = newest_version(folder)
        with contextlib.suppress(FileNotFoundError, ValueError):
            synced = int((folder / _SYNCED).read_bytes())
        self._hidden.mkdir(exist_ok=True)
        kept = self._hidden / path.name
        if cut:
            shutil.copyfile(path, kept)
            with path.open("r+b") as file:
                file.truncate(chance.randrange(kept.stat().st_size))
        else:
            path.rename(kept)
        self.damage = Damage(dataset, path, kept, cut, files, synced)
        return True

    def check(self) -> None:
        """Check that the damage destroyed nothing else.

        Raises:
            AssertionError: A file is missing, has another size or another name.
        """
        damage = self.damage
        if damage is None:
            return
        for path, size in damage.files.items():
            if path.suffix == ".manifest" and _version(path) > damage.synced:
                continue  # this version may have been incomplete before the damage
            assert path.exists(), f"{path} is gone, {damage.path} was damaged"
            assert path.stat().st_size == size, f"{path} was changed, {damage.path} was damaged"
        with self._opened() as store:
            store.datasets()  # the other datasets can be listed

    def repair(self) -> None:
        """Put the damaged file back."""
        damage, self.damage = self.damage, None
        if damage is None or not damage.path.parent.exists():
            return
        if damage.cut:
            with damage.path.open("r+b") as file:
                file.write(damage.kept.read_bytes())
        else:
            damage.kept.rename(damage.path)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        with contextlib.closing(open_store(f"{self._scheme}:{self._vectors}")) as store:
            yield store


@contextlib.contextmanager
def stopped(process: Process) -> Iterator[None]:
    """Stop a process during the block."""
    process.send(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")

    def is_stopped() -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states = [path.read_text() for path in tasks.glob("*/stat")]
            return all(state.rpartition(")")[2].split()[0] in "TtZX" for state in states)
        return False

    try:
        if psutil.pid_exists(process.pid):
            eventually(is_stopped, f"process {process.pid} stops")
        yield
    finally:
        process.send(signal.SIGCONT)


def foreign_rows(schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    """Rows of another program for a dataset. Their `n` differs from all uploads' rows."""
    columns: list[pa.Array] = []
    for field in schema:
        if field.name == "n":
            values = pa.array([FOREIGN * MOST_ROWS + row for row in range(num_rows)], field.type)
        elif field.name == "id":
            values = pa.array(range(num_rows), field.type)
        elif field.name == "batch_key":
            values = pa.array([f"foreign:0-{num_rows - 1}"] * num_rows, field.type)
        elif field.name == "vector":
            values = pa.array([[1.0] + [0.0] * (field.type.list_size - 1)] * num_rows, field.type)
        elif field.name == "timestamp":
            values = pa.array([0] * num_rows, pa.int64()).cast(field.type)
        elif field.nullable:
            values = pa.nulls(num_rows, field.type)
        else:
            values = pa.array([{"text": ""}.get(field.name, 0)] * num_rows, field.type)
        columns.append(values)
    return pa.record_batch(columns, schema=schema)


def _version(path: Path) -> int:
    number = int(path.stem) if path.stem.isdecimal() else 0
    return (1 << 64) - 1 - number if number >= 1 << 63 else number
