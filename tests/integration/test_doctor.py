"""Every check of the doctor against the broken thing that it is there for."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import postgres
import pytest

from storage.ledger import Ledger
from storage.sessions import Sessions, StateRecord
from whatsapp_worker import doctor, leftovers
from whatsapp_worker.doctor import data, host, services
from whatsapp_worker.settings import Settings


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def settings(folder, monkeypatch):
    monkeypatch.setattr(host, "WHATSAPP", ("127.0.0.1", 9))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    return Settings(data_dir=folder)


@pytest.fixture
def sessions(folder):
    sessions = Sessions(folder)
    sessions.prepare()
    sessions.create("sales", network="whatsapp", now=1.0)
    return sessions


def found(settings, name, *, fix=False):
    """The findings of one check, the worst first."""
    order = {"problem": 0, "warning": 1, "ok": 2}
    findings = [finding for finding in doctor.run(settings, fix=fix) if finding.name == name]
    assert findings, f"no finding {name}"
    return sorted(findings, key=lambda finding: order[finding.verdict])


def worst(settings, name, **options):
    return found(settings, name, **options)[0]


def test_a_healthy_host_has_no_problem(settings, sessions):
    findings = doctor.run(settings)
    assert [finding for finding in findings if finding.verdict == "problem"] == []
    assert all(finding.sentence for finding in findings)
    assert all(finding.remedy for finding in findings if finding.verdict != "ok")


def test_findings_are_json(settings):
    json.dumps([finding.as_dict() for finding in doctor.run(settings)])


def test_looking_changes_nothing(settings, sessions, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    doctor.run(settings)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if path not in before} <= set(folder.rglob("*.lock"))
    assert all(after[path] == before[path] for path in before)


def test_a_check_that_breaks_is_a_finding_and_stops_no_other(settings, monkeypatch):
    def broken(settings):
        raise RuntimeError("surprise")

    monkeypatch.setitem(doctor.CHECKS, "clock", broken)
    finding = worst(settings, "clock")
    assert finding.verdict == "problem" and "surprise" in finding.sentence
    assert worst(settings, "neonize").verdict == "ok"


# The data folder


def test_a_data_folder_that_is_not_there_is_made_by_fix(settings, folder):
    assert worst(settings, "data-folder").verdict == "warning"
    assert not folder.exists()
    finding = worst(settings, "data-folder", fix=True)
    assert finding.verdict == "ok" and "made" in finding.did
    assert (folder / "sessions").is_dir()


def test_a_data_folder_that_cannot_be_written_is_a_problem(settings, sessions, monkeypatch):
    def refuse(path, data, mode):
        raise OSError(errno.EROFS, "Read-only file system", str(path.parent))

    monkeypatch.setattr(data, "write_synced", refuse)
    assert "Read-only" in worst(settings, "data-folder").sentence


def test_a_file_in_place_of_the_data_folder_is_a_problem(settings, folder):
    folder.write_text("")
    assert worst(settings, "data-folder").verdict == "problem"


def test_credentials_that_others_may_read_are_closed_by_fix(settings, sessions):
    path = sessions.folder("sales") / "device.db"
    path.touch()
    path.chmod(0o644)
    assert worst(settings, "data-folder").verdict == "problem"
    finding = worst(settings, "data-folder", fix=True)
    assert finding.verdict == "ok" and "sales/device.db" in finding.did
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm, a tmpfs")
def test_a_data_folder_on_tmpfs_is_a_warning(monkeypatch):
    finding = worst(Settings(data_dir=Path("/dev/shm/absent/data")), "data-persists")
    assert finding.verdict == "warning" and "tmpfs" in finding.sentence


def test_the_innermost_mount_decides():
    mountinfo = (
        "1 0 0:1 / / rw - overlay overlay rw\n"
        "2 1 0:2 / /app/my\\040data rw - ext4 /dev/sda rw\n"
        "3 1 0:3 / /app rw - tmpfs tmpfs rw\n"
        "nonsense\n"
    )
    kinds = {
        "/app/my data/sessions": "ext4",
        "/app/other": "tmpfs",
        "/application": "overlay",
    }
    assert {path: data.filesystem_of(Path(path), mountinfo) for path in kinds} == kinds
    assert data.judge_persistence(Path("data"), None).verdict == "ok"


def test_room_on_the_disk_is_judged():
    assert data.judge_space(10 * 2**30, None).verdict == "ok"
    assert data.judge_space(200 * 2**20, 10**6).verdict == "warning"
    assert data.judge_space(10 * 2**20, 10**6).verdict == "problem"
    assert data.judge_space(10 * 2**30, 5).verdict == "problem"


def test_a_filesystem_that_does_not_lock_is_a_problem(settings, sessions, monkeypatch):
    def refuse(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    finding = worst(settings, "locks")
    assert finding.verdict == "problem" and finding.remedy


# What lies in it


@contextlib.contextmanager
def holding(path, name):
    """A process, named like a device process, that holds a lock and never ends."""
    code = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, name, str(path)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_stopped_leftover_that_holds_a_session_is_ended_by_fix(settings, sessions, monkeypatch):
    monkeypatch.setattr(leftovers, "PATIENCE_S", 0.1)
    lock = sessions.folder("sales") / "session.lock"
    with holding(lock, "whatsapp-worker device sales") as process:
        process.send_signal(signal.SIGSTOP)
        finding = worst(settings, "leftovers")
        assert finding.verdict == "problem" and str(process.pid) in finding.sentence
        finding = worst(settings, "leftovers", fix=True)
        assert finding.verdict == "ok" and "sales" in finding.did
        assert process.wait(10) == -signal.SIGKILL


def test_a_stranger_that_holds_a_session_is_left_alone(settings, sessions, monkeypatch):
    monkeypatch.setattr(leftovers, "PATIENCE_S", 0.1)
    monkeypatch.setattr(data, "END_S", 0.5)
    lock = sessions.folder("sales") / "session.lock"
    with holding(lock, "backup") as process:
        finding = worst(settings, "leftovers", fix=True)
        assert finding.verdict == "problem" and "no processes of ours" in finding.did
        assert process.poll() is None


def test_processes_of_a_running_supervisor_are_no_leftovers(settings, sessions, folder):
    lock = sessions.folder("sales") / "session.lock"
    with holding(folder / "supervisor.lock", "run"), holding(lock, "whatsapp-worker device sales"):
        assert worst(settings, "leftovers", fix=True).verdict == "ok"


def test_half_written_files_are_removed_by_fix(settings, sessions, folder):
    leftover = sessions.folder("sales") / "state.json.tmp"
    leftover.write_text("{")
    grave = folder / "sessions" / ".deleted-old-1"
    grave.mkdir()
    assert worst(settings, "leftovers").verdict == "warning"
    assert worst(settings, "leftovers", fix=True).verdict == "ok"
    assert not leftover.exists() and not grave.exists()


def state(sessions):
    sessions.put_state("sales", StateRecord(generation=1, state="stopped", since=1.0))
    return sessions.folder("sales") / "state.json"


def test_a_broken_state_is_set_aside_by_fix(settings, sessions):
    path = state(sessions)
    path.write_text("{")
    assert worst(settings, "state-files").verdict == "problem"
    finding = worst(settings, "state-files", fix=True)
    assert finding.verdict == "ok" and "set" in finding.did
    assert not path.exists() and list(path.parent.glob("state.json.broken-*"))


def test_a_broken_record_is_left_for_a_person(settings, sessions):
    path = sessions.folder("sales") / "wanted.json"
    path.write_text("\0\0")
    finding = worst(settings, "state-files", fix=True)
    assert finding.verdict == "problem" and "backup" in finding.remedy
    assert path.read_text() == "\0\0"


def test_a_lost_record_is_a_problem(settings, sessions):
    database(sessions)
    (sessions.folder("sales") / "wanted.json").unlink()
    finding = worst(settings, "state-files")
    assert finding.verdict == "problem" and "whatsapp-worker start sales" in finding.remedy


def test_broken_tombstones_are_a_problem(settings, sessions, folder):
    (folder / "tombstones.json").write_text("[]")
    assert "tombstones" in worst(settings, "state-files").sentence


def test_a_record_of_newer_software_is_a_problem_and_untouched(settings, sessions):
    path = state(sessions)
    text = json.dumps({"version": 99})
    path.write_text(text)
    finding = worst(settings, "state-files", fix=True)
    assert finding.verdict == "problem" and "Upgrade" in finding.remedy
    assert path.read_text() == text


def test_a_lost_or_damaged_install_key_is_found(settings, sessions, folder):
    (folder / "install.key").write_bytes(b"short")
    assert worst(settings, "state-files").verdict == "problem"
    (folder / "install.key").unlink()
    assert worst(settings, "state-files").verdict == "ok"
    database(sessions)
    assert worst(settings, "state-files").verdict == "warning"


def database(sessions, name="device.db"):
    """A SQLite file of some pages."""
    path = sessions.folder("sales") / name
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE rows (text)")
        connection.executemany("INSERT INTO rows VALUES (?)", [("x" * 500,)] * 200)
        connection.commit()
    path.chmod(0o600)
    return path


def spoil(path):
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xff" * 8192
    path.write_bytes(content)


def test_a_damaged_device_database_is_a_problem(settings, sessions):
    path = database(sessions)
    assert "1 are sound" in worst(settings, "device-databases").sentence
    spoil(path)
    finding = worst(settings, "device-databases")
    assert finding.verdict == "problem"
    assert finding.remedy == "Run: whatsapp-worker link sales --again", "never from a backup"


def test_a_device_database_in_use_is_not_touched(settings, sessions, monkeypatch):
    monkeypatch.setattr(data, "LOCK_WAIT_S", 0.01)
    spoil(database(sessions))
    with holding(sessions.folder("sales") / "session.lock", "whatsapp-worker device sales"):
        finding = worst(settings, "device-databases")
        assert finding.verdict == "ok" and "1 in use" in finding.sentence


def test_a_damaged_ledger_and_one_set_aside_are_problems(settings, sessions):
    path = database(sessions, "ledger.db")
    assert worst(settings, "ledgers").verdict == "ok"
    spoil(path)
    assert "restart sales" in worst(settings, "ledgers").remedy
    path.with_name("ledger.db.held").write_text("why")
    assert "held" in worst(settings, "ledgers").sentence


# Redis

HEALTHY = {
    "redis_version": "7.0.15",
    "role": "master",
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
    "used_memory": 1,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
}


def judge(*, saves=True, **changes):
    return services.judge_redis({**HEALTHY, **changes}, saves=saves)


def test_a_redis_that_keeps_everything_is_fine(redis_server, folder):
    settings = Settings(data_dir=folder, redis_url=redis_server.url)
    assert worst(settings, "redis").verdict == "ok"
    assert "right" in worst(settings, "clock").sentence


def test_a_redis_that_evicts_or_keeps_nothing_is_a_problem(redis_server, folder):
    settings = Settings(data_dir=folder, redis_url=redis_server.url)
    client = redis_server.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("appendonly", "no")
    findings = found(settings, "redis")
    assert [finding.verdict for finding in findings] == ["problem", "problem"]
    words = " ".join(finding.sentence for finding in findings)
    assert "allkeys-lru" in words and "nothing on disk" in words
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("save", "60 1000")
    assert worst(settings, "redis").verdict == "warning"
    client.close()


def test_each_trouble_of_redis_has_its_verdict():
    assert [finding.verdict for finding in judge()] == ["ok"]
    assert judge(redis_version="5.0.7")[0].verdict == "problem"
    assert judge(role="slave")[0].verdict == "problem"
    assert judge(maxmemory_policy="volatile-ttl")[0].verdict == "problem"
    assert judge(aof_last_write_status="err")[0].verdict == "problem"
    assert judge(aof_enabled=0, rdb_last_bgsave_status="err")[0].verdict == "problem"
    assert judge(aof_enabled=0, saves=None)[0].verdict == "warning"
    assert judge(maxmemory=100, used_memory=95)[0].verdict == "warning"


def test_a_redis_that_does_not_answer_is_a_problem(folder, tmp_path):
    url = f"unix://{tmp_path}/none.sock"
    finding = worst(Settings(data_dir=folder, redis_url=url), "redis")
    assert finding.verdict == "problem" and "REDIS_URL" in finding.remedy


def test_a_password_never_shows(folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"redis://:hunter2@127.0.0.1:{closed.getsockname()[1]}/0"
        findings = doctor.run(Settings(data_dir=folder, redis_url=url))
    assert "hunter2" not in json.dumps([finding.as_dict() for finding in findings])


def test_no_redis_at_all_is_a_problem_that_names_a_package(settings, monkeypatch):
    from whatsapp_worker import redis_server
    from whatsapp_worker.errors import RedisUnavailable

    def none():
        raise RedisUnavailable("apt install redis-server")

    monkeypatch.setattr(redis_server, "program", none)
    assert "apt install" in worst(settings, "redis").remedy


def test_the_trace_of_a_killed_redis_is_removed_by_fix(settings, sessions, folder):
    announced = folder / "redis.json"
    announced.write_text(json.dumps({"url": f"unix://{folder}/redis/none.sock"}))
    assert worst(settings, "redis").verdict == "warning"
    finding = worst(settings, "redis", fix=True)
    assert finding.verdict == "ok" and "redis.json" in finding.did
    assert not announced.exists()


# The database


def test_a_database_that_answers_is_fine_before_and_after_the_first_start(folder, postgres_url):
    with postgres.fresh_schema(postgres_url, f"doctor_{os.getpid()}") as url:
        settings = Settings(data_dir=folder, database_url=url)
        assert "first start" in worst(settings, "database").sentence
        Ledger.open(url, "sales").close()
        assert "up to date" in worst(settings, "database").sentence


def test_a_ledger_of_newer_software_is_a_problem():
    finding = services.judge_revision("postgresql://db", "9999")
    assert finding.verdict == "problem" and "Upgrade" in finding.remedy


def test_a_database_that_does_not_answer_is_a_problem(folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"postgresql://u:hunter2@127.0.0.1:{closed.getsockname()[1]}/none"
        finding = worst(Settings(data_dir=folder, database_url=url), "database")
    assert finding.verdict == "problem" and "hunter2" not in finding.sentence


# The machine


def test_a_wrong_clock_is_found():
    assert services.judge_clock(0.0, None).verdict == "problem"
    assert services.judge_clock(1_800_000_000, 1_800_000_001).verdict == "ok"
    assert services.judge_clock(1_800_000_000, 1_800_000_020).verdict == "warning"
    assert services.judge_clock(1_800_000_000, 1_800_003_600).verdict == "problem"


def test_too_few_open_files_are_found():
    assert host.judge_open_files(1024, max_sessions=20).verdict == "ok"
    assert host.judge_open_files(-1, max_sessions=10_000).verdict == "ok"
    low = host.judge_open_files(2048, max_sessions=1000)
    assert low.verdict == "problem" and "hard limit" in low.remedy


def test_a_misspelt_setting_is_a_warning(settings, monkeypatch):
    assert worst(settings, "settings").verdict == "ok"
    monkeypatch.setenv("PACE_PER_MIN", "5")
    finding = worst(settings, "settings")
    assert finding.verdict == "warning"
    assert "PACE_PER_MIN " in finding.sentence and "PACE_PER_MINUTE" in finding.remedy


def test_a_missing_ffmpeg_is_a_warning(settings, monkeypatch):
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    assert worst(settings, "ffmpeg").verdict == "warning"
    monkeypatch.setattr(host.shutil, "which", lambda name: name if name == "ffmpeg" else None)
    assert worst(settings, "ffmpeg").verdict == "ok"


def test_only_the_neonize_that_this_was_made_for_will_do():
    verdicts = {
        version: host.judge_neonize(version).verdict
        for version in ("0.5.2", "0.5.10", "0.5.2.post1", "0.5.1", "0.6.0", "1.0", None)
    }
    assert [version for version, verdict in verdicts.items() if verdict == "ok"] == [
        "0.5.2",
        "0.5.10",
        "0.5.2.post1",
    ]


def test_a_network_that_cannot_be_reached_is_a_warning(settings):
    assert worst(settings, "network").verdict == "warning"


def test_the_entrance_is_the_proxy_where_there_is_one(settings, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        finding = worst(settings, "network")
        assert finding.verdict == "ok" and "HTTPS_PROXY" in finding.sentence


def test_sandbox_mode_without_the_sandbox_is_a_problem(folder, monkeypatch):
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    finding = worst(Settings(data_dir=folder, network="sandbox"), "network")
    assert finding.verdict == "problem" and "sandbox --env" in finding.remedy


def test_a_long_path_needs_a_port_for_redis(tmp_path, monkeypatch):
    long = Settings(data_dir=tmp_path / ("d" * 100))
    assert "is free" in host._loopback(long).sentence

    class Refusing(socket.socket):
        def bind(self, address):
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(host.socket, "socket", Refusing)
    assert host._loopback(long).verdict == "problem"
