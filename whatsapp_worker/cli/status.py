"""`whatsapp-worker status`: the host, then every session; once, live, or for programs."""

import contextlib
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from storage.errors import StorageError
from storage.hold import Standing
from storage.ledger_schema import held_path
from storage.sessions import StateRecord
from whatsapp_worker import keys, purge_memory
from whatsapp_worker.cli import host as hosts
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import columns, duration, emit, moment, paint, printable
from whatsapp_worker.errors import RedisUnavailable
from whatsapp_worker.history import History
from whatsapp_worker.session import State
from whatsapp_worker.settings import Settings

if TYPE_CHECKING:
    from whatsapp_worker.rq_job import Job

_Breakers = dict[str, dict[str, Any]]  # of one session, as `breaker_board.read` gives them

WATCH_S = 1.0
HISTORY_LINES = 15
_NO_SUPERVISOR = "No supervisor runs on this data folder. Start it: whatsapp-worker run"
PAUSED = "an operator paused it: whatsapp-worker queue {} resume"
HELD = "enqueued before this session was linked to its number; an operator decides about it"
LEDGER_HELD = (
    "its ledger was damaged and set aside, and without it messages could be sent twice: read {1},"
    " look through the queue (whatsapp-worker queue {0} list), then remove that file; to cancel"
    " some of it, pause the queue before"
)
_AND_HELD = "; it is also held: "
_STARTING = "The supervisor has not taken it up yet."
_QUIET = ("idle", "running", "held")  # of a queue; nothing else keeps it
# States that are only true while a supervisor runs.
_LIVE = {State.CONNECTED, State.CONNECTING, State.LINKING, State.RECONNECTING}
_COLOURS = {
    State.CONNECTED: "green",
    State.CONNECTING: "yellow",
    State.LINKING: "yellow",
    State.RECONNECTING: "yellow",
    State.UNLINKED: "cyan",
    State.STOPPED: "dim",
}


def status(options: Options, settings: Settings) -> int:
    """Serve `status [SESSION]`."""
    host = Host(settings)
    if options.session:
        host.wanted(options.session)
    if options.watch:
        return _watch(options, host)
    print_status(options, gather(host, options.session))
    return 0


def _history(host: Host, session: str) -> list[dict[str, Any]]:
    """What happened to it lately, oldest first."""
    folder, limit = host.sessions.folder(session), host.settings.history_events
    return History(folder, limit=limit).read(now=time.time())


def print_status(options: Options, found: dict[str, Any]) -> None:
    """Show what `gather` found."""
    if options.json:
        emit(found)
    else:
        print("\n".join(render(found, in_full=bool(options.session))))


def _watch(options: Options, host: Host) -> int:
    while True:
        found = gather(host, options.session)
        if options.json or not sys.stdout.isatty():
            print_status(options, found)
        else:
            size = shutil.get_terminal_size()
            lines = render(found, in_full=bool(options.session))[: size.lines - 1]
            # Home, then each line cleared to its end, then the rest: no flicker.
            text = "".join(f"{line}\x1b[K\n" for line in lines)
            print(f"\x1b[H{text}\x1b[J", end="", flush=True)
        time.sleep(WATCH_S)


def gather(host: Host, session: str | None = None) -> dict[str, Any]:
    """What there is to know, in the form that `--json` prints.

    Args:
        host: Of which host.
        session: Only this one, with its history.
    """
    supervisor = host.supervisor()
    redis = hosts.check_redis(host)
    alive = supervisor.alive
    names = [session] if session else host.sessions.ids()
    depths, breakers = _queues(host, names) if redis["ok"] else ({}, {})
    standings = {name: _standing(host, name) for name in names}
    held = _held(host, standings) if redis["ok"] else {}
    return {
        "supervisor": {"alive": alive, "pid": supervisor.pid},
        "redis": redis,
        "database": hosts.check_database(host.settings),
        "network": supervisor.network,
        "data_dir": str(host.settings.data_dir.absolute()),
        "purge": purge_memory.counters(host.settings.data_dir),
        "sessions": [
            _decided(
                host,
                name,
                _row(host, name, alive, depths.get(name), breakers.get(name, {})),
                standings[name],
                held.get(name, []),
            )
            | ({"history": _history(host, name)} if session else {})
            for name in names
        ],
    }


