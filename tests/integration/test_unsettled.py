"""Messages that stayed unknown, on SQLite and PostgreSQL."""

import threading
from pathlib import Path

import pytest
from support import eventually

from storage.ledger import Claim, Ledger, Settlement
from storage.sessions import Sessions
from whatsapp_worker import unsettled
from whatsapp_worker.settings import Settings
from whatsapp_worker.unsettled import LOOK_BACK_S, LOOK_EVERY_S, Unsettled

NOW = 1_800_000_000.0
PATIENCE_S = Settings().unknown_alert_s


class World:
    def __init__(self, folder, location):
        url = None if isinstance(location, Path) else location
        self.settings = Settings(data_dir=folder, database_url=url)
        self.sessions = Sessions(folder)
        self.sessions.prepare()
        for id in ("help", "new", "sales"):
            self.sessions.create(id, network="whatsapp", now=NOW)
        self.now = NOW
        self.alerts = []
        self.watch = Unsettled(
            settings=self.settings,
            sessions=Sessions(folder),
            raise_alert=self.alerts.append,
            clock=lambda: self.now,
        )

    def message(self, session, message_id, *, age_s, status="unknown", claimed_s=0):
        """One that became what it is `age_s` ago, and was claimed `claimed_s` before that."""
        where = self.settings.database_url or self.sessions.folder(session) / "ledger.db"
        ledger = Ledger.open(where, session)
        claim = Claim(message_id, "hash", "job", "recipient", self.now - age_s - claimed_s)
        ledger.claim(claim, secret=lambda attempt: b"s" * 32)
        ledger.settle(Settlement(message_id, status, at=self.now - age_s))
        ledger.close()

    def told(self):
        self.watch.look()
        found = [(alert.session, alert.context["message_ids"]) for alert in self.alerts]
        self.alerts.clear()
        return found


@pytest.fixture
def world(tmp_path, location):
    return World(tmp_path / "data", location)


def test_only_unknown_messages_older_than_an_hour_are_told(world):
    world.message("sales", "young", age_s=PATIENCE_S - 10)
    world.message("sales", "sent", age_s=PATIENCE_S + 10, status="sent")
    world.message("sales", "b", age_s=PATIENCE_S + 10)
    world.message("sales", "a", age_s=PATIENCE_S + 20)
    world.message("help", "c", age_s=PATIENCE_S + 30)
    assert world.told() == [("help", ["c"]), ("sales", ["b", "a"])]


def test_each_message_is_told_once(world):
    world.message("sales", "a", age_s=PATIENCE_S + 10)
    world.message("sales", "b", age_s=PATIENCE_S - 10)
    assert world.told() == [("sales", ["a"])]
    world.now += LOOK_EVERY_S
    assert world.told() == [("sales", ["b"])]
    world.now += LOOK_EVERY_S
    assert world.told() == []


def test_a_start_looks_back_and_not_for_ever(world):
    world.message("sales", "while down", age_s=PATIENCE_S + LOOK_BACK_S - 10)
    world.message("sales", "long ago", age_s=PATIENCE_S + LOOK_BACK_S + 10)
    assert world.told() == [("sales", ["while down"])]


def test_what_recovery_found_out_late_is_told(world):
    world.message("sales", "late", age_s=PATIENCE_S + 10, claimed_s=86_400)
    assert world.told() == [("sales", ["late"])]


def test_a_ledger_that_cannot_be_read_costs_no_other_its_look_and_is_read_later(tmp_path):
    world = World(tmp_path / "data", tmp_path)
    for session in ("help", "sales"):
        world.message(session, "a", age_s=PATIENCE_S + 10)
    held = world.sessions.folder("help") / "ledger.db.held"
    held.write_text("set aside")
    assert world.told() == [("sales", ["a"])]
    world.now += LOOK_EVERY_S
    held.unlink()
    assert world.told() == [("help", ["a"])]
    assert world.told() == []


def test_the_thread_looks_and_ends(world, monkeypatch):
    monkeypatch.setattr(unsettled, "LOOK_EVERY_S", 0.01)
    looked = threading.Event()
    monkeypatch.setattr(world.watch, "look", looked.set)
    world.watch.start()
    assert eventually(looked.is_set)
    assert world.watch.stop(timeout_s=5)
