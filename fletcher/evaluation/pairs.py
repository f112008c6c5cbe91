"""A corpus of pairs: queries, and the document that each of them should find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fletcher.core.batches import Int64Array
from fletcher.errors import InvalidCommandError
from fletcher.readers import open_source

_SEED = 20200520


@dataclass(frozen=True, slots=True)
class Pairs:
    """Texts to embed.

    Attributes:
        documents: utf8 [num_documents], no two alike.
        queries: utf8 [num_queries], no two alike.
        relevant: int64 [num_queries], the document that each query belongs to.
        num_rows: Rows that were read.
        num_empty: Of these, rows without a query or a document.
        num_repeated: Of the others, rows whose document or query came before.
    """

    documents: pa.Array
    queries: pa.Array
    relevant: Int64Array
    num_rows: int
    num_empty: int
    num_repeated: int


def read_pairs(
    paths: Sequence[str],
    *,
    query_column: str,
    document_column: str,
    format_name: str | None = None,
    num_documents: int | None = None,
    num_queries: int | None = None,
    notice: Callable[[str], None],
) -> Pairs:
    """Reads pairs from files, as `fletcher.readers.open_source`; all texts are held in memory.

    Raises:
        FletcherError: As `open_source`, and of a column that holds no text.
    """
    source = open_source(
        paths,
        text_column=document_column,
        columns=(query_column,),
        format_name=format_name,
        notice=notice,
    )
    table = pa.Table.from_batches(source.batches(), schema=source.schema)
    for name in (query_column, document_column):
        if not pa.types.is_string(table.schema.field(name).type):
            raise InvalidCommandError(
                f"column `{name}` is {table.schema.field(name).type}, expected text", field=name
            )
    return choose(
        table[query_column],
        table[document_column],
        num_documents=num_documents,
        num_queries=num_queries,
    )


def choose(
    queries: pa.ChunkedArray,
    documents: pa.ChunkedArray,
    *,
    num_documents: int | None = None,
    num_queries: int | None = None,
) -> Pairs:
    """Rows that have both texts, each text once, and of these a fixed random choice.

    A document or a query that comes again is left out with its row, whatever stands beside it:
    else a right answer would count as wrong. Texts are compared without the white space around.

    Args:
        queries: utf8 [n].
        documents: utf8 [n], of the same rows.
        num_documents: Documents to keep at most; None: all.
        num_queries: Queries to keep at most, of those whose document was kept; None: all.

    Raises:
        InvalidCommandError: Fewer than two pairs are left.
    """
    table = pa.table({"query": queries, "document": documents})
    trimmed = [
        pc.utf8_trim_whitespace(pc.fill_null(table[name], "")) for name in table.column_names
    ]
    full = pc.and_(*(pc.not_equal(column, "") for column in trimmed))
    rows = np.flatnonzero(full.to_numpy())
    num_full = len(rows)
    for column in (trimmed[1], trimmed[0]):
        rows = rows[_first_of_each(column.take(rows))]
    if len(rows) < 2:
        raise InvalidCommandError(
            f"{len(queries)} rows hold {len(rows)} pairs of a query and a document that come no "
            "second time; two are the least that can be told apart"
        )
    chosen = np.random.default_rng(_SEED).permutation(rows)[:num_documents]
    relevant = np.arange(len(chosen), dtype=np.int64)[:num_queries]
    return Pairs(
        documents=_taken(table["document"], chosen),
        queries=_taken(table["query"], chosen[relevant]),
        relevant=relevant,
        num_rows=len(queries),
        num_empty=len(queries) - num_full,
        num_repeated=num_full - len(rows),
    )


def _first_of_each(column: pa.ChunkedArray) -> Int64Array:
    """Places of the values that did not come before, ascending."""
    codes = column.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return np.sort(first).astype(np.int64)


def _taken(column: pa.ChunkedArray, rows: Int64Array) -> pa.Array:
    return pa.concat_arrays(column.take(rows).chunks)
