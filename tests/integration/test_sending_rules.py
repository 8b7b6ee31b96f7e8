"""Expiry, retries, resending, laying aside, breakers and pauses; only WhatsApp is pretended."""

import itertools
import json
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sending import (
    KEY,
    QUEUE,
    FakeDevice,
    Parts,
    Running,
    enqueue,
    enqueue_many,
    event_names,
    fetch,
    limbo,
    outcome,
    queue_of,
    settled,
)
from support import RedisServer, events, eventually, locked

from storage.errors import LedgerUnavailable
from storage.hold import Hold
from storage.ledger import Ledger
from whatsapp_worker.cancelling import cancel
from whatsapp_worker.consumer import Ending
from whatsapp_worker.device import SendFailed
from whatsapp_worker.errors import MediaFailed
from whatsapp_worker.event_names import Event
from whatsapp_worker.settings import Settings


class Refusing(FakeDevice):
    """Refuses each text as often as it was told to."""

    def __init__(self, folder: Path, refusals: dict[str, list[str]]) -> None:
        super().__init__(folder)
        self.refusals = refusals
        self.tries: list[str] = []
        self.tried_at: list[float] = []

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
        self.tried_at.append(time.time())
        text = content["text"]["body"].removeprefix("text of ")
        self.tries.append(text)
        if self.refusals.get(text):
            raise SendFailed(self.refusals[text].pop(0))
        return super().send(recipient, content, secret)


def test_an_expired_message_is_not_sent_and_everybody_is_told(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "late", expires_at=time.time() - 1)
    enqueue(redis, "short", ttl_s=0.05)
    enqueue(redis, "good", expires_at=time.time() + 60, ttl_s=60)
    time.sleep(0.06)
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "good"))
        assert running.parts.device.received() == ["text of good"]
        for id in ("late", "short"):
            row = running.parts.ledger.find(id)
            assert row is not None
            assert row.status == outcome(redis, id)["status"] == "expired"
            assert fetch(redis, id).get_status() == "failed"
    assert sorted(event_names(redis)) == ["message.expired", "message.expired", "message.sent"]


def test_an_expired_message_may_be_enqueued_again(redis: Redis, url: str, tmp_path: Path) -> None:
    enqueue(redis, "m1", expires_at=time.time() - 1)
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1"))
        enqueue(redis, "m1", job_id="again")
        eventually(lambda: running.parts.device.received() == ["text of m1"])


