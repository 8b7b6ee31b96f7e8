"""The real sentry-sdk against an ingest endpoint on loopback."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest
from ingest import Ingest
from rq import Queue
from rq.serializers import JSONSerializer
from support import eventually

from whatsapp_worker import alert_policy
from whatsapp_worker.alert_policy import breaker_closed, breaker_opened, session_changed
from whatsapp_worker.alerts import Alerts
from whatsapp_worker.errors import SettingsError


@pytest.fixture
def ingest():
    server = Ingest().start()
    yield server
    server.close()


@pytest.fixture
def make(tmp_path):
    made = []

    def make(dsn, **changes):
        settings = {"host": "host-1", "memory": tmp_path / "alerts.json", "repeat_s": 3600.0}
        alerts = Alerts(dsn, release="0.1", **{**settings, **changes})
        alerts.start()
        made.append(alerts)
        return alerts

    yield make
    for alerts in made:
        alerts.close(timeout_s=0.1)


def opened(session="sales", breaker="message", **changes):
    facts = {
        "failure": "timeout",
        "failures": [{"at": "2026-03-01T12:00:00Z", "failure": "timeout"}],
        "retry_after_s": 60.0,
    }
    return breaker_opened(breaker, session=session, **{**facts, **changes})


def test_a_trip_arrives_as_one_event_of_level_error(ingest, make):
    make(ingest.dsn).raise_alert(opened())
    [event] = ingest.await_events(1)
    assert event["level"] == "error"
    assert event["tags"] == {
        "event": "breaker.opened",
        "breaker": "message",
        "session": "sales",
        "host": "host-1",
        "failure": "timeout",
    }
    assert event["fingerprint"] == ["breaker", "message", "sales"]
    assert event["contexts"]["alert"]["failures"][0]["failure"] == "timeout"
    assert event["release"] == "0.1" and event["server_name"] == "host-1"


def test_a_recovery_arrives_at_level_info(ingest, make):
    alerts = make(ingest.dsn)
    alerts.raise_alert(opened())
    alerts.raise_alert(breaker_closed("message", session="sales", open_s=61.2))
    _, event = ingest.await_events(2)
    assert event["level"] == "info" and event["tags"]["event"] == "breaker.closed"


def test_a_flapping_breaker_and_a_shared_outage_are_one_event_each(ingest, make):
    alerts = make(ingest.dsn)
    for number in range(20):
        alerts.raise_alert(opened())
        alerts.raise_alert(breaker_closed("message", session="sales"))
        alerts.raise_alert(opened(breaker="database", session=f"s{number}"))
    assert alerts.close()
    events = [(event["tags"]["event"], event["tags"]["breaker"]) for event in ingest.events]
    assert sorted(events) == [
        ("breaker.closed", "message"),
        ("breaker.opened", "database"),
        ("breaker.opened", "message"),
    ]


def test_a_restarted_supervisor_does_not_repeat_itself(ingest, make, tmp_path):
    make(ingest.dsn).raise_alert(opened())
    ingest.await_events(1)
    eventually((tmp_path / "alerts.json").exists)
    again = make(ingest.dsn)
    again.raise_alert(opened())
    again.raise_alert(opened(session="help"))
    assert again.close()
    assert [event["tags"]["session"] for event in ingest.events] == ["sales", "help"]


def test_what_lasts_is_told_again_after_the_repeat_time(ingest, make):
    alerts = make(ingest.dsn, repeat_s=0.3)
    alerts.raise_alert(opened())
    alerts.raise_alert(opened())
    assert len(ingest.await_events(2)) == 2


def test_no_number_and_no_log_line_ever_travels(ingest, make, caplog):
    import logging

    alerts = make(ingest.dsn)
    number = "5511999990001"
    logging.getLogger("whatsapp_worker").error("secret log line", extra={"to": number})
    alerts.raise_alert(
        opened(
            session=number,
            failure=f"no LID found for {number} from server",
            failures=[{"problem": f"+{number}"}, {"to": int(number)}],
        )
    )
    with contextlib.suppress(ZeroDivisionError):
        1 / 0  # noqa: B018
    alerts.raise_alert(
        session_changed(
            number, state="replaced", reason="wa-stream-replaced", sentence=number, heals=False
        )
    )
    assert alerts.close()
    assert len(ingest.events) == 2
    for body in ingest.raw:
        assert number.encode() not in body and b"secret" not in body and b"argv" not in body


def test_an_unreachable_sentry_costs_nothing_and_gets_the_alert_later(make, monkeypatch):
    monkeypatch.setattr(alert_policy, "RESEND_S", 0.2)
    ingest = Ingest()
    port = ingest.port
    ingest._server.server_close()
    alerts = make(ingest.dsn)
    began = time.monotonic()
    for number in range(200):
        alerts.raise_alert(opened(session=f"s{number}"))
    assert time.monotonic() - began < 2.5
    again = Ingest(port=port).start()
    with contextlib.closing(again):
        sessions = {event["tags"]["session"] for event in again.await_events(200, within_s=30)}
        assert sessions == {f"s{number}" for number in range(200)}


def test_what_an_unreachable_sentry_did_not_take_is_told_by_the_next_process(make):
    ingest = Ingest()
    port = ingest.port
    ingest._server.server_close()
    alerts = make(ingest.dsn)
    alerts.raise_alert(opened())
    assert alerts.close()
    again = Ingest(port=port).start()
    with contextlib.closing(again):
        later = make(again.dsn, clock=lambda: time.time() + 120)
        later.raise_alert(opened())
        assert [event["tags"]["event"] for event in again.await_events(1)] == ["breaker.opened"]
        assert later.close()
        assert len(again.events) == 1


def test_what_a_hanging_sentry_never_answered_is_told_by_the_next_process(ingest, make):
    silent = Ingest().start()
    silent.hang_s = 30
    with contextlib.closing(silent):
        alerts = make(silent.dsn)
        alerts.raise_alert(opened())
        alerts.raise_alert(opened(session="support"))
        eventually(lambda: silent.asked)
        assert alerts.close()
        later = make(ingest.dsn, clock=lambda: time.time() + 120)
        sessions = [event["tags"]["session"] for event in ingest.await_events(2)]
        assert sorted(sessions) == ["sales", "support"]
        assert later.close()


def test_a_hanging_sentry_does_not_hold_up_anything(ingest, make):
    ingest.hang_s = 30
    alerts = make(ingest.dsn)
    slowest = 0.0
    for number in range(500):
        began = time.monotonic()
        alerts.raise_alert(opened(session=f"s{number}"))
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1.0
    began = time.monotonic()
    alerts.close()
    assert time.monotonic() - began < 5


def test_a_sentry_that_answers_500_gets_the_alert_later(ingest, make, monkeypatch):
    monkeypatch.setattr(alert_policy, "RESEND_S", 0.1)
    ingest.status = 500
    alerts = make(ingest.dsn)
    alerts.raise_alert(opened())
    time.sleep(0.3)
    ingest.status = 200
    ingest.await_events(1)


def test_a_sentry_that_takes_no_more_for_now_gets_the_alerts_later(ingest, make, monkeypatch):
    monkeypatch.setattr(alert_policy, "RESEND_S", 0.2)
    ingest.status = 429
    alerts = make(ingest.dsn)
    alerts.raise_alert(opened())
    eventually(lambda: ingest.asked)
    alerts.raise_alert(opened(session="support"))  # meets the SDK's own pause
    ingest.status = 200
    sessions = [event["tags"]["session"] for event in ingest.await_events(2)]
    assert sorted(sessions) == ["sales", "support"]


def test_closing_delivers_what_was_raised(ingest, make):
    alerts = make(ingest.dsn)
    for number in range(50):
        alerts.raise_alert(opened(session=f"s{number}"))
    assert alerts.close(timeout_s=20)
    assert len(ingest.events) == 50


def test_alerts_are_raised_from_many_threads_at_once(ingest, make):
    alerts = make(ingest.dsn)
    names = itertools.count()
    threads = [
        threading.Thread(
            target=lambda: [
                alerts.raise_alert(opened(session=f"s{next(names)}")) for _ in range(10)
            ]
        )
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alerts.close(timeout_s=20)
    assert len({event["tags"]["session"] for event in ingest.events}) == 50


def test_a_memory_that_cannot_be_read_or_written_does_not_silence_alerts(ingest, make, tmp_path):
    (tmp_path / "alerts.json").write_text("{")
    make(ingest.dsn).raise_alert(opened())
    make(ingest.dsn, memory=tmp_path / "absent" / "alerts.json").raise_alert(opened())
    ingest.await_events(2)


def test_an_alert_that_cannot_be_remembered_does_not_silence_those_after_it(ingest, make):
    alerts = make(ingest.dsn)
    for _ in range(2):  # the second waits, and what waits is remembered
        alerts.raise_alert(opened(failures=[{"at": object()}]))
    ingest.await_events(1)
    alerts.raise_alert(opened(session="support"))
    ingest.await_events(2)
    assert alerts.close()


def test_without_a_dsn_alerts_are_log_lines(make, caplog):
    alerts = make(None)
    alerts.raise_alert(opened())
    assert alerts.close()
    assert [record.message for record in caplog.records] == ["alert.raised"]


def test_a_dsn_that_is_none_is_a_problem_of_the_settings(make):
    with pytest.raises(SettingsError, match="SENTRY_DSN"):
        make("https://example.invalid")


MAINTENANCE = """
import logging, os, sys
from whatsapp_worker import maintenance, telemetry
from whatsapp_worker.settings import Settings

