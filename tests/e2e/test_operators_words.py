"""What an operator asks for is noticed in time, and the codes that answer it reach nobody else."""

import contextlib
import dataclasses
import os
import signal
import statistics
import time
from pathlib import Path

import psutil
from world import World, eventually

from storage.sessions import Sessions
from whatsapp_worker import process


def holding(folder: Path, secret: str) -> set[str]:
    """The files under a folder in which this stands: Redis's own, records, logs and all."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            if path.is_file() and secret.encode() in path.read_bytes():
                found.add(path.name)
    return found


def test_a_code_stands_in_one_private_file_and_never_in_redis(world: World) -> None:
    sessions = world.data / "sessions"
    with world.linking("sales") as lines:
        code = next(lines)["code"]
        eventually(lambda: holding(world.folder / "redis", "session.qr"), what="it is announced")
        for part in code.partition("#")[2].split(",")[:4]:  # reference, two keys, the adv secret
            assert holding(world.folder, part) == {"link.json"}
        assert (sessions / "sales" / "link.json").stat().st_mode & 0o777 == 0o600
        world.control.scan(code, phone="5511999990012")
        assert [line["event"] for line in lines][-1] == "linked"
    with world.linking("support", "--phone", "+5511999990013") as lines:
        typed = str(next(lines)["code"])
        assert holding(world.folder, typed) == {"link.json"}
        assert not holding(world.folder, typed.replace("-", ""))
        world.control.enter_code(typed, "5511999990013")
        assert [line["event"] for line in lines] == ["linked"]
    assert not holding(world.folder, typed) | holding(world.folder, code.split(",")[3])


def test_a_pairing_process_that_stands_still_is_killed_at_the_deadline(tmp_path: Path) -> None:
    with World.running(tmp_path, LINK_ATTEMPT_S="15") as world:
        with world.linking("sales") as lines:
            assert next(lines)["event"] == "qr"
            pid = world.state("sales")["pid"]
            assert psutil.Process(pid).cmdline()[0] == "whatsapp-worker link sales"
            os.kill(pid, signal.SIGSTOP)
            told = next(lines)
        assert (told["event"], told["reason"]) == ("failed", "qr-expired")
        eventually(lambda: not process.is_alive(pid), what="it is gone")
        assert world.state("sales")["state"] == "unlinked"


def test_a_record_that_changes_is_noticed_within_a_second(world: World) -> None:
    """By the supervisor's clock: from the operator's word to the state that answers it. A change
    that follows an answer comes right after a look, and waits for the whole time between two."""
    sessions = Sessions(world.data)
    sessions.create("idle", network="sandbox", now=time.time())
    world.await_state("idle", "unlinked")
    took_s = []
    for run, state in [("stop", "stopped"), ("run", "unlinked")] * 4:
        asked_at = time.time()
        sessions.want("idle", lambda wanted, run=run: dataclasses.replace(wanted, run=run))
        took_s.append(world.await_state("idle", state)["since"] - asked_at)
    # One may wait for a busy machine's disk; more than half would be the supervisor's doing.
    assert statistics.median(took_s) < 1, took_s
