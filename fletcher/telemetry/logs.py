"""Logging to standard error, as text for people or as JSON lines for programs."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from datetime import UTC, datetime
from typing import Any

# Attributes that every log record has. Other attributes were given as `extra` and are logged.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logging(level: str, style: str) -> None:
    """Send Fletcher's log and the warnings of other packages to standard error.

    `level` is the least severe level of Fletcher's log. `style` is `json` or `text`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fletcher").setLevel(level.upper())
    logging.captureWarnings(True)
    if level != "debug":
        warnings.simplefilter("ignore")


class TextFormatter(logging.Formatter):
    """Formatter of lines like `11:04:05 info fletcher.runtime: warmed up (model=x)`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        text = f"{time} {record.levelname.lower()} {record.name}: {record.getMessage()}"
        if extra := _extra(record):
            text += " (" + ", ".join(f"{name}={value}" for name, value in extra.items()) + ")"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        # Clear a live progress bar in the line before the text is printed.
        return "\r\x1b[K" + text if sys.stderr.isatty() else text


class JsonFormatter(logging.Formatter):
    """Formatter of JSON lines: time (UTC), level, logger, message, `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}