def _queues(host: Host, names: list[str]) -> tuple[dict[str, int], dict[str, _Breakers]]:
    """Jobs that wait or are in hand, and breakers, by session; empty when Redis does not answer."""
    import redis

    from whatsapp_worker import breaker_board

    try:
        with host.redis(timeout_s=2.0) as client, client.pipeline(transaction=False) as pipeline:
            for name in names:
                for high in (False, True):
                    key = f"rq:queue:{keys.outbound_queue(keys.SessionId(name), high=high)}"
                    pipeline.llen(key)
                    pipeline.llen(f"{key}:intermediate")
            lengths = [int(length) for length in pipeline.execute()]
            breakers = breaker_board.read(client, names)
    except (redis.RedisError, RedisUnavailable, OSError):
        return {}, {}
    return {name: sum(lengths[4 * n : 4 * n + 4]) for n, name in enumerate(names)}, breakers


def _held(host: Host, standings: dict[str, Standing | None]) -> dict[str, list[bool]]:
    """Whether the heads of a session's queues are held for another number, in the order in which
    they are taken; only of sessions that may hold anything."""
    import redis

    from whatsapp_worker.outbox import Outbox
    from whatsapp_worker.stream import EventStream

    before = {name: it.held_before for name, it in standings.items() if it and it.held_before}
    if not before:
        return {}
    found, settings = {}, host.settings
    with (
        contextlib.suppress(redis.RedisError, RedisUnavailable, OSError),
        contextlib.closing(host.redis(timeout_s=2.0)) as client,
    ):
        stream = EventStream(client, events_max=settings.events_max)
        for name, moment in before.items():
            outbox = Outbox(client, name, stream=stream, result_ttl_s=settings.result_ttl_s)
            # A queue that is no list hides what is held of no other session.
            with contextlib.suppress(redis.ResponseError), contextlib.closing(outbox):
                found[name] = [is_held(job, moment) for job in outbox.heads()]
    return found


def is_held(job: "Job", held_before: float | None) -> bool:
    """Whether it would be sent, but was enqueued for another number."""
    return job.order is not None and job.enqueued_at < (held_before or 0.0)


def _standing(host: Host, name: str) -> Standing | None:
    """What keeps its queue; None where that cannot be read."""
    with contextlib.suppress(StorageError):
        return host.sessions.hold(name).read()
    return None


def _rests(breakers: _Breakers) -> dict[str, Any]:
    """Why a queue rests, by what its device process last said in Redis; empty when it does not."""
    now = time.time()
    for name, state in (("database", "database"), ("message", "breaker"), ("pause", "paused")):
        facts = breakers.get(name, {})
        if (facts.get("until") or 0.0) > now:
            return {"state": state, "reason": facts.get("reason"), "until": facts["until"]}
    return {}


def _row(
    host: Host, name: str, alive: bool, depth: int | None, breakers: _Breakers
) -> dict[str, Any]:
    """One session. Without a supervisor nothing is called connected."""
    try:
        wanted, state = host.sessions.wanted(name), host.sessions.state(name)
    except StorageError as error:
        return _facts(name, State.FAILED, None, str(error), depth)
    wish = {"network": wanted.network, "wanted": wanted.run} if wanted else {}
    if state is None:
        sentence = _STARTING if alive else _NO_SUPERVISOR
        return _facts(name, State.UNLINKED, None, sentence, depth) | wish
    row = _facts(name, state.state, state.reason, state.sentence, depth) | {
        "since": state.since,
        "degraded": state.degraded,
        "phone": state.phone,
        "jid": state.jid,
        "lid": state.lid,
        "push_name": state.push_name,
        "attempt": state.attempt,
        "next_attempt_at": state.next_attempt_at,
        "banned_until": state.banned_until,
        **wish,
    }
    if not alive:
        return row | _without_supervisor(state)
    age = None if state.proof_of_life_at is None else time.time() - state.proof_of_life_at
    queue = dict(state.queue or {"state": "idle", "reason": None, "until": None})
    if queue["state"] in ("idle", "running"):  # the record is seconds old
        queue |= _rests(breakers)
    return row | {
        "pid": state.pid,
        "rss_mib": state.rss_mib,
        "queue": queue | {"depth": depth if depth is not None else queue.get("depth")},
        "proof_of_life_age_s": None if age is None else round(max(0.0, age), 1),
    }


