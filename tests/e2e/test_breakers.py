"""The message breaker on the real path, counted where it counts: at the server, which sees every
message that is tried and every question that a probe asks."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rq.job import Job
from support import events
from world import World, eventually

from whatsapp_worker.client import Outbox

CONTACT = "5511999990001"
SILENT = "5511999990002"  # sends no receipts, which would settle what is unknown
NOBODY = "5511999990003"
RESET_S = 4.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = {"MSG_FAILURE_THRESHOLD": "2", "MSG_RESET_S": str(RESET_S), "SEND_TIMEOUT_S": "4"}
    folder = tmp_path_factory.mktemp("breakers")
    with World.running(folder, MEDIA_ALLOW_PRIVATE="1", **settings) as it:
        it.control.contacts(SILENT, receipts="none")
        it.control.unknown_number(NOBODY)
        yield it


class Seen(NamedTuple):
    """One thing that the server saw of a session."""

    at: float
    what: str  # a text, or `probe`


def seen(world: World, phone: str) -> list[Seen]:
    """Every message, refused ones too and each as often as it came, and every probe; in order."""
    messages = [
        Seen(row["at"], row["text"] or "refused")
        for row in world.control.messages(sender=phone, refused=True)
        for _ in range(row["times"])
    ]
    asked = world.control.lookups()
    probes = [Seen(row["at"], "probe") for row in asked if row["from"] == row["phone"] == phone]
    return sorted(messages + probes)


def enqueue(world: World, session: str, count: int, *, to: str = CONTACT) -> list[Job]:
    return [world.enqueue(session, to, f"text {n}", f"m{n}") for n in range(count)]


def events_of(world: World, session: str, name: str) -> int:
    return sum((e["event"], e["session"]) == (name, session) for e in events(world.redis))


def open_until(world: World, session: str) -> float | None:
    """UTC seconds; None while its breaker is closed."""
    shown = json.loads(world.redis.hget(f"wa:breakers:{session}", "message") or "{}")
    found: float | None = shown.get("until")
    return found


def counted(world: World, session: str) -> dict[str, Any]:
    """What decides: the file from which each process takes its breaker."""
    path = world.data / "sessions" / session / "breaker.json"
    found = json.loads(path.read_text()) if path.exists() else {"failures": 0, "opened_at": None}
    return {"failures": found["failures"], "opened_at": found["opened_at"]}


def lose_one(world: World, session: str, phone: str, n: int) -> None:
    """A message without an answer: a failure that counts, and the end of its process."""
    pid = world.state(session)["pid"]
    world.control.send_fault("no_ack", phone, count=1)
    [outcome] = world.await_outcomes([world.enqueue(session, SILENT, f"text {n}", f"m{n}")])
    assert outcome["status"] == "unknown"
    eventually(lambda: world.state(session).get("pid") not in (None, pid), what="a new process")
    world.await_state(session, "connected")


def kill_redis(world: World, session: str) -> dict[str, Any]:
    """SIGKILL it, and start it again once the session has noticed; what its breaker was then."""
    log = world.folder / "run.log"
    words = [f"consumer.redis_{what} session={session}" for what in ("lost", "back")]
    lost, back = (log.read_text().count(word) for word in words)
    world.kill_redis()
    eventually(lambda: log.read_text().count(words[0]) > lost, what="it is noticed")
    found = counted(world, session)
    world.redis_server.start()
    eventually(lambda: log.read_text().count(words[1]) > back, what="it is back")
    return found


def test_an_open_breaker_lets_nothing_through_and_a_half_open_one_a_question_and_a_message(
    world: World,
) -> None:
    phone = world.link("sales")
    world.control.send_fault("refuse", phone, code=503, count=4)
    jobs = enqueue(world, "sales", 6)
    outcomes = world.await_outcomes(jobs)
    assert {outcome["status"] for outcome in outcomes} == {"sent"}, "resting fails nothing"
    tried = seen(world, phone)
    assert [it.what for it in tried] == [
        *("refused", "refused"),  # the second opens it
        *("probe", "refused"),
        *("probe", "refused"),
        "probe",
        *(f"text {n}" for n in range(6)),
    ]
    openings = [tried[1].at, tried[3].at, tried[5].at]
    probes = [it.at for it in tried if it.what == "probe"]
    for opened_at, asked_at in zip(openings, probes, strict=True):
        assert RESET_S - 0.2 <= asked_at - opened_at < 2 * RESET_S
    assert events_of(world, "sales", "breaker.opened") == 1, "one trip"
    assert events_of(world, "sales", "breaker.closed") == 1


def test_a_count_outlives_processes_and_logins_and_so_does_an_open_breaker(world: World) -> None:
    phone = world.link("deaf")
    first_pid = world.state("deaf")["pid"]
    world.control.send_fault("no_ack", phone, count=2)
    jobs = enqueue(world, "deaf", 4, to=SILENT)
    lost = world.await_outcomes(jobs[:2])
    assert {outcome["status"] for outcome in lost} == {"unknown"}
    until = eventually(lambda: open_until(world, "deaf"), what="two processes make one trip")
    assert world.await_state("deaf", "connected")["pid"] != first_pid
    world.replace_process("deaf")
    outcomes = world.await_outcomes(jobs[2:])
    assert {outcome["status"] for outcome in outcomes} == {"sent"}
    tried = seen(world, phone)
    assert [it.what for it in tried] == ["text 0", "text 1", "probe", "text 2", "text 3"]
    assert tried[2].at >= until - 0.05, "nobody asked or sent before its time was over"
    assert events_of(world, "deaf", "breaker.opened") == 1


def test_while_it_is_open_messages_are_cancelled_and_a_shutdown_is_quick_and_keeps_the_order(
    tmp_path: Path,
) -> None:
    with World.running(tmp_path, MSG_FAILURE_THRESHOLD="2", MSG_RESET_S="600") as world:
        phone = world.link("office")
        world.control.send_fault("refuse", phone, code=503, count=2)
        jobs = enqueue(world, "office", 9)
        at_rest = {"queue": 9, "intermediate": 0, "started": 0}
        eventually(
            lambda: open_until(world, "office") and world.limbo("office") == at_rest,
            what="it is open, and the message that opened it is back at the head",
        )
        # Each time the one at the head, and one further back.
        assert [cancel_as_crm(world, "office", id) for id in ("m0", "m2")] == ["cancelled"] * 2
        assert [cancel_as_operator(world, "office", id) for id in ("m1", "m4")] == ["cancelled"] * 2
        for n in (3, 6):
            jobs[n].cancel()
        gone = world.await_outcomes([jobs[n] for n in (0, 1, 2, 3, 4, 6)])
        assert [outcome["status"] for outcome in gone] == ["cancelled"] * 6
        begun = time.monotonic()
        assert world.supervisor is not None
        world.supervisor.terminate()
        assert world.supervisor.wait(30) == 0
        assert time.monotonic() - begun < 10
        kept = [jobs[n] for n in (5, 7, 8)]
        assert [job.get_status() for job in kept] == ["queued"] * 3
        assert world.limbo("office") == {"queue": 3, "intermediate": 0, "started": 0}
        assert [it.what for it in seen(world, phone)] == ["refused"] * 2

        world.control.query_fault(phone, code=503, count=1)
        world.environ["MSG_RESET_S"] = "1"
        world.start_supervisor()
        assert {outcome["status"] for outcome in world.await_outcomes(kept)} == {"sent"}
        after = [it.what for it in seen(world, phone)[2:]]
        assert after == ["probe", "probe", "text 5", "text 7", "text 8"]
        assert events_of(world, "office", "message.cancelled") == 6
        assert events_of(world, "office", "breaker.opened") == 1


def cancel_as_crm(world: World, session: str, message_id: str) -> str | None:
    outcome = Outbox(world.redis).cancel(session, message_id, timeout_s=30)
    return outcome and outcome.status


def cancel_as_operator(world: World, session: str, message_id: str) -> str:
    done = world.run("messages", "cancel", session, message_id, "--json")
    return str(json.loads(done.stdout)["status"])


def test_a_redis_that_is_killed_neither_opens_nor_closes_it(world: World) -> None:
    phone = world.link("lost")
    lose_one(world, "lost", phone, 0)
    before = counted(world, "lost")
    assert before == {"failures": 1, "opened_at": None}
    assert kill_redis(world, "lost") == before == counted(world, "lost")
    lose_one(world, "lost", phone, 1)
    until = open_until(world, "lost")
    assert until is not None, "one more failure was one too many, as before"
    before = counted(world, "lost")
    assert kill_redis(world, "lost") == before == counted(world, "lost")
    jobs = [world.enqueue("lost", SILENT, f"text {n}", f"m{n}") for n in (2, 3)]
    assert {outcome["status"] for outcome in world.await_outcomes(jobs)} == {"sent"}
    tried = seen(world, phone)
    assert [it.what for it in tried] == ["text 0", "text 1", "probe", "text 2", "text 3"]
    assert tried[2].at >= until - 0.05
    assert world.limbo("lost") == {"queue": 0, "intermediate": 0, "started": 0}


def test_what_concerns_one_message_counts_nothing_nor_does_a_wish_for_a_pause(
    world: World,
) -> None:
    phone = world.link("picky")
    document = {"type": "document", "document": {"link": "http://127.0.0.1:1/x"}}
    bad: list[tuple[str, str, dict[str, Any], str]] = [
        ("nobody", NOBODY, {}, "the number is not on WhatsApp"),
        ("empty", CONTACT, {"message": {"type": "text", "text": {"body": ""}}}, "text.body"),
        ("media", CONTACT, {"message": document}, "could not be asked"),
    ]
    for name, to, extra, error in bad:
        jobs = [world.enqueue("picky", to, "x", f"{name}-{n}", **extra) for n in range(3)]
        for outcome in world.await_outcomes(jobs):
            assert outcome["status"] == "failed" and error in outcome["error"]
        assert counted(world, "picky")["failures"] == 0
    [good] = world.await_outcomes([world.enqueue("picky", CONTACT, "good", "good")])
    assert good["status"] == "sent"
    world.control.send_fault("refuse", phone, code=463, count=1)
    rested = world.enqueue("picky", CONTACT, "rested", "rested")
    queue = eventually(lambda: paused(world, "picky"), what="WhatsApp's wish is obeyed")
    assert "WhatsApp asked this number to pause" in queue["reason"]
    assert (counted(world, "picky")["failures"], open_until(world, "picky")) == (0, None)
    assert rested.get_status() == "queued"
    assert [it.what for it in seen(world, phone)] == ["good", "refused"], "and nobody asked first"
    assert events_of(world, "picky", "breaker.opened") == 0


def test_a_probe_that_is_answered_with_a_wish_for_a_pause_counts_nothing(world: World) -> None:
    phone = world.link("probes")
    world.await_outcomes(enqueue(world, "probes", 1))  # so the next question is the probe
    world.control.send_fault("refuse", phone, code=503, count=2)
    world.control.query_fault(phone, code=429)
    job = world.enqueue("probes", CONTACT, "later", "later")
    eventually(lambda: open_until(world, "probes"), what="it is open")
    before = counted(world, "probes")
    queue = eventually(lambda: paused(world, "probes"), what="WhatsApp's wish is obeyed")
    assert "WhatsApp asked this number to pause" in queue["reason"]
    assert queue["until"] > time.time() + 30
    assert counted(world, "probes") == before
    assert job.get_status() == "queued"
    assert [it.what for it in seen(world, phone)] == ["text 0", "refused", "refused", "probe"]


def paused(world: World, session: str) -> dict[str, Any] | None:
    queue: dict[str, Any] = world.session(session)["queue"]
    return queue if queue["state"] == "paused" else None
