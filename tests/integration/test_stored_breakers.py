"""Breakers outlive their process, whatever ends it, and a Redis that is away changes nothing but
when it is told."""

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sending import (
    SESSION,
    FakeDevice,
    Parts,
    Running,
    enqueue,
    fork_consumer,
    kill,
    settled,
    terminate,
)
from support import RedisServer, events, eventually, locked

from whatsapp_worker import redis_client
from whatsapp_worker.breakers import Phase
from whatsapp_worker.device import SendFailed
from whatsapp_worker.settings import Settings
from whatsapp_worker.stored_breakers import Breakers
from whatsapp_worker.stream import EventStream

FILES = {"message": "breaker.json", "database": "breaker-database.json"}


def stored(folder: Path, breaker: str) -> dict[str, Any]:
    """What decides; empty before the first failure."""
    path = folder / FILES[breaker]
    return dict(json.loads(path.read_text())) if path.exists() else {}


class Refusing(FakeDevice):
    """WhatsApp refuses some texts for the moment."""

    def __init__(self, folder: Path, *refused: str) -> None:
        super().__init__(folder)
        self.refused = [f"text of {id}" for id in refused]

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
        if content["text"]["body"] in self.refused:
            raise SendFailed("server returned error 503")
        return super().send(recipient, content, secret)


def opened_and_closed(redis: Redis) -> list[dict[str, Any]]:
    return [event for event in events(redis) if event["event"].startswith("breaker.")]


def test_a_sent_message_ends_the_count_of_a_process_that_was_killed(
    redis: Redis, url: str, tmp_path: Path
) -> None:
    def start() -> int:
        device = Refusing(tmp_path, "m0", "m1", "m3", "m4", "m5")
        breakers = {"folder": tmp_path}
        limits = {"msg_failure_threshold": 3, "send_retries": 0}
        return fork_consumer(url, tmp_path, device=device, breakers=breakers, **limits)

    for ids, count in ((("m0", "m1"), 2), (("m2",), 0), (("m3", "m4"), 2)):
        pid = start()
        for id in ids:
            enqueue(redis, id)
        eventually(lambda: settled(redis, *ids))  # noqa: B023
        eventually(lambda: stored(tmp_path, "message").get("failures") == count)  # noqa: B023
        kill(pid)
    assert opened_and_closed(redis) == []
    pid = start()
    enqueue(redis, "m5")
    eventually(lambda: stored(tmp_path, "message")["opened_at"])
    eventually(lambda: len(opened_and_closed(redis)) == 1)
    assert terminate(pid) == 0


