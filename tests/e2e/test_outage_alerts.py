"""What concerns the whole host is one alert: a database that is away, a stream that fills."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import postgres
import pytest
from ingest import TEXT, Ingest
from world import World, eventually

CONTACT = "5511999990001"


@pytest.fixture
def database() -> Iterator[postgres.Server]:
    with postgres.own_server() as server:
        if server is None:
            postgres.missing()
        assert server is not None
        yield server


@pytest.fixture
def host(tmp_path: Path, database: postgres.Server) -> Iterator[tuple[World, Ingest]]:
    with (
        contextlib.closing(Ingest().start()) as ingest,
        World.running(
            tmp_path,
            SENTRY_DSN=ingest.dsn,
            DATABASE_URL=database.url,
            DB_FAILURE_THRESHOLD="2",
            DB_RESET_S="1",
            EVENTS_MAX="1000",
        ) as world,
    ):
        yield world, ingest


def told(ingest: Ingest, event: str) -> list[dict[str, Any]]:
    return [found for found in ingest.events if found["tags"]["event"] == event]


def test_an_outage_of_the_database_is_one_alert_and_one_end_and_costs_no_message(
    host: tuple[World, Ingest], database: postgres.Server
) -> None:
    world, ingest = host
    names = ("one", "two")
    for name in names:
        world.link(name)
    world.await_outcomes([world.enqueue(name, CONTACT, TEXT, f"{name}-0") for name in names])
    database.stop()
    jobs = [world.enqueue(name, CONTACT, TEXT, f"{name}-{n}") for n in (1, 2) for name in names]
    eventually(
        lambda: all(world.redis.hexists(f"wa:breakers:{name}", "database") for name in names),
        what="both breakers are open",
    )
    [opened] = eventually(lambda: told(ingest, "breaker.opened"), what="an alert")
    assert (opened["level"], opened["tags"]["breaker"]) == ("error", "database")
    # Between two probes the breaker is half open, and the record is seconds old.
    eventually(lambda: world.session("one")["queue"]["state"] == "database")
    # A process that begins during the outage goes on with the open breaker that it finds.
    world.replace_process("two")
    assert len(world.arrived(to=CONTACT)) == 2
    assert told(ingest, "breaker.closed") == []
    database.start()
    assert {o["status"] for o in world.await_outcomes(jobs)} == {"sent"}
    [closed] = eventually(lambda: told(ingest, "breaker.closed"), what="its end")
    assert closed["level"] == "info"
    assert len(world.arrived(to=CONTACT)) == 6
    assert len(told(ingest, "breaker.opened")) == 1


def test_a_stream_that_nears_its_ceiling_alerts_and_names_who_lags(
    host: tuple[World, Ingest],
) -> None:
    world, ingest = host
    world.redis.xgroup_create("wa:events", "crm", id="0", mkstream=True)
    pipeline = world.redis.pipeline()
    for _ in range(950):
        pipeline.xadd("wa:events", {"id": "x", "event": "x", "session": "", "payload": "{}"})
    pipeline.execute()
    [alert] = eventually(lambda: told(ingest, "stream.filling"), what="an alert", within_s=25)
    assert alert["level"] == "error"
    assert alert["contexts"]["alert"]["slowest_group"] == "crm"
    assert 0.9 <= alert["contexts"]["alert"]["full"] < 1