def test_a_passing_refusal_is_tried_again_and_keeps_the_order(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": ["server returned error 503"] * 2})
    enqueue_many(redis, 3)
    with Running(Parts(url, tmp_path, device=device)) as running:
        eventually(lambda: settled(redis, "m2"))
        assert device.tries == ["m0", "m0", "m0", "m1", "m2"]
        assert [attempt.status for attempt in running.parts.ledger.attempts("m0")] == [
            "failed",
            "failed",
        ]
    assert outcome(redis, "m0")["status"] == "sent"
    assert event_names(redis) == ["message.sent"] * 3


def test_stopping_while_a_refused_message_rests_does_not_fail_it(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue_many(redis, 2)
    device = Refusing(tmp_path, {"m0": ["server returned error 503"]})
    with Running(Parts(url, tmp_path, device=device)) as running:
        eventually(lambda: device.tries)
        running.parts.consumer.stop()
        assert running.join() is Ending.STOPPED
    with Running(Parts(url, tmp_path)):
        eventually(lambda: settled(redis, "m0", "m1"))
    assert [outcome(redis, id)["status"] for id in ("m0", "m1")] == ["sent", "sent"]
    assert FakeDevice(tmp_path).received() == ["text of m0", "text of m1"]


def test_a_redis_that_restarts_while_a_message_is_refused_does_not_fail_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    client = redis_server.client()
    is_back = threading.Event()

    class Restarting(Refusing):
        def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
            if not is_back.is_set():
                redis_server.kill()
                redis_server.start()
                is_back.set()
            return super().send(recipient, content, secret)

    enqueue_many(client, 2)
    device = Restarting(tmp_path, {"m0": ["server returned error 503"]})
    with Running(Parts(redis_server.url, tmp_path, device=device)):
        assert is_back.wait(20)
        eventually(lambda: settled(client, "m0", "m1"))
    assert [outcome(client, id)["status"] for id in ("m0", "m1")] == ["sent", "sent"]
    assert device.tries == ["m0", "m0", "m1"]
    client.close()


def test_a_lasting_refusal_fails_after_the_retries_and_the_next_goes_on(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": ["server returned error 500"] * 9})
    enqueue_many(redis, 2)
    with Running(Parts(url, tmp_path, device=device, send_retries=2)):
        eventually(lambda: settled(redis, "m1"))
    assert device.tries == ["m0", "m0", "m0", "m1"]
    assert outcome(redis, "m0")["status"] == "failed"
    assert "500" in outcome(redis, "m0")["error"]


def test_retries_come_after_a_quarter_of_a_second_and_ever_later(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": ["server returned error 503"] * 4})
    enqueue(redis, "m0", ttl_s=600)
    with Running(Parts(url, tmp_path, device=device)):
        eventually(lambda: settled(redis, "m0"))
    assert outcome(redis, "m0")["status"] == "failed"
    gaps = [later - at for at, later in itertools.pairwise(device.tried_at)]
    assert len(gaps) == Settings.send_retries == 3
    for gap, least in zip(gaps, (0.25, 0.5, 1.0), strict=True):
        assert least <= gap < 2 * least + 1


def test_a_message_that_is_refused_when_no_retry_would_be_in_time_expires_after_one_try(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    deadline = time.time() + 2

    class Slow(Refusing):
        def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
            if not self.tries:
                time.sleep(max(0.0, deadline - 0.1 - time.time()))
            return super().send(recipient, content, secret)

    device = Slow(tmp_path, {"m0": ["server returned error 503"]})
    enqueue(redis, "m0", expires_at=deadline)
    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path, device=device)) as running:
        eventually(lambda: settled(redis, "m0", "m1"))
        assert device.tries == ["m0", "m1"]
        row = running.parts.ledger.find("m0")
        assert row is not None
        assert row.status == outcome(redis, "m0")["status"] == "expired"
    assert event_names(redis) == ["message.expired", "message.sent"]


def test_a_message_that_is_refused_for_ever_is_not_tried_after_its_time(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": ["server returned error 503"] * 99})
    with Running(Parts(url, tmp_path, device=device, send_retries=10)):
        job = enqueue(redis, "m0", ttl_s=0.9)
        eventually(lambda: settled(redis, "m0"))
    assert outcome(redis, "m0")["status"] == "expired"
    assert job.enqueued_at is not None
    deadline = job.enqueued_at.replace(tzinfo=UTC).timestamp() + 0.9
    assert len(device.tries) > 1
    # What was in time when it was claimed may leave later; one more would have 0.85 s after it.
    assert max(device.tried_at) < deadline + 0.5


def test_a_message_whose_time_is_over_when_the_database_is_back_is_not_sent(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    with Running(Parts(url, tmp_path)) as running:
        with locked(tmp_path / "ledger.db"):
            enqueue(redis, "late", ttl_s=0.5)
            enqueue(redis, "good")
            eventually(lambda: running.parts.consumer.queue_state()["state"] == "database")
        eventually(lambda: settled(redis, "late", "good"))
        assert running.parts.device.received() == ["text of good"]
    assert outcome(redis, "late")["status"] == "expired"


def test_a_refusal_of_one_recipient_is_not_tried_again(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": ["server returned error 400"]})
    enqueue_many(redis, 2)
    with Running(Parts(url, tmp_path, device=device)):
        eventually(lambda: settled(redis, "m1"))
    assert device.tries == ["m0", "m1"]


def test_an_unknown_message_is_sent_again_at_most_twice_where_the_crm_wants_it(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m0", on_unknown="resend")
    enqueue(redis, "m1")
    for _ in range(3):
        device = FakeDevice(tmp_path, takes_s=30)
        with Running(Parts(url, tmp_path, device=device, send_timeout_s=0.3)) as running:
            assert running.join() is Ending.SEND_HUNG
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m0", "m1"))
        assert running.parts.device.received() == ["text of m1"]
        assert len(running.parts.ledger.attempts("m0")) == 2
    assert outcome(redis, "m0")["status"] == "unknown"
    assert event_names(redis) == ["message.unknown", "message.sent"]


def test_a_message_for_later_waits_survives_a_restart_and_goes_on_time(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    due_at = time.time() + 3
    enqueue(redis, "later", send_at=due_at)
    enqueue(redis, "now")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "now"))
        assert fetch(redis, "later").get_status() == "scheduled"
        assert limbo(redis) == 0
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "later"))
        assert running.parts.device.received() == ["text of now", "text of later"]
    assert outcome(redis, "later")["claimed_at"] >= due_at


@pytest.mark.parametrize("how", ["enqueue_at", "enqueue_in"])
def test_jobs_that_rq_itself_scheduled_are_sent_when_they_are_due(
    redis: Redis, url: str, tmp_path: Path, how: str
) -> None:
    arguments = {
        "session": "s1",
        "to": "+5511999990001",
        "message_id": "m1",
        "message": {"type": "text", "text": {"body": "x"}},
    }
    wait = timedelta(seconds=2)
    job = getattr(queue_of(redis), how)(
        datetime.now(UTC) + wait if how == "enqueue_at" else wait,
        "jobs.outbound.send_message",
        description="send_message",
        kwargs=arguments,
    )
    due_at = redis.zscore(f"rq:scheduled:{QUEUE}", job.id)  # RQ drops what is no whole second
    assert due_at is not None and due_at > time.time() + 0.5
    with Running(Parts(url, tmp_path)):
        eventually(lambda: job.get_status() == "finished")
    job.refresh()
    assert job.meta["outcome"]["claimed_at"] >= due_at


def test_five_lost_connections_open_the_breaker_across_processes_and_nothing_is_lost(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    told: list[tuple[Event, Mapping[str, Any]]] = []
    breakers: dict[str, Any] = {
        "folder": tmp_path,
        "on_change": lambda event, facts: told.append((event, facts)),
    }
    enqueue_many(redis, 3)
    for _ in range(5):
        device = Refusing(tmp_path, {"m0": ["websocket not connected"]})
        with Running(Parts(url, tmp_path, device=device, breakers=breakers)) as running:
            assert running.join() is Ending.NOT_CONNECTED
    assert [event for event, _ in told] == ["breaker.opened"]
    assert told[0][1]["breaker"] == "message"
    device = Refusing(tmp_path, {})
    parts = Parts(url, tmp_path, device=device, breakers=breakers, msg_reset_s=4.0)
    with Running(parts):
        eventually(lambda: parts.consumer.queue_state()["state"] == "breaker")
        time.sleep(0.3)
        assert device.tries == []
        assert redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"job-m0", b"job-m1", b"job-m2"]
        assert limbo(redis) == 0
        eventually(lambda: settled(redis, "m0", "m1", "m2"))
        assert device.tries == ["m0", "m1", "m2"]
    assert [event for event, _ in told] == ["breaker.opened", "breaker.closed"]
    assert event_names(redis).count("breaker.opened") == 1
    assert event_names(redis).count("breaker.closed") == 1


def test_a_half_open_breaker_asks_first_and_risks_no_message_without_an_answer(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    answers: list[Exception | None] = [TimeoutError("deaf"), None]
    probes = 0

    def probe() -> None:
        nonlocal probes
        probes += 1
        answer = answers.pop(0) if answers else None
        if answer is not None:
            raise answer

    path = tmp_path / "breaker.json"
    opened = {"version": 1, "failures": 5, "opened_at": time.time() - 100, "last": []}
    path.write_text(json.dumps(opened))
    device = Refusing(tmp_path, {})
    known: dict[str, Any] = {"breakers": {"folder": tmp_path}, "options": {"probe": probe}}
    parts = Parts(url, tmp_path, device=device, msg_reset_s=2.0, **known)
    with Running(parts):
        time.sleep(0.3)
        assert probes == 0  # there is nothing to send
        enqueue_many(redis, 2)
        eventually(lambda: probes == 1)
        assert device.tries == []
        assert redis.llen(f"rq:queue:{QUEUE}") + limbo(redis) == 2
        eventually(lambda: settled(redis, "m0", "m1"))
    assert probes == 2
    assert device.tries == ["m0", "m1"]


def test_stopping_works_while_the_breaker_is_open(redis: Redis, url: str, tmp_path: Path) -> None:
    path = tmp_path / "breaker.json"
    opened = {"version": 1, "failures": 5, "opened_at": time.time(), "last": []}
    path.write_text(json.dumps(opened))
    enqueue_many(redis, 2)
    parts = Parts(url, tmp_path, breakers={"folder": tmp_path})
    with Running(parts) as running:
        eventually(lambda: parts.consumer.queue_state()["state"] == "breaker")
        parts.consumer.stop()
        assert running.join(2) is Ending.STOPPED
    assert redis.llen(f"rq:queue:{QUEUE}") == 2


def test_whatsapp_asking_for_a_pause_rests_the_queue_and_fails_nothing(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": ["server returned error 463"]})
    enqueue_many(redis, 2)
    parts = Parts(url, tmp_path, device=device)
    with Running(parts) as running:
        state = eventually(lambda: _paused(parts))
        assert state["until"] > time.time() + 30
        assert redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"job-m0", b"job-m1"]
        assert running.ending is None
    assert device.tries == ["m0"]


def test_what_was_enqueued_for_another_number_is_held_until_an_operator_decides(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    hold = Hold(tmp_path)
    enqueue_many(redis, 2)
    hold.put(time.time())
    parts = Parts(url, tmp_path, options={"standing": hold.read})
    with Running(parts):
        state = eventually(lambda: _resting(parts, "held"))
        assert state["depth"] == 2
        assert "operator" in state["reason"]
        enqueue(redis, "m2")
        waiting = [b"job-m0", b"job-m1", b"job-m2"]  # between two looks at the first
        eventually(lambda: redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == waiting)
        assert parts.device.received() == []
        assert hold.release()
        eventually(lambda: settled(redis, "m0", "m1", "m2"))
        assert parts.consumer.queue_state()["state"] in ("running", "idle")
    assert parts.device.received() == ["text of m0", "text of m1", "text of m2"]


def test_nothing_that_is_enqueued_after_a_pause_is_sent(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    hold = Hold(tmp_path)
    parts = Parts(url, tmp_path, options={"standing": hold.read})
    with Running(parts):
        for number in range(3):
            eventually(lambda: _resting(parts, "idle"))
            sent = parts.device.received()
            hold.pause(time.time())
            enqueue(redis, f"m{number}")
            eventually(lambda: _paused(parts))
            waiting = [f"job-m{number}".encode()]
            eventually(lambda waiting=waiting: redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == waiting)
            assert parts.device.received() == sent
            assert hold.release()
            eventually(lambda number=number: settled(redis, f"m{number}"))


def test_what_is_enqueued_after_the_number_changed_is_sent(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    hold = Hold(tmp_path)
    hold.put(time.time())
    enqueue(redis, "m0")
    with Running(Parts(url, tmp_path, options={"standing": hold.read})):
        eventually(lambda: settled(redis, "m0"))
    assert outcome(redis, "m0")["status"] == "sent"


def _resting(parts: Parts, word: str) -> dict[str, Any] | None:
    state = parts.consumer.queue_state()
    return state if state["state"] == word else None


def _paused(parts: Parts) -> dict[str, Any] | None:
    state = parts.consumer.queue_state()
    return state if state["state"] == "paused" else None


def test_a_database_that_is_away_opens_its_breaker_once_and_sending_goes_on_afterwards(
    redis: Redis, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    breakers = {"on_change": lambda event, facts: told.append(event)}
    is_away = True
    claim = Ledger.claim

    def away(self: Ledger, *args: Any, **kwargs: Any) -> Any:
        if is_away:
            raise LedgerUnavailable("away")
        return claim(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "claim", away)
    enqueue_many(redis, 3)
    parts = Parts(url, tmp_path, breakers=breakers, db_reset_s=0.3)
    with Running(parts) as running:
        eventually(lambda: told)
        assert parts.consumer.queue_state()["state"] == "database"
        is_away = False
        eventually(lambda: settled(redis, "m2"))
        assert running.parts.device.received() == ["text of m0", "text of m1", "text of m2"]
    assert told == [Event.BREAKER_OPENED, Event.BREAKER_CLOSED]


def test_a_file_that_cannot_be_had_fails_that_message_alone(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    def prepare(content: Mapping[str, Any]) -> Mapping[str, Any]:
        raise MediaFailed("it is not there")

    image = {"type": "image", "image": {"link": "https://example.org/a.jpg"}}
    enqueue(redis, "m0")
    enqueue(redis, "image", message=image)
    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path, options={"prepare": prepare})) as running:
        eventually(lambda: settled(redis, "m1"))
        assert running.parts.device.received() == ["text of m0", "text of m1"]
        row = running.parts.ledger.find("image")
        assert row is not None
        assert row.status == "failed"
    assert "not there" in outcome(redis, "image")["error"]


def test_a_queue_that_is_no_list_harms_nothing_and_is_used_once_it_is_one(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    redis.set(f"rq:queue:{QUEUE}", "not a list")
    with Running(Parts(url, tmp_path)) as running:
        begun = time.process_time()
        time.sleep(1)
        assert time.process_time() - begun < 0.5  # no busy loop
        redis.delete(f"rq:queue:{QUEUE}")
        enqueue(redis, "m1")
        eventually(lambda: settled(redis, "m1"))
        assert running.ending is None


def test_a_waiting_message_is_cancelled_by_its_id_and_never_sent(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue_many(redis, 5)
    enqueue(redis, "later", send_at=time.time() + 1000)
    parts = Parts(url, tmp_path)

    def try_cancel(id: str) -> str | None:
        found = cancel({id}, outbox=parts.outbox, ledger=parts.ledger, install_key=KEY)[id]
        return found and found.status

    assert try_cancel("m3") == "cancelled"
    assert try_cancel("nobody") is None
    assert fetch(redis, "m3").get_status() == "failed"
    assert outcome(redis, "m3")["status"] == "cancelled"
    redis.lpush(f"rq:queue:{QUEUE}", "job-m3")  # put back at the head: not revived
    with Running(parts):
        eventually(lambda: settled(redis, "m4"))
        eventually(lambda: fetch(redis, "later").get_status() == "scheduled")
        assert parts.device.received() == [f"text of m{n}" for n in (0, 1, 2, 4)]
    parts = Parts(url, tmp_path)
    assert try_cancel("m0") == "sent"
    assert try_cancel("later") == "cancelled"
    assert redis.zcard(f"rq:scheduled:{QUEUE}") == 0
    assert event_names(redis).count("message.cancelled") == 2
    parts.close()


@pytest.mark.parametrize("is_popped", [False, True], ids=["waiting", "popped"])
def test_a_message_that_waits_more_than_once_is_cancelled_and_never_sent(
    redis: Redis, url: str, tmp_path: Path, is_popped: bool
) -> None:
    jobs = ["job-m0", "again", "urgent", "later"]
    enqueue(redis, "m0")
    enqueue(redis, "m0", job_id="again")
    enqueue(redis, "m0", job_id="urgent", queue=f"{QUEUE}:high")
    redis.zadd(f"rq:scheduled:{QUEUE}", {enqueue(redis, "m0", job_id="later").id: time.time()})
    redis.lrem(f"rq:queue:{QUEUE}", 1, "later")
    parts = Parts(url, tmp_path)
    if is_popped:
        parts.outbox.exchange()
    found = cancel({"m0"}, outbox=parts.outbox, ledger=parts.ledger, install_key=KEY)["m0"]
    assert found is not None and found.status == "cancelled"
    parts.close()
    metas = [json.loads(redis.hget(f"rq:job:{id}", "meta") or b"{}") for id in jobs]
    assert [meta["outcome"]["status"] for meta in metas] == ["cancelled"] * 4
    assert sorted(event["payload"]["job_id"] for event in events(redis)) == sorted(jobs)
    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1"))
        assert running.parts.device.received() == ["text of m1"]
        enqueue(redis, "m0", job_id="anew")
        eventually(lambda: redis.hget("rq:job:anew", "status") == b"finished")
    assert event_names(redis) == [*["message.cancelled"] * 4, "message.sent", "message.sent"]


def test_a_job_that_rq_cancels_while_it_is_laid_aside_is_not_revived(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    job = enqueue(redis, "m0", send_at=time.time() + 0.2)
    parts = Parts(url, tmp_path)
    parts.outbox.exchange()
    popped = parts.outbox.next()
    assert popped is not None
    job.cancel()
    parts.outbox.defer(popped, time.time() + 0.2)
    assert [found.id for found in parts.outbox.cancelled()] == ["job-m0"], "the keeper ends it"
    assert fetch(redis, "m0").get_status() == "canceled"
    assert limbo(redis) == redis.zcard(f"rq:scheduled:{QUEUE}") == 0
    parts.close()


@pytest.mark.parametrize("is_popped", [False, True], ids=["waiting", "popped"])
def test_a_cancel_that_was_killed_half_way_is_not_revived_by_who_finds_its_job_at_the_head(
    redis: Redis, url: str, tmp_path: Path, location: str | Path, is_popped: bool
) -> None:
    enqueue(redis, "m0")
    enqueue(redis, "m0", job_id="again")
    enqueue(redis, "m1")
    parts = Parts(url, tmp_path, location=location)
    if is_popped:
        parts.outbox.exchange()  # by a process that ends before it claims
    parts.outbox.withdraw = _killed  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        cancel({"m0"}, outbox=parts.outbox, ledger=parts.ledger, install_key=KEY)
    parts.close()
    assert outcome(redis, "m0") == {}
    with Running(Parts(url, tmp_path, location=location)) as running:
        eventually(lambda: settled(redis, "m0", "m1"))
        assert running.parts.device.received() == ["text of m1"]
    assert outcome(redis, "m0")["status"] == "cancelled"
    assert event_names(redis) == ["message.cancelled", "message.cancelled", "message.sent"]
    assert {event["payload"]["job_id"] for event in events(redis)} == {"job-m0", "again", "job-m1"}


def _killed(*_: Any) -> None:
    """In the ledger it is cancelled, in Redis it is not."""
    raise SystemExit


def test_cancelling_while_it_is_sent_ends_in_one_word_everywhere(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    ids = enqueue_many(redis, 60)
    other = Parts(url, tmp_path)
    with Running(Parts(url, tmp_path, device=FakeDevice(tmp_path, takes_s=0.001))) as running:
        for id in reversed(ids):
            cancel({id}, outbox=other.outbox, ledger=other.ledger, install_key=KEY)
        eventually(lambda: settled(redis, *ids))
        received = running.parts.device.received()
    for id in ids:
        status = outcome(redis, id)["status"]
        assert status in ("sent", "cancelled")
        assert received.count(f"text of {id}") == (status == "sent")
        row = other.ledger.find(id)
        assert row is not None
        assert row.status == status
    assert limbo(redis) == 0
    other.close()


def _job(redis: Redis, id: str) -> Any:
    job = queue_of(redis).fetch_job(id)
    assert job is not None
    return job


@pytest.mark.parametrize("ended", ["expired", "cancelled", "failed"])
def test_a_job_that_ends_unsent_is_not_told_what_became_of_other_content_with_its_id(
    redis: Redis, url: str, tmp_path: Path, ended: str
) -> None:
    def prepare(content: Mapping[str, Any]) -> Mapping[str, Any]:
        raise MediaFailed("there is no such file")

    parts = Parts(url, tmp_path, options={"prepare": prepare})
    other: dict[str, Any] = {"message": {"type": "text", "text": {"body": "quite another text"}}}
    if ended == "expired":
        other["expires_at"] = time.time() - 5
    if ended == "failed":
        other["message"] = {"type": "image", "image": {"link": "https://example.org/x.png"}}
    enqueue(redis, "m1")
    enqueue(redis, "m1", job_id="other", **other)
    if ended == "cancelled":  # as RQ's own `cancel` does to what was popped
        redis.hset("rq:job:other", "status", "canceled")
    with Running(parts):
        eventually(lambda: settled(redis, "m1") and _job(redis, "other").meta.get("outcome"))
        row = parts.ledger.find("m1")
        assert row is not None and row.status == "sent"
    assert outcome(redis, "m1")["status"] == "sent"
    told = _job(redis, "other").meta["outcome"]
    assert (told["status"], told["wa_message_id"]) == (ended, None)
    assert event_names(redis) == ["message.sent", f"message.{ended}"]
    assert [one["payload"].get("duplicate") for one in events(redis)] == [None, True]


def test_an_expired_repetition_of_a_message_that_was_just_sent_is_told_so_and_ends_nothing(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1")
    enqueue(redis, "m1", job_id="again", expires_at=time.time() - 5)
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1") and _job(redis, "again").meta.get("outcome"))
        assert running.ending is None
    assert _job(redis, "again").meta["outcome"] == outcome(redis, "m1")


UNKNOWN_NUMBER = "no LID found for 5511999990001@s.whatsapp.net from server"


def _fail(*_: object) -> Any:
    raise SendFailed(UNKNOWN_NUMBER)


def test_what_neonize_says_is_logged_without_phone_numbers(
    redis: Redis, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Refusing(tmp_path, {"m0": [UNKNOWN_NUMBER]})
    pace: dict[str, Any] = {"pace_per_minute": 300.0, "pace_jitter": 0.0, "pace_typing_s": 0.01}
    options = {"show_typing": _fail, "prepare": _fail}
    parts = Parts(url, tmp_path, device=device, options=options, send_retries=0, **pace)
    document = {"type": "document", "document": {"link": "https://example.org/x.pdf"}}
    enqueue(redis, "m0")
    enqueue(redis, "m1", message=document)
    with caplog.at_level("DEBUG", "whatsapp_worker.consumer"), Running(parts):
        eventually(lambda: settled(redis, "m0", "m1"))
    said = {record.getMessage(): str(vars(record).get("error")) for record in caplog.records}
    for event in ("message.send_error", "message.typing_failed"):
        assert "no LID found for ...@s.whatsapp.net" in said[event]
    assert not any("5511999990001" in text for text in said.values())


def test_a_failure_is_told_in_words_that_people_know(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Refusing(tmp_path, {"m0": [UNKNOWN_NUMBER]})
    parts = Parts(url, tmp_path, device=device, options={"prepare": _fail}, send_retries=0)
    document = {"type": "document", "document": {"link": "https://example.org/x.pdf"}}
    enqueue(redis, "m0")
    enqueue(redis, "m1", message=document)
    with Running(parts):
        eventually(lambda: settled(redis, "m0", "m1"))
        row = parts.ledger.find("m0")
        assert row is not None and row.error == "the number is not on WhatsApp"
    assert outcome(redis, "m0")["error"] == "the number is not on WhatsApp"
    assert outcome(redis, "m1")["error"] == "WhatsApp did not take the file"
    told = [event["payload"]["error"] for event in events(redis)]
    assert told == ["the number is not on WhatsApp", "WhatsApp did not take the file"]
