"""An operator's word on a queue, and a session's pace, with real processes and the sandbox."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from world import World, eventually

from whatsapp_worker import client
from whatsapp_worker.client import Outbox

CONTACT = "5521988880001"


@pytest.fixture
def world(tmp_path: Path):
    pace = {"PACE_PER_MINUTE": "240", "PACE_JITTER": "0", "PACE_NEW_CONTACT_FACTOR": "1"}
    with World.running(tmp_path, **pace, PACE_TYPING_S="0.2") as world:
        yield world


def ask(world: World, *words: str, code: int = 0) -> dict[str, Any]:
    done = world.run(*words, "--json")
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return dict(json.loads(done.stdout)) if done.stdout else {}


def test_a_queue_is_paused_looked_at_cancelled_from_cleared_and_resumed(world: World):
    world.link("sales")
    assert ask(world, "queue", "sales")["state"] == "idle"
    assert ask(world, "queue", "sales", "pause")["state"] == "paused"
    jobs = [world.enqueue("sales", CONTACT, f"text {n}", f"m{n}") for n in range(4)]
    eventually(lambda: ask(world, "queue", "sales")["depth"] == 4)
    late = world.enqueue("sales", CONTACT, "late", "late", ttl_s=1)
    eventually(lambda: world.session("sales")["queue"]["state"] == "paused")
    eventually(lambda: world.outcome(late).get("status") == "expired", within_s=15)
    found = ask(world, "queue", "sales")
    assert (found["state"], found["depth"], found["session_state"]) == ("paused", 4, "connected")
    assert found["head"]["message_id"] == "m0" and found["head"]["age_s"] > 0
    assert found["pace"]["per_minute"] == 240 and found["pace"]["sent_today"] == 0
    assert ask(world, "messages", "cancel", "sales", "m1")["status"] == "cancelled"
    outcome = Outbox(world.redis).cancel("sales", "m2")
    assert outcome is not None and outcome.status == "cancelled"
    ask(world, "restart", "sales")
    assert ask(world, "queue", "sales")["state"] == "paused"
    assert world.arrived(to=CONTACT) == []

    resumed = ask(world, "queue", "sales", "resume")
    assert resumed["paused_at"] is None and resumed["state"] != "paused"
    world.await_outcomes([jobs[0], jobs[3]])
    arrived = world.arrived(to=CONTACT)
    assert [message["text"] for message in arrived] == ["text 0", "text 3"]
    assert ask(world, "queue", "sales")["pace"]["sent_today"] == 2

    ask(world, "queue", "sales", "pause")
    more = [world.enqueue("sales", CONTACT, "never", f"n{n}") for n in range(450)]
    later = world.enqueue("sales", CONTACT, "never", "later", send_at=time.time() + 3600)
    assert "--yes" in world.run("queue", "sales", "clear", "--json").stderr
    cleared = ask(world, "queue", "sales", "clear", "--yes")
    assert cleared == {"session": "sales", "cleared": 451, "as": {"cancelled": 451}}
    assert {world.outcome(job)["status"] for job in [*more, later]} == {"cancelled"}
    assert ask(world, "queue", "sales", "resume")["depth"] == 0
    last = world.enqueue("sales", CONTACT, "last", "last")
    world.await_outcomes([last])
    texts = [message["text"] for message in world.arrived(to=CONTACT)]
    assert texts == ["text 0", "text 3", "last"]


def test_what_rq_scheduled_goes_in_its_place_by_time_of_enqueueing(world: World):
    """Each of RQ's own ways to enqueue for later, and ours, between others; all due by the end."""
    world.link("sales")
    ask(world, "queue", "sales", "pause")
    eventually(lambda: world.session("sales")["queue"]["state"] == "paused")
    queue = Queue("wa:out:sales", connection=world.redis, serializer=JSONSerializer)
    call = ("jobs.outbound.send_message",)
    wait = timedelta(seconds=2)  # of which RQ drops what is no whole second
    jobs = []
    for n, how in enumerate(("at", "", "in", "send_at", "", "in", "")):
        kwargs = client.text(CONTACT, f"text {n}", message_id=f"m{n}").kwargs("sales")
        if how == "send_at":
            kwargs["send_at"] = time.time() + 1
        if how == "at":
            jobs.append(queue.enqueue_at(datetime.now(UTC) + 2 * wait, *call, kwargs=kwargs))
        elif how == "in":
            jobs.append(queue.enqueue_in(wait, *call, kwargs=kwargs))
        else:
            jobs.append(queue.enqueue(*call, kwargs=kwargs))
    assert queue.scheduled_job_registry.count == 3
    eventually(lambda: queue.count == 7, what="those that are due are moved in")
    ask(world, "queue", "sales", "resume")
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    texts = [message["text"] for message in world.arrived(to=CONTACT)]
    assert texts == [f"text {n}" for n in range(7)]


def test_a_contact_sees_that_something_is_typed_before_each_text_arrives(world: World):
    dialled, known = "5569991110002", "556991110002"
    world.control.number_alias(dialled, known)
    world.link("sales")
    reaction = {"type": "reaction", "reaction": {"message_id": "3EB0AA", "emoji": "👍"}}
    world.await_outcomes(
        [
            world.enqueue("sales", CONTACT, "one", "m1"),
            world.enqueue("sales", CONTACT, "two", "m2"),
            world.enqueue("sales", dialled, "three", "m3"),
            world.enqueue("sales", CONTACT, "", "m4", message=reaction),
        ]
    )
    shown, arrived = world.control.chat_states(), world.arrived()
    assert [row["type"] for row in arrived] == ["text", "text", "text", "reaction"]
    assert [(row["to"], row["state"]) for row in shown] == [
        (CONTACT, "composing"),
        (CONTACT, "composing"),
        (known, "composing"),
    ]
    for typing, message, before in zip(shown, arrived, [None, *arrived], strict=False):
        assert 0.2 <= message["at"] - typing["at"] < 2
        assert before is None or before["at"] < typing["at"]
