"""Checks of Redis and of the ledger's database, and of this host's clock against theirs."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from redis import Redis, RedisError

from storage import ledger_tables
from storage.database import Database, Statement
from storage.errors import LedgerError
from storage.locks import is_locked
from whatsapp_worker import redis_client, redis_server
from whatsapp_worker.doctor.finding import Finding, ok, problem, warning
from whatsapp_worker.errors import RedisUnavailable
from whatsapp_worker.settings import Settings, mask

TIMEOUT_S = 3.0
NEARLY_FULL = 0.9
SKEW_WARNING_S = 5.0
SKEW_PROBLEM_S = 60.0
RELEASED_AT = 1_767_225_600.0  # 2026-01-01; a clock before that is wrong

Info = Mapping[str, Any]


def check_redis(settings: Settings) -> list[Finding]:
    """Redis answers, keeps what it is given, and never drops any of it."""
    try:
        with _redis(settings) as redis:
            return judge_redis(redis.info(), saves=_saves(redis))
    except RedisUnavailable as error:
        return [_no_redis(settings, error)]
    except (RedisError, OSError) as error:
        return [_silent_redis(settings, error)]


@contextlib.contextmanager
def _redis(settings: Settings) -> Iterator[Redis]:
    client = redis_client.connect(redis_server.resolve_url(settings), timeout_s=TIMEOUT_S)
    with contextlib.closing(client):
        client.ping()
        yield client


def _saves(redis: Redis) -> bool | None:
    """Whether snapshots are made; None when the server does not tell (managed ones forbid it)."""
    try:
        return bool(redis.config_get("save").get("save"))
    except RedisError:
        return None


def _no_redis(settings: Settings, error: RedisUnavailable) -> Finding:
    """No REDIS_URL, and no supervisor that runs one."""
    try:
        program = redis_server.program()
    except RedisUnavailable as missing:
        return problem("redis", "No REDIS_URL is set and no Redis is installed.", str(missing))
    return ok("redis", f"The supervisor brings a Redis of its own ({program}).")


def _silent_redis(settings: Settings, error: Exception) -> Finding:
    announced = settings.data_dir / "redis.json"
    if settings.redis_url:
        return problem(
            "redis",
            f"{mask(settings.redis_url)} cannot be used: {error}.",
            "Start it, or correct REDIS_URL",
        )
    if is_locked(settings.data_dir / "supervisor.lock"):
        return problem(
            "redis",
            f"The supervisor's own Redis does not answer: {error}.",
            "It is started again within seconds; if not, look at the supervisor's log",
        )

    def forget() -> str:
        announced.unlink(missing_ok=True)
        return f"removed {announced.name}, which a killed supervisor left behind"

    return warning(
        "redis",
        f"{announced} names a Redis that is gone: its supervisor was killed.",
        "whatsapp-worker run replaces it",
        mend=forget,
    )


def judge_redis(info: Info, *, saves: bool | None) -> list[Finding]:
    """What INFO says.

    Args:
        info: As redis-py parses it.
        saves: Whether snapshots are made, if known.
    """
    version = str(info.get("redis_version", "0"))
    findings = [_version(version), _role(info), _eviction(info), _durability(info, saves=saves)]
    findings += [_memory(info)]
    bad = [finding for finding in findings if finding.verdict != "ok"]
    return bad or [
        ok("redis", f"Redis {version} answers, keeps everything on disk, drops nothing.")
    ]


def _version(version: str) -> Finding:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= redis_server.AT_LEAST:
        return ok("redis", version)
    wanted = ".".join(map(str, redis_server.AT_LEAST))
    return problem(
        "redis", f"Redis {version} is too old.", f"Use Redis {wanted} or later, or Valkey"
    )


def _role(info: Info) -> Finding:
    if info.get("role") in (None, "master"):
        return ok("redis", "")
    return problem("redis", "This Redis is a replica: it refuses writes.", "Use the primary's URL")


def _eviction(info: Info) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return ok("redis", "")
    return problem(
        "redis",
        f"This Redis may drop messages when memory is short (maxmemory-policy {policy}).",
        "Run: redis-cli CONFIG SET maxmemory-policy noeviction, and set it in redis.conf; or use a"
        " Redis that is no cache",
    )


def _durability(info: Info, *, saves: bool | None) -> Finding:
    remedy = "Run: redis-cli CONFIG SET appendonly yes, and set it in redis.conf"
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            return problem(
                "redis", "Redis cannot write its append-only file.", "Make room on its disk"
            )
        return ok("redis", "")
    if saves is False:
        return problem(
            "redis", "This Redis keeps nothing on disk: a restart loses every message.", remedy
        )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return problem("redis", "Redis cannot write its snapshots.", "Make room on its disk")
    return warning(
        "redis",
        "This Redis only makes snapshots: a crash loses the messages of the last minutes.",
        remedy,
    )


def _memory(info: Info) -> Finding:
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not most or used < NEARLY_FULL * most:
        return ok("redis", "")
    return warning(
        "redis",
        f"Redis uses {used / most:.0%} of its maxmemory; when it is full, enqueueing fails.",
        "Raise maxmemory, or find out what does not drain: whatsapp-worker status",
    )


def check_database(settings: Settings) -> list[Finding]:
    """The ledger's database answers, takes rows, and is not newer than this software."""
    if settings.database_url is None:
        return [ok("database", "The ledger is one SQLite file a session.")]
    database = Database(settings.database_url, timeout_s=TIMEOUT_S)
    where = mask(settings.database_url)
    try:
        [(exists,)] = database.run(_HAS_LEDGER, {})
        if not exists:
            return [_judge_empty(where, database)]
        rows = database.run(_REVISION, {})
        return [judge_revision(where, str(rows[0][0]) if rows else "")]
    except LedgerError as error:
        return [
            problem(
                "database",
                f"The ledger's database cannot be used: {error}.",
                "Start it, or correct DATABASE_URL",
            )
        ]
    finally:
        database.close()


