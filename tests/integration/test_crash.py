"""kill -9 at any point: each message ends in exactly one outcome, and it is the truth. With the
ledger on SQLite and on PostgreSQL."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sending import (
    QUEUE,
    Parts,
    check_outcomes,
    enqueue_many,
    fork_consumer,
    kill,
    outcome,
    terminate,
)
from support import RedisServer, eventually


def is_drained(redis: Redis, ids: list[str]) -> bool:
    return redis.llen(f"rq:queue:{QUEUE}") == 0 and all(outcome(redis, id) for id in ids[-3:])


def drain(
    redis: Redis, url: str, folder: Path, ids: list[str], *, location: str | Path | None = None
) -> None:
    """Let a last process do what is left, and leave in order."""
    pid = fork_consumer(url, folder, location=location)
    try:
        eventually(lambda: is_drained(redis, ids), within_s=60)
    finally:
        assert terminate(pid) == 0


def test_killed_at_random_points_nothing_is_lost_or_sent_twice(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path, location: str | Path
) -> None:
    url = shared_redis_server.url
    ids = enqueue_many(redis, 200)
    chance = random.Random(4711)
    kills = 0
    while redis.llen(f"rq:queue:{QUEUE}") > 20 and kills < 60:
        before = redis.llen(f"rq:queue:{QUEUE}")
        pid = fork_consumer(url, tmp_path, location=location)
        # Often right after the start, in recovery; else in the middle of sending.
        if chance.random() < 0.7:
            goal = max(0, before - chance.randint(1, 12))
            eventually(lambda: redis.llen(f"rq:queue:{QUEUE}") <= goal)  # noqa: B023
        time.sleep(chance.uniform(0, 0.01))
        kill(pid)
        kills += 1
    drain(redis, url, tmp_path, ids, location=location)
    counts = check_outcomes(redis, tmp_path, ids, location=location)
    assert kills >= 10
    assert counts["sent"] >= 200 - kills
    assert counts.get("failed", 0) == 0


class _Trap:
    """Kills this process before or after the nth call of a method."""

    def __init__(self, owner: Any, name: str, *, nth: int, is_before: bool) -> None:
        original = getattr(owner, name)
        calls = 0

        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if is_before and calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, trapped)


def _step(parts: Parts, step: str, nth: int) -> None:
    calls = 0

    def at(reached: str) -> None:
        nonlocal calls
        calls += reached == step
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.device.at = at


POINTS: list[tuple[str, Callable[[Parts], None]]] = [
    *(
        (
            f"{side} {name} {nth}",
            lambda parts, n=name, k=nth, b=side == "before": _Trap(  # type: ignore[misc]
                getattr(parts, n.split(".")[0]), n.split(".")[1], nth=k, is_before=b
            ),
        )
        for name in (
            *("outbox.exchange", "outbox.note", "outbox.resync", "outbox.limbo"),
            *("ledger.claim", "ledger.settle", "ledger.sending", "consumer._put_down"),
        )
        for side in ("before", "after")
        for nth in (1, 2, 5)
    ),
    *(
        (f"device {step} {nth}", lambda parts, s=step, k=nth: _step(parts, s, k))  # type: ignore[misc]
        for step in ("before", "stored", "transmitted")
        for nth in (1, 3)
    ),
]


def test_killed_between_any_two_steps_nothing_is_lost_or_sent_twice(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path, location: str | Path
) -> None:
    url = shared_redis_server.url
    ids = enqueue_many(redis, 200)
    died = 0
    for _, prepare in POINTS:
        if redis.llen(f"rq:queue:{QUEUE}") <= 10:
            break
        goal = redis.llen(f"rq:queue:{QUEUE}") - 7
        pid = fork_consumer(url, tmp_path, location=location, prepare=prepare)

        def is_over(pid: int = pid, goal: int = goal) -> bool:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            is_dead = os.waitid(os.P_PID, pid, options) is not None
            return is_dead or redis.llen(f"rq:queue:{QUEUE}") <= goal

        eventually(is_over)
        os.kill(pid, signal.SIGTERM)  # for traps that only leaving springs
        _, status = os.waitpid(pid, 0)
        died += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    drain(redis, url, tmp_path, ids, location=location)
    check_outcomes(redis, tmp_path, ids, location=location)
    assert died >= len(POINTS) // 2


def test_sigterm_at_random_points_leaves_nothing_in_limbo(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path, location: str | Path
) -> None:
    url = shared_redis_server.url
    ids = enqueue_many(redis, 100)
    chance = random.Random(7)
    for _ in range(15):
        goal = max(0, redis.llen(f"rq:queue:{QUEUE}") - chance.randint(0, 6))
        pid = fork_consumer(url, tmp_path, location=location)
        eventually(lambda: redis.llen(f"rq:queue:{QUEUE}") <= goal)  # noqa: B023
        time.sleep(chance.uniform(0, 0.005))
        assert terminate(pid) == 0
        assert redis.llen(f"rq:queue:{QUEUE}:intermediate") == 0
    drain(redis, url, tmp_path, ids, location=location)
    assert check_outcomes(redis, tmp_path, ids, location=location) == {"sent": 100}


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "silent"])
def test_redis_lost_and_back_in_the_middle_costs_nothing(
    redis_server: RedisServer, tmp_path: Path, is_killed: bool
) -> None:
    redis = redis_server.client()
    ids = enqueue_many(redis, 200)
    pid = fork_consumer(redis_server.url, tmp_path)
    try:
        for left in (150, 100, 50):
            eventually(lambda: redis.llen(f"rq:queue:{QUEUE}") <= left)  # noqa: B023
            if is_killed:
                redis_server.kill()
                time.sleep(0.3)
                redis_server.start()
            else:
                redis_server.pause()
                time.sleep(0.3)
                redis_server.resume()
            redis = redis_server.client()
        eventually(lambda: is_drained(redis, ids), within_s=30)
    finally:
        assert terminate(pid) == 0
    assert check_outcomes(redis, tmp_path, ids) == {"sent": 200}
