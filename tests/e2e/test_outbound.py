"""How messages leave on the real path: who goes first, to which number, and when WhatsApp wants
less of them or none at all. Counted at the sandbox."""

import itertools
import json
import time
from collections.abc import Iterator
from datetime import UTC
from typing import Any

import pytest
from rq.job import Job
from support import events
from world import World, eventually

from whatsapp_worker import client
from whatsapp_worker.client import Outbox

CONTACT = "5521988880001"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.running(tmp_path_factory.mktemp("outbound")) as it:
        yield it


class Limited:
    """A session that WhatsApp asked to send less, and what waits in it."""

    def __init__(self, world: World) -> None:
        self.phone = world.link("limited")
        world.await_outcomes([world.enqueue("limited", CONTACT, "text 0", "m0")])
        world.control.send_fault("refuse", self.phone, code=463, count=1)
        texts = [(f"text {n}", f"m{n}") for n in range(1, 5)]
        self.jobs = [world.enqueue("limited", CONTACT, *text) for text in texts]
        self.queue: dict[str, Any] = eventually(
            lambda: paused(world, "limited"), what="WhatsApp's wish is obeyed"
        )


def paused(world: World, session: str) -> dict[str, Any] | None:
    queue: dict[str, Any] = world.session(session)["queue"]
    return queue if queue["state"] == "paused" else None


@pytest.fixture(scope="module", autouse=True)
def limited(world: World) -> Limited:
    """First of all: its pause of a minute passes while the other tests run."""
    return Limited(world)


def texts_of(world: World, phone: str) -> list[str]:
    return [row["text"] for row in world.arrived(sender=phone)]


def test_a_message_that_is_refused_for_ever_reaches_whatsapp_ever_later_and_never_after_its_time(
    world: World,
) -> None:
    phone = world.link("refused")
    world.control.send_fault("refuse", phone, code=503, seconds=600)
    job = world.enqueue("refused", CONTACT, "in time", "m0", ttl_s=1.0)
    [outcome] = world.await_outcomes([job])
    world.control.remove_fault()
    assert outcome["status"] == world.status_of("refused", "m0") == "expired"
    assert job.enqueued_at is not None
    deadline = job.enqueued_at.replace(tzinfo=UTC).timestamp() + 1.0
    tried = sorted(row["at"] for row in world.control.messages(sender=phone, refused=True))
    assert 1 <= len(tried) <= 3
    # What was in time when it left may arrive later; a fourth would have come 0.75 s after it.
    assert tried[-1] < deadline + 0.5
    gaps = [later - at for at, later in itertools.pairwise(tried)]
    assert all(gap >= least for gap, least in zip(gaps, (0.25, 0.5), strict=False))


def test_high_priority_overtakes_what_waits_and_each_lane_keeps_its_order(world: World) -> None:
    phone = world.link("lanes")
    world.control.send_fault("slow", phone, delay_s=0.05, seconds=60)
    out = Outbox(world.redis)

    def enqueue(lane: Any, count: int) -> list[Job]:
        drafts = [
            client.text(CONTACT, f"{lane} {n}", message_id=f"{lane}-{n}", priority=lane)
            for n in range(count)
        ]
        return out.send_many("lanes", drafts)

    jobs = enqueue("normal", 60)
    eventually(lambda: texts_of(world, phone)[5:], what="it is under way")
    jobs += enqueue("high", 20)
    enqueued_at = time.time()
    # A CRM in another language chooses the lane by the queue.
    jobs.append(world.enqueue("lanes", CONTACT, "raw", "raw", queue="wa:out:lanes:high"))
    assert {outcome["status"] for outcome in world.await_outcomes(jobs)} == {"sent"}
    texts = texts_of(world, phone)
    first = texts.index("high 0")
    before = [row for row in world.arrived(sender=phone) if row["at"] < enqueued_at]
    assert first <= len(before) + 2, "the one in hand, and the one popped behind it"
    assert texts[first : first + 21] == [*(f"high {n}" for n in range(20)), "raw"]
    assert [t for t in texts if "normal" in t] == [f"normal {n}" for n in range(60)]


