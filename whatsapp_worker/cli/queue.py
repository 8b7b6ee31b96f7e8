"""`whatsapp-worker queue`: what waits, why it rests, and an operator's word on it."""

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from redis import RedisError

from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker import cancelling, pacer
from whatsapp_worker.cli import status
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.messages import open_ledger
from whatsapp_worker.cli.terminal import columns, duration, emit, moment, paint, printable, talk
from whatsapp_worker.errors import CommandFailed, RedisUnavailable, UsageError
from whatsapp_worker.event_names import Status
from whatsapp_worker.outbox import Outbox
from whatsapp_worker.rq_job import Job, Outcome
from whatsapp_worker.session import State
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

CLEARED = "its queue was cleared by an operator"
_PAGE = 200
_SAMPLE = 1000  # messages that tell how fast it goes
_MOST_DIGITS = re.compile(r"\d+(?=\d{4})")  # of a number; who knows it, knows it by the rest
_PERSON = "@s.whatsapp.net"
_RESUMES = (
    "Look first: whatsapp-worker queue {0} list. Send it: whatsapp-worker queue {0} resume."
    " Cancel it: whatsapp-worker queue {0} clear"
)
_UNPAUSES = "End the pause alone: whatsapp-worker queue {} resume --keep-held"


def queue(options: Options, settings: Settings) -> int:
    """Serve `queue SESSION [list|pause|resume|clear]`."""
    host = Host(settings)
    host.wanted(options.session)
    match options.action:
        case "list":
            return _list(options, host)
        case "clear":
            return _clear(options, host)
        case "pause":
            host.sessions.hold(options.session).pause(time.time())
            talk("Paused. What is in hand at this moment is still sent.")
        case "resume":
            _resume(options, host)
    found = gather(host, options.session)
    if options.json:
        emit(found)
    else:
        print("\n".join(_render(found)))
    return 0


def gather(host: Host, session: str) -> dict[str, Any]:
    """What there is to know, in the form that `--json` prints; times are UTC seconds.

    Raises:
        RedisUnavailable: It does not answer (transient).
    """
    standing = host.sessions.hold(session).read()
    [row] = status.gather(host, session)["sessions"]
    with _outbox(host, session) as outbox:
        counts = outbox.counts()
        head = next(iter(outbox.heads()), None)
    high, normal = counts.values()
    found: dict[str, Any] = {
        "session": session,
        "session_state": row["state"],
        **{key: row["queue"].get(key) for key in ("state", "reason", "until")},
        "depth": high["queued"] + normal["queued"] + high["in_hand"] + normal["in_hand"],
        "high": high["queued"],
        "in_hand": high["in_hand"] + normal["in_hand"],
        "later": high["later"] + normal["later"],
        "head": _head(head),
        "pace": _pace(host, session),
        "paused_at": standing.paused_at,
        "held_before": standing.held_before,
    }
    is_quiet = found["state"] in ("idle", "running")
    if is_quiet and row["state"] != State.CONNECTED and found["depth"]:
        found["reason"] = f"the session is {row['state']}. {row['sentence']}".strip()
    elif is_quiet and found["depth"] and (found["pace"]["next_at"] or 0.0) > time.time():
        # state.json says so at the next write of what changes all the time.
        found |= {"state": "pacing", "reason": pacer.LIMITED, "until": found["pace"]["next_at"]}
    return found


def _head(job: Job | None) -> dict[str, Any] | None:
    if job is None:
        return None
    return {
        "message_id": job.message_id,
        "job_id": job.id,
        "high": job.queue.endswith(":high"),
        "enqueued_at": job.enqueued_at,
        "age_s": round(max(0.0, time.time() - job.enqueued_at), 1),
    }


def _pace(host: Host, session: str) -> dict[str, Any]:
    """How fast it goes, and how fast it may."""
    now_a_minute = 0.0
    if not status.ledger_hold(host, session):
        with open_ledger(host, session) as ledger:
            now_a_minute = _sent_a_minute(ledger) if ledger else 0.0
    limits: dict[str, Any] = dict.fromkeys(("per_minute", "per_day", "sent_today", "next_at"))
    pace = pacer.pace_of(host.settings)
    if pace is not None:
        path = host.sessions.folder(session) / pacer.FILE
        limits = pacer.Pacer(pace, path).as_dict()
    return {"sent_a_minute": now_a_minute, **limits}


