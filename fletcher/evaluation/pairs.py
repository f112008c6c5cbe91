"""Corpus of pairs of a query and the document that the query should find."""

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
        relevant: int64 [num_queries], index of the document that each query should find.
        num_rows: Number of rows read.
        num_empty: Number of rows without a query or without a document.
        num_repeated: Number of other rows that repeat an earlier row's document or query.
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
        FletcherError: See `open_source` and `choose_pairs`. Also raised if the column of queries
            does not hold text.
    """
    source = open_source(
        paths,
        text_column=document_column,
        columns=(query_column,),
        format_name=format_name,
        notice=notice,
    )
    table = pa.Table.from_batches(source.batches(), schema=source.schema)
    query, document = source.selection.carried_columns[0], source.selection.text_column
    kind = table.schema.field(query).type  # `open_source` checks the type of the documents
    if not pa.types.is_string(kind):
        raise InvalidCommandError(
            f"column `{query_column}` is {kind}, expected text", field=query_column
        )
    queries, documents = table[query], table[document]
    return choose_pairs(queries, documents, num_documents=num_documents, num_queries=num_queries)


def choose_pairs(
    queries: pa.ChunkedArray,
    documents: pa.ChunkedArray,
    *,
    num_documents: int | None = None,
    num_queries: int | None = None,
) -> Pairs:
    """Choose pairs at random, the same ones on every run.

    Only rows with a query and a document are chosen. A row that repeats a document or query is left
    out, because otherwise a right answer could count as wrong. Surrounding white space is ignored
    when texts are compared.

    Args:
        queries: utf8 [n].
        documents: utf8 [n], the documents of the same rows.
        num_documents: Maximum number of documents; None: all.
        num_queries: Maximum number of queries; None: all. Only queries of chosen documents are
            chosen.

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
