"""Rates, time left and where the line goes; and text that is safe and fits on a terminal."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading

import pytest

from fletcher.cli.progress import Meter, Progress, Sample, Total, clock, human
from fletcher.cli.terminal import columns, cut, padded, print_table, printable, styled
from fletcher.telemetry.logs import JsonFormatter, TextFormatter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_rates_bytes_queues_and_time_left() -> None:
    meter = Meter(Total(rows=10_000, num_bytes=2_000_000))
    meter.add_sample(0, Sample(0, 0, 0))
    meter.add_sample(2, Sample(4000, 50_000, 800_000, queues={"tokenize": 3, "inference": 0}))
    assert meter.line() == (
        "4,000 of 10,000 rows  2,000 rows/s  0:03 left  25k tokens/s  800kB of 2.0MB  "
        "queues: tokenize 3"
    )


def test_time_left_by_rows_where_reading_runs_ahead() -> None:
    meter = Meter(Total(num_bytes=1000))
    meter.add_sample(0, Sample(0))
    meter.add_sample(10, Sample(100, None, 500, rows_read=400))
    assert "1:10 left" in meter.line()  # 800 rows in all, 100 of them done in 10 s


def test_time_left_by_bytes_where_nobody_counted_rows() -> None:
    meter = Meter(Total(num_bytes=1000))
    meter.add_sample(0, Sample(0))
    meter.add_sample(10, Sample(5, None, 100))
    assert meter.line() == "5 rows  0 rows/s  1:30 left  100B of 1.0kB"
    meter.add_sample(11, Sample(5, None, 1000))
    assert "left" not in meter.line()


def test_without_totals_and_before_anything_happened() -> None:
    meter = Meter(Total())
    meter.add_sample(0, Sample(0))
    assert meter.line() == "0 rows  0 rows/s"


def test_rates_are_of_the_last_seconds() -> None:
    meter = Meter(Total())
    for second in range(100):
        meter.add_sample(second, Sample(1000 if second < 50 else 1000 + 10 * (second - 50)))
    assert "10 rows/s" in meter.line()


def test_the_share_that_is_done() -> None:
    meter = Meter(Total(num_bytes=1000))
    meter.add_sample(0, Sample(0))
    assert meter.done_share == 0
    meter.add_sample(10, Sample(100, None, 500, rows_read=400))
    assert meter.done_share == 100 / 800
    unknown = Meter(Total())
    unknown.add_sample(0, Sample(5))
    assert unknown.done_share is None


def shown(stream: io.StringIO, samples: list[Sample]) -> str:
    done = threading.Event()
    left = iter(samples)

    def sample() -> Sample:
        try:
            return next(left)
        except StopIteration:
            done.set()
            raise OSError from None

    with Progress(sample, Total(), stream, interval_s=0.001):
        assert done.wait(20)
    return stream.getvalue()


def test_a_terminal_gets_one_live_line_that_is_cleared_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal(), [Sample(1), Sample(2)])
    assert "1 rows" in text
    assert "━" in text
    assert text.endswith("\x1b[2K")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert all(len(line) <= 60 for line in re.split(r"[\r\n]", plain))


def test_elsewhere_whole_lines_without_control_characters() -> None:
    lines = shown(io.StringIO(), [Sample(1), Sample(2)]).splitlines()
    assert [line.split(" rows")[0] for line in lines] == ["1", "2"]
    assert not any("\x1b" in line or "\r" in line for line in lines)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (9960, "10k"), (1_500_000, "1.5M"), (None, "0")],
)
def test_human(number: float | None, text: str) -> None:
    assert human(number) == text


def test_clock() -> None:
    assert [clock(9), clock(754), clock(3723)] == ["0:09", "12:34", "1:02:03"]


def test_stored_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mred\r\n\tb\x07\u202ec") == "a [31mred b c"


def test_wide_characters_take_two_columns() -> None:
    assert columns("日本") == 4
    assert cut("日本語", 5) == "日本…"
    assert cut("plain", 5) == "plain"
    assert padded("日", 4) == "日  "


def printed_table(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    rows = [("a", "1", styled("fine\x1b[2J", "green")), (), ("long name", "23", "[b]words " * 4)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setenv("COLUMNS", "40")
        patch.setenv("TERM", "xterm")
        print_table(rows, header=("name", "n"), right=(1,))
    return stream.getvalue().splitlines()


def test_tables_are_aligned_and_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed_table(io.StringIO(), monkeypatch) == [
        "name        n",
        "a           1  fine [2J",
        "",
        "long name  23  [b]words [b]words [b]words [b]words",
    ]


def test_a_terminal_gets_colour_and_narrow_ones_no_cut_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = printed_table(Terminal(), monkeypatch)
    assert "\x1b[32mfine [2J " in lines[1]
    assert [line.strip() for line in lines[3:]] == [
        "long name  23  [b]words [b]words",
        "[b]words [b]words",
    ]


def record(**extra: object) -> logging.LogRecord:
    made = logging.LogRecord("fletcher.x", logging.INFO, "f", 1, "warmed %s", ("up",), None)
    vars(made).update(extra)
    return made


def test_log_lines() -> None:
    fields = json.loads(JsonFormatter().format(record(model="m")))
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "info",
        "logger": "fletcher.x",
        "message": "warmed up",
        "model": "m",
    }
    assert (
        TextFormatter().format(record(model="m")).endswith(" info fletcher.x: warmed up (model=m)")
    )


def test_tracebacks_go_to_the_log() -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        made = record(exc_info=sys.exc_info())
    assert "ValueError: inside" in json.loads(JsonFormatter().format(made))["traceback"]
    assert TextFormatter().format(made).endswith("ValueError: inside")