def purge(argument):
    log.error("secret line", extra={"to": argument})
    try:
        sys.stdin.no_such_thing
    except AttributeError:
        log.exception("secret trace")
    really_purge(argument)  # it takes none

log = logging.getLogger("whatsapp_worker.maintenance")
[(name, really_purge)] = maintenance._ALLOWED.items()
maintenance._ALLOWED[name] = purge
settings = Settings.read(os.environ)
telemetry.set_up(settings)
sys.exit(maintenance.run(settings))
"""


@pytest.fixture
def maintenance(ingest, redis, shared_redis_server, tmp_path):
    """The real maintenance process, whose purge logs errors and then fails; its log is in the
    folder."""
    environ = {
        "DATA_DIR": str(tmp_path / "data"),
        "REDIS_URL": shared_redis_server.url,
        "SENTRY_DSN": ingest.dsn,
        "WORKER_HOST": "host-1",
    }
    command = [sys.executable, "-c", MAINTENANCE]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **environ}, stdout=log, stderr=log)
    yield process
    process.kill()
    process.wait()


def enqueue_purge(redis, argument):
    queue = Queue("wa:maintenance:host-1", connection=redis, serializer=JSONSerializer)
    return queue.enqueue("jobs.purge.purge_sessions", argument)


def test_a_failed_purge_arrives_once_without_its_arguments_and_no_log_line_does(
    ingest, redis, maintenance, tmp_path
):
    redis.hset("rq:job:bad", mapping={"created_at": "secret"})
    redis.rpush("rq:queue:wa:maintenance:host-1", "bad")
    jobs = [enqueue_purge(redis, f"5511999990001 secret {n}") for n in range(2)]
    [event] = ingest.await_events(1, within_s=30)
    # What was logged before it would have arrived before it.
    assert event["exception"]["values"][-1]["mechanism"]["type"] == "rq"
    assert event["tags"] == {"event": "purge.failed", "host": "host-1"}
    assert event["level"] == "error" and event["fingerprint"] == ["purge.failed", "host-1"]
    assert "trace" not in event.get("contexts", {})
    assert event["extra"]["rq-job"]["func"] == "jobs.purge.purge_sessions"
    eventually(lambda: all(job.get_status(refresh=True) == "failed" for job in jobs))
    maintenance.terminate()
    assert maintenance.wait(10) == 0
    assert len(ingest.events) == 1
    assert b"secret" not in b"".join(ingest.raw)
    logged = (tmp_path / "log").read_text()
    for line in ("ERROR job.poisoned", "ERROR secret line", "ERROR secret trace"):
        assert line in logged
