"""The consumer with a real Redis and a real ledger; only WhatsApp is pretended."""

import contextlib
import json
import os
import pickle
import signal
import threading
import time
import zlib
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
    fetch,
    fork_consumer,
    limbo,
    outcome,
    queue_of,
    settled,
)
from support import events, eventually

from whatsapp_worker import outbox, redis_client
from whatsapp_worker.cancelling import cancel
from whatsapp_worker.consumer import Ending
from whatsapp_worker.device import SendAck, SendFailed
from whatsapp_worker.stream import EventStream


def test_a_message_is_sent_and_a_crm_reads_it_with_plain_rq(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1"))
        received = running.parts.device.received()
    job = fetch(redis, "m1")
    told = job.meta["outcome"]
    assert received == ["text of m1"]
    assert job.get_status() == "finished"
    assert set(told) == {"status", "wa_message_id", "wa_id", "error", "claimed_at", "sent_at"}
    assert (told["status"], told["wa_id"], told["error"]) == ("sent", "5511999990001", None)
    assert told["claimed_at"] <= told["sent_at"]
    assert job.latest_result().return_value == told
    assert job.kwargs.keys() == {"session", "message_id", "content_hash"}
    assert 3500 < redis.ttl("rq:job:job-m1") <= 3600
    assert redis.zscore(f"rq:finished:{QUEUE}", "job-m1") is not None
    [event] = events(redis)
    assert event["event"] == "message.sent"
    assert event["payload"]["message_id"] == "m1"
    assert limbo(redis) == 0


def test_nothing_of_the_text_stays_in_redis_once_it_is_settled(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    secret = "the-launch-code-is-0000"
    message = {"type": "text", "text": {"body": secret}}
    # RQ's default description repeats the arguments.
    queue_of(redis).enqueue(
        "jobs.outbound.send_message",
        session="s1",
        to="5511999990001",
        message_id="m1",
        message=message,
        job_id="job-m1",
    )
    enqueue(redis, "m2", message={"type": "text", "text": {"body": secret}, "nonsense": 1})
    with Running(Parts(url, tmp_path)):
        eventually(lambda: settled(redis, "m1", "m2"))
    for key in redis.scan_iter("rq:*"):
        if redis.type(key) == b"hash":
            for value in redis.hgetall(key).values():
                assert secret.encode() not in value
                with contextlib.suppress(zlib.error):
                    assert secret.encode() not in zlib.decompress(value)


def test_messages_leave_in_the_order_in_which_they_were_enqueued(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    ids = enqueue_many(redis, 50)
    with Running(Parts(url, tmp_path, device=FakeDevice(tmp_path, takes_s=0))) as running:
        eventually(lambda: settled(redis, ids[-1]))
        assert running.parts.device.received() == [f"text of {id}" for id in ids]
    assert limbo(redis) == 0


def test_a_message_on_the_high_lane_overtakes_those_that_wait(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    ids = enqueue_many(redis, 20)
    enqueue(redis, "urgent", queue=f"{QUEUE}:high")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, ids[-1], "urgent"))
        assert running.parts.device.received()[0] == "text of urgent"
    assert fetch(redis, "urgent").get_status() == "finished"
    assert limbo(redis, f"{QUEUE}:high") == 0


def test_a_message_on_the_high_lane_is_taken_at_once_by_an_idle_consumer(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    with Running(Parts(url, tmp_path)):
        for number in range(3):
            enqueue(redis, f"high-{number}", queue=f"{QUEUE}:high")
            eventually(lambda: settled(redis, f"high-{number}"), within_s=2)  # noqa: B023
            enqueue(redis, f"low-{number}")
            eventually(lambda: settled(redis, f"low-{number}"), within_s=2)  # noqa: B023


def test_the_same_message_id_twice_is_sent_once_and_both_jobs_get_its_outcome(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1")
    enqueue(redis, "m1", job_id="again")
    enqueue(redis, "last")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "last"))
        assert running.parts.device.received() == ["text of m1", "text of last"]
    again = queue_of(redis).fetch_job("again")
    assert again is not None
    assert again.get_status() == "finished"
    assert again.meta["outcome"] == outcome(redis, "m1")


def test_the_same_job_id_twice_is_sent_once(redis: Redis, url: str, tmp_path: Path) -> None:
    enqueue(redis, "m1")
    enqueue(redis, "m1")
    enqueue(redis, "last")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "last"))
        assert running.parts.device.received() == ["text of m1", "text of last"]
    assert outcome(redis, "m1")["status"] == "sent"
    assert limbo(redis) == 0


