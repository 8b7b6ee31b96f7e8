"""Fixtures for all tests."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from support import RedisServer

# A shell that starts the tests in the background has SIGINT ignored, and so would every child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests that only need an empty one; they must not kill it."""
    # Not under tmp_path: a Unix socket's path must stay short.
    with tempfile.TemporaryDirectory(prefix="wa-redis-") as folder:
        server = RedisServer(Path(folder)).start()
        yield server
        server.kill()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis of the test's own, which it may kill, pause and start again."""
    with tempfile.TemporaryDirectory(prefix="wa-redis-") as folder:
        server = RedisServer(Path(folder)).start()
        yield server
        server.kill()


@pytest.fixture
def redis(shared_redis_server: RedisServer) -> Iterator[Redis]:
    """A client of an empty Redis."""
    client = shared_redis_server.client()
    client.flushall()
    yield client
    client.close()
