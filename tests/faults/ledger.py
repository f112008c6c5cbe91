"""Compares the rows that were sent, acknowledged and stored.

At every moment acknowledged durable ⊆ stored or journaled ⊆ sent, each row once. After a resume to
the end all three are equal. Each client writes a diary, a file that outlives it: rows before they
are sent, and acknowledgements when they arrive.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.delivery.journal.root import journal_folders
from fletcher.delivery.journal.segment import REJECTED, WAITING, Segment, read_segments
from fletcher.delivery.journal.settled_groups import SettledGroups
from tests.faults import poison
from tests.faults.overwrites import Overwritten
from tests.faults.rewrites import SCHEMA, Rewritten

MAX_ROW_BYTES = 1024
MOST_ROWS = 1 << 32
POINT = pa.field("point", pa.list_(pa.float32(), 2))
FOREIGN = 1 << 20  # stands for the upload's number in rows of another program
_WORDS = "debian packages hold programs that people use every day and night".split()


@dataclass(frozen=True)
class Upload:
    """One upload; all its rows follow from these few numbers.

    Attributes:
        number: Names it.
        dataset: Where it goes.
        num_rows: All its rows.
        batch_rows: Rows of a batch.
        durability: As in the command.
        flawed: Some rows have no text, no id, or too much text.
        poisoned: The model gives no finite vector for some rows.
        points: A carried column has points, some of which are not finite.
    """

    number: int
    dataset: str
    num_rows: int
    batch_rows: int
    durability: str
    flawed: bool
    poisoned: bool = False
    points: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The carried columns."""
        return ("n", "point") if self.points else ("n",)

    @property
    def schema(self) -> pa.Schema:
        return SCHEMA.append(POINT) if self.points else SCHEMA

    @property
    def upload_id(self) -> str:
        return f"upload-{self.number}"

    def text_of(self, row: int) -> str:
        return " ".join([*_WORDS[row % 7 : row % 7 + row % 5], str(row), str(self.number)])

    def is_flawed(self, row: int) -> bool:
        """Whether the row gets an error and no vector."""
        flaw = self.flawed and row % 31 in (7, 19, 23)
        return flaw or (self.poisoned and row % 29 == 11)

    def point_of(self, row: int) -> list[float] | None:
        if not self.points or row % 5 == 3:
            return None
        return [math.nan if row % 37 == 5 else float(row), float(self.number)]

    @property
    def num_flawed(self) -> int:
        return sum(map(self.is_flawed, range(self.num_rows)))

    def batch(self, first: int, last: int) -> pa.RecordBatch:
        """Rows first to last, the last not included."""
        ids: list[int | None] = []
        texts: list[str | None] = []
        for row in range(first, last):
            flaw = row % 31 if self.flawed else 0
            ids.append(None if flaw == 19 else row)
            long = "x" * (MAX_ROW_BYTES + 1) if flaw == 23 else self.text_of(row)
            good = poison.TEXT if self.poisoned and row % 29 == 11 else long
            texts.append(None if flaw == 7 else good)
        numbers = np.arange(first, last) + self.number * MOST_ROWS
        columns = {"id": ids, "text": texts, "n": numbers}
        if self.points:
            columns["point"] = [self.point_of(row) for row in range(first, last)]
        return pa.record_batch(columns, self.schema)

    def batches(self, first: int) -> Iterator[pa.RecordBatch]:
        """All rows from `first` on."""
        for start in range(first, self.num_rows, self.batch_rows):
            yield self.batch(start, min(start + self.batch_rows, self.num_rows))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class UnreadableError(Exception):
    """A dataset cannot be read, because one of its files was damaged."""


