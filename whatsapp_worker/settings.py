"""Every setting, declared once: name, variable, default, unit, range and one sentence.

The declarations feed the parser, `whatsapp-worker settings`, `doctor` and the table in the docs.
Settings are read once, at process entry, and handed down; nothing else reads the environment.
"""

import contextlib
import dataclasses
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from whatsapp_worker.errors import SettingsError

Network = Literal["whatsapp", "sandbox"]

_NEAR = 0.85  # of difflib: a few letters more, fewer or other


@dataclass(frozen=True)
class Declaration:
    """What is known of one setting beside its type."""

    variable: str
    unit: str
    sentence: str
    parse: Callable[[str], Any]
    secret: bool = False


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(
                f"is no {'whole ' if kind is int else ''}number: {text!r:.40}"
            ) from None
        if not low <= value <= high:
            raise ValueError(f"must be from {low:g} to {high:g}, not {value:g}")
        return value

    return parse


def _waits(text: str) -> tuple[float, ...]:
    parse = _number(float, 0, 3600)
    waits = tuple(parse(part.strip()) for part in text.split(",") if part.strip())
    if not 1 <= len(waits) <= 10:
        raise ValueError("must be 1 to 10 numbers with commas between them")
    return waits


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {text!r:.40}")
        return text

    return parse


