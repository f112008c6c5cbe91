"""Random uploads to a Longbow, of changing columns, types, widths and modes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fletcher.core.command import EmbedCommand
from tests.doubles.random_tables import random_value
from tests.doubles.table_values import plain

WIDTH = 32  # of the model `tiny`
DATASETS = ("articles", "notes", "x-1")
_WORDS = "debian packages hold programs that people use every day and night".split()
_IDS: dict[str, pa.DataType | None] = {
    "utf8": pa.utf8(),
    "large_utf8": pa.large_utf8(),
    "utf8_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.utf8()),
    "int64": pa.int64(),
    "int32": pa.int32(),
    "uint64": pa.uint64(),
    "none": None,
}
# Types of each carried column. Some of them are the same in a Longbow.
_COLUMNS: dict[str, tuple[pa.DataType, ...]] = {
    "year": (pa.int32(), pa.int64(), pa.utf8(), pa.float64()),
    "tag": (pa.utf8(), pa.large_utf8(), pa.dictionary(pa.int16(), pa.utf8()), pa.bool_()),
    "day": (pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.date32(), pa.timestamp("s")),
    "data": (pa.binary(), pa.list_(pa.int32()), pa.struct([("a", pa.int8())]), pa.uint8()),
    "ü b": (pa.decimal128(9, 2), pa.float32(), pa.float16(), pa.time64("us"), pa.int16()),
}


@dataclass(frozen=True)
class Shape:
    """Columns of an upload's rows, and the options that decide about vectors.

    Attributes:
        ids: Type of the ids, a key of `_IDS`.
        columns: The carried columns and their types, beside `n`.
        dims: As in the command.
        prompt: As in the command.
        include_text: As in the command.
    """

    ids: str
    columns: tuple[tuple[str, pa.DataType], ...]
    dims: int
    prompt: str
    include_text: bool

    @property
    def carried(self) -> tuple[str, ...]:
        return ("n", *(name for name, _ in self.columns))


@dataclass
class Sent:
    """An upload.

    Attributes:
        upload_id: Its name.
        dataset: Where it goes.
        shape: Its columns.
        table: Its rows. `n` is a row's number, which no row of another upload has.
        options: Further fields of the command.
        is_file: It is sent by a command. Types of a file, and so of the upload, may differ.
        is_promised: All rows that can be stored were reported as stored.
    """

    upload_id: str
    dataset: str
    shape: Shape
    table: pa.Table
    options: dict[str, str]
    is_file: bool = False
    is_promised: bool = False

    @property
    def command(self) -> EmbedCommand:
        return EmbedCommand(
            dataset=self.dataset,
            upload_id=self.upload_id,
            columns=self.shape.carried,
            dims=self.shape.dims,
            prompt=self.shape.prompt,
            include_text=self.shape.include_text,
            **self.options,  # type: ignore[arg-type]
        )

    def argv(self, folder: Path) -> list[str]:
        """`fletcher ingest` of these rows, without a store; writes them to a file."""
        file = folder / f"{self.upload_id}.{'parquet' if '-' in self.upload_id else 'arrow'}"
        if file.suffix == ".parquet":
            pq.write_table(self.table, file)
        else:
            with pa.ipc.new_file(str(file), self.table.schema) as writer:
                writer.write_table(self.table)
        flags = {
            "columns": ",".join(self.shape.carried),
            "dataset": self.dataset,
            "upload-id": self.upload_id,
            "dims": str(self.shape.dims),
            "prompt": self.shape.prompt,
            **{name: text for name, text in self.options.items() if name != "durability"},
        }
        given = [part for name, text in flags.items() for part in (f"--{name}", text)]
        no_text = [] if self.shape.include_text else ["--no-text"]
        return ["ingest", str(file), *given, *no_text, "--json"]

    @property
    def is_refused(self) -> bool:
        """Whether no Longbow takes it."""
        mode, dtype = self.options.get("mode", "append"), self.options.get("dtype", "float32")
        needed = {"id": self.shape.ids != "none", "text": self.shape.include_text}
        has_needed = needed.get(self.options.get("dedupe", ""), True)
        return mode != "append" or dtype not in ("float32", "float16") or not has_needed

    def is_good(self, row: int) -> bool:
        """Whether a row has a text and an id."""
        columns = [self.table[name] for name in ("text", "id") if name in self.table.schema.names]
        return all(column[row].is_valid for column in columns)

    def values(self, row: int) -> dict[str, Any]:
        """A row as it has to be stored, without its vector."""
        names = [*self.shape.carried, *(["text"] if self.shape.include_text else [])]
        found = {name: plain(self.table[name][row]) for name in names}
        has_ids = "id" in self.table.schema.names
        found["id"] = plain(self.table["id"][row]) if has_ids else f"{self.upload_id}:{row}"
        return found


class Uploads:
    """Draws uploads.

    Attributes:
        sent: All uploads so far.
        touched: Datasets whose columns something else may have declared.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._num_drawn = self._num_rows = 0
        self.sent: list[Sent] = []
        self.touched: set[str] = set()
        self._shapes: dict[str, Shape] = {}  # of stored rows, by dataset

    def draw(self) -> Sent:
        """An upload, often of the same shape as the dataset's rows, or of a similar one."""
        dataset = self._chance.choices(DATASETS, (5, 2, 1))[0]
        shape = self._shapes.get(dataset) or self._shape()
        chosen = self._chance.random()
        if chosen < 0.1:
            shape = self._shape()
        elif chosen < 0.5:
            shape = self._changed(shape)
        self._num_drawn += 1
        number = self._num_drawn
        sent = Sent(f"u{'-' * (number % 2)}{number}", dataset, shape, self._table(shape), {})
        sent.options = self._options()
        self.sent.append(sent)
        return sent

    def must_be_taken(self, sent: Sent) -> bool:
        """Whether nothing speaks against an upload."""
        others = [one for one in self.sent if one.dataset == sent.dataset and one is not sent]
        known = self._shapes.get(sent.dataset)
        is_new = known is None and not others and sent.dataset not in self.touched
        return not sent.is_refused and (known == sent.shape or is_new)

    def forget(self, sent: Sent) -> None:
        """Forget an upload of which no row is to be stored."""
        self.sent.remove(sent)
        self.touched.add(sent.dataset)

    def note_promised(self, sent: Sent) -> None:
        """Note that all rows of an upload were reported as stored."""
        sent.is_promised = True
        if any(map(sent.is_good, range(sent.table.num_rows))):
            self._shapes.setdefault(sent.dataset, sent.shape)

    def numbers(self, count: int) -> list[int]:
        """Numbers of rows that no row has."""
        first, self._num_rows = self._num_rows, self._num_rows + count
        return list(range(first, first + count))

    def _shape(self) -> Shape:
        chance = self._chance
        names = chance.sample(sorted(_COLUMNS), chance.randint(0, 3))
        columns = tuple((name, chance.choice(_COLUMNS[name])) for name in names)
        dims, prompt = chance.choice([WIDTH, WIDTH, 16, 8]), chance.choice(["", "", "a note: "])
        ids = chance.choices(list(_IDS), (6, 2, 1, 1, 4, 1, 2, 2))[0]
        return Shape(ids, columns, dims, prompt, chance.random() < 0.8)

    def _changed(self, shape: Shape) -> Shape:
        """Another shape, which has one thing from another one."""
        other = self._shape()
        name = self._chance.choice(["ids", "columns", "columns", "dims", "prompt", "include_text"])
        if name != "columns" or self._chance.random() < 0.3:
            return replace(shape, **{name: getattr(other, name)})
        columns = dict(shape.columns)
        one = self._chance.choice(sorted(_COLUMNS))
        if one in columns and self._chance.random() < 0.4:
            del columns[one]
        else:
            columns[one] = self._chance.choice(_COLUMNS[one])
        return replace(shape, columns=tuple(columns.items()))

    def _options(self) -> dict[str, str]:
        draw = self._chance.random
        options = {"durability": self._chance.choice(["journal", "store", "store"])}
        if draw() < 0.2:
            options["mode"] = self._chance.choice(["upsert", "overwrite", "delta"])
        elif draw() < 0.15:
            options["dedupe"] = self._chance.choice(["id", "text"])
        if draw() < 0.3:
            options["dtype"] = self._chance.choice(["float16", "float32", "int8", "ubinary"])
        return options

    def _table(self, shape: Shape) -> pa.Table:
        chance = self._chance
        numbers = self.numbers(chance.choice([1, 2, 7, 30]))
        flaws = 0.1 if chance.random() < 0.15 else 0.0
        ends = [" ".join(_WORDS[n % 5 : n % 5 + n % 4]) for n in numbers]
        texts = [
            None if chance.random() < flaws else f"row {n} {end}"
            for n, end in zip(numbers, ends, strict=True)
        ]
        columns: dict[str, Any] = {"text": texts, "n": numbers}
        kind = _IDS[shape.ids]
        if kind is not None:
            base = 1 << 63 if shape.ids == "uint64" and chance.random() < 0.5 else 0
            ids = [base + n if pa.types.is_integer(kind) else f"id {n}" for n in numbers]
            given = [None if chance.random() < flaws else one for one in ids]
            columns["id"] = pa.array(given, kind)
        for name, one in shape.columns:
            is_coded = pa.types.is_dictionary(one)
            plain_kind = one.value_type if is_coded else one
            values = pa.array([random_value(plain_kind, chance) for _ in numbers], plain_kind)
            columns[name] = values.dictionary_encode().cast(one) if is_coded else values
        return pa.table(columns)
