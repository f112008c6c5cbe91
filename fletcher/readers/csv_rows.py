"""CSV and TSV files as batches of texts."""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from fletcher.errors import InvalidCommandError, InvalidUtf8Error
from fletcher.readers.columns import Selection
from fletcher.readers.csv_body import CSV_BLOCK_BYTES, CsvBody

MAX_HEADER_BYTES = 8 << 20
_READ_BYTES = 64 << 10
# Text of the row that `CsvBody` appends.
_END = b"(end of file)"


@dataclass(frozen=True, slots=True)
class Dialect:
    """A file's way to separate and quote values.

    Attributes:
        delimiter: One ASCII character.
        quoted: Whether values may be in double quotes. TSV has no quotes, by its registration at
            IANA.
    """

    delimiter: str
    quoted: bool = True

    @classmethod
    def of(cls, delimiter: str | None, *, is_tsv: bool) -> Dialect:
        """The dialect of CSV or TSV; None is the usual delimiter."""
        return cls(delimiter or ("\t" if is_tsv else ","), quoted=not is_tsv)


def check_delimiter(text: str | None) -> str | None:
    r"""The delimiter in an option, which may be written `tab` or `\t`.

    Raises:
        InvalidCommandError: It is not one ASCII character, or a quote or line end.
    """
    if text is None:
        return None
    one = "\t" if text in ("tab", r"\t") else text
    if len(one) != 1 or not one.isascii() or one in '"\r\n\0':
        raise InvalidCommandError(
            f"`delimiter` is {text!r}, expected one ASCII character such as ; or | or tab",
            field="delimiter",
        )
    return one


