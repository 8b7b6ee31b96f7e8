"""The purge on real files and a real Redis: nothing comes back, nothing good is lost."""

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis import Redis
from redis.connection import AbstractConnection
from rq import Callback, Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from support import RedisServer, eventually

from jobs import purge as purge_job
from storage.errors import DocumentBroken
from storage.ledger import Claim, Ledger, Settlement
from storage.locks import FileLock
from storage.sessions import Sessions, StateRecord
from whatsapp_worker import maintenance
from whatsapp_worker.errors import AlreadyRunning
from whatsapp_worker.purge import Purge, Report
from whatsapp_worker.purge_memory import counters
from whatsapp_worker.purge_queues import PurgeQueues
from whatsapp_worker.session import State
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

DAY = 86_400.0
NOW = 1_000_000_000.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder = tmp_path_factory.mktemp("a redis")  # whose path RQ's worker must not trip over
    started = RedisServer(folder).start()
    yield started
    started.kill()


@pytest.fixture
def redis(server: RedisServer) -> Iterator["Redis"]:
    client = server.client()
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def config(tmp_path: Path, server: RedisServer) -> Settings:
    return Settings(data_dir=tmp_path / "data", redis_url=server.url, host="here")


@pytest.fixture
def sessions(config: Settings) -> Sessions:
    made = Sessions(config.data_dir)
    made.prepare()
    return made


def purge(config: Settings, now: float = NOW, **more: Any) -> Report:
    redis = Redis.from_url(config.redis_url) if config.redis_url else None
    queues = None
    if redis is not None:
        queues = PurgeQueues(redis, stream=EventStream(redis), host="here", result_ttl_s=60)
    return Purge(config, queues=queues, clock=lambda: now, **more).run()


def make(
    sessions: Sessions,
    id: str,
    state: State = State.UNLINKED,
    *,
    linked: bool = False,
    touched_at: float = NOW,
) -> None:
    sessions.create(id, network="sandbox", now=touched_at)
    jid, phone = ("5511:1@s.whatsapp.net", "5511") if linked else (None, None)
    record = StateRecord(
        generation=1, state=state, since=touched_at, touched_at=touched_at, jid=jid, phone=phone
    )
    sessions.put_state(id, record)
    if linked:
        credentials(sessions.folder(id) / "device.db")


