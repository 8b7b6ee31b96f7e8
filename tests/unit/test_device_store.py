"""Reading neonize's database file: credentials, what was handed over, and adopting a pairing."""

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from whatsapp_worker import device_store
from whatsapp_worker.device_store import DeviceStoreBroken

JID = "5511999990001:3@s.whatsapp.net"


def make(path, *, jid=JID, secrets=()):
    """The part of whatsmeow's schema that is read, as neonize 0.5.2 creates it."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            CREATE TABLE whatsmeow_device (jid TEXT PRIMARY KEY, lid TEXT,
                push_name TEXT NOT NULL DEFAULT '', platform TEXT NOT NULL DEFAULT '');
            CREATE TABLE whatsmeow_message_secrets (our_jid TEXT, chat_jid TEXT, sender_jid TEXT,
                message_id TEXT, key bytea NOT NULL,
                PRIMARY KEY (our_jid, chat_jid, sender_jid, message_id));
            """
        )
        if jid:
            row = (jid, "777@lid", "Sales", "android")
            database.execute("INSERT INTO whatsmeow_device VALUES (?, ?, ?, ?)", row)
        for number, secret in enumerate(secrets):
            row = (jid, "1@lid", jid, f"3EB{number}", secret)
            database.execute("INSERT INTO whatsmeow_message_secrets VALUES (?, ?, ?, ?, ?)", row)
        database.commit()
    return path


def test_a_file_tells_whose_credentials_it_holds(tmp_path):
    who = device_store.identity(make(tmp_path / "device.db"))
    assert (who.jid, who.lid, who.push_name) == (JID, "777@lid", "Sales")
    assert who.phone == "5511999990001"


def test_no_file_and_no_credentials_are_the_same_answer(tmp_path):
    assert device_store.identity(tmp_path / "none.db") is None
    assert device_store.identity(make(tmp_path / "device.db", jid=None)) is None
    (tmp_path / "empty.db").touch()
    assert device_store.identity(tmp_path / "empty.db") is None
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_no_database_is_broken(tmp_path):
    (tmp_path / "device.db").write_bytes(b"no database at all" * 100)
    for look in (device_store.identity, lambda path: device_store.handed_over(path, [b"x"])):
        with pytest.raises(DeviceStoreBroken, match=r"device\.db"):
            look(tmp_path / "device.db")
    assert device_store.check(tmp_path / "device.db")


ON_A_FULL_DISK = """
import pathlib, resource, sys
from whatsapp_worker import device_store
path = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for look in (device_store.identity, lambda path: device_store.handed_over(path, [b"x"])):
    try:
        look(path)
    except device_store.DeviceStoreUnavailable:
        continue
    sys.exit("read, or called damaged")
"""


def test_on_a_full_disk_it_is_not_called_damaged(tmp_path):
    """SQLite then cannot make the file in which readers of a log take turns."""
    path = make(tmp_path / "device.db")
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, str(path)], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    assert device_store.identity(path).jid == JID


def test_only_secrets_that_were_handed_over_are_found(tmp_path):
    secrets = [bytes([number % 256, number // 256]) * 16 for number in range(1200)]
    path = make(tmp_path / "device.db", secrets=secrets[:1100])
    found = device_store.handed_over(path, secrets)
    assert len(found) == 1100
    assert found[secrets[7]] == "3EB7"
    assert secrets[1100] not in found
    assert device_store.handed_over(path, []) == {}
    assert device_store.handed_over(tmp_path / "none.db", secrets) == {}


def test_adopting_replaces_the_old_credentials_and_their_journal(tmp_path):
    device, pairing = tmp_path / "device.db", tmp_path / "pairing.db"
    make(device, jid="1:1@s.whatsapp.net")
    (tmp_path / "device.db-journal").write_bytes(b"old")
    make(pairing)
    assert device_store.adopt(pairing, device).jid == JID
    assert device_store.identity(device).jid == JID
    assert device.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.db"]


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 200])
def test_a_failed_pairing_leaves_the_old_credentials_alone(tmp_path, content):
    device, pairing = make(tmp_path / "device.db"), tmp_path / "pairing.db"
    if content is not None:
        pairing.write_bytes(content)
    with pytest.raises(DeviceStoreBroken):
        device_store.adopt(pairing, device)
    assert device_store.identity(device).jid == JID


KILLED_WHILE_WRITING = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA journal_mode = " + sys.argv[2])
database.execute("PRAGMA cache_size = 1")
row = ("INSERT INTO whatsmeow_message_secrets VALUES (?, '', '', ?, ?)")
database.execute(row, ("a", "committed", b"z" * 32))
database.execute("BEGIN IMMEDIATE")
database.execute("DELETE FROM whatsmeow_device")
for number in range(2000):
    database.execute(row, ("a", str(number), b"y" * 100))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("mode", "left"), [("DELETE", "-journal"), ("WAL", "-wal")])
def test_what_was_committed_before_a_kill_is_adopted_and_nothing_else(tmp_path, mode, left):
    pairing, device = make(tmp_path / "pairing.db"), tmp_path / "device.db"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(pairing), mode]
    subprocess.run(command, check=False)
    assert (tmp_path / f"pairing.db{left}").exists()
    assert device_store.adopt(pairing, device).jid == JID
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.db"]
    assert device_store.check(device) == []
    found = device_store.handed_over(device, [b"y" * 100, b"z" * 32])
    assert found == {b"z" * 32: "committed"}


def test_a_pairing_that_still_has_its_file_open_is_not_adopted(tmp_path):
    pairing = make(tmp_path / "pairing.db")
    with closing(sqlite3.connect(pairing, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM whatsmeow_message_secrets")
        with pytest.raises(DeviceStoreBroken):
            device_store.adopt(pairing, tmp_path / "device.db")
    assert not (tmp_path / "device.db").exists()
