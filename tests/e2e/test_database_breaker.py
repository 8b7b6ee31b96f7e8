"""The database breaker on the real path: it goes on where a killed device process left it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import events, locked
from world import World, eventually

CONTACT = "5511999990001"
RESET_S = 20.0  # longer than a call to a locked ledger lasts, and a new process takes


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World.running(tmp_path, DB_FAILURE_THRESHOLD="3", DB_RESET_S=str(RESET_S)) as it:
        yield it


def stored(world: World) -> dict[str, Any]:
    """What decides."""
    path = world.data / "sessions" / "sales" / "breaker-database.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def shown(world: World) -> dict[str, Any]:
    """What every process can see."""
    return dict(json.loads(world.redis.hget("wa:breakers:sales", "database") or "{}"))


def test_its_count_and_its_opening_outlive_killed_processes_and_are_told_once(
    world: World,
) -> None:
    world.link("sales")
    world.await_outcomes([world.enqueue("sales", CONTACT, "before", "m0")])
    with locked(world.data / "sessions" / "sales" / "ledger.db"):
        jobs = [world.enqueue("sales", CONTACT, f"text {n}", f"m{n}") for n in (1, 2)]
        eventually(lambda: stored(world).get("failures") == 2, within_s=30)
        world.replace_process("sales")
        assert stored(world)["opened_at"] is None, "one failure is missing"
        eventually(lambda: stored(world)["opened_at"], within_s=30, what="the first one opens it")
        assert stored(world)["failures"] == 3
        until = stored(world)["opened_at"] + RESET_S
        eventually(lambda: shown(world).get("until") == until)
        world.replace_process("sales")
    assert time.time() < until, "too slow to see anything"
    assert (stored(world)["opened_at"] + RESET_S, shown(world)["until"]) == (until, until)
    assert world.session("sales")["queue"]["state"] == "database"
    outcomes = world.await_outcomes(jobs)
    assert {outcome["status"] for outcome in outcomes} == {"sent"}
    assert min(outcome["claimed_at"] for outcome in outcomes) >= until
    assert stored(world)["failures"] == 0
    told = [event["event"] for event in events(world.redis) if event["event"].startswith("break")]
    assert told == ["breaker.opened", "breaker.closed"]
