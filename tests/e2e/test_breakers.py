"""The message breaker on the real path, counted where it counts: at the server, which sees every
message that is tried and every question that a probe asks."""

import json
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from rq.job import Job
from world import World, eventually

CONTACT = "5511999990001"
RESET_S = 4.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    it = World(
        tmp_path_factory.mktemp("breakers"),
        MSG_FAILURE_THRESHOLD="2",
        MSG_RESET_S=str(RESET_S),
        SEND_TIMEOUT_S="2",
    )
    try:
        yield it.start()
    finally:
        it.close()
        print(it.logs())


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


def enqueue(world: World, session: str, count: int) -> list[Job]:
    return [world.enqueue(session, CONTACT, f"text {n}", f"m{n}") for n in range(count)]


def events_of(world: World, session: str, name: str) -> int:
    rows = [fields for _, fields in world.redis.xrange("wa:events")]
    return sum(
        (row[b"event"], row[b"session"]) == (name.encode(), session.encode()) for row in rows
    )


def open_until(world: World, session: str) -> float | None:
    """UTC seconds; None while its breaker is closed."""
    shown = json.loads(world.redis.hget(f"wa:breakers:{session}", "message") or "{}")
    found: float | None = shown.get("until")
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
        assert RESET_S - 0.2 <= asked_at - opened_at < RESET_S + 2
    assert events_of(world, "sales", "breaker.opened") == 1, "one trip"
    assert events_of(world, "sales", "breaker.closed") == 1


def test_a_count_outlives_processes_and_logins_and_so_does_an_open_breaker(world: World) -> None:
    phone = world.link("deaf")
    first_pid = world.state("deaf")["pid"]
    world.control.contacts(CONTACT, receipts="none")  # which would settle what is unknown
    world.control.send_fault("no_ack", phone, count=2)
    jobs = enqueue(world, "deaf", 4)
    lost = world.await_outcomes(jobs[:2])
    assert {outcome["status"] for outcome in lost} == {"unknown"}
    until = eventually(lambda: open_until(world, "deaf"), what="two processes make one trip")
    pid = world.await_state("deaf", "connected")["pid"]
    assert pid != first_pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: world.state("deaf").get("pid") not in (None, pid), what="a new process")
    outcomes = world.await_outcomes(jobs[2:])
    assert {outcome["status"] for outcome in outcomes} == {"sent"}
    tried = seen(world, phone)
    assert [it.what for it in tried] == ["text 0", "text 1", "probe", "text 2", "text 3"]
    assert tried[2].at >= until - 0.05, "nobody asked or sent before its time was over"
    assert events_of(world, "deaf", "breaker.opened") == 1
