"""Databases for the ledger's tests, and the address of an empty Redis."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
from redis import Redis
from support import RedisServer


@pytest.fixture
def url(shared_redis_server: RedisServer, redis: Redis) -> str:
    """Of the Redis that `redis` has emptied."""
    return shared_redis_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server | None]:
    """A server of our own; None where it cannot be had and another one must do."""
    with postgres.own_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    if given := os.environ.get("TEST_DATABASE_URL"):
        return given
    server = request.getfixturevalue("postgres_server")
    if server is not None:
        return str(server.url)
    if postgres.reachable(postgres.LOCAL):
        return postgres.LOCAL
    return postgres.missing()


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | Path]:
    """Where a fresh ledger lies: every test that uses it runs on both databases."""
    if request.param == "sqlite":
        yield tmp_path / "ledger.db"
        return
    url = request.getfixturevalue("postgres_url")
    with postgres.fresh_schema(url, f"test_{uuid.uuid4().hex}") as fresh:
        yield fresh
