"""Server, logging: what was requested, how long it took and how it ended; never by which client, or its content.

No address, file name, caption or session gets into the log, because none is passed to it. Of an exception only its type
and the lines of code are logged: its message may quote what a client sent.
"""

import json
import logging
import traceback
from datetime import UTC, datetime
from pathlib import Path

_FIELDS = "service"
_OURS = "alignment"
_QUOTABLE = tuple(f"{_OURS}.{part}" for part in ("engine.photo_folder", "gallery", "index", "model", "server"))
"""Loggers whose messages are about what the operator chose; messages of others may quote clients."""


def log_event(logger: logging.Logger, event: str, **fields: object) -> None:
    """Log a fixed word, with fields that are numbers and fixed words."""
    logger.info(event, extra={_FIELDS: fields})


def configure_logging(style: str) -> None:
    """Send the log of the whole process to stderr: "json" for a JSON object a line, "human" for a line of text."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """A JSON object for each event."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one event."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, **_fields(record)}, ensure_ascii=False, default=str)


class HumanFormatter(logging.Formatter):
    """A line of text for each event, and one for the place where code failed."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one event."""
        time, fields = datetime.fromtimestamp(record.created).strftime("%H:%M:%S"), _fields(record)
        level, event, error = fields.pop("level"), fields.pop("event"), fields.pop("error", "")
        line = "  ".join([f"{time} {level}: {event}", *(f"{name} {value}" for name, value in fields.items())])
        return f"{line}\n{error}".rstrip()


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what may be logged of a record; of loggers that may quote clients only a message's fixed beginning."""
    event = f"{record.name}: {record.msg}" if not record.args else f"{record.name}: {str(record.msg).split('%')[0]}…"
    if record.name.startswith(_QUOTABLE) and not record.exc_info:
        event = record.getMessage()
    fields = {"level": record.levelname.lower(), "event": event, **getattr(record, _FIELDS, {})}
    if record.exc_info and record.exc_info[0]:
        kind, _, trace = record.exc_info
        lines = [f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in traceback.extract_tb(trace)]
        fields["error"] = " > ".join([*lines, kind.__name__])
    return fields