def test_the_same_message_id_with_other_content_is_refused(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1")
    enqueue(redis, "m1", job_id="other", to="+5511999990002")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: redis.hget("rq:job:other", "status") == b"failed")
        assert running.parts.device.received() == ["text of m1"]
    other = queue_of(redis).fetch_job("other")
    assert other is not None
    assert "message_id" in other.meta["outcome"]["error"]
    assert outcome(redis, "m1")["status"] == "sent"
    told = [(event["event"], event["payload"]) for event in events(redis)]
    assert [(name, one["job_id"], one.get("duplicate")) for name, one in told] == [
        ("message.sent", "job-m1", None),
        ("message.failed", "other", True),
    ]


def test_cancelling_a_job_whose_id_was_used_before_says_that_only_this_job_ended(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path)):
        eventually(lambda: settled(redis, "m1"))
    enqueue(redis, "m1", job_id="other", to="+5511999990002")
    parts = Parts(url, tmp_path)
    found = cancel({"m1"}, outbox=parts.outbox, ledger=parts.ledger, install_key=KEY)["m1"]
    parts.close()
    assert found is not None and found.status == "sent"
    told = [(event["event"], event["payload"]) for event in events(redis)]
    assert [(name, one["job_id"], one.get("duplicate")) for name, one in told] == [
        ("message.sent", "job-m1", None),
        ("message.cancelled", "other", True),
    ]


def test_a_failed_message_may_be_enqueued_again(redis: Redis, url: str, tmp_path: Path) -> None:
    device = FakeDevice(tmp_path)
    parts = Parts(url, tmp_path, device=device)
    refusals = ["no LID found for 5511999990001@s.whatsapp.net from server"]

    def refuse(step: str) -> None:
        if step == "before" and refusals:
            raise SendFailed(refusals.pop())

    device.at = refuse
    with Running(parts):
        enqueue(redis, "m1")
        eventually(lambda: settled(redis, "m1"))
        job = fetch(redis, "m1")
        assert job.get_status() == "failed"
        assert job.meta["outcome"]["status"] == "failed"
        assert job.meta["outcome"]["error"] == "the number is not on WhatsApp"
        assert job.latest_result().exc_string == "failed: the number is not on WhatsApp"
        enqueue(redis, "m1", job_id="second")
        eventually(lambda: redis.hget("rq:job:second", "status") == b"finished")
    assert [event["event"] for event in events(redis)] == ["message.failed", "message.sent"]


def rewrite(redis: Redis, id: str, **fields: Any) -> None:
    redis.hset(f"rq:job:job-{id}", mapping=fields)


