"""A number moves to another host; what nobody needs any more is purged; for real."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import events
from world import World, eventually

CONTACT = "5521988880001"
PASSPHRASE = {"SESSION_PASSPHRASE": "correct horse battery"}


@pytest.fixture
def elsewhere(world: World, tmp_path: Path) -> Iterator[World]:
    """Another host on the same network: its own data folder, Redis and supervisor."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    other = World(folder, **PASSPHRASE)
    network = ("WHATSAPP_NETWORK", "HTTPS_PROXY", "SSL_CERT_FILE")
    other.environ |= {name: world.environ[name] for name in network}
    try:
        other.start_supervisor()
        yield other
    finally:
        other.close()
        print(other.logs())


def test_a_number_moves_to_another_host_without_a_new_qr(world: World, elsewhere: World):
    world.environ |= PASSPHRASE
    phone = world.link("sales")
    first = world.enqueue("sales", CONTACT, "from here", "crm-1")
    assert world.await_outcomes([first])[0]["status"] == "sent"
    file = str(elsewhere.folder / "sales.session")
    refused = world.run("session", "export", "sales", file)
    assert refused.returncode == 5
    assert "stop it first" in refused.stderr
    assert world.run("stop", "sales").returncode == 0
    moved = world.run("session", "export", "sales", file, "--json")
    assert moved.returncode == 0, moved.stderr
    assert json.loads(moved.stdout)["messages"] == 1
    assert world.run("start", "sales").returncode != 0
    taken = elsewhere.run("session", "import", file, "--json")
    assert taken.returncode == 0, taken.stderr
    started = elsewhere.run("start", "sales")
    assert started.returncode == 0, started.stderr
    assert elsewhere.await_state("sales", "connected")["phone"] == phone
    again = elsewhere.enqueue("sales", CONTACT, "from here", "crm-1")
    second = elsewhere.enqueue("sales", CONTACT, "from there", "crm-2")
    told, new = elsewhere.await_outcomes([again, second])
    assert told["status"] in ("sent", "delivered")  # what became of it over there
    assert new["status"] == "sent"
    texts = [row["text"] for row in world.arrived(to=CONTACT)]
    assert texts == ["from here", "from there"]
    assert world.state("sales")["state"] == "stopped"


def test_a_session_never_linked_is_purged_by_the_running_supervisor(tmp_path: Path):
    with World.running(tmp_path, LINK_TIMEOUT_S="1") as world:
        linked = world.link("sales")
        with world.linking("ghost") as lines:
            assert next(lines)["event"] == "qr"
            world.run("stop", "ghost")
            assert list(lines)[-1]["event"] == "failed"
        folder = world.data / "sessions" / "ghost"
        job = world.enqueue("ghost", CONTACT, "hello", "crm-1")
        skipped = eventually(lambda: _purge(world)["skipped"], what="it is old enough")
        assert skipped == [{"session": "ghost", "why": "1 message waits for it"}]
        world.redis.delete("rq:queue:wa:out:ghost")
        job.delete()
        purged = eventually(lambda: _purge(world)["purged"], what="the ghost is purged")
        assert purged == {"never_linked": 1}
        eventually(lambda: not folder.exists(), what="the supervisor removes it")
        assert world.state("sales")["phone"] == linked
        assert not (world.data / "tombstones.json").exists()


def _purge(world: World) -> dict[str, Any]:
    done = world.run("purge", "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_supervisor_has_the_maintenance_process_purge_in_every_slot(tmp_path: Path):
    environ = {"LINK_TIMEOUT_S": "1", "CLEANUP_INTERVAL_S": "2", "WORKER_HOST": "here"}
    with World.running(tmp_path, **environ) as world:
        world.spawn("maintenance")
        with world.linking("ghost") as lines:
            assert next(lines)["event"] == "qr"
            world.run("stop", "ghost")
            assert list(lines)[-1]["event"] == "failed"
        folder = world.data / "sessions" / "ghost"
        eventually(lambda: not folder.exists(), what="the ghost is purged")
        eventually(
            lambda: "purge.completed" in [event["event"] for event in events(world.redis)],
            what="it is told, at the end of the purge",
        )