class Diary:
    """A client's diary; each line is written at once."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **entry: Any) -> None:
        os.write(self._file, json.dumps(entry).encode() + b"\n")


@dataclass
class Holdings:
    """State of all rows at one moment.

    Attributes:
        durable: By upload: whether each row was acknowledged as durable.
        journaled: By upload: whether each row is in the journal.
        refused: By upload: whether each row is in a file of refused rows.
        stored: By upload: how often each row is in the store.
    """

    durable: dict[int, np.ndarray]
    journaled: dict[int, np.ndarray]
    refused: dict[int, np.ndarray]
    stored: dict[int, np.ndarray]


class Ledger:
    """Checks the promises to the clients of some uploads.

    Args:
        uploads: The uploads.
        folder: Folder of the clients' diaries.
        home: The server's home, for its journal.
        read_store: Returns a dataset's rows in the store; None: there is no dataset.
        null_vectors: The store takes rows without a vector.
        rewritten: Rows of another dataset that are replaced again and again.
        overwritten: Checks another dataset, which is replaced as a whole again and again.

    Attributes:
        may_give_up: Workers died more than once, so that rows that may have killed them fail.
        num_given_up: Good rows that have no vector at the last look; in a store without null
            vectors, rows that are settled and not stored.
        may_double: The store appends whatever comes, and may still have been appending when it was
            asked for its rows.
        num_doubled: Rows that are stored more than once at the last check.
        unreadable: Datasets with a damaged file, at the last look.
        foreign: Number of rows of another program, by dataset.
    """

    def __init__(
        self,
        uploads: Sequence[Upload],
        folder: Path,
        *,
        home: Path,
        read_store: Callable[[str], pa.Table | None],
        null_vectors: bool,
        rewritten: Rewritten | None = None,
        overwritten: Overwritten | None = None,
    ) -> None:
        self.uploads = {upload.number: upload for upload in uploads}
        self._folder = folder
        self._home = home
        self._read_store = read_store
        self._null_vectors = null_vectors
        self.rewritten = rewritten
        self.overwritten = overwritten
        self.unreadable: set[str] = set()
        self.foreign: dict[str, int] = {}
        # By upload: rows that somebody may have dropped, and the number of diaries at that time.
        self._dropped: dict[int, np.ndarray] = {}
        self._told_since: dict[int, int] = {}
        self._num_diaries = 0
        self.may_give_up = False
        self.num_given_up = 0
        self.may_double = False
        self.num_doubled = 0

    def new_diary(self, upload: Upload) -> Path:
        """Path of the diary of another client of an upload."""
        self._num_diaries += 1
        return self._folder / f"{upload.number}-{self._num_diaries:03d}.diary"

    def entries(self, upload: Upload) -> Iterator[dict[str, Any]]:
        """All entries of its clients' diaries."""
        for path in sorted(self._folder.glob(f"{upload.number}-*.diary")):
            yield from entries(path)

    def sent(self, upload: Upload) -> np.ndarray:
        """Rows that may have left a client."""
        rows = np.zeros(upload.num_rows, bool)
        for entry in self.entries(upload):
            if "sent" in entry:
                rows[slice(*entry["sent"])] = True
        return rows

    def durable(self, upload: Upload) -> np.ndarray:
        """Rows that were acknowledged as durable, and that nobody has dropped since.

        Dropped rows count again if a client that began after the drop was told that they are
        durable.
        """
        since = self._told_since.get(upload.number, 0)
        earlier = self._durable(upload, lambda number: number <= since)
        if upload.number in self._dropped:
            earlier &= ~self._dropped[upload.number]
        return earlier | self._durable(upload, lambda number: number > since)

    def _durable(self, upload: Upload, is_wanted: Callable[[int], bool]) -> np.ndarray:
        rows = np.zeros(upload.num_rows, bool)
        for path in self._folder.glob(f"{upload.number}-*.diary"):
            if upload.durability == "memory" or not is_wanted(int(path.stem.partition("-")[2])):
                continue
            for entry in entries(path):
                if "prefix" in entry:
                    rows[: entry["prefix"]] = True
                if "range" in entry:
                    rows[slice(*entry["range"])] = True
        return rows

    def note_dropped(self, dataset: str, *, racing: bool) -> None:
        """Note that somebody drops a dataset, whose rows are gone.

        `racing`: the server may be storing rows at the same time, so any row that was sent until
        now may be gone. Otherwise only the rows that are stored now are gone.
        """
        stored = {} if racing else self._stored(dataset)
        for number, upload in self.uploads.items():
            if upload.dataset == dataset:
                since = self._told_since.get(number, 0)
                told = self._durable(upload, lambda one, since=since: one > since)
                gone = self._dropped.get(number, np.zeros(upload.num_rows, bool)) & ~told
                self._dropped[number] = gone | (self.sent(upload) if racing else stored[number] > 0)
                self._told_since[number] = self._num_diaries
        self.foreign[dataset] = 0

    def was_dropped(self, dataset: str) -> bool:
        return dataset in self.foreign

    def look(self) -> Holdings:
        """The state of all rows now.

        Rows go from the journal to the store, so the journal is read first.
        """
        self.num_given_up = 0
        uploads = self.uploads.values()
        durable = {upload.number: self.durable(upload) for upload in uploads}
        journaled = self._journaled(WAITING)
        refused = self._journaled(REJECTED)
        self.unreadable = set()
        stored: dict[int, np.ndarray] = {}
        for dataset in sorted({upload.dataset for upload in uploads}):
            stored |= self._stored(dataset)
        for upload in uploads:
            self.num_given_up += int(self._given_up(upload, stored[upload.number]).sum())
        return Holdings(durable, journaled, refused, stored)

    def _stored(self, dataset: str) -> dict[int, np.ndarray]:
        """How often each row is stored, by upload to a dataset."""
        stored = {
            number: np.zeros(upload.num_rows, np.int64)
            for number, upload in self.uploads.items()
            if upload.dataset == dataset
        }
        try:
            table = self._read_store(dataset)
        except UnreadableError:
            self.unreadable.add(dataset)
            return stored
        num_foreign = 0
        if table is not None:
            num_foreign = self._count(dataset, table, stored)
        expected = self.foreign.get(dataset, 0)
        assert num_foreign == expected, f"{num_foreign} of {expected} rows of another program"
        return stored

    def check(self) -> Holdings:
        """Check what must hold at any moment.

        Raises:
            AssertionError: Rows are lost, doubled, changed, or were never sent, or older ones back.
        """
        if self.rewritten is not None:
            self.rewritten.check()
        if self.overwritten is not None:
            self.overwritten.check()
        now = self.look()
        for number, upload in self.uploads.items():
            if upload.dataset in self.unreadable:
                continue
            stored, journaled = now.stored[number], now.journaled[number]
            if self.may_double:
                self.num_doubled = sum(int((rows > 1).sum()) for rows in now.stored.values())
            else:
                self._assert_none(upload, stored > 1, "are stored more than once")
            refused = now.refused[number]
            lost = now.durable[number] & ~journaled & ~refused & self._missing(upload, stored)
            self._assert_none(upload, lost, "were acknowledged as durable and are nowhere")
            not_sent = (journaled | (stored > 0)) & ~self.sent(upload)
            self._assert_none(upload, not_sent, "are there and were never sent")
        return now

    def check_end(self) -> None:
        """Check what must hold at the end: each row is stored once, the journal empty.

        Raises:
            AssertionError: It does not hold.
        """
        now = self.check()
        for number, upload in self.uploads.items():
            missing = self._missing(upload, now.stored[number])
            self._assert_none(upload, missing, "are not stored in the end")
            self._assert_none(upload, now.journaled[number], "are left in the journal")
        rejected = list(self._home.glob(f"journal/*/*/*{REJECTED}"))
        assert not rejected, f"the store refused rows for good: {rejected}"

    def refused(self, upload: Upload) -> np.ndarray:
        """Rows that the store refused, and that nobody has sent again."""
        now = self.look()
        number = upload.number
        return now.refused[number] & ~now.journaled[number] & (now.stored[number] == 0)

    def all_stored(self) -> bool:
        """Whether no row is missing in the store."""
        if self.rewritten is not None and not self.rewritten.is_done:
            return False
        if self.overwritten is not None and not self.overwritten.is_done:
            return False
        stored = self.look().stored
        return not any(
            self._missing(upload, stored[number]).any() for number, upload in self.uploads.items()
        )

    def _journaled(self, suffix: str) -> dict[int, np.ndarray]:
        found = {number: np.zeros(upload.num_rows, bool) for number, upload in self.uploads.items()}
        datasets = {upload.dataset for upload in self.uploads.values()}
        for _, dataset, folder in journal_folders(self._home / "journal"):
            if dataset not in datasets:
                continue
            # Segments that vanish meanwhile are left out: their rows are stored.
            for _, segment in read_segments(folder.glob(f"*{suffix}")):
                for group in segment.groups if isinstance(segment, Segment) else ():
                    if group.settled:
                        continue
                    number = int(group.info.upload_id.rpartition("-")[2])
                    assert self.uploads[number].dataset == dataset
                    found[number][group.info.first : group.info.last + 1] = True
        return found

    def _count(self, dataset: str, table: pa.Table, stored: dict[int, np.ndarray]) -> int:
        """Count a dataset's rows, and check the content of each.

        Returns the number of rows of another program.
        """
        foreign = pc.greater_equal(table.column("n"), FOREIGN * MOST_ROWS)
        kept = sorted(table.filter(foreign).column("n").to_pylist())
        expected = [FOREIGN * MOST_ROWS + row for row in range(len(kept))]
        assert kept == expected, f"rows of another program in {dataset}: {kept}"
        table = table.filter(pc.invert(foreign))
        numbers = table.column("n").to_numpy()
        texts = table.column("text").to_pylist()
        ids = table.column("id").to_pylist()
        without = table.column("vector").is_null().to_pylist()
        points: list[Any] = [None] * table.num_rows
        if "point" in table.schema.names:
            points = table.column("point").to_pylist()
        rows_of = zip(numbers.tolist(), texts, ids, without, points, strict=True)
        for n, text, row_id, no_vector, point in rows_of:
            number, row = divmod(n, MOST_ROWS)
            upload = self.uploads[number]
            where = f"row {row} of {upload}"
            assert upload.dataset == dataset, f"{where} is in {dataset}"
            flawed = upload.is_flawed(row)
            self.num_given_up += no_vector and not flawed
            assert no_vector or not flawed, f"{where} has a vector"
            assert no_vector == flawed or self.may_give_up, f"{where} has no vector"
            if not flawed:
                assert (text, row_id) == (upload.text_of(row), row), f"{where}: {text!r}, {row_id}"
            # Compared as text, because NaN does not equal itself.
            assert repr(point) == repr(upload.point_of(row)), f"{where}: {point}"
            stored[number][row] += 1
        return len(kept)

    def _missing(self, upload: Upload, stored: np.ndarray) -> np.ndarray:
        """Rows that the store could hold and lacks."""
        if self._null_vectors:
            return stored == 0
        return self._absent(upload, stored) & ~self._given_up(upload, stored)

    def _absent(self, upload: Upload, stored: np.ndarray) -> np.ndarray:
        """Good rows that a store without null vectors lacks."""
        flawed = [upload.is_flawed(row) for row in range(upload.num_rows)]
        return (stored == 0) & ~np.array(flawed, bool)

    def _given_up(self, upload: Upload, stored: np.ndarray) -> np.ndarray:
        """Good rows that are settled without a vector: their workers died more than once."""
        rows = np.zeros(upload.num_rows, bool)
        if self._null_vectors or not self.may_give_up:
            return rows
        for _, dataset, folder in journal_folders(self._home / "journal"):
            if dataset == upload.dataset:
                for first, last in SettledGroups(folder).ranges_of(upload.upload_id):
                    rows[first : last + 1] = True
        return rows & self._absent(upload, stored)

    def _assert_none(self, upload: Upload, rows: np.ndarray, what: str) -> None:
        wrong = np.flatnonzero(rows)
        assert not len(wrong), f"{len(wrong)} rows of {upload} {what}: {_brief(wrong)}"


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a diary; a client that is killed leaves half a line at most."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _brief(rows: np.ndarray) -> str:
    """Row numbers as text of ranges."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return ", ".join(f"{part[0]}-{part[-1]}" for part in parts[:8])
