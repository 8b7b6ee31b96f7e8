"""Log lines on stderr: an event name and its facts.

    log.info("session.reconnect_scheduled", extra={"session": id, "attempt": 2, "wait_s": 6.0})

becomes `2026-03-01T12:00:00.123Z INFO session.reconnect_scheduled session=sales attempt=2
wait_s=6` or, with LOG_FORMAT=json, one JSON object a line with the same keys.
"""

import json
import logging
import sys
import time
import traceback
from typing import Any

from whatsapp_worker.settings import Settings

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Libraries that talk at INFO about what we log ourselves, with numbers and payloads in it.
_NOISY = ("rq", "asyncio", "aiohttp", "alembic", "sqlalchemy", "urllib3", "whatsmeow", "neonize")


class EventFormatter(logging.Formatter):
    """`time LEVEL event.name key=value ...` on one line, whatever the values are."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={_value(value)}" for key, value in _facts(record).items())
        line = f"{_time(record)} {record.levelname} {_one_line(record.getMessage())}{facts}"
        return line + _trace(record)


class JsonFormatter(logging.Formatter):
    """The same as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": _time(record), "level": record.levelname, "event": record.getMessage()}
        facts = {**head, "logger": record.name, **_facts(record)}
        if record.exc_info and record.exc_info[0]:
            facts["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(facts, default=str, ensure_ascii=False)


def set_up(settings: Settings, *, quiet: bool = False) -> None:
    """Send this process's log lines to stderr; called once, at process entry, before any thread.

    Replaces whatever handlers there were, so that a library's basicConfig cannot double lines.

    Args:
        quiet: Only warnings and worse, for commands that talk to a person.
    """
    formatter = JsonFormatter() if settings.log_format == "json" else EventFormatter()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = logging.getLevelNamesMapping()[settings.log_level]
    root.setLevel(max(level, logging.WARNING) if quiet else level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else str(value)
    if text and not any(c.isspace() or c in '"=' or not c.isprintable() for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or not record.exc_info[0]:
        return ""
    return "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
