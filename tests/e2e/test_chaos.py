"""Nothing lost, nothing doubled, order kept: SIGKILL at random points during 200 messages."""

import collections
import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from judging import allowed
from rq.job import Job
from support import eventually
from world import World

CONTACT = "5521988880001"
MESSAGES = 200


def _kill_device(world: World) -> None:
    pid = eventually(lambda: world.state("sales").get("pid"), what="a device process runs")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: world.state("sales").get("pid") != pid, what="its end is noticed")


def _kill_supervisor(world: World) -> None:
    pids = world.kill_supervisor()
    eventually(lambda: not any(map(_lives, pids)), within_s=20, what="no orphan is left")
    world.start_supervisor()


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _kill_redis(world: World) -> None:
    world.kill_redis()
    world.redis_server.start()


@pytest.mark.parametrize("kill", [_kill_device, _kill_supervisor, _kill_redis])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_kill_during_200_messages_loses_and_doubles_nothing(
    world: World, kill: Callable[[World], None], seed: int
):
    dice = random.Random(seed)
    phone = world.link("sales")
    # So that nearly every kill finds one that was handed over and not yet acknowledged.
    world.control.send_fault("slow", phone, delay_s=0.01, seconds=120)
    world.control.contacts(CONTACT, receipts="none")
    jobs = [world.enqueue("sales", CONTACT, f"text {n}", f"m{n}") for n in range(MESSAGES)]
    for part in range(1, 4):
        due = MESSAGES * part // 4 - dice.randrange(MESSAGES // 5)
        eventually(lambda due=due: len(world.arrived(to=CONTACT)) >= due, within_s=60)
        kill(world)
    outcomes = world.await_outcomes(jobs, within_s=90)
    _judge(world, [str(outcome["status"]) for outcome in outcomes])
    assert {row["times"] for row in world.arrived(to=CONTACT)} == {1}
    _settle(world, jobs)


def _settle(world: World, jobs: list[Job]) -> None:
    """Receipts settle every unknown message that has arrived."""
    arrived = {row["id"] for row in world.arrived(to=CONTACT)}
    unknown = [job for job in jobs if world.outcome(job)["status"] == "unknown"]
    doubtful = [job for job in unknown if world.outcome(job)["wa_message_id"] in arrived]
    print(len(unknown), "unknown,", len(doubtful), "of them arrived")
    for job in doubtful:
        world.control.receipts(world.outcome(job)["wa_message_id"], "delivered")
    eventually(lambda: all(world.outcome(job)["status"] == "delivered" for job in doubtful))


def _judge(world: World, statuses: list[str]) -> None:
    rows = world.arrived(to=CONTACT)
    times = collections.Counter(row["text"] for row in rows)
    for n, status in enumerate(statuses):
        assert times[f"text {n}"] in allowed(status), (n, status, times[f"text {n}"])
    order = [int(row["text"].split()[1]) for row in rows]
    assert order == sorted(order)
    assert set(world.limbo("sales").values()) == {0}


def test_a_message_without_an_answer_is_unknown_until_a_receipt_settles_it(tmp_path: Path):
    with World.running(tmp_path, SEND_TIMEOUT_S="2") as world:
        phone = world.link("sales")
        world.control.contacts(CONTACT, receipts="none")
        world.control.send_fault("no_ack", phone, count=1)
        lost = world.enqueue("sales", CONTACT, "lost answer", "m1")
        after = world.enqueue("sales", CONTACT, "the next one", "m2")
        unknown, sent = world.await_outcomes([lost, after])
        assert (unknown["status"], sent["status"]) == ("unknown", "sent")
        texts = [(row["text"], row["times"]) for row in world.arrived(to=CONTACT)]
        assert texts == [("lost answer", 1), ("the next one", 1)]
        world.control.receipts(unknown["wa_message_id"], "delivered")
        eventually(lambda: world.outcome(lost)["status"] == "delivered")
        assert world.status_of("sales", "m1") == "delivered"


@pytest.mark.parametrize("how", ["drop_before", "drop_after"])
def test_a_connection_lost_around_a_message_is_judged_without_a_guess(world: World, how: str):
    """After `drop_after` whatsmeow hands the same id over again by itself: the server, and so the
    contact, has it once."""
    phone = world.link("sales")
    world.control.send_fault(how, phone, count=1)
    jobs = [world.enqueue("sales", CONTACT, f"text {n}", f"m{n}") for n in range(3)]
    outcomes = world.await_outcomes(jobs)
    _judge(world, [str(outcome["status"]) for outcome in outcomes])
    assert [outcome["status"] for outcome in outcomes[1:]] == ["sent", "sent"]
