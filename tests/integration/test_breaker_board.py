"""What every process can see of a session's breakers."""

import time

from redis import Redis

from whatsapp_worker import redis_client
from whatsapp_worker.breaker_board import TTL_S, BreakerBoard, read


def test_what_is_posted_can_be_read_until_it_is_closed(redis: Redis) -> None:
    board = BreakerBoard(redis, "s1")
    board.post({"message": {"failures": 5, "until": time.time() + 60, "reason": "why"}})
    found = read(redis, ["s1", "s2"])
    assert list(found) == ["s1"]
    assert found["s1"]["message"]["failures"] == 5
    assert TTL_S < redis.ttl("wa:breakers:s1") <= TTL_S + 60
    board.post({})
    assert read(redis, ["s1"]) == {}


def test_garbage_is_left_out(redis: Redis) -> None:
    redis.hset("wa:breakers:s1", mapping={"message": "{", "database": "[]", "pause": "{}"})
    assert read(redis, ["s1"]) == {"s1": {"pause": {}}}


def test_a_redis_that_is_down_is_no_error_and_is_told_later(redis: Redis) -> None:
    board = BreakerBoard(redis_client.connect("redis://127.0.0.1:1/0"), "s1")
    board.post({"message": {"failures": 1, "until": None}})
    board._redis = redis
    board.post({"message": {"failures": 1, "until": None}})
    assert read(redis, ["s1"]) == {"s1": {"message": {"failures": 1, "until": None}}}
