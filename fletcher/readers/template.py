r"""Texts that are put together from several columns, such as `{title}\n{body}`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fletcher.errors import ColumnTypeError, InvalidCommandError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|\\[ntr\\]|[^{}\\]+|\\|(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """Literal texts and columns, in the order in which they make a row's text.

    Attributes:
        pieces: Pairs of (text, False) and (column name, True).
    """

    pieces: tuple[tuple[str, bool], ...]

    @classmethod
    def parse(cls, text: str) -> TextTemplate | None:
        r"""The template in an option; None for the name of a column.

        `{name}` is a column, `{{` and `}}` are braces, `\n`, `\t`, `\r` and `\\` are escapes.

        Raises:
            InvalidCommandError: A brace has no counterpart.
        """
        if not re.search(r"\{[^{}]+\}", text):
            return None
        pieces: list[tuple[str, bool]] = []
        for match in _PIECE.finditer(text):
            found = match.group()
            if match.group(2):
                raise InvalidCommandError(
                    f"`text` is {text!r}, which has a brace without its counterpart; write {{{{ "
                    "or }} for a brace",
                    field="text",
                )
            if match.group(1):
                pieces.append((match.group(1), True))
            else:
                literal = found[0] if found in ("{{", "}}") else _ESCAPES.get(found, found)
                pieces.append((literal, False))
        return cls(tuple(pieces))

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of the template, each once."""
        return tuple(dict.fromkeys(name for name, is_column in self.pieces if is_column))

    def check(self, schema: pa.Schema, where: str) -> None:
        """Raise ColumnTypeError unless the columns are strings, integers or bools."""
        for name in self.names:
            kind = schema.field(name).type
            if not (types.is_string(kind) or types.is_integer(kind) or types.is_boolean(kind)):
                raise ColumnTypeError(
                    f"{where}: column `{name}` of the text is {kind}, expected strings or integers",
                    field=name,
                )

    def compose(self, batch: pa.RecordBatch) -> pa.Array:
        """The texts of a batch. A null is an empty text, and a row of nulls alone is null."""
        columns = {name: batch.column(name) for name in self.names}
        texts = {name: pc.fill_null(pc.cast(one, pa.utf8()), "") for name, one in columns.items()}
        parts = [texts[piece] if is_column else piece for piece, is_column in self.pieces]
        joined = pc.binary_join_element_wise(*parts, "")
        if isinstance(joined, pa.ChunkedArray):
            joined = joined.combine_chunks()
        empty = pa.array([True] * batch.num_rows, pa.bool_())
        for one in columns.values():
            empty = pc.and_(empty, pc.is_null(one))
        return pc.if_else(empty, pa.scalar(None, pa.utf8()), joined)
