"""Breakers and alerts on the real path: real processes, a real Sentry SDK, an ingest endpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ingest import Ingest
from world import World, eventually

CONTACT = "5511999990001"
TEXT = "meet me at the old harbour"
RESET_S = 4.0


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Ingest]]:
    ingest = Ingest().start()
    it = World(
        tmp_path_factory.mktemp("alerts"),
        SENTRY_DSN=ingest.dsn,
        WORKER_HOST="host-1",
        MSG_FAILURE_THRESHOLD="2",
        MSG_RESET_S=str(RESET_S),
        SEND_RETRIES="0",
        SEND_TIMEOUT_S="3",
        UNKNOWN_ALERT_S="5",
    )
    try:
        yield it.start(), ingest
    finally:
        it.close()
        ingest.close()
        print(it.logs())


def stream_events(world: World, session: str) -> list[tuple[str, dict[str, Any]]]:
    entries = [fields for _, fields in world.redis.xrange("wa:events")]
    return [
        (fields[b"event"].decode(), json.loads(fields[b"payload"]))
        for fields in entries
        if fields[b"session"].decode() == session
    ]


def named(world: World, session: str, name: str) -> list[dict[str, Any]]:
    return [payload for event, payload in stream_events(world, session) if event == name]


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
    sent = b"".join(ingest.raw).decode()
    assert TEXT not in sent
    assert not re.search(r"5521\d{6,}|5511\d{6,}", sent)
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
    pid = world.state("killed")["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(
        lambda: (
            world.state("killed").get("pid") not in (None, pid)
            and world.state("killed")["state"] == "connected"
        ),
        what="it is back",
    )
    assert time.time() < shown["until"], "back before the breaker's time was over"
    while time.time() < shown["until"] - 0.1:
        assert len(world.arrived(sender=phone)) == attempts
        time.sleep(0.05)
    assert world.outcome(job) == {}
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
    pid = world.state("slow")["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: world.state("slow").get("pid") not in (None, pid), what="a new process")
    world.await_state("slow", "connected")
    after = queue_of(world, "slow")
    assert (after["state"], after["until"]) == ("paused", pytest.approx(row["until"], abs=0.01))
    quiet_for(1.0, lambda: len(world.arrived(sender=phone)), 0)
    assert world.limbo("slow")["queue"] == 1
    assert told(ingest, session="slow") == []


def test_a_job_that_nobody_can_read_alerts(host: tuple[World, Ingest]) -> None:
    world, ingest = host
    world.link("poison")
    world.redis.hset("rq:job:bad", mapping={"data": TEXT, "origin": "wa:out:poison"})
    world.redis.rpush("rq:queue:wa:out:poison", "bad")
    [alert] = eventually(lambda: told(ingest, event="job.poisoned"), what="an alert")
    assert alert["tags"]["session"] == "poison"
    assert alert["contexts"]["alert"]["job_id"] == "bad"
    assert TEXT not in b"".join(ingest.raw).decode()
    assert world.limbo("poison") == {"queue": 0, "intermediate": 0, "started": 0}


def test_a_job_on_a_queue_that_nobody_consumes_alerts_too(host: tuple[World, Ingest]) -> None:
    world, ingest = host
    world.redis.hset("rq:job:worse", mapping={"data": TEXT, "origin": "wa:out:nobody"})
    world.redis.sadd("rq:queues", "rq:queue:wa:out:nobody")
    world.redis.rpush("rq:queue:wa:out:nobody", "worse")
    [alert] = eventually(lambda: told(ingest, event="job.poisoned", session="nobody"))
    assert alert["contexts"]["alert"]["job_id"] == "worse"
    assert TEXT not in b"".join(ingest.raw).decode()
    assert world.limbo("nobody") == {"queue": 0, "intermediate": 0, "started": 0}


def test_messages_that_stay_unknown_are_one_alert_and_those_a_receipt_settled_none(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    silent = "5511999990077"
    world.control.contacts(silent, receipts="none")
    phone = world.link("doubts")
    jobs = []
    for id in ("settled", "stays"):
        world.control.send_fault("no_ack", phone=phone, count=1)
        jobs.append(world.enqueue("doubts", silent, TEXT, id))
        world.await_outcomes(jobs)
    settled, stays = world.await_outcomes(jobs)
    assert (settled["status"], stays["status"]) == ("unknown", "unknown")
    world.control.receipts(settled["wa_message_id"])
    [alert] = eventually(lambda: told(ingest, event="message.unknown"), what="an alert")
    assert (alert["level"], alert["tags"]["session"]) == ("warning", "doubts")
    assert alert["contexts"]["alert"]["message_ids"] == ["stays"]
    assert time.time() - stays["claimed_at"] > 5
    assert TEXT not in b"".join(ingest.raw).decode()
    quiet_for(2.0, lambda: len(told(ingest, event="message.unknown")), 1)


def test_every_end_for_good_alerts_once(host: tuple[World, Ingest]) -> None:
    world, ingest = host
    phones = {name: world.link(name) for name in ("replaced", "outdated")}
    world.control.stream_error(phones["replaced"], conflict="replaced")
    world.control.connect_failure(405, phones["outdated"], seconds=60)
    world.control.drop(phones["outdated"])
    for name in phones:
        [alert] = eventually(lambda: told(ingest, event="session.ended", session=name))  # noqa: B023
        assert (alert["level"], alert["tags"]["state"]) == ("error", name)
        assert world.state(name)["sentence"] in alert["message"]
    quiet_for(1.0, lambda: [len(told(ingest, session=name)) for name in phones], [1, 1])


def test_a_sentry_that_hangs_slows_no_send_and_no_end(tmp_path: Path) -> None:
    ingest = Ingest().start()
    world = World(tmp_path, SENTRY_DSN=ingest.dsn)
    try:
        world.start().link("sales")
        before_s = duration(world, "before")
        ingest.hang_s = 300
        world.redis.rpush("rq:queue:wa:out:sales", "no job at all")
        eventually(lambda: ingest.asked, what="an alert is on its way")
        assert duration(world, "while it hangs") < 2 * before_s + 0.5
        assert ingest.events == []
        begun = time.monotonic()
        assert world.supervisor is not None
        world.supervisor.terminate()
        assert world.supervisor.wait(20) == 0
        assert time.monotonic() - begun < 5, "at most 2 s of it for the alert"
    finally:
        world.close()
        ingest.close()


def duration(world: World, name: str) -> float:
    """Seconds that a hundred messages take, one after the other."""
    begun = time.monotonic()
    jobs = [world.enqueue("sales", CONTACT, TEXT, f"{name} {n}") for n in range(100)]
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    return time.monotonic() - begun


def test_device_processes_and_hosts_without_a_dsn_do_not_load_the_sentry_sdk(
    tmp_path: Path,
) -> None:
    script = """if True:
        import pathlib, sys
        import whatsapp_worker.fork_helper, whatsapp_worker.device_process
        import whatsapp_worker.pairing, whatsapp_worker.supervisor
        from whatsapp_worker import warmup
        from whatsapp_worker.alerts import Alerts
        memory = pathlib.Path(sys.argv[1]) / "alerts.json"
        Alerts(None, host="h", memory=memory, repeat_s=1.0, release="0")
        sys.exit("sentry_sdk" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
