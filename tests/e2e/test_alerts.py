"""Breakers and alerts on the real path: real processes, a real Sentry SDK, an ingest endpoint."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ingest import TEXT, Ingest
from rq.job import Job
from support import events
from world import World, eventually

CONTACT = "5511999990001"
RESET_S = 10.0
REPEAT_S = 20.0
UNKNOWN_S = 10.0


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Ingest]]:
    with (
        contextlib.closing(Ingest().start()) as ingest,
        World.running(
            tmp_path_factory.mktemp("alerts"),
            SENTRY_DSN=ingest.dsn,
            WORKER_HOST="host-1",
            MSG_FAILURE_THRESHOLD="2",
            MSG_RESET_S=str(RESET_S),
            SEND_RETRIES="0",
            SEND_TIMEOUT_S="3",
            UNKNOWN_ALERT_S=str(UNKNOWN_S),
        ) as world,
    ):
        yield world, ingest


@pytest.fixture(scope="module")
def pager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Ingest]]:
    """A host that repeats itself soon, with one session."""
    with (
        contextlib.closing(Ingest().start()) as ingest,
        World.running(
            tmp_path_factory.mktemp("pager"),
            SENTRY_DSN=ingest.dsn,
            ALERT_REPEAT_S=str(REPEAT_S),
            MSG_FAILURE_THRESHOLD="1",
            MSG_RESET_S="0.5",
            SEND_RETRIES="0",
        ) as world,
    ):
        world.link("sales")
        yield world, ingest


def named(world: World, session: str, name: str) -> list[dict[str, Any]]:
    wanted = (session, name)
    return [e["payload"] for e in events(world.redis) if (e["session"], e["event"]) == wanted]


def told(ingest: Ingest, **tags: str) -> list[dict[str, Any]]:
    return [event for event in ingest.events if tags.items() <= event["tags"].items()]


def quiet_for(seconds: float, look: Callable[[], Any], expected: Any) -> None:
    """Nothing changes for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert look() == expected
        time.sleep(0.05)


def trip(world: World, session: str, phone: str) -> None:
    """Two refusals that a transport fault explains, one a message."""
    world.control.send_fault("refuse", phone=phone, code=503, count=2)
    jobs = [world.enqueue(session, CONTACT, TEXT, f"{session}-lost-{n}") for n in range(2)]
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"failed"}


def queue_of(world: World, session: str) -> dict[str, Any]:
    return dict(world.session(session)["queue"])


def resting(world: World, session: str) -> dict[str, Any]:
    row = queue_of(world, session)
    return row if row["state"] not in ("idle", "running") else {}


def breaker(world: World, session: str) -> dict[str, Any]:
    """What every process can see of the message breaker."""
    return dict(json.loads(world.redis.hget(f"wa:breakers:{session}", "message") or "{}"))