def test_a_database_breaker_that_opens_while_redis_is_away_is_told_once_it_is_back(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    client = redis_server.client()
    told: list[str] = []
    breakers = {"folder": tmp_path, "on_change": lambda event, facts: told.append(event)}
    limits: dict[str, Any] = {"db_failure_threshold": 2, "db_reset_s": 1.0}
    parts = Parts(redis_server.url, tmp_path, ledger_timeout_s=0.3, breakers=breakers, **limits)
    with Running(parts):
        with locked(tmp_path / "ledger.db"):
            enqueue(client, "m0")
            eventually(lambda: stored(tmp_path, "database").get("failures") == 1)
            redis_server.kill()
            eventually(lambda: told)
            opened_at = stored(tmp_path, "database")["opened_at"]
            eventually(lambda: stored(tmp_path, "database")["failures"] >= 3)
            back_at = time.time()
            redis_server.start()
            [opened] = eventually(lambda: opened_and_closed(client))
            assert told[0] == opened["event"] == "breaker.opened"
            assert opened_at - 0.001 <= int(opened["timestamp_ms"]) / 1000 < back_at
        eventually(lambda: settled(client, "m0"))
    again, closed = opened_and_closed(client)
    assert (again, closed["event"]) == (opened, "breaker.closed")
    assert told.count("breaker.closed") == 1
    assert "untold" not in stored(tmp_path, "database")
    client.close()


def test_a_message_breaker_that_opens_while_redis_is_away_is_told_by_the_next_process(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    client = redis_server.client()

    class Last(Refusing):
        def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
            if content["text"]["body"] == "text of m1":
                redis_server.kill()
            return super().send(recipient, content, secret)

    known: dict[str, Any] = {"breakers": {"folder": tmp_path}}
    known |= {"msg_failure_threshold": 2, "send_retries": 0, "msg_reset_s": 60.0}
    with Running(Parts(redis_server.url, tmp_path, device=Last(tmp_path, "m0", "m1"), **known)):
        enqueue(client, "m0")
        eventually(lambda: stored(tmp_path, "message").get("failures") == 1)
        enqueue(client, "m1")
        eventually(lambda: stored(tmp_path, "message")["failures"] == 2)
    before = stored(tmp_path, "message")
    assert len(before.pop("untold")) == 1
    back_at = time.time()
    redis_server.start()
    assert opened_and_closed(client) == []
    parts = Parts(redis_server.url, tmp_path, **known)
    with Running(parts):
        [opened] = eventually(lambda: opened_and_closed(client))
        assert parts.consumer.queue_state()["until"] == before["opened_at"] + 60
        eventually(lambda: stored(tmp_path, "message") == before)
    assert before["opened_at"] - 0.001 <= int(opened["timestamp_ms"]) / 1000 < back_at
    assert [failure["at"] for failure in opened["payload"]["failures"]][-1] == before["opened_at"]
    assert opened_and_closed(client) == [opened]
    client.close()


def make(folder: Path, **limits: Any) -> Breakers:
    nobody = EventStream(redis_client.connect("redis://127.0.0.1:1/0"))
    settings = Settings(db_failure_threshold=1, msg_failure_threshold=1, **limits)
    return Breakers(folder, session=SESSION, settings=settings, stream=nobody)


@pytest.mark.parametrize("breaker", ["message", "database"])
@pytest.mark.parametrize(
    "found",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'{"version": 99}',
        b'{"version": 1, "failures": "many", "opened_at": {}, "last": 5, "untold": 5}',
        b'{"version": 1, "failures": 5, "opened_at": 1e999}',
        b'{"version": 1, "failures": 5, "opened_at": NaN, "untold": [5, {}, {"id": {}}]}',
    ],
)
def test_a_damaged_file_counts_as_closed(tmp_path: Path, breaker: str, found: bytes) -> None:
    (tmp_path / FILES[breaker]).write_bytes(found)
    breakers = make(tmp_path)
    it = getattr(breakers, breaker)
    assert it.phase() is Phase.CLOSED
    assert (it.until, it.rest_s(), it.as_dict()) == (None, 0.0, {})
    breakers.show()
    it.failed("timeout")
    assert it.phase() is Phase.OPEN
    if b"99" not in found:  # a newer version's is left alone
        assert getattr(make(tmp_path), breaker).until == it.until


def test_a_file_that_cannot_be_read_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILES["database"]).write_bytes(b"{")
    make(tmp_path)
    assert "breaker.unreadable" in caplog.messages


def test_what_waits_for_redis_is_bounded_and_in_order(redis: Redis, tmp_path: Path) -> None:
    breakers = make(tmp_path)
    for _ in range(50):
        breakers.database.failed("timeout")
        breakers.database.succeeded()
    breakers.database.failed("timeout")
    kept = stored(tmp_path, "database")["untold"]
    assert 10 <= len(kept) <= 20
    again = Breakers(tmp_path, session=SESSION, settings=Settings(), stream=EventStream(redis))
    again.show()
    again.show()
    told = opened_and_closed(redis)
    assert [event["id"] for event in told] == [event["id"] for event in kept]
    names = [event["event"] for event in told]
    assert names[-1] == "breaker.opened"
    assert all(a != b for a, b in itertools.pairwise(names))
    assert len({event["id"] for event in told}) == len(told)


@pytest.mark.parametrize("entry", [{"id": True}, {"id": "\ud800"}, {"\ud800": "id"}])
def test_an_event_that_redis_cannot_take_holds_up_no_other(
    redis: Redis, tmp_path: Path, entry: dict[str, Any]
) -> None:
    damaged = {"version": 1, "untold": [entry]}
    (tmp_path / FILES["message"]).write_text(json.dumps(damaged))
    stream = EventStream(redis)
    breakers = Breakers(
        tmp_path, session=SESSION, settings=Settings(db_failure_threshold=1), stream=stream
    )
    breakers.database.failed("timeout")
    assert [event["event"] for event in opened_and_closed(redis)] == ["breaker.opened"]
