"""Corpus of pairs: queries, and the document that each should find."""

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
    """Queries and documents to embed.

    Attributes:
        documents: utf8 [num_documents], all different.
        queries: utf8 [num_queries], all different.
        relevant: int64 [num_queries], the document of each query.
        num_rows: Number of rows read.
        num_empty: Number of them without a query or a document.
        num_repeated: Number of the others whose document or query an earlier row has.
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
    """Read pairs from files into memory; see `open_source` and `choose_pairs`.

    Raises:
        FletcherError: As `open_source`, or a column does not hold text.
    """
    source = open_source(
        paths,
        text_column=document_column,
        columns=(query_column,),
        format_name=format_name,
        notice=notice,
    )
    table = pa.Table.from_batches(source.batches(), schema=source.schema)
    kind = table.schema.field(query_column).type  # the document's is text
    if not pa.types.is_string(kind):
        raise InvalidCommandError(
            f"column `{query_column}` is {kind}, expected text", field=query_column
        )
    queries, documents = table[query_column], table[document_column]
    return choose_pairs(queries, documents, num_documents=num_documents, num_queries=num_queries)


def choose_pairs(
    queries: pa.ChunkedArray,
    documents: pa.ChunkedArray,
    *,
    num_documents: int | None = None,
    num_queries: int | None = None,
) -> Pairs:
    """A reproducible random choice of the rows with both texts, each text once.

    A row with a repeated document or query is left out, because otherwise a right answer would
    count as wrong. Texts are compared without surrounding white space.

    Args:
        queries: utf8 [n].
        documents: utf8 [n], of the same rows.
        num_documents: Maximum number of documents; None: all.
        num_queries: Maximum number of queries, among those of the chosen documents; None: all.

    Raises:
        InvalidCommandError: Fewer than two pairs remain.
    """
    trimmed = [pc.utf8_trim_whitespace(pc.fill_null(one, "")) for one in (documents, queries)]
    full = pc.and_(*(pc.not_equal(column, "") for column in trimmed))
    rows = np.flatnonzero(full.to_numpy())
    num_full = len(rows)
    for column in trimmed:
        codes = column.take(rows).combine_chunks().dictionary_encode().indices.to_numpy()
        rows = rows[np.unique(codes, return_index=True)[1]]  # the first row of each text
    if len(rows) < 2:
        raise InvalidCommandError(
            f"{len(queries)} rows hold {len(rows)} pairs of a query and a document without "
            "repeats, expected at least 2; give more rows"
        )
    chosen = np.random.default_rng(_SEED).permutation(rows)[:num_documents]
    relevant = np.arange(len(chosen), dtype=np.int64)[:num_queries]
    return Pairs(
        documents=documents.take(chosen).combine_chunks(),
        queries=queries.take(chosen[relevant]).combine_chunks(),
        relevant=relevant,
        num_rows=len(queries),
        num_empty=len(queries) - num_full,
        num_repeated=num_full - len(rows),
    )