def _sent_a_minute(ledger: Ledger) -> float:
    """Messages of the last minute; of less where they are many."""
    now = time.time()
    claimed = ledger.recent(_SAMPLE)
    sent = [row.sent_at for row in claimed if row.sent_at and row.sent_at > now - 60]
    span_s = now - min(row.claimed_at for row in claimed) if len(claimed) == _SAMPLE else 60.0
    return round(len(sent) * 60 / min(60.0, max(1.0, span_s)), 1)


def _render(found: dict[str, Any]) -> list[str]:
    state = found["state"]
    colour = "green" if state in ("running", "idle") else "yellow"
    head, pace = found["head"], found["pace"]
    until = f", until {moment(found['until'])}" if found["until"] else ""
    rows = [
        ("queue", paint(found["session"], "bold")),
        ("state", paint(status.state_words(found), colour) + until),
        ("why", printable(found["reason"] or "")),
        ("depth", f"{found['depth']} ({found['in_hand']} in hand, {found['high']} high)"),
        ("later", str(found["later"] or "")),
        ("head", f"{printable(head['message_id'])}, {duration(head['age_s'])} old" if head else ""),
        ("pace", _pace_words(pace)),
        ("paused", moment(found["paused_at"]) if found["paused_at"] else ""),
    ]
    lines = columns([row for row in rows if row[1]])
    if found["paused_at"] or status.HELD in (found["reason"] or ""):
        lines += ["", _RESUMES.format(found["session"])]
    if status.state_words(found) == "paused, held":
        lines.append(_UNPAUSES.format(found["session"]))
    return lines


def _pace_words(pace: dict[str, Any]) -> str:
    words = f"{pace['sent_a_minute']:g} a minute"
    if pace["per_minute"] is None:
        return f"{words}, not limited"
    cap = f" of {pace['per_day']}" if pace["per_day"] else ""
    return f"{words} of {pace['per_minute']:g}; {pace['sent_today']}{cap} today"


def _list(options: Options, host: Host) -> int:
    """What waits, the next first, those for later last; no texts, and of numbers four digits."""
    held_before = host.sessions.hold(options.session).read().held_before
    rows: list[dict[str, Any]] = []
    with _outbox(host, options.session) as outbox:
        for queue in outbox.queues:
            left = options.limit - len(rows)
            for jobs in _pages(outbox, queue, left) if left else ():
                rows += [_row(options.session, job, held_before) for job in jobs]
        count = sum(sum(counts.values()) for counts in outbox.counts().values())
    if options.json:
        for row in rows:
            emit(row)
    else:
        head = ["MESSAGE", "TO", "ENQUEUED", "JOB", ""]
        shown = [_row_words(row) for row in rows]
        print("\n".join(columns(shown, head=head)) if shown else "Nothing waits.")
    if len(rows) == options.limit < count:
        talk(f"{len(rows)} of {count}; more: --limit")
    return 0


def _row(session: str, job: Job, held_before: float | None) -> dict[str, Any]:
    order = job.order
    return {
        "session": session,
        "message_id": job.message_id,
        "job_id": job.id,
        "to": _MOST_DIGITS.sub("...", order.recipient.jid).removesuffix(_PERSON) if order else None,
        "high": job.queue.endswith(":high"),
        "sending": job.status == "started",
        "held": status.is_held(job, held_before),
        "enqueued_at": job.enqueued_at or None,
        "send_at": order.send_at if order else None,
    }


def _row_words(row: dict[str, Any]) -> list[str]:
    notes = [name for name in ("high", "sending", "held") if row[name]]
    notes += [f"not before {moment(row['send_at'])}"] if row["send_at"] else []
    return [
        printable(row["message_id"] or "-"),
        printable(row["to"] or "cannot be read"),
        moment(row["enqueued_at"]),
        printable(row["job_id"]),
        ", ".join(notes),
    ]


