"""Files damaged under a running supervisor cost one session at most; every other goes on."""

import json
import os
from pathlib import Path
from typing import Any

from world import World, eventually

from storage.sessions import Sessions

CONTACT = "5521988880001"


def documents(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if ".json" in path.name)


def works(world: World, session: str, message_id: str) -> None:
    """It sends; to be called while another session's files are damaged."""
    job = world.enqueue(session, CONTACT, f"text of {message_id}", message_id)
    assert world.await_outcomes([job])[0]["status"] in ("sent", "delivered")


def sentence(world: World, session: str) -> str:
    row: dict[str, Any] = world.session(session)
    return str(row["sentence"])


def relink(world: World, session: str, phone: str) -> None:
    with world.linking(session, "--again") as lines:
        for line in lines:
            if line["event"] == "qr":
                world.control.scan(line["code"], phone=phone)
            if line["event"] == "linked":
                return
    raise AssertionError("not linked")


def restart_supervisor(world: World) -> None:
    assert world.supervisor is not None
    world.supervisor.terminate()
    assert world.supervisor.wait(30) == 0
    world.start_supervisor()


def test_garbage_in_every_state_file_costs_that_session_at_most(world: World) -> None:
    world.link("sales")
    world.link("other")
    works(world, "sales", "crm-0")
    folder = world.data / "sessions" / "sales"
    for path in [*documents(folder), *documents(world.data)]:
        path.write_bytes(os.urandom(200))
    world.redis.ping()
    works(world, "other", "crm-1")
    purged = world.run("purge", "--json")
    assert purged.returncode == 0, purged.stderr
    works(world, "other", "crm-2")
    restart_supervisor(world)
    works(world, "other", "crm-3")
    assert "wanted.json" in sentence(world, "sales")
    assert world.supervisor is not None and world.supervisor.poll() is None
    # As the error says: remove the damaged file. The credentials are as good as before.
    for path in documents(folder):
        path.unlink()
    assert (folder / "device.db").exists()


def test_a_record_that_is_removed_as_advised_costs_neither_messages_nor_link(world: World) -> None:
    phone = world.link("sales")
    assert world.run("queue", "sales", "pause").returncode == 0
    job = world.enqueue("sales", CONTACT, "text of crm-0", "crm-0")
    record = world.data / "sessions" / "sales" / "wanted.json"
    files = [record, record.with_name("wanted.json.bak")]
    for path in files:
        path.write_bytes(b"garbage")
    assert "remove it and wanted.json.bak and run: whatsapp-worker start sales" in sentence(
        world, "sales"
    )
    for path in files:
        path.unlink()
    eventually(record.exists, what="the supervisor writes it as it knows it")
    assert world.session("sales")["state"] == "connected"
    assert world.supervisor is not None
    world.supervisor.terminate()
    assert world.supervisor.wait(30) == 0
    for path in files:
        path.unlink(missing_ok=True)
    world.start_supervisor()
    log = world.folder / "run.log"  # the supervisor's word, and the keeper's after it
    eventually(lambda: log.read_text().count("session.unreadable session=sales") > 1)
    assert world.outcome(job) == {} and not job.is_failed
    assert "whatsapp-worker start sales" in sentence(world, "sales")
    with world.linking("sales") as lines:
        assert [(line["event"], line["phone"]) for line in lines] == [("linked", phone)]
    assert world.run("queue", "sales", "resume").returncode == 0
    assert world.await_outcomes([job])[0]["status"] in ("sent", "delivered")


def test_a_state_that_nobody_can_read_is_looked_at_again_until_it_is_removed(world: World) -> None:
    world.link("sales")
    world.link("other")
    assert world.supervisor is not None
    world.supervisor.terminate()
    assert world.supervisor.wait(30) == 0
    files = [world.data / "sessions" / "sales" / name for name in ("state.json", "state.json.bak")]
    for path in files:
        path.write_bytes(b"{")
    # A word of some other version is as unreadable as garbage, and costs no other session either.
    other = world.data / "sessions" / "other" / "state.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "state": "levitating"}))
    world.start_supervisor()
    world.link("third")
    assert "remove it and state.json.bak" in sentence(world, "sales")
    for path in [*files, other, other.with_name("state.json.bak")]:
        path.unlink()
    world.await_state("sales", "connected")
    world.await_state("other", "connected")
    unread = (world.folder / "run.log").read_text().count("session.unreadable session=sales")
    assert unread == 1