class Bomb:
    """Runs a command wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def packed(payload: Any) -> bytes:
    return zlib.compress(json.dumps(payload).encode())


def test_poison_fails_alone_with_a_clear_error_and_nothing_runs(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    bomb = tmp_path / "exploded"
    pickled = pickle.dumps(Bomb(bomb))
    command = f"touch {bomb}"
    good = {
        "session": "s1",
        "to": "+5511999990001",
        "message_id": "x",
        "message": {"type": "text", "text": {"body": "x"}},
    }
    name = "jobs.outbound.send_message"
    poison: dict[str, tuple[dict[str, Any], str]] = {
        "pickle": ({"data": zlib.compress(pickled)}, "JSON"),
        "pickled-meta": ({"meta": pickled}, "meta"),
        "os-system": ({"data": packed(["os.system", None, [command], {}])}, "function"),
        "instance": ({"data": packed([name, {"a": 1}, [], good])}, "instance"),
        "positional": ({"data": packed([name, None, ["s1"], good])}, "args"),
        "not-json": ({"data": zlib.compress(b"{nope")}, "JSON"),
        "not-a-job": ({"data": packed({"a": 1})}, "data"),
        "deep": ({"data": zlib.compress(b"[" * 200_000)}, "JSON"),
        "bomb": ({"data": zlib.compress(b" " * 50_000_000)}, "1048576"),
        "bogus-status": ({"status": "bogus"}, "status"),
        "bad-date": ({"created_at": "yesterday"}, "created_at"),
        "bad-number": ({"result_ttl": "soon"}, "result_ttl"),
        "callback": ({"success_callback_name": "os.system"}, "success_callback_name"),
        "webhook": ({"webhooks": '[{"url":"http://x"}]'}, "webhooks"),
        "extra-field": ({"data": packed([name, None, [], {**good, "x": 1}])}, "x"),
        "wrong-session": ({"data": packed([name, None, [], {**good, "session": "s2"}])}, "session"),
        "huge": ({"description": "x" * 6_000_000}, "too large"),
    }
    for id, (fields, _) in poison.items():
        enqueue(redis, id)
        rewrite(redis, id, **fields)
    enqueue(redis, "gone")
    redis.delete("rq:job:job-gone")
    enqueue(redis, "string")
    redis.delete("rq:job:job-string")
    redis.set("rq:job:job-string", "not a hash")
    redis.rpush(f"rq:queue:{QUEUE}", b"\xff\x00 no id")
    enqueue(redis, "good")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "good"))
        assert running.parts.device.received() == ["text of good"]
    assert not bomb.exists()
    for id, (_, word) in poison.items():
        job = fetch(redis, id)
        assert job.get_status() == "failed", id
        assert job.meta["outcome"]["status"] == "failed"
        assert word in job.meta["outcome"]["error"], id
        assert word in job.latest_result().exc_string, id
        assert redis.zscore(f"rq:failed:{QUEUE}", f"job-{id}") is not None
    assert "not a hash" in outcome(redis, "string")["error"]
    assert not redis.exists("rq:job:job-gone")
    assert limbo(redis) == 0


def test_rq_info_shows_the_queue_and_harms_nothing(redis: Redis, url: str, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from rq.cli import main

    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path)):
        eventually(lambda: settled(redis, "m1"))
        result = CliRunner().invoke(main, ["info", "--url", url, "--raw"])
        assert result.exit_code == 0, result.output
        assert f"queue {QUEUE} 0" in result.output
        enqueue(redis, "m2")
        eventually(lambda: settled(redis, "m2"))
    assert outcome(redis, "m1")["status"] == "sent"


def test_a_settled_job_that_is_requeued_is_not_sent_again(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1"))
        first = outcome(redis, "m1")
        redis.hset("rq:job:job-m1", "status", "queued")
        redis.rpush(f"rq:queue:{QUEUE}", "job-m1")
        enqueue(redis, "last")
        eventually(lambda: settled(redis, "last"))
        assert running.parts.device.received() == ["text of m1", "text of last"]
    assert outcome(redis, "m1") == first
    assert fetch(redis, "m1").get_status() == "finished"


def test_a_job_cancelled_with_rq_while_it_waits_is_not_sent(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue(redis, "m1").cancel()
    enqueue(redis, "last")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "last"))
        assert running.parts.device.received() == ["text of last"]


def test_a_send_without_an_answer_is_given_up_and_ends_the_process(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = FakeDevice(tmp_path, takes_s=30)
    enqueue_many(redis, 2)
    with Running(Parts(url, tmp_path, device=device, send_timeout_s=0.3)) as running:
        assert running.join() is Ending.SEND_HUNG
    # The next process finds that it was handed over, and goes on with the next.
    with Running(Parts(url, tmp_path)) as running:
        assert outcome(redis, "m0")["status"] == "unknown"
        assert outcome(redis, "m0")["wa_message_id"]
        eventually(lambda: settled(redis, "m1"))
        assert running.parts.device.received() == ["text of m1"]
    assert [event["event"] for event in events(redis)] == ["message.unknown", "message.sent"]


def test_a_hang_before_the_hand_over_is_repaired_by_sending_again(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = FakeDevice(tmp_path)
    device.at = lambda step: time.sleep(30) if step == "before" else None
    enqueue_many(redis, 2)
    with Running(Parts(url, tmp_path, device=device, send_timeout_s=0.3)) as running:
        assert running.join() is Ending.SEND_HUNG
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m0", "m1"))
        assert running.parts.device.received() == ["text of m0", "text of m1"]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        ("websocket not connected", Ending.NOT_CONNECTED),
        ("the store doesn't contain a device JID", Ending.LOGGED_OUT),
    ],
)
def test_a_lost_connection_puts_the_message_back_and_ends_the_process(
    redis: Redis, url: str, tmp_path: Path, error: str, ending: Ending
) -> None:
    def fail(step: str) -> None:
        raise SendFailed(error)

    device = FakeDevice(tmp_path)
    device.at = fail
    enqueue_many(redis, 3)
    with Running(Parts(url, tmp_path, device=device)) as running:
        assert running.join() is ending
    assert limbo(redis) == 0
    assert redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"job-m0", b"job-m1", b"job-m2"]
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m2"))
        assert running.parts.device.received() == ["text of m0", "text of m1", "text of m2"]


def test_stopping_waits_for_the_send_in_hand_and_leaves_the_rest_queued(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device, is_asked = FakeDevice(tmp_path), threading.Event()
    device.at = lambda step: is_asked.wait(5) if step == "stored" else None
    enqueue_many(redis, 3)
    with Running(Parts(url, tmp_path, device=device)) as running:
        eventually(lambda: device.handed_over_file.exists())
        running.parts.consumer.stop()
        is_asked.set()
        assert running.join() is Ending.STOPPED
    assert outcome(redis, "m0")["status"] == "sent"
    assert redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"job-m1", b"job-m2"]
    assert fetch(redis, "m1").get_status() == "queued"
    assert limbo(redis) == 0


def test_stopping_gives_up_a_send_that_outlasts_the_drain(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = FakeDevice(tmp_path, takes_s=30)
    enqueue(redis, "m0")
    with Running(Parts(url, tmp_path, device=device)) as running:
        eventually(lambda: device.handed_over_file.exists())
        running.parts.consumer.stop(drain_s=0.2)
        assert running.join(2) is Ending.NOT_DRAINED


def test_an_idle_consumer_stops_at_once(redis: Redis, url: str, tmp_path: Path) -> None:
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: running.parts.consumer.queue_state()["state"] == "idle")
        asked_at = time.monotonic()
        running.parts.consumer.stop()
        assert running.join(5) is Ending.STOPPED
        assert time.monotonic() - asked_at < 1.0


def test_jobs_left_by_a_stock_worker_are_recovered_in_order(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    ids = enqueue_many(redis, 4)
    for score, id in ((1.0, "m0"), (2.0, "m1")):
        redis.lrem(f"rq:queue:{QUEUE}", 1, f"job-{id}")
        redis.hset(f"rq:job:job-{id}", "status", "started")
        redis.zadd(f"rq:wip:{QUEUE}", {f"job-{id}:execution": score})
    redis.zadd(f"rq:wip:{QUEUE}", {b"rubbish": 3.0})
    redis.lmove(f"rq:queue:{QUEUE}", f"rq:queue:{QUEUE}:intermediate", "LEFT", "RIGHT")
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, *ids))
        assert running.parts.device.received() == [f"text of {id}" for id in ids]
    assert limbo(redis) == 0


def test_a_pop_whose_answer_was_lost_is_put_back_before_later_jobs_run(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = FakeDevice(tmp_path, takes_s=0.05)
    enqueue_many(redis, 6)
    with Running(Parts(url, tmp_path, device=device)) as running:
        eventually(lambda: device.handed_over_file.exists())
        # As if a BLMOVE had been repeated behind our back.
        redis.lmove(f"rq:queue:{QUEUE}", f"rq:queue:{QUEUE}:intermediate", "LEFT", "RIGHT")
        eventually(lambda: settled(redis, "m5"))
        assert device.received() == [f"text of m{number}" for number in range(6)]
        assert running.ending is None
    assert limbo(redis) == 0


def test_a_stranger_in_the_results_or_registry_keys_does_not_block_the_queue(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue_many(redis, 2)
    redis.set("rq:results:job-m0", "not a stream")
    with Running(Parts(url, tmp_path)):
        eventually(lambda: settled(redis, "m0", "m1"))
    assert outcome(redis, "m0")["status"] == "sent"


def test_the_keeper_fails_the_jobs_of_a_deleted_session_in_batches(redis: Redis) -> None:
    ids = enqueue_many(redis, 25)
    redis.lmove(f"rq:queue:{QUEUE}", f"rq:queue:{QUEUE}:intermediate", "LEFT", "RIGHT")
    redis.hset("rq:job:job-m0", "status", "started")
    stream = EventStream(redis)

    def sweep() -> int:
        return outbox.fail_queue(
            redis, QUEUE, "session deleted", stream=stream, result_ttl_s=60, limit=10
        )

    assert [sweep(), sweep(), sweep(), sweep()] == [10, 10, 4, 0]
    assert outcome(redis, "m0")["status"] == "unknown", "a device process had it in hand"
    for id in ids[1:]:
        job = fetch(redis, id)
        assert job.get_status() == "failed"
        assert job.meta["outcome"]["status"] == "failed"
        assert job.meta["outcome"]["error"] == "session deleted"
    assert limbo(redis) == 0
    assert len(events(redis)) == 25


def test_the_keeper_does_not_call_failed_what_was_sent(redis: Redis) -> None:
    enqueue(redis, "m1")
    redis.lmove(f"rq:queue:{QUEUE}", f"rq:queue:{QUEUE}:intermediate", "LEFT", "RIGHT")
    told = {
        "status": "sent",
        "wa_message_id": "A",
        "wa_id": "1",
        "error": None,
        "claimed_at": 1.0,
        "sent_at": 2.0,
    }
    redis.hset(
        "rq:job:job-m1", mapping={"status": "started", "meta": json.dumps({"outcome": told})}
    )
    outbox.fail_queue(redis, QUEUE, "session deleted", stream=EventStream(redis), result_ttl_s=60)
    assert fetch(redis, "m1").get_status() == "finished"
    assert outcome(redis, "m1") == told


def test_a_send_that_breaks_is_looked_up_by_the_next_process(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    def explode(*call: Any) -> SendAck:
        raise RuntimeError("something nobody expected")

    device = FakeDevice(tmp_path)
    device.send = explode  # type: ignore[method-assign]
    enqueue(redis, "m0")
    with Running(Parts(url, tmp_path, device=device)) as running:
        assert running.join() is Ending.SEND_UNSURE
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m0"))
        assert running.parts.device.received() == ["text of m0"]


def test_a_message_that_always_ends_its_process_fails_in_the_end(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue_many(redis, 2)
    for _ in range(40):
        device = FakeDevice(tmp_path)
        send = device.send

        def only_m1(recipient: str, content: Any, secret: bytes, send: Any = send) -> SendAck:
            if content["text"]["body"] == "text of m0":
                raise RuntimeError("always")
            return send(recipient, content, secret)  # type: ignore[no-any-return]

        device.send = only_m1  # type: ignore[method-assign]
        with Running(Parts(url, tmp_path, device=device)) as running:
            eventually(lambda: running.ending or settled(redis, "m0", "m1"))
        if settled(redis, "m0", "m1"):
            break
    assert outcome(redis, "m0")["status"] == "failed"
    assert "handed over" in outcome(redis, "m0")["error"]
    assert outcome(redis, "m1")["status"] == "sent"


@pytest.mark.parametrize("note", ["ж" * 16_000, "\ud800 " * 8_000])
def test_killed_before_the_ledger_knew_a_sent_message_is_sent_however_long_its_meta(
    redis: Redis, url: str, tmp_path: Path, note: str
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare(parts: Parts) -> None:
        parts.ledger.settle = killed  # type: ignore[method-assign]

    raw = json.dumps({"note": note}, ensure_ascii=False).encode("utf-8", "backslashreplace")
    enqueue(redis, "m1")
    redis.hset("rq:job:job-m1", "meta", raw)
    pid = fork_consumer(url, tmp_path, prepare=prepare)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert limbo(redis) == 1
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1"))
        row = running.parts.ledger.find("m1")
        assert running.parts.device.received() == ["text of m1"]
    assert row is not None and row.status == outcome(redis, "m1")["status"] == "sent"
    assert fetch(redis, "m1").meta["note"] == note
    assert [event["event"] for event in events(redis)] == ["message.sent"]


def test_a_meta_that_its_crm_damaged_meanwhile_does_not_hide_what_became_of_the_message(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    def prepare(parts: Parts) -> None:
        def step(name: str) -> None:
            if name == "transmitted":
                redis_client.connect(url).hset("rq:job:job-m1", "meta", pickle.dumps({}))
                os.kill(os.getpid(), signal.SIGKILL)

        parts.device.at = step

    enqueue(redis, "m1")
    os.waitpid(fork_consumer(url, tmp_path, prepare=prepare), 0)
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: limbo(redis) == 0 and redis.hget("rq:job:job-m1", "status") == b"failed")
        assert running.parts.device.received() == ["text of m1"]
    assert outcome(redis, "m1")["status"] == "unknown"
    [event] = events(redis)
    assert (event["event"], event["payload"]["message_id"]) == ("message.unknown", "m1")
