"""Where log records go: standard error, as plain lines or as JSON objects."""

from __future__ import annotations

import datetime
import logging
import sys

import msgspec


class _JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": _encodable(record.getMessage()),
        }
        if record.exc_info:
            content["traceback"] = _encodable(self.formatException(record.exc_info))
        return msgspec.json.encode(content).decode()


def _encodable(text: str) -> str:
    """A file name that is no UTF-8 holds characters that JSON cannot: they are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def configure(level: str, as_json: bool) -> None:
    """Log moeshm's records of at least `level` (debug, info, warning, error) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    if as_json:
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("moeshm")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