def test_one_damaged_version_of_each_state_file_costs_nothing(world: World) -> None:
    phone = world.link("sales")
    works(world, "sales", "crm-0")
    folder = world.data / "sessions" / "sales"
    damaged = [path for path in documents(folder) if path.name.endswith(".json")]
    damaged = [path for path in damaged if path.with_name(path.name + ".bak").exists()]
    assert folder / "wanted.json" in damaged and folder / "state.json" in damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:20])
    restart_supervisor(world)
    works(world, "sales", "crm-1")
    assert world.await_state("sales", "connected")["phone"] == phone
    assert list(folder.glob("wanted.json.corrupt-*"))
    log = (world.folder / "run.log").read_text()
    assert "document.recovered" in log


def test_damaged_databases_cost_that_session_only_and_nothing_is_sent_twice(world: World) -> None:
    world.link("sales")
    world.link("support")
    world.link("other")
    works(world, "support", "crm-0")
    assert world.run("stop", "sales").returncode == 0
    assert world.run("stop", "support").returncode == 0
    for path in (world.data / "sessions" / "sales").glob("device.db*"):
        path.write_bytes(os.urandom(4096))
    for path in (world.data / "sessions" / "support").glob("ledger.db*"):
        path.write_bytes(os.urandom(4096))
    listed = world.run("messages", "list", "support")
    assert listed.returncode == 6 and "when its session starts next" in listed.stderr
    assert not list((world.data / "sessions" / "support").glob("ledger.db.*")), "touched by others"
    again = world.enqueue("support", CONTACT, "text of crm-0", "crm-0")
    for session in ("sales", "support"):
        world.run("start", session)
    works(world, "other", "crm-1")
    for session, words in (("sales", "--again"), ("support", "queue is held")):
        refused = f"{session} is failed: {world.session(session)}"
        eventually(lambda session=session: _is_refused(world, session), what=refused)
        assert words in world.run("logs", session).stdout
    eventually(lambda: "whatsapp-worker link sales --again" in sentence(world, "sales"))
    assert world.outcome(again) == {}
    shown = world.run("queue", "support").stdout
    assert "held" in shown and "ledger.db.held" in shown
    assert "crm-0" in world.run("queue", "support", "list").stdout
    resumed = world.run("queue", "support", "resume")
    assert resumed.returncode == 1 and "ledger.db.held" in resumed.stderr
    shown = world.run("messages", "show", "other", "crm-1", "--json").stdout
    assert json.loads(shown)["status"] in ("sent", "delivered")
    # The remedies that were named.
    relink(world, "sales", "5521900009999")
    works(world, "sales", "crm-2")
    (world.data / "sessions" / "support" / "ledger.db.held").unlink()
    again.delete()
    assert world.run("start", "support").returncode == 0
    works(world, "support", "crm-3")
    texts = [row["text"] for row in world.arrived(to=CONTACT)]
    assert sorted(texts) == [f"text of crm-{number}" for number in range(4)]


def _is_refused(world: World, session: str) -> bool:
    return world.state(session).get("reason") == "cannot-run"


def test_a_queue_is_held_when_its_session_is_linked_to_another_number(tmp_path: Path) -> None:
    with World.running(tmp_path, HEALTH_CHECK_INTERVAL_S="1") as world:  # for `status`
        first = world.link("sales")
        works(world, "sales", "crm-0")
        assert world.run("stop", "sales").returncode == 0
        job = world.enqueue("sales", CONTACT, "text of crm-1", "crm-1")
        relink(world, "sales", first)
        assert world.await_outcomes([job])[0]["status"] in ("sent", "delivered"), "the same number"
        assert world.run("stop", "sales").returncode == 0
        job = world.enqueue("sales", CONTACT, "text of crm-2", "crm-2")
        relink(world, "sales", "5521900009999")
        queue = eventually(lambda: _held(world, "sales"), what="its queue is held")
        assert "operator" in queue["reason"]
        assert world.outcome(job) == {}
        assert Sessions(world.data).hold("sales").release()
        assert world.await_outcomes([job])[0]["status"] in ("sent", "delivered")


def _held(world: World, session: str) -> dict[str, Any] | None:
    queue: dict[str, Any] = world.session(session)["queue"]
    return queue if queue["state"] == "held" else None
