"""What was refused for the moment waits for the breaker at the head of its queue."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis import Redis
from sending import (
    QUEUE,
    FakeDevice,
    Parts,
    Running,
    enqueue_many,
    fetch,
    outcome,
    settled,
)
from support import eventually

from whatsapp_worker import recovery
from whatsapp_worker.device import SendFailed


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
    limits: dict[str, Any] = {"msg_failure_threshold": 2, "msg_reset_s": 1.0, "send_retries": 3}
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
    redis: Redis, url: str, tmp_path: Path
) -> None:
    device = Overloaded(tmp_path, refusals=recovery.MAX_RELEASES + 1)
    enqueue_many(redis, 2)
    limits: dict[str, Any] = {"msg_failure_threshold": 1, "msg_reset_s": 0.3, "send_retries": 1}
    with Running(Parts(url, tmp_path, device=device, **limits)):
        eventually(lambda: settled(redis, "m0"), within_s=60)
        eventually(lambda: settled(redis, "m1"))
    assert outcome(redis, "m0")["status"] == "failed"
    assert outcome(redis, "m1")["status"] == "sent"
    assert device.tries == ["m0"] * (recovery.MAX_RELEASES + 1) + ["m1"]
