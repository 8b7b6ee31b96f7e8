"""Deletions on a thread of their own: retried, and never in the way of the supervisor's end."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from support import RedisServer, eventually

from storage.sessions import Sessions
from whatsapp_worker.graves import RETRY_S, Graves
from whatsapp_worker.settings import Settings

STUCK = """
import sys, time
from pathlib import Path
from whatsapp_worker import deletion
from whatsapp_worker.graves import Graves
from whatsapp_worker.settings import Settings

deletion.delete_session = lambda *args, **more: time.sleep(60)
graves = Graves(Settings(data_dir=Path(sys.argv[1]), redis_url="redis://127.0.0.1:1"))
graves.dig("sales", why="delete", now=0.0)
graves.stop(timeout_s=0.1)
"""


def doomed(folder: Path) -> Sessions:
    sessions = Sessions(folder)
    sessions.create("sales", network="sandbox", now=time.time())
    sessions.want("sales", lambda wanted: dataclasses.replace(wanted, run="delete"))
    return sessions


def test_a_deletion_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], check=True, timeout=15)


def test_a_deletion_is_tried_again_and_told_once(tmp_path: Path, redis_server: RedisServer) -> None:
    sessions = doomed(tmp_path)
    graves = Graves(Settings(data_dir=tmp_path, redis_url=redis_server.url))
    now = 0.0
    with sessions.session_lock("sales"):
        assert not graves.dig("sales", why="delete", now=now)
        eventually(lambda: graves.dig("sales", why="delete", now=now) or _waits(graves))
    assert sessions.folder("sales").exists() and graves.is_digging("sales")
    now += RETRY_S
    eventually(lambda: graves.dig("sales", why="delete", now=now))
    assert not sessions.folder("sales").exists() and not graves.is_digging("sales")
    graves.stop(timeout_s=5)


def _waits(graves: Graves) -> bool:
    return graves._graves["sales"].retry_at is not None


def test_what_was_forgotten_is_dug_anew(tmp_path: Path, redis_server: RedisServer) -> None:
    sessions = doomed(tmp_path)
    graves = Graves(Settings(data_dir=tmp_path, redis_url=redis_server.url))
    graves.dig("sales", why="delete", now=0.0)
    eventually(lambda: not sessions.folder("sales").exists())
    graves.forget("sales")
    doomed(tmp_path)
    eventually(lambda: graves.dig("sales", why="delete", now=1.0))
    assert not sessions.folder("sales").exists()
    graves.stop(timeout_s=5)