def _decided(
    host: Host, name: str, row: dict[str, Any], standing: Standing | None, held: list[bool]
) -> dict[str, Any]:
    """The row with what operators decided, or have to, which the record tells seconds later, or not
    at all while no device process runs."""
    queue, paused = row["queue"], PAUSED.format(name)
    if standing is None:
        return row
    was_held = queue["state"] == "held" and standing.held_before is None
    if was_held or (queue["reason"] == paused and standing.paused_at is None):
        state = "running" if queue["depth"] else "idle"
        queue |= {"state": state, "reason": None, "until": None}
    ledger = ledger_hold(host, name)
    is_paused = standing.paused_at is not None and (
        ledger is not None or queue["state"] not in ("breaker", "database")
    )
    is_held = any(held) if is_paused else held[:1] == [True] and queue["state"] in _QUIET
    reasons = "; ".join([HELD] * is_held + ([ledger] if ledger else []))
    if is_paused:
        reason = f"{paused}{_AND_HELD}{reasons}" if reasons else paused
        queue |= {"state": "paused", "reason": reason, "until": None}
    elif reasons:
        queue |= {"state": "held", "reason": reasons, "until": None}
    return row


def ledger_hold(host: Host, name: str) -> str | None:
    """What to do where a damaged ledger was set aside, which holds the queue; else None."""
    held = held_path(host.sessions.folder(name) / "ledger.db")
    if host.settings.database_url is not None or not held.exists():
        return None
    return LEDGER_HELD.format(name, held)


def _facts(
    name: str, state: str, reason: str | None, sentence: str, depth: int | None
) -> dict[str, Any]:
    """Every key of the contract."""
    return {
        "session": name,
        "state": str(state),
        "reason": reason,
        "sentence": sentence,
        "since": None,
        "degraded": False,
        "phone": None,
        "jid": None,
        "lid": None,
        "push_name": None,
        "network": None,
        "wanted": None,
        "pid": None,
        "attempt": 0,
        "next_attempt_at": None,
        "banned_until": None,
        "queue": {"state": "idle", "reason": None, "until": None, "depth": depth},
        "proof_of_life_age_s": None,
        "rss_mib": None,
    }


def _without_supervisor(state: StateRecord) -> dict[str, Any]:
    if state.state not in _LIVE:
        return {}
    return {"state": str(State.STOPPED), "reason": None, "sentence": _NO_SUPERVISOR}


def render(found: dict[str, Any], *, in_full: bool = False) -> list[str]:
    """The same for people, as lines."""
    lines = [*_heading(found), ""]
    if in_full:
        for row in found["sessions"]:
            lines += _in_full(row)
        return lines
    if not found["sessions"]:
        return [*lines, "No session yet. Link one: whatsapp-worker link SESSION"]
    return lines + _table(found["sessions"]) + _sentences(found["sessions"])


def _heading(found: dict[str, Any]) -> list[str]:
    supervisor, redis, database = found["supervisor"], found["redis"], found["database"]
    alive = supervisor["alive"]
    rows = [
        ("supervisor", _mark(alive, f"pid {supervisor['pid']}" if alive else _NO_SUPERVISOR)),
        (
            "network",
            paint(found["network"], *(["yellow"] if found["network"] != "whatsapp" else [])),
        ),
        ("redis", _mark(redis["ok"], _redis_words(redis))),
        ("database", _mark(database["ok"], _database_words(database))),
        ("data", printable(found["data_dir"])),
    ]
    return columns(rows)


def _mark(ok: bool, text: str) -> str:
    return f"{paint('ok', 'green') if ok else paint('problem', 'red', 'bold')}  {printable(text)}"


def _redis_words(redis: dict[str, Any]) -> str:
    if not redis["ok"]:
        return str(redis["error"])
    return f"{redis['url']}{' (the supervisor brings it)' if redis['embedded'] else ''}"


