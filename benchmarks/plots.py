"""A PNG beside a result's JSON, if matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_INCHES = (8, 4.5)


def draw(result: dict[str, Any], path: Path) -> str:
    """Draws a result; returns a line with its place, or the reason why not.

    Args:
        result: The content of the JSON.
        path: Path of the PNG.
    """
    plot = _PLOTS.get(result["benchmark"])
    if plot is None:
        return f"{result['benchmark']} has no plot"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: matplotlib is not installed (pip install '.[bench]')"
    figure = Figure(
        figsize=_INCHES, layout="constrained"
    )  # a Figure, because pyplot needs a display
    plot(result, figure)
    hardware = result["hardware"]
    figure.suptitle(f"{result['model']}, {hardware['cpu']}, {hardware['cores']} cores", fontsize=9)
    figure.savefig(path, dpi=120)
    return f"drawn to {path}"


def _throughput(result: dict[str, Any], figure: Any) -> None:
    """One bar for each row that ran, with whiskers from the slowest to the fastest turn."""
    rows = [row for row in reversed(result["rows"]) if "skipped" not in row]
    rates = [row["texts_per_s"] for row in rows]
    num_texts = result["sample"]["texts"]
    whiskers = [
        [rate - num_texts / max(row["seconds"]) for row, rate in zip(rows, rates, strict=True)],
        [num_texts / min(row["seconds"]) - rate for row, rate in zip(rows, rates, strict=True)],
    ]
    axes = figure.subplots()
    axes.barh([row["name"] for row in rows], rates, xerr=whiskers, capsize=3)
    axes.set_xlabel("texts/s")


def _latency(result: dict[str, Any], figure: Any) -> None:
    """Percentiles up to the 99th, one line for each row."""
    axes = figure.subplots()
    for row in result["rows"]:
        times = sorted(row["ms"])
        shares = [100 * (place + 0.5) / len(times) for place in range(len(times))]
        axes.plot(shares, times, label=row["name"])
    axes.set(xlabel="percentile", ylabel="ms", xlim=(0, 99), yscale="log")
    axes.legend()


def _overhead(result: dict[str, Any], figure: Any) -> None:
    """Memory over time, a panel for each upload."""
    uploads = result["uploads"]
    for axes, upload in zip(
        figure.subplots(1, len(uploads), squeeze=False)[0], uploads, strict=True
    ):
        moments = upload["moments"]
        seconds = [moment["seconds"] for moment in moments]
        for field, label in (("front_bytes", "front process"), ("worker_bytes", "workers")):
            axes.plot(seconds, [moment[field] / 2**20 for moment in moments], label=label)
        axes.set(title=upload["name"], xlabel="s", ylabel="MiB resident", ylim=(0, None))
        axes.legend()


def _scaling(result: dict[str, Any], figure: Any) -> None:
    """One panel for each varied quantity."""
    curves = result["curves"]
    for axes, curve in zip(figure.subplots(1, len(curves)), curves, strict=True):
        points = curve["points"]
        values = [point["value"] for point in points]
        axes.plot(values, [point["rows_per_s"] for point in points], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(curve["name"].replace(", ", "\n"))
        axes.set_ylim(0, None)
    figure.supylabel("rows/s")


_PLOTS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "throughput": _throughput,
    "latency": _latency,
    "overhead": _overhead,
    "scaling": _scaling,
}