def _sql(text: str) -> Statement:
    import sqlalchemy

    return Statement(sqlalchemy.text(text))


_HAS_LEDGER = _sql("SELECT to_regclass('ledger_version') IS NOT NULL")
_REVISION = _sql("SELECT version_num FROM ledger_version")
_MAY_CREATE = _sql("SELECT has_schema_privilege(current_schema(), 'CREATE')")


def _judge_empty(where: str, database: Database) -> Finding:
    [(may_create,)] = database.run(_MAY_CREATE, {})
    if may_create:
        return ok("database", f"{where} answers; the ledger is made at the first start.")
    return problem(
        "database",
        f"{where} answers, and this user may not create the ledger's tables.",
        "Run there: GRANT CREATE, USAGE ON SCHEMA public TO the user of DATABASE_URL",
    )


def judge_revision(where: str, revision: str) -> Finding:
    """The revision of the ledger's tables."""
    if revision == ledger_tables.HEAD:
        return ok("database", f"{where} answers; its ledger is up to date.")
    if revision in ledger_tables.KNOWN_REVISIONS:
        return ok("database", f"{where} answers; its ledger is upgraded at the next start.")
    return problem(
        "database",
        f"The ledger in {where} was made by newer software (revision {revision or 'unknown'}).",
        "Upgrade whatsapp-worker, or use the database that belongs to this version",
    )


def check_clock(settings: Settings) -> list[Finding]:
    """This host's clock agrees with Redis's; expiry and receipts depend on it."""
    other: float | None = None
    with contextlib.suppress(RedisError, RedisUnavailable, OSError), _redis(settings) as redis:
        before = time.time()
        seconds, microseconds = redis.time()
        # Half of the way there and back.
        other = seconds + microseconds / 1e6 + (time.time() - before) / 2
    return [judge_clock(time.time(), other)]


def judge_clock(now: float, other: float | None) -> Finding:
    """UTC seconds here, and at Redis if known."""
    remedy = "Synchronise the clock: timedatectl set-ntp true, or run chrony"
    if now < RELEASED_AT:
        stamp = time.strftime("%Y-%m-%d", time.gmtime(now))
        return problem("clock", f"This host's clock says {stamp}.", remedy)
    skew_s = 0.0 if other is None else abs(now - other)
    if skew_s >= SKEW_WARNING_S:
        how = problem if skew_s >= SKEW_PROBLEM_S else warning
        return how(
            "clock", f"The clocks of this host and of Redis differ by {skew_s:.0f} s.", remedy
        )
    return ok("clock", "The clock is right." if other else "The clock is plausible.")