def credentials(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE whatsmeow_device (jid, lid, push_name, platform)")
        database.execute(
            "INSERT INTO whatsmeow_device VALUES ('5511:1@s.whatsapp.net', '', '', '')"
        )
    database.close()


def enqueue(redis: "Redis", session: str) -> Job:
    queue = Queue(f"wa:out:{session}", connection=redis, serializer=JSONSerializer)
    message = {"type": "text", "text": {"body": "hello"}}
    return queue.enqueue(
        "jobs.outbound.send_message",
        description="send_message",
        kwargs={"session": session, "to": "+5511999990001", "message_id": "m1", "message": message},
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Whom


def test_a_data_folder_that_is_absent_is_empty_and_a_file_in_its_place_is_refused(
    config: Settings,
) -> None:
    assert purge(config).is_complete and not config.data_dir.exists()
    config.data_dir.touch()
    with pytest.raises(DocumentBroken, match="a file lies where a folder must be"):
        purge(config)


def test_a_session_never_linked_goes_without_a_tombstone(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "old", touched_at=NOW - 301)
    make(sessions, "young", touched_at=NOW - 299)
    report = purge(config)
    assert report.purged == {"never_linked": 1}
    assert report.bytes_freed > 0
    assert report.is_complete
    assert sessions.ids() == ["young"]
    assert sessions.tombstones.all() == []


def test_a_logged_out_session_goes_and_leaves_a_tombstone(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", State.LOGGED_OUT, linked=True, touched_at=NOW - 8 * DAY)
    report = purge(config)
    assert (report.purged, report.tombstones) == ({"logged_out": 1}, 1)
    stone = sessions.tombstones.find("sales")
    assert stone is not None
    assert (stone.why, stone.at) == ("purge: logged_out", NOW)
    assert stone.number_hash is not None
    assert "5511" not in stone.number_hash[:4]
    assert not sessions.folder("sales").exists()
    assert list((config.data_dir / "sessions").iterdir()) == []


def test_good_credentials_stay_and_are_reported(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", State.FAILED, linked=True, touched_at=NOW - 40 * DAY)
    report = purge(config)
    assert report.purged == {}
    assert report.skipped == [
        {"session": "sales", "why": "stale: linked, and not connected for 40 days"}
    ]
    report = purge(dataclasses.replace(config, purge_linked_after_s=30 * DAY))
    assert report.purged == {"linked": 1}


def test_a_session_with_messages_waiting_stays_until_they_are_gone(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", touched_at=0.0)
    enqueue(redis, "sales")
    report = purge(config)
    assert (report.purged, report.skipped) == (
        {},
        [{"session": "sales", "why": "1 message waits for it"}],
    )
    redis.rename("rq:queue:wa:out:sales", "rq:queue:wa:out:sales:intermediate")
    assert purge(config).purged == {}
    redis.delete("rq:queue:wa:out:sales:intermediate")
    assert purge(config).purged["never_linked"] == 1


def test_a_session_that_a_process_runs_stays(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", touched_at=0.0)
    with sessions.session_lock("sales"):
        assert purge(config).purged == {}
    assert purge(config).purged == {"never_linked": 1}


def test_without_redis_only_deletions_are_finished(config: Settings, sessions: Sessions) -> None:
    make(sessions, "old", touched_at=0.0)
    make(sessions, "gone", State.CONNECTED, linked=True)
    sessions.want("gone", lambda wanted: dataclasses.replace(wanted, run="delete"))
    report = purge(dataclasses.replace(config, redis_url=None))
    assert report.purged == {"deleted": 1}
    assert [skipped["session"] for skipped in report.skipped] == ["old"]
    assert sessions.tombstones.find("gone") is not None


@pytest.mark.parametrize("answered", [False, True])
def test_a_session_whose_link_request_waits_stays_while_a_supervisor_runs(
    config: Settings, sessions: Sessions, redis: "Redis", answered: bool
) -> None:
    make(sessions, "old", touched_at=0.0)
    link = {"request": "r1", "method": "qr", "phone": None, "again": False}
    network = config.network
    sessions.want("old", lambda wanted: dataclasses.replace(wanted, link=link, network=network))
    state = sessions.state("old")
    assert state is not None
    if answered:
        sessions.put_state("old", dataclasses.replace(state, link={"request": "r1"}))
    with FileLock(config.data_dir / "supervisor.lock"):
        assert purge(config).purged == ({"never_linked": 1} if answered else {})


def test_a_running_supervisor_is_asked_and_not_replaced(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", State.LOGGED_OUT, linked=True, touched_at=0.0)
    with FileLock(config.data_dir / "supervisor.lock"):
        assert purge(config).purged == {"logged_out": 1}
        wanted = sessions.wanted("sales")
        assert wanted is not None
        assert (wanted.run, wanted.why, wanted.generation) == ("delete", "purge: logged_out", 2)
        assert (sessions.folder("sales") / "device.db").exists()
        assert purge(config).purged == {}, "the supervisor is at it"
    assert purge(config).purged == {"deleted": 1}
    assert sessions.ids() == []


def test_queued_messages_of_a_deleted_session_are_told_so(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", State.STOPPED, linked=True)
    job = enqueue(redis, "sales")
    sessions.want("sales", lambda wanted: dataclasses.replace(wanted, run="delete"))
    report = purge(config)
    assert (report.purged["deleted"], report.purged["jobs"]) == (1, 1)
    job = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    assert job.get_status() == "failed"
    assert job.meta["outcome"]["error"] == "session deleted"


def test_a_broken_record_hurts_nobody_else(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "bad", touched_at=0.0)
    make(sessions, "old", touched_at=0.0)
    (sessions.folder("bad") / "wanted.json").write_bytes(b"rubbish")
    report = purge(config)
    assert report.purged == {"never_linked": 1}
    assert report.skipped == [{"session": "bad", "why": "its record cannot be read"}]
    sessions.tombstones.add("bad", None, "operator", 5.0)
    assert purge(config).purged == {"deleted": 1}


# Leftovers


def test_leftovers_without_a_record_go(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    folder = sessions.folder("leftover")
    folder.mkdir()
    (folder / "wanted.json.lock").touch()
    (folder / "wanted.json.tmp").write_bytes(b"half")
    (config.data_dir / "sessions" / ".deleted-sales-12ab").mkdir()
    assert purge(config, time.time()).purged == {"files": 1}
    assert purge(config, time.time() + 301).purged == {"no_record": 1}
    assert list((config.data_dir / "sessions").iterdir()) == []


def test_codes_and_pairings_left_behind_go_and_those_in_use_stay(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    for id, state in (("idle", State.UNLINKED), ("linking", State.LINKING)):
        make(sessions, id, state)
        for name in ("link.json", "pairing.db", "pairing.db-journal"):
            (sessions.folder(id) / name).write_bytes(b"x")
    report = purge(config)
    assert report.purged == {"files": 2}
    assert not list(sessions.folder("idle").glob("pairing.db*"))
    assert not (sessions.folder("idle") / "link.json").exists()
    assert len(list(sessions.folder("linking").glob("pairing.db*"))) == 2


def test_damaged_files_that_were_kept_go_with_the_ledgers_old_rows(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales")
    old = sessions.folder("sales") / "wanted.json.corrupt-1"
    new = sessions.folder("sales") / "ledger.db.broken-2"
    for path, age_s in ((old, 91 * DAY), (new, 89 * DAY)):
        path.write_bytes(b"x")
        os.utime(path, (NOW - age_s, NOW - age_s))
    assert purge(config).purged == {"files": 1}
    assert new.exists()


def test_old_ledger_rows_go_once_a_day(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales", State.CONNECTED, linked=True)
    ledger = Ledger.open(sessions.folder("sales") / "ledger.db", "sales")

    def settled(id: str, at: float) -> None:
        ledger.record([(Claim(id, "h", "j", "r", at), Settlement(id, "expired", at=at))])

    settled("old", NOW - 91 * DAY)
    settled("young", NOW - 89 * DAY)
    assert purge(config).purged == {"ledger_rows": 1}
    assert ledger.counts() == {"expired": 1}
    settled("old", NOW - 91 * DAY)
    assert purge(config, NOW + 3600).purged == {}
    assert purge(config, NOW + DAY).purged == {"ledger_rows": 1}
    settled("old", NOW - 191 * DAY)
    assert purge(config, NOW - 100 * DAY).purged == {"ledger_rows": 1}, "the clock went back"
    ledger.close()


def test_queues_of_unknown_sessions_are_emptied_and_forgotten(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "sales")
    known, unknown = enqueue(redis, "sales"), enqueue(redis, "nobody")
    redis.rename("rq:queue:wa:out:nobody", "rq:queue:wa:out:nobody:intermediate")
    with FileLock(config.data_dir / "supervisor.lock"):
        assert purge(config).purged == {}, "its keeper does that"
    report = purge(config)
    assert report.purged == {"jobs": 1, "queues": 1}
    assert redis.smembers("rq:queues") == {b"rq:queue:wa:out:sales"}
    assert not redis.exists("rq:queue:wa:out:nobody:intermediate")
    assert Job.fetch(unknown.id, connection=redis, serializer=JSONSerializer).is_failed
    assert known.get_status() == "queued"


def test_a_queue_that_is_no_list_costs_the_others_nothing(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    for name in ("odd", "aaa-unknown"):
        redis.sadd("rq:queues", f"rq:queue:wa:out:{name}")
        redis.set(f"rq:queue:wa:out:{name}", "nonsense")
    make(sessions, "odd", touched_at=NOW - 301)
    make(sessions, "old", touched_at=NOW - 301)
    job = enqueue(redis, "nobody")
    report = purge(config)
    assert sessions.ids() == ["odd"]
    assert [skipped["session"] for skipped in report.skipped] == ["odd"]
    assert report.purged["jobs"] == 1 and report.is_complete
    assert job.get_status(refresh=True) == "failed"


def test_a_queue_name_that_is_no_text_costs_the_others_nothing(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    redis.sadd("rq:queues", b"rq:queue:caf\xe9", b"rq:queue:wa:out:caf\xe9")
    job = enqueue(redis, "nobody")
    report = purge(config)
    assert report.purged["jobs"] == 1 and report.is_complete
    assert job.get_status(refresh=True) == "failed"


def test_many_queues_are_emptied_over_few_connections(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    jobs = [enqueue(redis, f"s{number}") for number in range(120)]
    before = redis.info("stats")["total_connections_received"]
    report = purge(config)
    assert report.is_complete
    assert report.purged == {"jobs": len(jobs), "queues": len(jobs)}
    assert len(redis.client_list()) < 10
    assert redis.info("stats")["total_connections_received"] - before <= 4 * len(jobs)


def test_dead_workers_are_forgotten(config: Settings, sessions: Sessions, redis: "Redis") -> None:
    for registry in ("rq:workers", "rq:workers:wa:maintenance:here"):
        redis.sadd(registry, "rq:worker:wa-maintenance-1-dead", "rq:worker:wa-maintenance-2-alive")
        redis.sadd(registry, "rq:worker:somebody-elses")
    redis.hset("rq:worker:wa-maintenance-2-alive", "birth", "now")
    assert purge(config).purged == {"workers": 1}
    assert redis.smembers("rq:workers") == {
        b"rq:worker:wa-maintenance-2-alive",
        b"rq:worker:somebody-elses",
    }


# How


def test_a_dry_run_says_what_it_would_do_and_changes_nothing(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "old", touched_at=0.0)
    make(sessions, "out", State.LOGGED_OUT, linked=True, touched_at=0.0)
    enqueue(redis, "nobody")
    before, keys = tree(config.data_dir), sorted(redis.keys())
    report = purge(config, dry_run=True)
    assert report.purged == {"never_linked": 1, "logged_out": 1}
    after = {name: data for name, data in tree(config.data_dir).items() if "lock" not in name}
    assert after == {name: data for name, data in before.items() if "lock" not in name}
    assert sorted(redis.keys()) == keys


def test_two_purges_never_overlap(config: Settings, sessions: Sessions, redis: "Redis") -> None:
    with FileLock(config.data_dir / "purge.lock"), pytest.raises(AlreadyRunning) as raised:
        purge(config)
    assert raised.value.exit_code == 5


def test_a_run_that_is_cut_short_goes_on_where_it_stopped(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    for number in range(6):
        make(sessions, f"s{number}", State.FAILED, linked=True, touched_at=0.0)
    seen = []
    for _ in range(3):
        asked = iter([False] * 2)
        report = purge(config, is_stopping=lambda asked=asked: next(asked, True))
        assert not report.is_complete
        seen += [skipped["session"] for skipped in report.skipped]
    assert seen == [f"s{number}" for number in range(6)]
    assert purge(config).is_complete
    assert len(purge(config).skipped) == 6


def test_it_is_told_on_the_stream(config: Settings, sessions: Sessions, redis: "Redis") -> None:
    make(sessions, "old", touched_at=0.0)
    report = purge(config)
    ((_, fields),) = redis.xrange("wa:events")
    assert fields[b"event"] == b"purge.completed"
    payload = json.loads(fields[b"payload"])
    assert payload["purged"] == {"never_linked": 1}
    assert payload["bytes_freed"] == report.bytes_freed


def test_what_all_purges_did_is_counted(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    assert counters(config.data_dir) is None
    make(sessions, "one", touched_at=0.0)
    first = purge(config)
    make(sessions, "two", touched_at=0.0)
    second = purge(config, max_run_s=0.0)
    third = purge(config, NOW + 1)
    purge(config, NOW + 2, dry_run=True)
    freed = first.bytes_freed + second.bytes_freed + third.bytes_freed
    found = counters(config.data_dir)
    assert found is not None
    assert found.pop("duration_s") >= 0
    assert found == {
        "runs": 3,
        "incomplete": 1,
        "purged": {"never_linked": 2},
        "bytes_freed": freed,
        "last_at": NOW + 1,
    }
    (config.data_dir / "purge.json").write_bytes(b"garbage")
    purge(config)
    assert counters(config.data_dir)


def test_a_purge_killed_at_any_step_is_finished_by_the_next_and_brings_nothing_back(
    tmp_path: Path, server: RedisServer, redis: "Redis"
) -> None:
    step = 0
    while True:
        config = Settings(data_dir=tmp_path / str(step), redis_url=server.url, host="here")
        sessions = Sessions(config.data_dir)
        sessions.prepare()
        sessions.install_key()
        make(sessions, "out", State.LOGGED_OUT, linked=True, touched_at=0.0)
        make(sessions, "good", State.FAILED, linked=True)
        make(sessions, "gone", State.STOPPED, linked=True)
        sessions.want("gone", lambda wanted: dataclasses.replace(wanted, run="delete"))
        redis.flushall()
        job = enqueue(redis, "gone")
        said = [(AbstractConnection, "send_packed_command")]
        was_killed = faults.killed_at(step, lambda config=config: purge(config), also=said)
        buried = sessions.tombstones.find("out") is not None
        left = sessions.wanted("out")
        if buried:
            assert left is None or left.run == "delete"
        if not sessions.folder("out").exists():
            assert buried, "removed before it was remembered"
        report = purge(config)
        assert report.is_complete
        assert sessions.ids() == ["good"]
        assert sessions.tombstones.find("out") is not None
        assert sessions.tombstones.find("gone") is not None
        job.refresh()
        assert job.get_status(refresh=False) == "failed"
        assert job.meta["outcome"]["error"] == "session deleted"
        events = [fields for _, fields in redis.xrange("wa:events")]
        told = {fields[b"id"] for fields in events if fields[b"event"] == b"message.failed"}
        assert len(told) == 1, "told again, it is the same event"
        assert not redis.exists("rq:queue:wa:out:gone", "rq:queue:wa:out:gone:intermediate")
        assert sessions.wanted("good") is not None
        assert sorted(path.name for path in (config.data_dir / "sessions").iterdir()) == ["good"]
        assert not list(config.data_dir.rglob("*.tmp"))
        if not was_killed:
            break
        step += 1
    assert step > 50


@pytest.mark.parametrize("count", [500, 1000])
def test_a_purge_costs_little_for_each_session(
    config: Settings, sessions: Sessions, redis: "Redis", count: int
) -> None:
    wanted = {
        "version": 1,
        "generation": 1,
        "network": "sandbox",
        "run": "run",
        "created_at": NOW,
        "touched_at": NOW - 10 * DAY,
    }
    state = {"version": 1, "generation": 1, "state": "failed", "since": NOW, "jid": "5511@s"}
    for number in range(count):
        folder = sessions.folder(f"s{number}")
        folder.mkdir()
        (folder / "wanted.json").write_text(json.dumps(wanted))
        (folder / "state.json").write_text(json.dumps(state))
    stones = [{"id": f"t{n}", "number_hash": None, "why": "", "at": 1.0} for n in range(1000)]
    (config.data_dir / "tombstones.json").write_text(
        json.dumps({"version": 1, "tombstones": stones})
    )
    report = purge(config)
    assert len(report.skipped) == count
    print(f"{count} sessions: {report.duration_s:.2f} s")
    assert report.duration_s < count * 0.01  # some 0.0005 when nothing else runs


# The maintenance process


def test_a_purge_is_enqueued_once_in_each_slot(config: Settings, redis: "Redis") -> None:
    assert maintenance.enqueue_purge(redis, config, now=1800.0 * 5)
    assert not maintenance.enqueue_purge(redis, config, now=1800.0 * 5 + 1799)
    assert redis.llen("rq:queue:wa:maintenance:here") == 1
    assert maintenance.enqueue_purge(redis, config, now=1800.0 * 6)
    assert redis.llen("rq:queue:wa:maintenance:here") == 1, "the last one still waits"


def worked(config: Settings) -> None:
    loop = maintenance.Maintenance(config, stop=threading.Event())
    purge_job.bind(loop._purge)
    loop.work()


def test_the_maintenance_worker_runs_the_purge(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "old", touched_at=0.0)
    maintenance.enqueue_purge(redis, config, now=time.time())
    (id,) = redis.lrange("rq:queue:wa:maintenance:here", 0, -1)
    worked(config)
    job = Job.fetch(id.decode(), connection=redis, serializer=JSONSerializer)
    assert job.is_finished
    assert job.return_value()["purged"] == {"never_linked": 1}
    assert sessions.ids() == []
    assert redis.smembers("rq:workers") == set()


def test_it_refuses_everything_that_is_not_on_its_list(
    config: Settings, sessions: Sessions, redis: "Redis", tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    name = "wa:maintenance:here"
    json_queue = Queue(name, connection=redis, serializer=JSONSerializer)
    system = json_queue.enqueue("os.system", f"touch {victim}", description="x")
    callback = json_queue.enqueue(
        "jobs.purge.purge_sessions", description="x", on_success=Callback("os.getpid")
    )
    Queue(name, connection=redis).enqueue("os.system", f"touch {victim}", description="x")
    redis.rpush("rq:queue:wa:maintenance:here", "no-such-job", b"\xff")
    redis.hset("rq:job:bad", mapping={"status": "rubbish", "created_at": "rubbish"})
    redis.rpush("rq:queue:wa:maintenance:here", "bad")
    good = json_queue.enqueue("jobs.purge.purge_sessions", description="x")
    worked(config)
    assert not victim.exists()
    fetched = [
        Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
        for job in (system, callback, good)
    ]
    assert [job.get_status() for job in fetched] == ["failed", "finished", "finished"]
    assert redis.llen("rq:queue:wa:maintenance:here") == 0
    assert redis.llen("rq:queue:wa:maintenance:here:intermediate") == 0


def test_the_maintenance_process_works_and_ends_when_asked(
    config: Settings, sessions: Sessions, redis: "Redis"
) -> None:
    make(sessions, "old", touched_at=0.0)
    script = (
        "import os, sys; from whatsapp_worker import maintenance;"
        "from whatsapp_worker.settings import Settings;"
        "sys.exit(maintenance.run(Settings.read(os.environ)))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "DATA_DIR": str(config.data_dir),
        "REDIS_URL": str(config.redis_url),
        "WORKER_HOST": "here",
    }
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        maintenance.enqueue_purge(redis, config, now=time.time())
        eventually(lambda: sessions.ids() == [], what="the purge was run")
        process.terminate()
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()


# A model of it all


class World(RuleBasedStateMachine):
    """Sessions created, linked, logged out, deleted and purged while the clock jumps about."""

    folder: Path
    config: Settings

    @initialize()
    def begin(self) -> None:
        World.turn += 1
        config = dataclasses.replace(World.config, data_dir=World.folder / str(World.turn))
        self.settings = config
        self.sessions = Sessions(config.data_dir, max_tombstones=3)
        self.sessions.prepare()
        self.now = NOW
        self.model: dict[str, str] = {}  # id: unlinked, linked, logged_out
        self.stones: list[str] = []

    turn = 0
    IDS = st.sampled_from("abcde")

    @rule(id=IDS)
    def create(self, id: str) -> None:
        if id in self.model:
            return
        make(self.sessions, id, touched_at=self.now)
        self.model[id] = "unlinked"
        if id in self.stones:
            self.stones.remove(id)

    @rule(id=IDS, logged_out=st.booleans())
    def link(self, id: str, logged_out: bool) -> None:
        if id not in self.model:
            return
        state = State.LOGGED_OUT if logged_out else State.FAILED
        self.sessions.put_state(
            id,
            StateRecord(
                generation=1, state=state, since=self.now, touched_at=self.now, jid="1@s", phone="1"
            ),
        )
        self.sessions.want(id, lambda wanted: wanted, now=self.now)
        self.model[id] = "logged_out" if logged_out else "linked"

    @rule(id=IDS)
    def delete(self, id: str) -> None:
        if id in self.model:
            self.sessions.want(id, lambda wanted: dataclasses.replace(wanted, run="delete"))
            self.purge()

    @rule(by_s=st.sampled_from([10.0, 400.0, 8 * DAY, -10.0, -8 * DAY, 1e9, -1e9]))
    def jump(self, by_s: float) -> None:
        self.now += by_s

    @rule()
    def purge(self) -> None:
        gone = []
        for id in sorted(self.model):
            wanted, state = self.sessions.wanted(id), self.sessions.state(id)
            assert wanted is not None
            assert state is not None
            idle_s = self.now - max(wanted.touched_at, state.touched_at)
            limits = {"unlinked": 300, "logged_out": 7 * DAY, "linked": float("inf")}
            if wanted.run == "delete" or idle_s >= limits[self.model[id]]:
                gone.append(id)
        purge(self.settings, self.now)
        for id in gone:
            if self.model.pop(id) != "unlinked":
                self.stones = [*self.stones, id][-3:]

    @invariant()
    def what_is_there_is_what_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        assert self.sessions.ids() == sorted(self.model)
        assert [stone.id for stone in self.sessions.tombstones.all()] == self.stones
        assert not set(self.stones) & set(self.model)


def test_sessions_come_and_go_as_the_model_says(
    config: Settings, redis: "Redis", tmp_path: Path
) -> None:
    World.folder, World.config = tmp_path, config
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=25,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
