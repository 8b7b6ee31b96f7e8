"""What the supervisor says comes onto the stream, whatever Redis does meanwhile."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from redis.exceptions import TimeoutError as RedisTimeout
from support import RedisServer, events, eventually

from whatsapp_worker import announcer as announcer_module
from whatsapp_worker import redis_client
from whatsapp_worker.announcer import Announcer
from whatsapp_worker.event_names import Event
from whatsapp_worker.stream import EventStream

CONNECTED = {"state": "connected"}


@contextmanager
def announcing(stream: EventStream, **options: Any) -> Iterator[Announcer]:
    announcer = Announcer(stream, **options)
    announcer.start()
    yield announcer
    assert announcer.stop(timeout_s=30)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer_module, "RETRY_S", 0.05)


def test_an_event_whose_answer_was_lost_is_told_again_under_the_same_id(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = EventStream(redis_client.connect(redis_server.url))
    original, calls = stream.add_many, 0

    def lossy(entries: Sequence[Mapping[str, str | int]]) -> None:
        nonlocal calls
        calls += 1
        original(entries)
        if calls == 1:
            raise RedisTimeout("the answer was lost")

    monkeypatch.setattr(stream, "add_many", lossy)
    with announcing(stream) as announcer:
        announcer.announce(Event.STATE_CHANGED, "s1", CONNECTED)
        announcer.announce(Event.STATE_CHANGED, "s1", CONNECTED)
    first, repeated, other = events(redis_server.client())
    assert first == repeated
    assert other["id"] != first["id"], "another happening, though it says the same"


def test_an_event_that_waited_for_redis_tells_when_it_happened(redis_server: RedisServer) -> None:
    stream = EventStream(redis_client.connect(redis_server.url))
    redis_server.kill()
    began = time.time()
    with announcing(stream) as announcer:
        announcer.announce(Event.STATE_CHANGED, "s1", CONNECTED)
        happened_by = time.time()
        time.sleep(0.2)  # so that the time of telling is another
        redis_server.start()
        [told] = eventually(lambda: events(redis_server.client()))
    assert int(began * 1000) <= int(told["timestamp_ms"]) <= int(happened_by * 1000)
    assert (told["event"], told["session"], told["payload"]) == (
        "session.state_changed",
        "s1",
        CONNECTED,
    )


def test_of_what_waits_the_oldest_is_dropped_and_what_was_said_stays_as_it_was(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    stream = EventStream(redis_client.connect(redis_server.url))
    announcer = Announcer(stream, limit=2)
    payload: dict[str, Any] = {}
    for number in range(3):
        payload["number"] = number
        announcer.announce(Event.STATE_CHANGED, f"s{number}", payload)
    [dropped] = [record for record in caplog.records if record.message == "event.dropped"]
    assert vars(dropped)["session"] == "s0"
    assert vars(dropped)["event_name"] == "session.state_changed"
    announcer.start()
    told = eventually(lambda: len(found := events(redis_server.client())) == 2 and found)
    assert [entry["payload"]["number"] for entry in told] == [1, 2]
    assert announcer.stop(timeout_s=30)
