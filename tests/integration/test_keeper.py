"""The queue keeper on a real Redis: what nobody will ever send ends, the rest is left alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from support import RedisServer, eventually

from storage.ledger import Ledger
from storage.sessions import Sessions
from whatsapp_worker import keeper as keeper_module
from whatsapp_worker import outbox
from whatsapp_worker.event_names import Status
from whatsapp_worker.keeper import Keeper
from whatsapp_worker.rq_job import RELEASED, Outcome
from whatsapp_worker.stream import EventStream


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    found = Sessions(tmp_path)
    found.prepare()
    found.create("known", network="sandbox", now=1.0)
    found.tombstones.add("gone", None, "delete", 1.0)
    return found


@pytest.fixture
def keeper(redis: Redis, sessions: Sessions) -> Keeper:
    return keeper_of(redis, sessions)


def keeper_of(redis: Redis, sessions: Sessions, *consumed: str) -> Keeper:
    return Keeper(
        redis=redis,
        stream=EventStream(redis),
        sessions=sessions,
        consumed=lambda: frozenset(consumed),
        result_ttl_s=600,
        ledger_of=lambda session: Ledger.open(sessions.folder(session) / "ledger.db", session),
    )


def enqueue(redis: Redis, session: str, message_id: str = "m1", *, lane: str = "") -> Job:
    queue = Queue(f"wa:out:{session}{lane}", connection=redis, serializer=JSONSerializer)
    message = {"type": "text", "text": {"body": "hello"}}
    return queue.enqueue(
        "jobs.outbound.send_message",
        description="send_message",
        kwargs={
            "session": session,
            "to": "+5511999990001",
            "message_id": message_id,
            "message": message,
        },
    )


def ended(redis: Redis, job: Job) -> tuple[str, str | None]:
    fresh = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    return fresh.get_status(), (fresh.meta.get("outcome") or {}).get("error")


def test_what_was_in_hand_when_its_session_was_deleted_is_not_called_failed(
    redis: Redis, keeper: Keeper
) -> None:
    jobs = [enqueue(redis, "gone", id) for id in ("m1", "m2")]
    redis.lmove("rq:queue:wa:out:gone", "rq:queue:wa:out:gone:intermediate")
    jobs[0].set_status(JobStatus.STARTED)
    keeper.sweep()
    words = [Job.fetch(job.id, redis, JSONSerializer).meta["outcome"] for job in jobs]
    assert [word["status"] for word in words] == ["unknown", "failed"]
    assert words[0]["error"] == "session deleted before WhatsApp's answer came"


def test_jobs_of_unknown_and_deleted_sessions_fail_with_the_reason(
    redis: Redis, keeper: Keeper
) -> None:
    unknown = enqueue(redis, "nobody")
    deleted = enqueue(redis, "gone", lane=":high")
    assert keeper.sweep() == 2
    assert ended(redis, unknown) == ("failed", "unknown session")
    assert ended(redis, deleted) == ("failed", "session deleted")


def test_jobs_of_a_session_that_is_not_connected_wait(redis: Redis, keeper: Keeper) -> None:
    job = enqueue(redis, "known")
    assert keeper.sweep() == 0
    assert ended(redis, job) == ("queued", None)


def test_a_queue_that_a_device_process_consumes_is_left_alone(
    redis: Redis, sessions: Sessions
) -> None:
    sessions.want("known", lambda wanted: replace(wanted, run="delete"))
    job = enqueue(redis, "known")
    assert keeper_of(redis, sessions, "known").sweep() == 0
    assert keeper_of(redis, sessions).sweep() == 1
    assert ended(redis, job) == ("failed", "session deleted")


def test_a_record_that_cannot_be_read_costs_no_job(redis: Redis, sessions: Sessions) -> None:
    path = sessions.folder("known") / "wanted.json"
    path.write_text("garbage")
    job = enqueue(redis, "known")
    assert keeper_of(redis, sessions).sweep() == 0
    assert ended(redis, job) == ("queued", None)


def test_a_session_without_its_record_is_not_unknown(redis: Redis, sessions: Sessions) -> None:
    (sessions.folder("known") / "device.db").touch()
    (sessions.folder("known") / "wanted.json").unlink()
    job = enqueue(redis, "known")
    assert keeper_of(redis, sessions).sweep() == 0
    assert ended(redis, job) == ("queued", None)


def test_a_queue_that_is_no_list_costs_the_others_nothing(
    redis: Redis, sessions: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("known", "aaa-unknown"):
        enqueue(redis, name)
        redis.delete(f"rq:queue:wa:out:{name}")
        redis.set(f"rq:queue:wa:out:{name}", "nonsense")
    sessions.create("other", network="sandbox", now=1.0)
    late = enqueue(redis, "other")
    late.cancel()
    unknown = enqueue(redis, "zzz-unknown")
    redis.set("wa:cancel", "nonsense")
    keeper = keeper_of(redis, sessions)
    for _ in range(3):
        keeper.answer_requests()
        keeper.sweep()
    assert ended(redis, unknown) == ("failed", "unknown session")
    assert ended(redis, late)[1] == "it was cancelled"
    told = [record.message for record in caplog.records]
    assert told.count("queue.not_tended") == 3, "once each"


def test_a_queue_name_that_is_no_text_costs_the_others_nothing(
    redis: Redis, keeper: Keeper
) -> None:
    redis.sadd("rq:queues", b"rq:queue:caf\xe9", b"rq:queue:wa:out:caf\xe9", b"\xff")
    redis.lpush(b"rq:queue:wa:out:caf\xe9", "a-job")
    job = enqueue(redis, "nobody")
    assert keeper.sweep() == 1
    assert ended(redis, job) == ("failed", "unknown session")


def test_a_bug_that_one_queue_meets_costs_the_others_nothing_and_is_told_once(
    redis: Redis,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_queue = outbox.fail_queue

    def fail(redis: Redis, queue: str, *args: Any, **kwargs: Any) -> int:
        if queue == "wa:out:aaa-unknown":
            raise ValueError("a bug")
        return fail_queue(redis, queue, *args, **kwargs)

    monkeypatch.setattr(outbox, "fail_queue", fail)
    enqueue(redis, "aaa-unknown")
    unknown = enqueue(redis, "zzz-unknown")
    keeper = keeper_of(redis, sessions)
    for _ in range(3):
        keeper.sweep()
    assert ended(redis, unknown) == ("failed", "unknown session")
    [told] = [record for record in caplog.records if record.message == "queue.not_tended"]
    assert told.exc_info, "where it is"


@pytest.mark.parametrize(
    "noted",
    [
        {"status": "queued"},
        {"status": "sending", "claimed_at": 1.0},
        {"status": "failed"},
        {"status": "sent", "claimed_at": "yesterday"},
    ],
)
def test_what_a_crm_wrote_in_the_place_of_an_outcome_is_none(
    redis: Redis, keeper: Keeper, noted: dict[str, Any]
) -> None:
    job, unknown = enqueue(redis, "gone"), enqueue(redis, "nobody")
    job.meta["outcome"] = noted
    job.save_meta()
    redis.lmove("rq:queue:wa:out:gone", "rq:queue:wa:out:gone:intermediate")
    job.set_status(JobStatus.STARTED)
    keeper.sweep()
    assert Job.fetch(job.id, redis, JSONSerializer).meta["outcome"]["status"] == "unknown"
    assert ended(redis, unknown) == ("failed", "unknown session")


@pytest.mark.parametrize("error", RELEASED)
def test_the_end_of_an_attempt_that_another_may_have_followed_is_no_outcome(
    redis: Redis, keeper: Keeper, error: str
) -> None:
    refused = Outcome(Status.FAILED, error=error, claimed_at=1.0)
    job = enqueue(redis, "gone")
    job.meta["outcome"] = refused.as_dict()
    job.save_meta()
    redis.lmove("rq:queue:wa:out:gone", "rq:queue:wa:out:gone:intermediate")
    job.set_status(JobStatus.STARTED)
    keeper.sweep()
    outcome = Job.fetch(job.id, redis, JSONSerializer).meta["outcome"]
    assert outcome["status"] == "unknown"
    assert outcome["error"] == "session deleted before WhatsApp's answer came"


def test_a_long_queue_does_not_keep_the_keeper_from_the_others(
    redis: Redis, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "JOBS_A_SWEEP", 10)
    sessions.create("other", network="sandbox", now=1.0)
    for number in range(100):
        enqueue(redis, "known", f"m{number}")
    late = enqueue(redis, "other")
    late.cancel()
    keeper = keeper_of(redis, sessions)
    keeper.sweep()
    keeper.sweep()
    assert ended(redis, late)[1] == "it was cancelled"


def test_what_was_read_of_a_queue_is_forgotten_with_it(redis: Redis, sessions: Sessions) -> None:
    enqueue(redis, "known")
    keeper = keeper_of(redis, sessions)
    keeper.sweep()
    assert keeper._waiting._watches
    redis.delete("rq:queue:wa:out:known")
    keeper.sweep()
    assert not keeper._waiting._watches


def test_many_jobs_end_in_bounded_batches(redis: Redis, keeper: Keeper) -> None:
    for number in range(1200):
        enqueue(redis, "nobody", f"m{number}")
    swept = []
    while batch := keeper.sweep():
        swept.append(batch)
    assert sum(swept) == 1200
    assert max(swept) <= 500


def test_it_outlives_a_redis_that_goes_away_and_comes_back(
    redis_server: RedisServer, sessions: Sessions
) -> None:
    redis = redis_server.client()
    keeper = keeper_of(redis, sessions)
    redis_server.kill()
    keeper.start()
    redis_server.start()
    client = redis_server.client()
    job = enqueue(client, "nobody")
    eventually(lambda: ended(client, job)[0] == "failed", within_s=10)
    assert keeper.stop(timeout_s=5)
