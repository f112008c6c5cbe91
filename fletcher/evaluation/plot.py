"""Plots of search quality against the size of vectors and the speed."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from fletcher.errors import ConfigError
from fletcher.evaluation.evaluate import EvaluationReport, Row

_INCHES = (9, 4)
_LEAST_SPAN = 0.05  # minimum height of the NDCG axis


def check_matplotlib() -> None:
    """Check that matplotlib is installed; raise ConfigError otherwise."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "`plot` needs matplotlib, which is not installed: pip install "
            "'longbow-fletcher[plot]'; or leave --plot out to print only the table",
            field="plot",
        )


def draw_report(report: EvaluationReport, path: Path) -> None:
    """Write a PNG: NDCG@10 over bytes per vector, and over texts per second.

    Raises:
        ConfigError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")  # unlike pyplot, this needs no display
    left, right = figure.subplots(1, 2, sharey=True)
    _sizes(left, report)
    _speeds(right, report)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(
        f"{report.model['name']}: {len(report.pairs.queries):,} queries, "
        f"{len(report.pairs.documents):,} documents",
        fontsize=10,
    )
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`plot` {str(path)!r} cannot be written: {error}", field="plot"
        ) from None


def _sizes(axes: Any, report: EvaluationReport) -> None:
    """Plot NDCG@10 over bytes: a line per engine, depth, type and chunking."""
    lines: dict[str, list[Row]] = defaultdict(list)
    depths = {row.variant.layers for row in report.rows}
    for row in report.rows:
        one = row.variant
        depth = f", {one.layers} layers" if len(depths) > 1 else ""
        lines[f"{one.engine}{depth}, {one.dtype}{_chunking_label(row)}"].append(row)
    for label, rows in lines.items():
        rows.sort(key=lambda row: row.bytes_per_vector)
        sizes = [row.bytes_per_vector for row in rows]
        axes.plot(sizes, [row.ndcg for row in rows], marker="o", markersize=4, label=label)
    axes.set(xlabel="bytes per vector", ylabel="NDCG@10")
    gains = [row.ndcg for row in report.rows]
    # Without a minimum height, insignificant differences would fill the plot.
    middle, height = (min(gains) + max(gains)) / 2, max(_LEAST_SPAN, 1.2 * np.ptp(gains))
    axes.set_ylim(middle - height / 2, middle + height / 2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _speeds(axes: Any, report: EvaluationReport) -> None:
    """Plot NDCG@10 over speed: the best variant per engine, depth and chunking."""
    best: dict[tuple[str, int | None, str], Row] = {}
    for row in report.rows:
        key = str(row.variant.engine), row.variant.layers, _chunking_label(row)
        if row.texts_per_s is not None and (key not in best or row.ndcg > best[key].ndcg):
            best[key] = row
    for (engine, layers, cut), row in best.items():
        axes.plot([row.texts_per_s], [row.ndcg], "o", label=f"{engine}, {layers} layers{cut}")
    axes.set_xlabel("texts/s")
    axes.set_xlim(left=0)


def _chunking_label(row: Row) -> str:
    chunking = row.variant.chunking
    return "" if chunking is None else f", {chunking}"
