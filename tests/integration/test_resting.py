"""What was refused for the moment waits for the breaker at the head of its queue."""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sending import (
    QUEUE,
    FakeDevice,
    Parts,
    Running,
    enqueue,
    enqueue_many,
    fetch,
    outcome,
    settled,
)
from support import eventually

from whatsapp_worker import recovery
from whatsapp_worker.device import SendFailed
from whatsapp_worker.rq_job import PAUSED


class Overloaded(FakeDevice):
    """Refuses the first messages, whichever they are, as an overloaded server does."""

    def __init__(self, folder: Path, refusals: int) -> None:
        super().__init__(folder)
        self.refusals = refusals
        self.tries: list[str] = []

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
        self.tries.append(content["text"]["body"].removeprefix("text of "))
        if len(self.tries) <= self.refusals:
            raise SendFailed("server returned error 503")
        return super().send(recipient, content, secret)


def test_while_the_breaker_is_open_nothing_is_tried_again_or_failed(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Overloaded(tmp_path, refusals=3)
    enqueue_many(redis, 3)
    limits: dict[str, Any] = {"msg_failure_threshold": 2, "msg_reset_s": 3.0, "send_retries": 3}
    parts = Parts(url, tmp_path, device=device, **limits)
    with Running(parts):
        eventually(lambda: parts.consumer.queue_state()["state"] == "breaker")
        eventually(lambda: redis.lrange(f"rq:queue:{QUEUE}", 0, 0) == [b"job-m0"])
        assert device.tries == ["m0", "m0"]
        assert fetch(redis, "m0").get_status() == "queued"
        eventually(lambda: settled(redis, "m0", "m1", "m2"))
    assert device.tries == ["m0", "m0", "m0", "m0", "m1", "m2"]
    assert {outcome(redis, id)["status"] for id in ("m0", "m1", "m2")} == {"sent"}


def test_a_message_that_is_always_refused_does_not_hold_up_its_queue_for_ever(
    redis: Redis, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "MAX_RELEASES", 3)
    device = Overloaded(tmp_path, refusals=recovery.MAX_RELEASES + 1)
    enqueue_many(redis, 2)
    limits: dict[str, Any] = {"msg_failure_threshold": 1, "msg_reset_s": 1.5, "send_retries": 1}
    with Running(Parts(url, tmp_path, device=device, **limits)):
        eventually(lambda: settled(redis, "m0"), within_s=60)
        eventually(lambda: settled(redis, "m1"))
    assert outcome(redis, "m0")["status"] == "failed"
    assert outcome(redis, "m1")["status"] == "sent"
    assert device.tries == ["m0"] * (recovery.MAX_RELEASES + 1) + ["m1"]


def test_a_file_that_cannot_be_uploaded_is_tried_again_in_its_time_and_fails_alone(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    tries: dict[str, list[float]] = {}

    def prepare(content: Mapping[str, Any]) -> Mapping[str, Any]:
        id = content["document"]["link"].rpartition("/")[2]
        tries.setdefault(id, []).append(time.monotonic())
        if id == "passing" and len(tries[id]) == 3:
            return {"type": "text", "text": {"body": "at last"}}
        raise SendFailed("failed to upload: unexpected status code 503")

    parts = Parts(url, tmp_path, options={"prepare": prepare}, send_retries=3)
    with Running(parts):
        for id, more in (("late", {"ttl_s": 0.6}), ("passing", {}), ("lasting", {})):
            link = f"https://example.org/{id}"
            enqueue(redis, id, message={"type": "document", "document": {"link": link}}, **more)
        enqueue(redis, "next")
        eventually(lambda: settled(redis, "late", "passing", "lasting", "next"))
    found = {id: outcome(redis, id) for id in ("late", "passing", "lasting", "next")}
    assert [told["status"] for told in found.values()] == ["expired", "sent", "failed", "sent"]
    assert "503" in found["lasting"]["error"]
    assert len(tries["late"]) <= 2 and len(tries["passing"]) == 3 and len(tries["lasting"]) == 4
    gaps = [later - one for one, later in itertools.pairwise(tries["lasting"])]
    assert all(gap >= wait for gap, wait in zip(gaps, (0.25, 0.5, 1.0), strict=True))
    assert parts.breakers.message.as_dict() == {}


def test_a_wish_for_a_pause_before_a_file_is_uploaded_fails_no_message(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    asked = []

    def prepare(content: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append(content)
        raise SendFailed("failed to refresh media connections: info query returned status 429: x")

    document = {"type": "document", "document": {"link": "https://example.org/x.pdf"}}
    enqueue(redis, "m0", message=document)
    enqueue(redis, "m1")
    parts = Parts(url, tmp_path, options={"prepare": prepare})
    with Running(parts):
        eventually(lambda: parts.consumer.queue_state()["reason"] == PAUSED)
        eventually(lambda: redis.lrange(f"rq:queue:{QUEUE}", 0, -1) == [b"job-m0", b"job-m1"])
    assert len(asked) == 1
    assert [fetch(redis, id).get_status() for id in ("m0", "m1")] == ["queued", "queued"]
