"""The report of an evaluation as a table and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from fletcher.evaluation.evaluate import EvaluationReport, Row

_HEADS = ("engine", "layers", "dims", "dtype", "chunking")
_SEARCH = ("R@1", "R@10", "R@100", "NDCG@10", "lost", "top 10", "of 40")
_VECTORS = ("cosine", "p1", "min", "Spearman", "align", "uniform", "texts/s", "bytes")


def table(report: EvaluationReport) -> list[str]:
    """Lines for a terminal: a table of search quality, then one of vector properties."""
    # The column `chunking` is left out if no variant cuts documents into chunks.
    width = len(_HEADS) - all(row.variant.chunking is None for row in report.rows)
    heads = [_HEADS[:width], *(_head(row)[:width] for row in report.rows)]
    found = _columns(heads, [_SEARCH, *map(_searched, report.rows)])
    return [*found, "", *_columns(heads, [_VECTORS, *map(_described, report.rows)])]


def as_json(report: EvaluationReport) -> dict[str, Any]:
    """The report as a JSON object, with unrounded numbers."""
    pairs = report.pairs
    return {
        "model": f"{report.model['name']}@{report.model['hash']}",
        "corpus": {
            "rows": pairs.num_rows,
            "rows_empty": pairs.num_empty,
            "rows_repeated": pairs.num_repeated,
            "documents": len(pairs.documents),
            "queries": len(pairs.queries),
            "documents_truncated": report.num_truncated,
        },
        "warnings": list(report.warnings()),
        "rows": [_as_json(row) for row in report.rows],
    }


def _as_json(row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    variant = fields.pop("variant")
    engine = variant.pop("engine")
    return {**engine, **variant, **fields}


def _head(row: Row) -> tuple[str, ...]:
    one = row.variant
    return str(one.engine), str(one.layers), str(one.dims), one.dtype, one.chunking or "none"


def _searched(row: Row) -> tuple[str, ...]:
    return (
        *(f"{value:.3f}" for value in row.recall.values()),
        f"{row.ndcg:.4f}",
        f"{row.ndcg_loss:+.4f} ±{row.ndcg_loss_95:.4f}",
        f"{row.top:.3f}",
        f"{row.top_rescored:.3f}",
    )


def _described(row: Row) -> tuple[str, ...]:
    return (
        *(f"{value:.5f}" for value in row.cosine.values()),
        f"{row.spearman:.4f}",
        "-" if row.alignment is None else f"{row.alignment:.3f}",
        "-" if row.uniformity is None else f"{row.uniformity:.3f}",
        "-" if row.texts_per_s is None else f"{row.texts_per_s:.0f}",
        str(row.bytes_per_vector),
    )


def _columns(left: list[tuple[str, ...]], right: list[tuple[str, ...]]) -> list[str]:
    rows = [(*first, *second) for first, second in zip(left, right, strict=True)]
    words = [0, *range(3, len(left[0]))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
