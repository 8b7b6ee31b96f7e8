"""Messages that were meant for another number wait until an operator decides; with real processes,
phones and relinking."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rq.job import Job
from support import events
from world import World, eventually

CONTACT = "5521988880001"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.running(tmp_path_factory.mktemp("relinked")) as it:
        yield it


def enqueue(world: World, session: str, *texts: str) -> list[Job]:
    return [world.enqueue(session, CONTACT, text, f"{session} {text}") for text in texts]


def ask(world: World, *words: str) -> dict[str, Any]:
    done = world.run(*words, "--json")
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return dict(json.loads(done.stdout))


def texts_of(world: World, phone: str) -> list[str]:
    return [row["text"] for row in world.arrived(sender=phone)]


def events_of(world: World, session: str) -> list[tuple[str, str]]:
    """Name and message of each message's event."""
    return [
        (entry["event"], entry["payload"]["message_id"])
        for entry in events(world.redis)
        if entry["session"] == session and "message_id" in entry["payload"]
    ]


def held(world: World, session: str, depth: int) -> dict[str, Any] | None:
    """The session's row once it says that so many messages are held."""
    row = world.session(session)
    return row if (row["queue"]["state"], row["queue"]["depth"]) == ("held", depth) else None


def check_held(
    world: World, session: str, phone: str, jobs: list[Job], *, sent: tuple[str, ...] = ()
) -> None:
    """Connected, and every place says that its queue is held; nothing of it was sent."""
    row = eventually(lambda: held(world, session, len(jobs)), what="it is held")
    assert (row["state"], row["phone"]) == ("connected", phone)
    assert "an operator decides" in row["queue"]["reason"]
    assert re.search(r"\bheld\b", world.run("status", session).stdout)
    found = ask(world, "queue", session)
    assert (found["state"], found["depth"]) == ("held", len(jobs))
    assert found["held_before"] >= found["head"]["enqueued_at"]
    assert f"queue {session} resume" in world.run("queue", session).stdout
    assert [job.get_status() for job in jobs] == ["queued"] * len(jobs)
    assert texts_of(world, phone) == list(sent)


def relinked(world: World, session: str) -> tuple[str, list[Job]]:
    """A session that was linked to another number while three messages waited, and a fourth came
    afterwards; its new number and those jobs."""
    first = world.link(session)
    world.await_outcomes(enqueue(world, session, "before"))
    assert world.run("logout", session, "--json").returncode == 0
    world.await_state(session, "logged_out")
    jobs = enqueue(world, session, "old 1", "old 2", "old 3")
    second = world.link(session)
    assert second != first
    jobs += enqueue(world, session, "new")
    check_held(world, session, second, jobs)
    assert texts_of(world, first) == ["before"]
    return second, jobs


def test_after_linking_another_number_the_old_queue_waits_for_a_word_and_then_goes(world: World):
    phone, jobs = relinked(world, "sales")
    assert world.run("restart", "sales").returncode == 0
    check_held(world, "sales", phone, jobs)
    resumed = ask(world, "queue", "sales", "resume", "--yes")
    assert resumed["held_before"] is None and resumed["state"] in ("running", "idle")
    assert not re.search(r"\bheld\b", world.run("status", "sales").stdout)
    assert {outcome["status"] for outcome in world.await_outcomes(jobs)} == {"sent"}
    assert texts_of(world, phone) == ["old 1", "old 2", "old 3", "new"]
    assert world.session("sales")["queue"]["state"] in ("running", "idle")


def test_a_held_queue_that_is_cleared_ends_as_cancelled_and_later_messages_go(world: World):
    phone, jobs = relinked(world, "support")
    cleared = ask(world, "queue", "support", "clear", "--yes")
    assert cleared == {"session": "support", "cleared": 4, "as": {"cancelled": 4}}
    assert {outcome["status"] for outcome in world.await_outcomes(jobs)} == {"cancelled"}
    told = [message for name, message in events_of(world, "support") if name == "message.cancelled"]
    assert sorted(told) == sorted(f"support {text}" for text in ("old 1", "old 2", "old 3", "new"))
    [later] = world.await_outcomes(enqueue(world, "support", "later"))
    assert later["status"] == "sent"
    assert texts_of(world, phone) == ["later"]


def test_a_pause_that_ends_sends_nothing_of_the_other_number(world: World):
    world.link("both")
    ask(world, "queue", "both", "pause")
    jobs = enqueue(world, "both", "old")
    assert world.run("logout", "both", "--json").returncode == 0
    world.await_state("both", "logged_out")
    phone = world.link("both")
    eventually(lambda: "paused, held" in world.run("status", "both").stdout)
    assert "paused, held" in world.run("queue", "both").stdout
    refused = world.run("queue", "both", "resume")
    assert refused.returncode == 2 and "1 message enqueued for another number" in refused.stderr
    assert ask(world, "queue", "both")["paused_at"] is not None
    assert ask(world, "queue", "both", "resume", "--keep-held")["state"] == "held"
    check_held(world, "both", phone, jobs)
    ask(world, "queue", "both", "resume", "--yes")
    assert [outcome["status"] for outcome in world.await_outcomes(jobs)] == ["sent"]
    assert texts_of(world, phone) == ["old"]


def test_the_same_number_linked_again_holds_nothing(world: World):
    phone = world.link("again")
    assert world.run("logout", "again", "--json").returncode == 0
    world.await_state("again", "logged_out")
    jobs = enqueue(world, "again", "waits")
    assert world.link("again", phone=phone) == phone
    assert [outcome["status"] for outcome in world.await_outcomes(jobs)] == ["sent"]


def test_an_id_that_is_used_again_after_its_deletion_holds_what_was_enqueued_between(world: World):
    phone = world.link("shop")
    waiting = enqueue(world, "shop", "sent")
    world.await_outcomes(waiting)
    assert world.run("delete", "shop", "--yes").returncode == 0
    # While a supervisor runs, its keeper fails these at once; without one they are still there.
    assert world.supervisor is not None
    world.supervisor.terminate()
    assert world.supervisor.wait(20) == 0
    jobs = enqueue(world, "shop", "between 1", "between 2")
    record = world.data / "sessions" / "shop" / "wanted.json"
    with world.linking("shop") as lines:
        eventually(record.exists, what="the record is made")
        world.start_supervisor()
        world.scan(lines, phone)
    check_held(world, "shop", phone, jobs, sent=("sent",))
    ask(world, "queue", "shop", "resume", "--yes")
    assert {outcome["status"] for outcome in world.await_outcomes(jobs)} == {"sent"}
    assert texts_of(world, phone) == ["sent", "between 1", "between 2"]
