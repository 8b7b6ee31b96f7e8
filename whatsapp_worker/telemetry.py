"""Log lines: an event name and its facts, on stderr and in files that rotate.

    log.info("session.reconnect_scheduled", extra={"session": id, "attempt": 2, "wait_s": 6.0})

becomes `2026-03-01T12:00:00.123Z INFO session.reconnect_scheduled session=sales attempt=2
wait_s=6` or, with LOG_FORMAT=json, one JSON object a line with the same keys. The files of a host
lie in DATA_DIR/logs, are JSON always, and are written by all of its processes together.
"""

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import sys
import time
import traceback
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

from whatsapp_worker.settings import Settings

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Libraries that talk at INFO about what we log ourselves, with numbers and payloads in it.
_NOISY = ("rq", "asyncio", "aiohttp", "alembic", "sqlalchemy", "urllib3", "whatsmeow", "neonize")
_MIB = 1_048_576
_bound: dict[str, Any] = {}  # facts of this process that every line carries


class EventFormatter(logging.Formatter):
    """`time LEVEL event.name key=value ...` on one line, whatever the values are."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={_value(value)}" for key, value in _facts(record).items())
        line = f"{_time(record)} {record.levelname} {_one_line(record.getMessage())}{facts}"
        return line + _trace(record)


def render(facts: dict[str, Any]) -> str:
    """A line of a log file as `EventFormatter` would have written it."""
    rest = {k: v for k, v in facts.items() if k not in ("time", "level", "event", "logger")}
    trace = rest.pop("traceback", None)
    words = "".join(f" {key}={_value(value)}" for key, value in rest.items())
    head = f"{facts.get('time')} {facts.get('level')} {_one_line(str(facts.get('event')))}"
    return head + words + (f"\n{str(trace).rstrip()}" if trace else "")


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
        quiet: Only warnings and worse, and only on stderr: for commands that talk to a person.
    """
    formatter = JsonFormatter() if settings.log_format == "json" else EventFormatter()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(formatter)
    if settings.log_file_mib and not quiet:
        with contextlib.suppress(OSError):  # stderr has the same lines
            handlers.append(SharedFileHandler(log_file(settings.data_dir), settings))
    root = logging.getLogger()
    root.handlers[:] = handlers
    level = logging.getLevelNamesMapping()[settings.log_level]
    root.setLevel(max(level, logging.WARNING) if quiet else level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def leave_stderr_to_libraries(descriptor: int) -> None:
    """From now on descriptor 2 is `descriptor`; what Python itself says goes where it went."""
    before = sys.stderr
    ours = FileIO(os.dup(2), "w")
    sys.stderr = TextIOWrapper(
        ours, encoding="utf-8", errors="backslashreplace", write_through=True
    )
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(sys.stderr)
    os.dup2(descriptor, 2)


def bind(**facts: Any) -> None:
    """Put facts, such as the session that it runs, on every later line of this process."""
    _bound.update(facts)


def log_file(data_dir: Path) -> Path:
    """Where the lines of a host's processes are; older ones in `.1`, `.2`, ... beside it."""
    return data_dir / "logs" / "worker.jsonl"


class SharedFileHandler(logging.handlers.WatchedFileHandler):
    """Appends to a file that other processes append to as well; whoever fills it rotates it.

    Each line is one write to a file opened for appending, so lines do not mix. A full disk costs
    lines, never the process.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._limit = settings.log_file_mib * _MIB
        self._kept = settings.log_files
        super().__init__(path, encoding="utf-8")
        self.setFormatter(JsonFormatter())

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        # Made private from the start, whatever the umask.
        return open(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; rotate first when the file is full."""
        with contextlib.suppress(OSError):
            super().emit(record)
            if self.stream and os.fstat(self.stream.fileno()).st_size >= self._limit:
                self._rotate()

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: stderr has the line."""

    def _rotate(self) -> None:
        path = Path(self.baseFilename)
        with (path.parent / ".rotation").open("a") as lock:
            # Not waiting: whoever rotates may be stopped meanwhile, and nobody must hang on it.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have been first: then the file is a new one by now.
            if path.stat().st_size < self._limit:
                return
            for number in range(self._kept, 0, -1):
                older = path.with_name(f"{path.name}.{number}")
                newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(older)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    own = {key: value for key, value in vars(record).items() if key not in _PLAIN}
    return {**_bound, **own}


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