class CsvFile:
    """A CSV file that is read once: its header, then its rows.

    Attributes:
        name: Name of the file.
        chosen: Names of the columns that are read, in the order of `Selection.pick_names`; empty
            if the file has no header.

    Raises:
        InvalidCommandError: The header is not CSV, or names a chosen column twice.
        InvalidUtf8Error: The header is not UTF-8.
        UnknownColumnError: The header lacks a chosen column.
    """

    def __init__(
        self, stream: io.BufferedReader, name: str, selection: Selection, dialect: Dialect
    ) -> None:
        self._stream = stream
        self.name = name
        self._selection = selection
        self._dialect = dialect
        self._header, self._rest = _read_header(stream, name, dialect)
        if not dialect.quoted and any(one.startswith('"') for one in self._header):
            raise InvalidCommandError(
                f"{name}: its header has quotes, and TSV has none; for quoted values give --format "
                "csv --delimiter tab"
            )
        counts = Counter(self._header)
        self.chosen = (
            selection.pick_names(self._header, name, counts.__getitem__) if self._header else []
        )

    def read_batches(self) -> Iterator[pa.RecordBatch]:
        """The rows as texts. A carried value without quotes and content is null.

        Raises:
            InvalidCommandError: A row has more or fewer values than the header, text after a
                closing quote, or a quote that is never closed, so that the rest of the file would
                be one value.
            InvalidUtf8Error: A value is not UTF-8.
        """
        if not self.chosen or not (self._rest or self._stream.peek(1)):
            return
        # Columns are numbered, as names may be empty or repeated in columns that are not read.
        places = {name: str(self._header.index(name)) for name in self.chosen}
        misfits: list[pa_csv.InvalidRow] = []

        def note_misfit(row: pa_csv.InvalidRow) -> str:
            misfits.append(row)
            return "error"

        options = {
            "read_options": pa_csv.ReadOptions(
                use_threads=False,  # with threads, errors do not name the row
                block_size=CSV_BLOCK_BYTES + len(codecs.BOM_UTF8),
                column_names=[str(number) for number in range(len(self._header))],
            ),
            "parse_options": pa_csv.ParseOptions(
                delimiter=self._dialect.delimiter,
                quote_char='"' if self._dialect.quoted else False,
                newlines_in_values=self._dialect.quoted,
                invalid_row_handler=note_misfit,
            ),
            "convert_options": pa_csv.ConvertOptions(
                column_types=dict.fromkeys(places.values(), pa.binary()),
                include_columns=list(places.values()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        }
        marked = self._header.index(self._selection.text_columns[0])
        last = self._dialect.delimiter.encode().join(
            _END if number == marked else b"" for number in range(len(self._header))
        )
        body = CsvBody(
            self._rest,
            self._stream,
            b"\n" + last + b"\n",
            self._dialect.delimiter,
            quoted=self._dialect.quoted,
        )
        rows = 0
        try:
            with pa_csv.open_csv(body, **options) as reader:
                for batch in self._without_last_row(reader, places, body):
                    texts = {
                        name: self._texts(batch, name, one, rows) for name, one in places.items()
                    }
                    rows += batch.num_rows
                    yield pa.RecordBatch.from_pydict(texts)
        except pa.ArrowInvalid:
            if misfits:
                row = misfits[-1]
                raise InvalidCommandError(
                    f"{self.name}: row {row.number} has {row.actual_columns} values, expected "
                    f"{row.expected_columns} as its header has: {row.text[:100]!r}"
                ) from None
            if body.problem is not None:  # it is in the first row, so pyarrow got no bytes
                raise InvalidCommandError(f"{self.name}: row 1 {body.problem}") from None
            raise

    def _texts(self, batch: pa.RecordBatch, name: str, place: str, rows: int) -> pa.Array:
        raw = batch.column(place)
        try:
            texts = pc.cast(raw, pa.utf8())
        except pa.ArrowInvalid:
            values = enumerate(raw.to_pylist())
            row = next(row for row, value in values if not _is_utf8(value))
            raise InvalidUtf8Error(
                f"{self.name}: row {rows + row + 1}: `{name}` is not UTF-8; if the file has "
                "another encoding, give --encoding",
                field=name,
            ) from None
        return pc.fill_null(texts, "") if name in self._selection.text_columns else texts

    def _without_last_row(
        self, batches: Iterable[pa.RecordBatch], places: dict[str, str], body: CsvBody
    ) -> Iterator[pa.RecordBatch]:
        """The batches without the row that `CsvBody` appended.

        pyarrow accepts the end of a file in place of a closing quote. If a quote is open, the
        appended row becomes part of the quoted value and does not appear as a row.
        """
        held: pa.RecordBatch | None = None
        rows = 0
        for batch in batches:
            if batch.num_rows:
                if held is not None:
                    yield held
                held = batch
                rows += batch.num_rows
        if body.problem is not None:
            raise InvalidCommandError(f"{self.name}: row {rows + 1} {body.problem}")
        place = places[self._selection.text_columns[0]]
        if held is None or held.column(place)[-1].as_py() != _END:
            raise InvalidCommandError(f"{self.name}: row {rows} opens a quote that is never closed")
        if held.num_rows > 1:
            yield held.slice(0, held.num_rows - 1)


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_header(stream: io.BufferedReader, name: str, dialect: Dialect) -> tuple[list[str], bytes]:
    """Read the header from a stream: the column names, and the bytes read after it.

    The names are empty for an empty file. Empty lines before the header are skipped.
    """
    data = b""
    while True:
        more = stream.read1(max(_READ_BYTES, len(data)))  # doubles, so the work stays linear
        data += more
        start = len(data) - len(data.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n"))
        found = _header_row(data, start, dialect, ended=not more)
        if found is not None:
            break
        if len(data) > MAX_HEADER_BYTES:
            raise InvalidCommandError(
                f"{name}: its header is not CSV: no end within {MAX_HEADER_BYTES >> 20} MiB"
            )
    values, end = found
    try:
        return [value.decode() for value in values], data[end:]
    except UnicodeDecodeError:
        raise InvalidUtf8Error(
            f"{name}: its header is not UTF-8; if the file has another encoding, give --encoding"
        ) from None


def _header_row(
    data: bytes, start: int, dialect: Dialect, *, ended: bool
) -> tuple[list[bytes], int] | None:
    """The values of the row at `start`, and its end; None if the row may go on.

    Rows are cut as pyarrow cuts them: at CR, LF or CRLF outside of quotes, and a quote counts at
    the start of a value only.
    """
    if start == len(data):
        return ([], start) if ended else None
    delimiter = re.escape(dialect.delimiter.encode())
    plain = rb"[^\r\n" + delimiter + rb"]*"
    quoted = rb'"([^"]*(?:""[^"]*)*)"' if dialect.quoted else rb"(?!)()"
    value = re.compile(quoted + rb"(" + plain + rb")|(" + plain + rb")")
    values, at = [], start
    while True:
        match = value.match(data, at)
        assert match is not None
        at = match.end()
        if at == len(data) and not ended:
            return None
        inner, after, whole = match.groups()
        if inner is None and dialect.quoted and whole.startswith(b'"'):
            if not ended:
                return None
            at = len(data)  # the quote is never closed
        values.append(whole if inner is None else inner.replace(b'""', b'"') + after)
        if data[at : at + 1] != dialect.delimiter.encode():
            break
        at += 1
    if data[at : at + 2] == b"\r\n":
        return values, at + 2
    if data[at:] == b"\r" and not ended:
        return None
    return values, min(at + 1, len(data))