def test_a_trip_and_its_recovery_are_one_alert_each_without_texts_and_numbers(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    phone = world.link("sales")
    trip(world, "sales", phone)
    opened = eventually(lambda: told(ingest, event="breaker.opened"), what="an alert")
    row = queue_of(world, "sales")
    assert row["state"] == "breaker"
    assert 0 < row["until"] - time.time() <= RESET_S
    shown = breaker(world, "sales")
    assert shown["failures"] == 2
    assert shown["until"] == pytest.approx(row["until"], abs=0.01)
    jobs = [world.enqueue("sales", CONTACT, TEXT, f"sales-{n}") for n in range(3)]
    before = len(world.arrived(sender=phone))
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    assert len(world.arrived(sender=phone)) == before + 3
    closed = eventually(lambda: told(ingest, event="breaker.closed"), what="its end")
    assert [event["level"] for event in (*opened, *closed)] == ["error", "info"]
    assert opened[0]["tags"] == {
        "event": "breaker.opened",
        "session": "sales",
        "breaker": "message",
        "host": "host-1",
        "failure": "transient",
    }
    assert len(opened[0]["contexts"]["alert"]["failures"]) == 2
    assert opened[0]["fingerprint"] == ["breaker", "message", "sales"]
    assert len(named(world, "sales", "breaker.opened")) == 1
    assert len(named(world, "sales", "breaker.closed")) == 1
    assert world.redis.exists("wa:breakers:sales") == 0
    assert len(told(ingest, session="sales")) == 2


def test_a_connection_loss_that_heals_alerts_nothing(host: tuple[World, Ingest]) -> None:
    world, ingest = host
    phone = world.link("heals")
    before = len(ingest.events)
    world.control.drop(phone)
    states = ["reconnecting", "connecting", "connected"]
    eventually(
        lambda: [c["state"] for c in named(world, "heals", "session.state_changed")][-3:] == states,
        what="it was lost and came back",
    )
    quiet_for(1.0, lambda: len(ingest.events), before)


def test_a_logout_alerts_once_and_one_that_an_operator_wanted_does_not(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    phone = world.link("gone")
    world.link("leaves")
    world.control.logout_device(phone)
    world.await_state("gone", "logged_out")
    assert world.run("logout", "leaves", "--json").returncode == 0
    world.await_state("leaves", "logged_out")
    [alert] = eventually(lambda: told(ingest, event="session.ended"), what="an alert")
    assert (alert["level"], alert["tags"]["session"]) == ("error", "gone")
    assert (alert["tags"]["state"], alert["tags"]["reason"]) == ("logged_out", "wa-logged-out")
    quiet_for(1.0, lambda: len(told(ingest, event="session.ended")), 1)


def test_a_breaker_stays_open_for_the_rest_of_its_time_when_its_process_is_killed(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    phone = world.link("killed")
    trip(world, "killed", phone)
    eventually(lambda: told(ingest, event="breaker.opened", session="killed"), what="an alert")
    shown = breaker(world, "killed")
    job = world.enqueue("killed", CONTACT, TEXT, "killed-next")
    attempts = len(world.arrived(sender=phone))
    world.replace_process("killed")
    world.await_state("killed", "connected")
    assert time.time() < shown["until"], "back before the breaker's time was over"
    while True:
        seen = len(world.arrived(sender=phone)), world.outcome(job)
        if time.time() >= shown["until"]:
            break  # what was seen may be from after it
        assert seen == (attempts, {})
        time.sleep(0.05)
    [outcome] = world.await_outcomes([job])
    assert outcome["status"] == "sent"
    assert outcome["claimed_at"] >= shown["until"] - 0.01
    assert len(world.arrived(sender=phone)) == attempts + 1
    eventually(lambda: told(ingest, event="breaker.closed", session="killed"), what="its end")
    assert len(named(world, "killed", "breaker.opened")) == 1
    assert len(told(ingest, event="breaker.opened", session="killed")) == 1


def test_a_probe_that_hangs_is_bounded_counts_and_costs_no_message(
    host: tuple[World, Ingest],
) -> None:
    world, _ = host
    phone = world.link("deaf")
    trip(world, "deaf", phone)
    world.control.stall(phone)
    job = world.enqueue("deaf", CONTACT, TEXT, "deaf-next")
    eventually(lambda: breaker(world, "deaf").get("failures") == 3, what="the probe failed")
    assert world.outcome(job) == {}
    assert world.run("messages", "show", "deaf", "deaf-next").returncode != 0, "never claimed"
    world.control.unstall(phone)
    [outcome] = world.await_outcomes([job])
    assert outcome["status"] == "sent"
    assert len(world.arrived(sender=phone)) == 1
    assert len(named(world, "deaf", "breaker.opened")) == 1


def test_a_pause_that_whatsapp_asked_for_outlives_the_process_and_says_why(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    phone = world.link("slow")
    world.control.send_fault("refuse", phone=phone, code=463, count=1)
    world.enqueue("slow", CONTACT, TEXT, "slow-1")
    row = eventually(lambda: resting(world, "slow"), what="it rests")
    assert row["state"] == "paused"
    assert "pause" in row["reason"]
    world.replace_process("slow")
    world.await_state("slow", "connected")
    after = queue_of(world, "slow")
    assert (after["state"], after["until"]) == ("paused", pytest.approx(row["until"], abs=0.01))
    quiet_for(1.0, lambda: len(world.arrived(sender=phone)), 0)
    assert world.limbo("slow")["queue"] == 1
    assert told(ingest, session="slow") == []


def test_a_job_that_nobody_can_read_alerts(host: tuple[World, Ingest]) -> None:
    world, ingest = host
    world.link("poison")
    poison(world, "poison", "bad")
    [alert] = eventually(lambda: told(ingest, event="job.poisoned"), what="an alert")
    assert alert["tags"]["session"] == "poison"
    assert alert["contexts"]["alert"]["job_id"] == "bad"
    eventually(lambda: not any(world.limbo("poison").values()), what="it is nowhere any more")


def test_a_job_on_a_queue_that_nobody_consumes_alerts_too_and_numbers_are_cut(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    poison(world, CONTACT, f"job-{CONTACT}")
    [alert] = eventually(lambda: told(ingest, event="job.poisoned", session="…01"))
    assert alert["contexts"]["alert"]["job_id"] == "job-…01"
    eventually(lambda: not any(world.limbo(CONTACT).values()), what="it is nowhere any more")


def poison(world: World, session: str, id: str) -> None:
    """A job that no worker can read, in that session's queue."""
    world.redis.hset(f"rq:job:{id}", mapping={"data": TEXT, "origin": f"wa:out:{session}"})
    world.redis.sadd("rq:queues", f"rq:queue:wa:out:{session}")
    world.redis.rpush(f"rq:queue:wa:out:{session}", id)


def test_messages_that_fail_for_reasons_of_their_own_alert_nothing(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    world.link("picky")
    stranger = "5511999990099"
    world.control.unknown_number(stranger)
    jobs = [world.enqueue("picky", stranger, TEXT, f"stranger-{n}") for n in range(10)]
    jobs += [world.enqueue("picky", CONTACT, "", f"empty-{n}") for n in range(5)]
    jobs += [world.enqueue("picky", "nobody", TEXT, f"nobody-{n}") for n in range(5)]
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"failed"}
    # What they had alerted would have arrived before this.
    poison(world, "picky", "picked")
    eventually(lambda: told(ingest, event="job.poisoned", session="picky"), what="an alert")
    assert len(told(ingest, session="picky")) == 1


def test_messages_that_stay_unknown_are_one_alert_and_those_a_receipt_settled_none(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    silent = "5511999990077"
    world.control.contacts(silent, receipts="none")
    phone = world.link("doubts")

    def lose(id: str) -> tuple[Job, dict[str, Any]]:
        world.control.send_fault("no_ack", phone=phone, count=1)
        job = world.enqueue("doubts", silent, TEXT, id)
        [outcome] = world.await_outcomes([job])
        assert outcome["status"] == "unknown"
        return job, outcome

    job, settled = lose("settled")
    world.control.receipts(settled["wa_message_id"])
    eventually(lambda: world.outcome(job)["status"] == "delivered", what="a receipt settled it")
    _, stays = lose("stays")
    [alert] = eventually(lambda: told(ingest, event="message.unknown"), what="an alert")
    assert (alert["level"], alert["tags"]["session"]) == ("warning", "doubts")
    assert alert["contexts"]["alert"]["message_ids"] == ["stays"]
    assert time.time() - stays["claimed_at"] > UNKNOWN_S
    quiet_for(2.0, lambda: len(told(ingest, event="message.unknown")), 1)


def test_every_end_for_good_alerts_once(host: tuple[World, Ingest]) -> None:
    world, ingest = host
    phones = {name: world.link(name) for name in ("replaced", "outdated")}
    world.control.stream_error(phones["replaced"], conflict="replaced")
    world.control.connect_failure(405, phones["outdated"], seconds=60)
    world.control.drop(phones["outdated"])
    for name in phones:
        world.await_state(name, name)
        [alert] = eventually(lambda: told(ingest, event="session.ended", session=name))  # noqa: B023
        assert (alert["level"], alert["tags"]["state"]) == ("error", name)
        assert world.state(name)["sentence"] in alert["message"]
    quiet_for(1.0, lambda: [len(told(ingest, session=name)) for name in phones], [1, 1])


def test_a_breaker_that_flaps_is_told_once_in_the_repeat_time(pager: tuple[World, Ingest]) -> None:
    world, ingest = pager

    def opened() -> list[dict[str, Any]]:
        return told(ingest, event="breaker.opened")

    pid = None
    for number in range(100):
        pid = flap(world, number, pid)
        if len(opened()) > 1:
            break
    second_at = time.time()
    first, second = opened()
    trips = [e for e in events(world.redis) if e["event"] == "breaker.opened"]
    assert len(trips) >= 3
    assert second_at - float(trips[0]["timestamp_ms"]) / 1000 >= REPEAT_S
    assert first["fingerprint"] == second["fingerprint"] == ["breaker", "message", "sales"]
    assert 1 <= len(told(ingest, event="breaker.closed")) <= 2
    assert len(told(ingest)) <= 4


def flap(world: World, number: int, killed: int | None) -> int:
    """The breaker trips, its process is killed, the next one sends again; the killed one's id."""
    world.control.send_fault("refuse", code=503, count=1)
    [lost] = world.await_outcomes([world.enqueue("sales", CONTACT, TEXT, f"lost-{number}")])
    assert lost["status"] == "failed"
    eventually(lambda: world.state("sales")["pid"] not in (None, killed), what="its process")
    pid = int(world.state("sales")["pid"])
    os.kill(pid, signal.SIGKILL)
    [sent] = world.await_outcomes([world.enqueue("sales", CONTACT, TEXT, f"sent-{number}")])
    assert sent["status"] == "sent"
    return pid


def test_what_waits_at_the_end_arrives_and_no_sentry_slows_a_send_or_an_end(
    pager: tuple[World, Ingest],
) -> None:
    world, ingest = pager
    before_s = duration(world, "before")
    plain_s = end(world)

    world.start_supervisor()
    ingest.hang_s = 0.5
    poison(world, "one", "bad-1")
    poison(world, "two", "bad-2")
    eventually(lambda: raised(world, "one") and raised(world, "two"), what="two alerts")
    assert end(world) < 2 * plain_s + 4
    for session in ("one", "two"):
        assert len(told(ingest, event="job.poisoned", session=session)) == 1

    ingest.hang_s = 300  # it takes what comes and is silent
    world.start_supervisor()
    asked, arrived = ingest.asked, len(ingest.events)
    poison(world, "three", "bad-3")
    eventually(lambda: ingest.asked > asked, what="an alert is on its way")
    assert duration(world, "silent") < 3 * before_s + 5
    assert end(world) < 2 * plain_s + 4, "at most 2 s of it for the alert"
    assert len(ingest.events) == arrived

    gone = Ingest()
    gone._server.server_close()
    world.environ["SENTRY_DSN"] = gone.dsn
    world.start_supervisor()
    poison(world, "four", "bad-4")
    eventually(lambda: "alert.delayed" in log_of(world, "four"), what="it was refused")
    assert duration(world, "refused") < 3 * before_s + 5
    assert end(world) < 2 * plain_s + 4


def raised(world: World, session: str) -> bool:
    return "alert.raised" in log_of(world, session)


def log_of(world: World, session: str) -> str:
    lines = (world.folder / "run.log").read_text().splitlines()
    return "\n".join(line for line in lines if f"session={session}" in line)


def end(world: World) -> float:
    """Seconds that the supervisor takes to end when it is asked to."""
    assert world.supervisor is not None
    begun = time.monotonic()
    world.supervisor.terminate()
    assert world.supervisor.wait(30) == 0
    return time.monotonic() - begun


def duration(world: World, name: str) -> float:
    """Seconds that a hundred messages take, one after the other."""
    world.await_state("sales", "connected")
    begun = time.monotonic()
    jobs = [world.enqueue("sales", CONTACT, TEXT, f"{name} {n}") for n in range(100)]
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    return time.monotonic() - begun


def test_device_and_events_processes_and_hosts_without_a_dsn_do_not_load_the_sentry_sdk(
    tmp_path: Path,
) -> None:
    script = """if True:
        import pathlib, sys
        import whatsapp_worker.fork_helper, whatsapp_worker.device_process
        import whatsapp_worker.events, whatsapp_worker.pairing, whatsapp_worker.supervisor
        from whatsapp_worker import warmup
        from whatsapp_worker.alerts import Alerts
        memory = pathlib.Path(sys.argv[1]) / "alerts.json"
        Alerts(None, host="h", memory=memory, repeat_s=1.0, release="0")
        sys.exit("sentry_sdk" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