def test_a_message_goes_to_the_number_that_whatsapp_knows_and_wa_id_tells_it(world: World) -> None:
    """Brazil's ninth digit: dialled with it, known without it."""
    dialled, known = "5569991110001", "556991110001"
    world.control.number_alias(dialled, known)
    phone = world.link("brazil")
    jobs = [world.enqueue("brazil", f"+{dialled}", f"text {n}", f"b{n}") for n in range(3)]
    jobs.append(world.enqueue("brazil", known, "as it is known", "b3"))
    outcomes = world.await_outcomes(jobs)
    assert [(o["status"], o["wa_id"]) for o in outcomes] == [("sent", known)] * 4
    assert [row["to"] for row in world.arrived(sender=phone)] == [known] * 4
    asked = [row["phone"] for row in world.control.lookups() if row["from"] == phone]
    assert asked == [dialled], "once, and what WhatsApp said is remembered"
    # A new process knows nothing of it and finds it again.
    assert world.run("restart", "brazil").returncode == 0
    [again] = world.await_outcomes([world.enqueue("brazil", dialled, "again", "b4")])
    assert (again["status"], again["wa_id"]) == ("sent", known)
    eventually(lambda: world.status_of("brazil", "b4") == "delivered", what="its receipt")


def test_a_rate_limit_of_the_questions_before_a_message_pauses_as_well(world: World) -> None:
    phone = world.link("curious")
    pid = world.state("curious")["pid"]
    world.control.query_fault(phone, code=429)
    job = world.enqueue("curious", "5521977776666", "who is there?", "q1")
    queue = eventually(lambda: paused(world, "curious"), what="WhatsApp's wish is obeyed")
    assert "WhatsApp asked this number to pause" in queue["reason"]
    assert queue["until"] > time.time() + 30
    assert (job.get_status(), world.state("curious")["pid"]) == ("queued", pid)
    assert len([row for row in world.control.lookups() if row["from"] == phone]) == 1
    assert world.control.messages(sender=phone, refused=True) == []
    assert listed(world, "curious", "failed") == [], "it is sent again"
    assert listed(world, "curious", "queued") == listed(world, "curious") == ["q1"]


def listed(world: World, session: str, *status: str) -> list[str]:
    words = [word for one in status for word in ("--status", one)]
    lines = world.run("messages", "list", session, *words, "--json").stdout.splitlines()
    return [json.loads(line)["message_id"] for line in lines]


def test_while_a_number_is_banned_its_messages_wait_and_go_out_when_the_ban_ends(
    world: World,
) -> None:
    phone = world.link("banned")
    world.control.connect_failure(402, phone, expire=12)
    world.control.drop(phone)
    state = world.await_state("banned", "banned")
    assert state["reason"] == "wa-temporary-ban"
    assert 6 < state["banned_until"] - time.time() <= 12.5
    jobs = [world.enqueue("banned", CONTACT, f"text {n}", f"x{n}") for n in range(3)]
    dials = len(world.control.connections(phone))
    shown = world.session("banned")
    assert (shown["state"], shown["queue"]["depth"]) == ("banned", 3)
    assert shown["banned_until"] == state["banned_until"]
    eventually(lambda: time.time() > state["banned_until"] - 2, what="it is nearly over")
    assert world.state("banned")["state"] == "banned"
    assert len(world.control.connections(phone)) == dials, "a banned number dials nobody"
    assert [job.get_status() for job in jobs] == ["queued"] * 3
    assert world.arrived(sender=phone) == []
    outcomes = world.await_outcomes(jobs)
    assert {outcome["status"] for outcome in outcomes} == {"sent"}
    assert min(outcome["claimed_at"] for outcome in outcomes) > state["banned_until"]
    assert texts_of(world, phone) == ["text 0", "text 1", "text 2"]


def test_a_rate_limit_pauses_the_session_loses_nothing_and_ends(
    world: World, limited: Limited
) -> None:
    until = limited.queue["until"]
    assert "WhatsApp asked this number to pause" in limited.queue["reason"]
    queue, statuses = paused(world, "limited"), [job.get_status() for job in limited.jobs]
    texts = texts_of(world, limited.phone)
    if time.time() < until:  # else the tests before this one took too long
        assert (queue, statuses, texts) == (limited.queue, ["queued"] * 4, ["text 0"])
    outcomes = world.await_outcomes(limited.jobs, within_s=90)
    assert [outcome["status"] for outcome in outcomes] == ["sent"] * 4
    assert min(outcome["claimed_at"] for outcome in outcomes) >= until - 0.01
    assert texts_of(world, limited.phone) == [f"text {n}" for n in range(5)]
    rows = world.control.messages(sender=limited.phone, refused=True)
    assert [row["times"] for row in rows if row["refused"]] == [1], "asked once, and obeyed"
    assert "message.failed" not in [entry["event"] for entry in events(world.redis)]
    assert world.session("limited")["queue"]["state"] in ("idle", "running")