def _database_words(database: dict[str, Any]) -> str:
    if database["error"]:
        return f"{database['url']}: {database['error']}"
    return database["url"] or "SQLite, one file a session"


def _table(sessions: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            row["session"],
            paint(row["state"], *_style(row)),
            duration(time.time() - row["since"]) if row["since"] else "-",
            f"+{printable(row['phone'])}" if row["phone"] else "-",
            _queue_words(row["queue"]),
            str(row["pid"] or "-"),
            f"{row['rss_mib']:.0f} MiB" if row["rss_mib"] else "-",
            row["reason"] or "",
        ]
        for row in sessions
    ]
    head = ["SESSION", "STATE", "FOR", "PHONE", "QUEUE", "PID", "MEMORY", "REASON"]
    return columns(rows, head=head)


def _style(row: dict[str, Any]) -> list[str]:
    if row["degraded"]:
        return ["yellow"]
    colour = _COLOURS.get(row["state"], "red")
    return [colour]


def _queue_words(queue: dict[str, Any]) -> str:
    depth = queue.get("depth")
    words = "?" if depth is None else f"{depth} waiting" if depth else "empty"
    if queue.get("state") in (None, "idle", "running"):
        return words
    return f"{words}, {state_words(queue)}"


def state_words(queue: dict[str, Any]) -> str:
    """Its state, and whether one that is paused would be held without that, too."""
    is_both = queue["state"] == "paused" and _AND_HELD in (queue["reason"] or "")
    return "paused, held" if is_both else str(queue["state"])


def _sentences(sessions: list[dict[str, Any]]) -> list[str]:
    """What to do next, for those that need somebody or something."""
    told = [(row["session"], row["sentence"]) for row in sessions if row["sentence"]]
    if not told:
        return []
    if len(told) > 1 and len({sentence for _, sentence in told}) == 1:
        return ["", printable(told[0][1])]
    return ["", *(f"{name}: {printable(sentence)}" for name, sentence in told)]


def _in_full(row: dict[str, Any]) -> list[str]:
    since = f" since {moment(row['since'])}" if row["since"] else ""
    shown: list[tuple[str, str]] = [
        ("session", paint(row["session"], "bold")),
        ("state", paint(row["state"], *_style(row)) + since),
    ]
    optional: list[tuple[str, Any]] = [
        ("reason", row["reason"]),
        ("next", row["sentence"]),
        ("degraded", "proof of life is overdue" if row["degraded"] else None),
        ("wanted", row["wanted"]),
        ("network", row["network"]),
        ("phone", f"+{row['phone']}" if row["phone"] else None),
        ("jid", row["jid"]),
        ("lid", row["lid"]),
        ("name", row["push_name"]),
        ("process", row["pid"]),
        ("memory", f"{row['rss_mib']:.0f} MiB" if row["rss_mib"] else None),
        ("attempt", _attempt_words(row)),
        ("banned", f"until {moment(row['banned_until'])}" if row["banned_until"] else None),
        ("queue", _queue_words(row["queue"])),
        ("proof of life", _age_words(row["proof_of_life_age_s"])),
    ]
    shown += [(name, printable(value)) for name, value in optional if value]
    return columns(shown) + _past(row.get("history") or [])


def _past(history: list[dict[str, Any]]) -> list[str]:
    """The last events, one a line."""
    if not history:
        return []
    rows = [
        (moment(event["at"]), str(event.get("event")), _facts_words(event))
        for event in history[-HISTORY_LINES:]
    ]
    return ["", paint("lately", "dim"), *columns(rows)]


def _facts_words(event: dict[str, Any]) -> str:
    hidden = ("at", "event", "sentence", "next_attempt_at")
    facts = {k: v for k, v in event.items() if k not in hidden and v}
    return printable(" ".join(f"{name}={value}" for name, value in facts.items()))


def _attempt_words(row: dict[str, Any]) -> str | None:
    if not row["attempt"]:
        return None
    at = row["next_attempt_at"]
    return f"{row['attempt']}" + (f", due {moment(at)}" if at else "")


def _age_words(age_s: float | None) -> str | None:
    return None if age_s is None else f"{duration(age_s)} ago"
