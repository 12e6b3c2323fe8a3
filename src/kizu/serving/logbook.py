"""What a service does, a line of JSON an event."""

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["log", "open_logbook"]

log = logging.getLogger("kizu.serving.service")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def open_logbook(quiet: bool) -> None:
    """Write events to standard error; with `quiet`, warnings and errors alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for logger in (log, logging.getLogger("uvicorn.error")):
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet or logger is not log else logging.INFO)