def _resume(options: Options, host: Host) -> None:
    """End a pause, and a hold once the operator knows what that sends."""
    hold = host.sessions.hold(options.session)
    standing = hold.read()
    held_before = 0.0 if options.keep_held else standing.held_before or 0.0
    count = _count_held(host, options.session, held_before) if held_before else 0
    messages = "1 message" if count == 1 else f"{count} messages"
    what = f"{messages} enqueued for another number, or before the session was deleted"
    if count:
        alone = "; --keep-held ends the pause alone" if standing.paused_at is not None else ""
        _confirm(
            options,
            f"resume sends {what}: look first (whatsapp-worker queue {options.session} list), then"
            f" say --yes{alone}",
            f"This sends {what}, from the session's present number.",
            "nothing was resumed",
        )
    if not hold.release(held_before):
        if why := status.ledger_hold(host, options.session):
            raise CommandFailed(f"resume does not release queue {options.session}: {why}")
        talk("It was not paused." if options.keep_held else "It was neither paused nor held.")
    elif count:
        talk(f"Released: {what}.")


def _count_held(host: Host, session: str, held_before: float) -> int:
    with _outbox(host, session) as outbox:
        return sum(
            status.is_held(job, held_before)
            for queue in outbox.queues
            for jobs in _pages(outbox, queue)
            for job in jobs
            if job.status != "started" and not job.is_settled
        )


def _clear(options: Options, host: Host) -> int:
    """Cancel everything that waits, in batches; what is in hand goes its way."""
    _confirm(
        options,
        "clear cancels every waiting message for good: say --yes",
        "This cancels every message that waits in the queue.",
        "nothing was cleared",
    )
    with (
        _outbox(host, options.session) as outbox,
        open_ledger(host, options.session, make=True) as ledger,
    ):
        assert ledger is not None
        ended: Counter[str] = Counter()
        for outcomes in _cancel_all(outbox, ledger, host.sessions):
            ended.update(outcome.status for outcome in outcomes)
            talk(f"{ended.total()} cleared")
    if options.json:
        emit({"session": options.session, "cleared": ended.total(), "as": dict(ended)})
    else:
        how = ", ".join(f"{count} {word}" for word, count in ended.items())
        print(f"{options.session}: {how or 'nothing waited'}")
    return 0


def _cancel_all(outbox: Outbox, ledger: Ledger, sessions: Sessions) -> Iterator[list[Outcome]]:
    """What became of each batch; what is enqueued meanwhile stays."""
    key = sessions.install_key()

    def end(jobs: list[Job]) -> list[Outcome]:
        return cancelling.end(
            jobs, Status.CANCELLED, CLEARED, outbox=outbox, ledger=ledger, install_key=key
        )

    for queue in outbox.queues:
        for jobs in _pages(outbox, queue):
            yield end([job for job in jobs if job.status != "started"])


def _pages(outbox: Outbox, queue: str, limit: int = 0) -> Iterator[list[Job]]:
    """All that waits on it at this moment, in hand or for later, too; see `Outbox.waiting`."""
    waiting = outbox.waiting(queue, limit)
    for start in range(0, len(waiting), _PAGE):
        yield outbox.load(queue, waiting[start : start + _PAGE])


def _confirm(options: Options, refusal: str, question: str, unchanged: str) -> None:
    """Ask before messages are cancelled, or sent from another number than they were meant for.

    Raises:
        UsageError: Nobody is there to ask, or the answer was no.
    """
    if options.yes:
        return
    if options.json or not sys.stdin.isatty():
        raise UsageError(refusal)
    print(question, file=sys.stderr)
    print("Type yes to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UsageError(unchanged)


@contextlib.contextmanager
def _outbox(host: Host, session: str) -> Iterator[Outbox]:
    """The session's queues.

    Raises:
        RedisUnavailable: Redis does not answer (transient).
    """
    settings = host.settings
    try:
        with contextlib.closing(host.redis()) as redis:
            stream = EventStream(redis, events_max=settings.events_max)
            outbox = Outbox(redis, session, stream=stream, result_ttl_s=settings.result_ttl_s)
            with contextlib.closing(outbox):
                yield outbox
    except RedisError as error:
        raise RedisUnavailable("Redis did not answer; call it again") from error