def _is_on(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not text.startswith(tuple(f"{scheme}://" for scheme in schemes)):
            raise ValueError(f"must start with one of {', '.join(s + '://' for s in schemes)}")
        if not _has_readable_host(text):  # what urllib says may hold a part of the password
            raise ValueError(
                "has no host and port that can be read; special characters of a password must be"
                " written as %XX"
            )
        return text

    return parse


def _has_readable_host(url: str) -> bool:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        has_port = parts.port is not None  # raises for what is none
        return bool(parts.hostname) or (not has_port and parts.netloc[-1:] in ("", "@"))
    return False


def _declare(
    variable: str,
    default: Any,
    unit: str,
    sentence: str,
    parse: Callable[[str], Any],
    *,
    secret: bool = False,
) -> Any:
    declaration = Declaration(variable, unit, sentence, parse, secret)
    return dataclasses.field(default=default, metadata={"declaration": declaration})


def _seconds(variable: str, default: float, sentence: str, low: float, high: float) -> Any:
    return _declare(variable, default, "s", sentence, _number(float, low, high))


def _count(variable: str, default: int, sentence: str, low: int, high: int, unit: str = "") -> Any:
    return _declare(variable, default, unit, sentence, _number(int, low, high))


_REDIS = _url("redis", "rediss", "unix")
_DATABASE = _url("postgresql", "postgres", "postgresql+psycopg")
_SENTRY = _url("http", "https")
_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a process was told. Build it with `read`; tests may use the constructor."""

    network: Network = _declare(
        "WHATSAPP_NETWORK",
        "whatsapp",
        "",
        "The network that sessions live on; `sandbox` is the only way into sandbox mode.",
        _choice("whatsapp", "sandbox"),
    )
    data_dir: Path = _declare(
        "DATA_DIR",
        Path("data"),
        "",
        "Folder of sessions, credentials and state; all processes of a host share it.",
        Path,
    )
    redis_url: str | None = _declare(
        "REDIS_URL",
        None,
        "",
        "Redis that holds the queues; without it the supervisor runs one of its own.",
        _REDIS,
        secret=True,
    )
    database_url: str | None = _declare(
        "DATABASE_URL",
        None,
        "",
        "PostgreSQL for the ledger; without it one SQLite file a session.",
        _DATABASE,
        secret=True,
    )
    sentry_dsn: str | None = _declare(
        "SENTRY_DSN", None, "", "Where alerts go; none without it.", _SENTRY, secret=True
    )
    host: str = _declare(
        "WORKER_HOST",
        socket.gethostname(),
        "",
        "Name of this host in queues, logs and alerts.",
        str,
    )
    log_level: str = _declare(
        "LOG_LEVEL",
        "INFO",
        "",
        "Least severe log lines shown.",
        _choice("DEBUG", "INFO", "WARNING", "ERROR"),
    )
    log_format: str = _declare(
        "LOG_FORMAT",
        "text",
        "",
        "`text` for people, `json` for one JSON object a line.",
        _choice("text", "json"),
    )
    log_file_mib: int = _count(
        "LOG_FILE_MIB",
        10,
        "Size at which DATA_DIR/logs/worker.jsonl rotates; 0: no files.",
        0,
        10_000,
        "MiB",
    )
    log_files: int = _count("LOG_FILES", 5, "Rotated log files that are kept.", 1, 1000)
    reconnect_waits_s: tuple[float, ...] = _declare(
        "RECONNECT_WAITS_S",
        (3.0, 6.0, 12.0),
        "s",
        "Waits before the connection attempts of one series; as many attempts as waits.",
        _waits,
    )
    reconnect_jitter_s: float = _seconds(
        "RECONNECT_JITTER_S", 0.25, "Most that is added to each reconnect wait.", 0, 60
    )
    failed_cooldown_s: float = _seconds(
        "FAILED_COOLDOWN_S",
        60.0,
        "First cool-down of a failed session, doubling to 900; 0 stays failed.",
        0,
        900,
    )
    connect_timeout_s: float = _seconds(
        "CONNECT_TIMEOUT_S", 60.0, "Dial, handshake and login together.", 1, 600
    )
    link_attempt_s: float = _seconds("LINK_ATTEMPT_S", 180.0, "One whole link attempt.", 5, 900)
    msg_failure_threshold: int = _count(
        "MSG_FAILURE_THRESHOLD", 5, "Consecutive failures that open the message breaker.", 1, 1000
    )
    msg_reset_s: float = _seconds(
        "MSG_RESET_S", 60.0, "How long the message breaker stays open.", 0.1, 3600
    )
    db_failure_threshold: int = _count(
        "DB_FAILURE_THRESHOLD", 3, "Consecutive failures that open the database breaker.", 1, 1000
    )
    db_reset_s: float = _seconds(
        "DB_RESET_S", 30.0, "How long the database breaker stays open.", 0.1, 3600
    )
    send_timeout_s: float = _seconds(
        "SEND_TIMEOUT_S", 30.0, "One send; without an answer by then it is unknown.", 1, 600
    )
    send_retries: int = _count(
        "SEND_RETRIES", 3, "Retries of a send that certainly did not go out.", 0, 20
    )
    pace_per_minute: float = _declare(
        "PACE_PER_MINUTE",
        0.0,
        "",
        "Messages a minute that each session sends on average; 0: as fast as WhatsApp takes them.",
        _number(float, 0, 6000),
    )
    pace_jitter: float = _declare(
        "PACE_JITTER",
        0.5,
        "",
        "With a pace: share by which the gaps between messages are longer or shorter.",
        _number(float, 0, 1),
    )
    pace_per_day: int = _count(
        "PACE_PER_DAY",
        1000,
        "With a pace: most messages a session sends in a day (UTC); 0: no cap.",
        0,
        10_000_000,
    )
    pace_new_contact_factor: float = _declare(
        "PACE_NEW_CONTACT_FACTOR",
        3.0,
        "",
        "With a pace: how many times longer the gap before a contact never written to is.",
        _number(float, 1, 1000),
    )
    pace_typing_s: float = _seconds(
        "PACE_TYPING_S",
        0.0,
        "With a pace: how long a typing indicator is shown before each text; 0: none.",
        0,
        30,
    )
    media_dir: Path | None = _declare(
        "MEDIA_DIR",
        None,
        "",
        "Folder whose files messages may name; without it files come by URL only.",
        Path,
    )
    media_max_mib: int = _count(
        "MEDIA_MAX_MIB",
        64,
        "Largest file of a message; WhatsApp's own limits lie below.",
        1,
        100,
        unit="MiB",
    )
    media_timeout_s: float = _seconds(
        "MEDIA_TIMEOUT_S", 60.0, "To fetch, convert and upload the file of a message.", 1, 600
    )
    media_allow_private: bool = _declare(
        "MEDIA_ALLOW_PRIVATE",
        False,
        "",
        "`1` fetches files from private, loopback and link-local addresses too.",
        _is_on,
    )
    db_timeout_s: float = _seconds(
        "DB_TIMEOUT_S",
        60.0,
        "One query of tools; of the events process, a third of SHUTDOWN_TIMEOUT_S at most.",
        1,
        600,
    )
    health_check_interval_s: float = _seconds(
        "HEALTH_CHECK_INTERVAL_S", 30.0, "Between two heartbeats of a device process.", 0.1, 600
    )
    hang_timeout_s: float = _seconds(
        "HANG_TIMEOUT_S", 120.0, "No progress for so long: the device process is recycled.", 1, 3600
    )
    cleanup_interval_s: float = _seconds(
        "CLEANUP_INTERVAL_S", 1800.0, "Between two purges.", 1, _DAY
    )
    max_tombstones: int = _count(
        "MAX_TOMBSTONES", 1000, "Deleted sessions remembered, the oldest dropped first.", 1, 1000
    )
    link_timeout_s: float = _seconds(
        "LINK_TIMEOUT_S",
        300.0,
        "A session never linked and not touched for so long is purged.",
        1,
        365 * _DAY,
    )
    stale_after_s: float = _seconds(
        "STALE_AFTER_S",
        7.0 * _DAY,
        "A logged-out session not touched for so long is purged.",
        1,
        3650 * _DAY,
    )
    purge_linked_after_s: float | None = _declare(
        "PURGE_LINKED_AFTER_S",
        None,
        "s",
        "A session still linked but not connected for so long is purged; never without it.",
        _number(float, 1, 3650 * _DAY),
    )
    ledger_retention_days: float = _declare(
        "LEDGER_RETENTION_DAYS",
        90.0,
        "days",
        "How long settled messages stay in the ledger.",
        _number(float, 0.001, 3650),
    )
    result_ttl_s: float = _seconds(
        "RESULT_TTL_S", 7.0 * _DAY, "How long finished and failed jobs stay.", 1, 365 * _DAY
    )
    max_sessions: int = _count(
        "MAX_SESSIONS", 20, "Sessions a host runs; more are refused.", 1, 10_000
    )
    memory_limit_mib: int = _count(
        "MEMORY_LIMIT_MIB",
        500,
        "Memory of a device process; above it is recycled when idle.",
        50,
        100_000,
        unit="MiB",
    )
    shutdown_timeout_s: float = _seconds(
        "SHUTDOWN_TIMEOUT_S", 25.0, "Graceful shutdown; then forced.", 1, 600
    )
    history_events: int = _count(
        "HISTORY_EVENTS", 500, "Events kept in a session's history.", 10, 10_000
    )
    events_max: int = _count(
        "EVENTS_MAX", 100_000, "Entries of the stream wa:events.", 1000, 10_000_000
    )
    alert_repeat_s: float = _seconds(
        "ALERT_REPEAT_S", 3600.0, "An alert repeats at most once in so long.", 1, 7 * _DAY
    )
    unknown_alert_s: float = _seconds(
        "UNKNOWN_ALERT_S",
        3600.0,
        "A message unknown for so long, without a receipt, is an alert.",
        1,
        7 * _DAY,
    )

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Settings":
        """Parse the environment; an empty variable counts as absent.

        Raises:
            SettingsError: One or more values cannot be used; all are listed.
        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for name, declaration in declarations().items():
            text = environ.get(declaration.variable, "").strip()
            if not text:
                continue
            try:
                values[name] = declaration.parse(text)
            except ValueError as problem:
                problems.append(f"{declaration.variable} {problem}")
        if problems:
            raise SettingsError(problems)
        return cls(**values)

    def table(self, environ: Mapping[str, str]) -> list[dict[str, str]]:
        """One row a setting: variable, value (secrets masked), unit, origin, default, sentence."""
        rows = []
        for name, declaration in declarations().items():
            value = getattr(self, name)
            given = environ.get(declaration.variable, "").strip()
            rows.append(
                {
                    "variable": declaration.variable,
                    "value": mask(str(value)) if declaration.secret and value else show(value),
                    "unit": declaration.unit,
                    "origin": "environment" if given else "default",
                    "default": show(_defaults()[name]),
                    "sentence": declaration.sentence,
                }
            )
        return rows


def declarations() -> dict[str, Declaration]:
    """Attribute name to declaration, in the order of the table."""
    return {field.name: field.metadata["declaration"] for field in dataclasses.fields(Settings)}


def misspelt(environ: Mapping[str, str]) -> dict[str, str]:
    """Names in an environment that nobody reads, each with the setting that it resembles."""
    import difflib  # only commands look

    ours = [declaration.variable for declaration in declarations().values()]
    others = (name for name in sorted(environ) if name not in ours)
    near = {name: difflib.get_close_matches(name.upper(), ours, 1, _NEAR) for name in others}
    return {name: found[0] for name, found in near.items() if found}


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Settings)}


def show(value: Any) -> str:
    """A value as it would be written in the environment; `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(show(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def mask(url: str) -> str:
    """Keep scheme, host and path of a URL; everybody's credentials become asterisks."""
    parts = urlsplit(url)
    where = parts.hostname or ""
    if parts.port:
        where += f":{parts.port}"
    if parts.username or parts.password:
        where = f"***@{where}"
    return f"{parts.scheme}://{where}{parts.path}{'?***' if parts.query else ''}"
