"""Types of CSV columns.

A column has a type other than text only if its values can be written back as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from fletcher.errors import ColumnTypeError
from fletcher.readers.columns import Selection


@dataclass(frozen=True, slots=True)
class _Form:
    """A type, and the way in which a file writes its values.

    Attributes:
        kind: The type.
        pattern: Regular expression of the texts in this form, as Arrow also reads others.
        write: Writes an array of the type as texts.
    """

    kind: pa.DataType
    pattern: str
    write: Callable[[pa.Array], pa.Array]

    def read(self, texts: pa.Array) -> pa.Array | None:
        """The values of some texts; None unless they are written back as the same texts."""
        if pc.all(pc.match_substring_regex(texts, self.pattern)).as_py() is False:
            return None
        try:
            values = pc.cast(texts, self.kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return None
        same = pc.all(pc.equal(self.write(values), texts)).as_py()
        return None if same is False else values


def _plain(values: pa.Array) -> pa.Array:
    return pc.cast(values, pa.utf8())


def _with_point(values: pa.Array) -> pa.Array:
    """Floats as Python writes them: whole numbers end in `.0`."""
    texts = _plain(values)
    whole = pc.match_substring_regex(texts, r"^-?\d+$")
    return pc.if_else(whole, pc.binary_join_element_wise(texts, "0", "."), texts)


def _with_t(values: pa.Array) -> pa.Array:
    return pc.replace_substring(_plain(values), " ", "T")


def _title(values: pa.Array) -> pa.Array:
    return pc.utf8_capitalize(_plain(values))


def _upper(values: pa.Array) -> pa.Array:
    return pc.utf8_upper(_plain(values))


_NUMBER = r"^-?\d"
# Python has no year 0.
_TIME = r"^(?:000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})-\d\d-\d\d"
_FORMS: tuple[_Form, ...] = (
    *(_Form(pa.bool_(), "(?i)^(true|false)$", write) for write in (_plain, _title, _upper)),
    _Form(pa.int64(), _NUMBER, _plain),
    *(_Form(pa.float64(), _NUMBER, write) for write in (_plain, _with_point)),
    _Form(pa.date32(), _TIME, _plain),
    *(
        _Form(pa.timestamp(unit, zone), _TIME, write)
        for unit, zone, write in itertools.product(
            ("s", "ms", "us", "ns"), (None, "UTC"), (_plain, _with_t)
        )
    ),
)


class CsvTypes:
    """Types of the columns of CSV files, by all values that were seen.

    Text and ids are strings. A value of another column without quotes or content is null.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._forms: dict[str, tuple[_Form, ...]] = {}
        self._has_values: set[str] = set()

    @property
    def needed(self) -> bool:
        """Whether a column's type depends on its values."""
        return bool(self._selection.carried)

    def observe_texts(self, batch: pa.RecordBatch) -> None:
        """Take texts into account."""
        for name, texts in zip(batch.schema.names, batch.columns, strict=True):
            if texts.null_count == len(texts):
                continue
            known = self._forms.get(name, self._possible(name))
            self._has_values.add(name)
            self._forms[name] = tuple(form for form in known if form.read(texts) is not None)

    def schema(self, names: list[str]) -> pa.Schema:
        """The types of some columns."""
        return pa.schema({name: self._kind(name) for name in names})

    def convert(self, batch: pa.RecordBatch, where: str, row_first: int) -> pa.RecordBatch:
        """The texts of a batch as values.

        Raises:
            ColumnTypeError: A text was not observed, and its column's type cannot keep it.
        """
        columns = {}
        for name, texts in zip(batch.schema.names, batch.columns, strict=True):
            kind = self._kind(name)
            if pa.types.is_string(kind):
                columns[name] = texts
                continue
            if texts.null_count == len(texts):
                columns[name] = pa.nulls(len(texts), kind)
                continue
            values = self._forms[name][0].read(texts) if self._forms.get(name) else None
            if values is None:
                self._refuse(name, texts, where, row_first)
            columns[name] = values
        return pa.RecordBatch.from_pydict(columns)

    def _possible(self, name: str) -> tuple[_Form, ...]:
        is_string = self._selection.is_id(name) or name in self._selection.text_columns
        return () if is_string else _FORMS

    def _kind(self, name: str) -> pa.DataType:
        if not self._possible(name):
            return pa.utf8()
        if name not in self._has_values:
            return pa.null()
        forms = self._forms[name]
        return forms[0].kind if forms else pa.utf8()

    def _refuse(self, name: str, texts: pa.Array, where: str, row_first: int) -> None:
        kind = self._kind(name)
        read: Callable[[pa.Array], pa.Array | None] = (
            self._forms[name][0].read if self._forms.get(name) else lambda _: None
        )
        rows = (row for row in range(len(texts)) if texts[row].is_valid)
        row = next(row for row in rows if read(texts.slice(row, 1)) is None)
        raise ColumnTypeError(
            f"{where}: row {row_first + row + 1}: `{name}` is {texts[row].as_py()[:100]!r}, which "
            f"{kind} cannot keep as it is written; the types of a pipe are those of its first "
            "rows: give a file",
            field=name,
        )
