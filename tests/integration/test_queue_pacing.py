"""Pacing and pausing in the consumer; only WhatsApp is pretended."""

import json
import time
from pathlib import Path
from typing import Any

from redis import Redis
from sending import (
    QUEUE,
    FakeDevice,
    Parts,
    Running,
    enqueue,
    enqueue_many,
    fetch,
    limbo,
    settled,
)
from support import eventually

from storage.hold import Hold

FAST = {"pace_per_minute": 300.0, "pace_jitter": 0.0, "pace_new_contact_factor": 1.0}


class Clocked(FakeDevice):
    """Notes when it sends, and when it shows that it types."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sent_at: list[float] = []
        self.typed_at: list[float] = []

    def send(self, *call: Any) -> Any:
        self.sent_at.append(time.monotonic())
        return super().send(*call)

    def type(self, recipient: str) -> None:
        assert recipient == "5511999990001@s.whatsapp.net"
        self.typed_at.append(time.monotonic())

    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.sent_at, self.sent_at[1:], strict=False)]


def state_of(parts: Parts, word: str) -> dict[str, Any] | None:
    state = parts.consumer.queue_state()
    return state if state["state"] == word else None


def test_a_pace_keeps_messages_apart_and_in_order(redis: Redis, url: str, tmp_path: Path) -> None:
    ids = enqueue_many(redis, 4)
    device = Clocked(tmp_path)
    parts = Parts(url, tmp_path, device=device, **FAST)
    with Running(parts):
        state = eventually(lambda: state_of(parts, "pacing"))
        assert state["until"] > time.time() - 1
        eventually(lambda: settled(redis, *ids))
    assert min(device.gaps()) >= 0.19
    assert max(device.gaps()) < 1
    assert device.received() == [f"text of {id}" for id in ids]


def test_what_is_done_meanwhile_is_no_part_of_a_gap(redis: Redis, url: str, tmp_path: Path) -> None:
    ids = enqueue_many(redis, 4)
    device = Clocked(tmp_path)
    with Running(Parts(url, tmp_path, device=device, **{**FAST, "pace_per_minute": 60.0})):
        eventually(lambda: settled(redis, *ids))
    assert 0.99 <= min(device.gaps()) < 1.3


def test_without_a_pace_nothing_is_written_and_nothing_waits(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    ids = enqueue_many(redis, 5)
    with Running(Parts(url, tmp_path, options={"pace_file": tmp_path / "pacing.json"})):
        eventually(lambda: settled(redis, *ids), within_s=5)
    assert not (tmp_path / "pacing.json").exists()


def test_a_contact_never_written_to_waits_longer(redis: Redis, url: str, tmp_path: Path) -> None:
    enqueue(redis, "a")
    enqueue(redis, "b")
    enqueue(redis, "c", to="+5511999990002")
    device = Clocked(tmp_path)
    options = {**FAST, "pace_per_minute": 120.0, "pace_new_contact_factor": 4.0}
    with Running(Parts(url, tmp_path, device=device, **options)):
        eventually(lambda: settled(redis, "a", "b", "c"))
    known_s, new_s = device.gaps()
    assert 0.49 <= known_s < 1.7
    assert new_s >= 1.99


def test_the_cap_of_a_day_outlives_the_process(redis: Redis, url: str, tmp_path: Path) -> None:
    ids = enqueue_many(redis, 3)
    options = {"options": {"pace_file": tmp_path / "pacing.json"}, **FAST, "pace_per_day": 2}
    with Running(Parts(url, tmp_path, **options)):
        eventually(lambda: settled(redis, *ids[:2]))
    assert json.loads((tmp_path / "pacing.json").read_text())["sent"] == 2
    parts = Parts(url, tmp_path, **options)
    with Running(parts):
        state = eventually(lambda: state_of(parts, "pacing"))
        assert state["until"] % 86_400 == 0
        assert state["depth"] == 1
    assert limbo(redis) == 0
    assert parts.device.received() == ["text of m0", "text of m1"]


def test_stopping_works_while_the_pace_makes_it_wait(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue_many(redis, 2)
    parts = Parts(url, tmp_path, **{**FAST, "pace_per_minute": 1.0})
    with Running(parts) as running:
        eventually(lambda: state_of(parts, "pacing"))
        parts.consumer.stop()
        assert running.join(2) == "stopped"
    assert redis.llen(f"rq:queue:{QUEUE}") == 1


def test_a_typing_indicator_is_shown_before_each_text(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    enqueue_many(redis, 2)
    device = Clocked(tmp_path)
    options = {"show_typing": device.type}
    parts = Parts(url, tmp_path, device=device, options=options, **FAST, pace_typing_s=0.3)
    with Running(parts):
        eventually(lambda: settled(redis, "m0", "m1"))
    waits = [sent - typed for typed, sent in zip(device.typed_at, device.sent_at, strict=True)]
    assert min(waits) >= 0.3


def test_a_typing_indicator_that_fails_costs_no_message(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    def refuse(recipient: str) -> None:
        raise RuntimeError("no presence")

    enqueue(redis, "m0")
    options = {"show_typing": refuse}
    with Running(Parts(url, tmp_path, options=options, **FAST, pace_typing_s=0.1)):
        eventually(lambda: settled(redis, "m0"))
    assert fetch(redis, "m0").get_status() == "finished"


def test_a_pause_is_obeyed_within_a_second_and_survives_a_restart(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    hold = Hold(tmp_path)
    told: list[str] = []
    parts = Parts(url, tmp_path, options={"standing": hold.read})
    parts.consumer._on_rest = lambda: told.append(parts.consumer.queue_state()["state"])
    with Running(parts):
        enqueue(redis, "m0")
        eventually(lambda: settled(redis, "m0"))
        hold.pause(time.time())
        eventually(lambda: state_of(parts, "paused"), within_s=1.0)
        enqueue_many(redis, 2)
    parts = Parts(url, tmp_path, options={"standing": hold.read})
    with Running(parts):
        eventually(lambda: state_of(parts, "paused"))
        assert redis.llen(f"rq:queue:{QUEUE}") + limbo(redis) == 2
        assert hold.release()
        eventually(lambda: settled(redis, "m0", "m1"))
    assert told == ["paused"]
    assert parts.device.received() == ["text of m0", "text of m1"]
