"""Top floor, the log: what was asked for, how long it took and how it ended, and nothing about who asked or for what.

No address, no file's name, no caption and no session gets in, because none is handed over. Of an exception of ours
only its kind and the lines of code are told: its message may quote what a visitor sent.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

_FIELDS = "service"
_FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
_OURS = "alignment"
_QUOTABLE = tuple(f"{_OURS}.{part}" for part in ("engine.photo_folder", "gallery", "index", "model", "ui.service"))
"""They speak of what the operator chose; the others see what visitors send."""


def note(logger: logging.Logger, what: str, **fields: object) -> None:
    """Log an event with its figures.

    Args:
        logger: of the module.
        what: happened; a fixed word.
        fields: numbers, and words of ours.
    """
    logger.info(what, extra={_FIELDS: fields})


def log_plainly(style: str) -> None:
    """Send the log of the whole process to stderr.

    Args:
        style: "json" for an object a line, "human" for a line that people read.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if style == "json" else Human())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)


def log_the_servers_too() -> None:
    """Take over the log of the web server, which brings its own; to be called once it runs."""
    for name in _FOREIGN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


class Human(logging.Formatter):
    """A line that people read."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one event down."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        figures = "  ".join(f"{name} {value}" for name, value in _fields(record).items())
        line = f"{time} {record.levelname.lower()}: {_said(record)}"
        return "\n".join(part for part in (f"{line}  {figures}" if figures else line, _where(record)) if part)


class Json(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one event down."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": _said(record), **_fields(record)}
        if where := _where(record):
            line["error"] = where
        return json.dumps(line, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return getattr(record, _FIELDS, {})


def _said(record: logging.LogRecord) -> str:
    """Take the template of a message, and what fills it only if it cannot quote a visitor."""
    if record.name.startswith(_QUOTABLE) and not record.exc_info:
        return record.getMessage()
    return f"{record.name}: {record.msg}" if not record.args else f"{record.name}: {str(record.msg).split('%')[0]}…"


def _where(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    kind, _, trace = record.exc_info
    lines = [f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in traceback.extract_tb(trace)]
    return " > ".join([*lines, kind.__name__])
