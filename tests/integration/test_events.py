"""Receipts: from the client's thread onto the stream, and from there into the ledger."""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import postgres
import pytest
from redis import Redis
from redis.exceptions import ResponseError
from sending import (
    SESSION,
    FakeDevice,
    Parts,
    Running,
    enqueue,
    fetch,
    kill,
    outcome,
    terminate,
)
from support import RedisServer, events, eventually

from storage import sqlite_files
from storage.errors import LedgerBroken
from storage.ledger import Claim, Ledger, Settlement
from storage.ledger import Receipt as Kept
from storage.sessions import Sessions
from whatsapp_worker import device_process, redis_client
from whatsapp_worker import events as events_module
from whatsapp_worker.consumer import Ending
from whatsapp_worker.device_process import DeviceProcess
from whatsapp_worker.event_names import Event
from whatsapp_worker.events import ReceiptWriter
from whatsapp_worker.events import run as serve
from whatsapp_worker.facts import Inbound, Receipt, ReceiptKind
from whatsapp_worker.receipts import MAX_WAITING, FactWriter
from whatsapp_worker.reports import Channel, Exit
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream


def receipt(*ids: str, kind: ReceiptKind = ReceiptKind.DELIVERED) -> Receipt:
    chat = "182736451928@lid"
    return Receipt(kind, ids, chat=chat, sender=chat, phone="5511999990001", at=1000.0)


@contextmanager
def writing(url: str, *, ledger: Ledger | None = None) -> Iterator[FactWriter]:
    writer = FactWriter(SESSION, EventStream(redis_client.connect(url)), ledger=ledger)
    writer.start()
    yield writer
    writer.close(timeout_s=5)


@contextmanager
def session_folder(data: Path) -> Iterator[Path]:
    sessions = Sessions(data)
    sessions.create(SESSION, network="sandbox", now=time.time())
    yield sessions.folder(SESSION)


@contextmanager
def serving(url: str, data: Path) -> Iterator[None]:
    """The events process, as a thread."""
    stop = threading.Event()
    settings = Settings(data_dir=data, redis_url=url)
    writer = ReceiptWriter(redis_client.connect(url), settings, stop=stop)
    thread = threading.Thread(target=writer.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def claimed(ledger: Ledger, message_id: str) -> None:
    claim = Claim(message_id, "hash", f"job-{message_id}", "number", time.time())
    ledger.claim(claim, secret=lambda attempt: b"s" * 32)


def has_status(ledger: Ledger, message_id: str, status: str) -> bool:
    row = ledger.find(message_id)
    return row is not None and row.status == status


def test_receipts_outlive_a_process_that_ends_while_redis_is_away(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db", SESSION)
    with writing(redis_server.url, ledger=ledger) as writer:
        redis_server.kill()
        writer.offer(receipt("WA1"))
        writer.offer(receipt("WA2", "WA3"))
    kept = [(kept.wa_message_id, kept.status) for kept in ledger.pending_receipts()]
    assert sorted(kept) == [("WA1", "delivered"), ("WA2", "delivered"), ("WA3", "delivered")]
    ledger.close()


def test_receipts_outlive_a_process_that_ends_while_redis_hangs(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    stream = EventStream(redis_client.connect(redis_server.url, timeout_s=600))
    with closing(Ledger.open(tmp_path / "ledger.db", SESSION)) as ledger:
        writer = FactWriter(SESSION, stream, ledger=ledger)
        writer.start()
        redis_server.pause()
        writer.offer(receipt("WA1"))
        writer.sent("WA1", "m1")
        writer.offer(receipt("WA2", "WA3"))
        writer.close(timeout_s=1)
        kept = eventually(ledger.pending_receipts, within_s=10)
        redis_server.resume()
    assert sorted(one.wa_message_id for one in kept) == ["WA1", "WA2", "WA3"]


def test_what_redis_does_not_take_in_time_is_left_to_the_ledger(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    with closing(Ledger.open(tmp_path / "ledger.db", SESSION)) as ledger:
        redis = redis_server.client()
        writer = FactWriter(SESSION, EventStream(redis), ledger=ledger)
        writer.start()
        for number in range(5000):
            writer.offer(receipt(f"WA{number}"))
        writer.close(timeout_s=0)

        def heard() -> set[str]:
            told = {entry["payload"]["wa_message_id"] for entry in events(redis)}
            return told | {one.wa_message_id for one in ledger.pending_receipts()}

        newest = {f"WA{number}" for number in range(3200, 5000)}  # the ledger keeps some 2,000
        eventually(lambda: newest <= heard())


def test_what_was_heard_is_written_whatever_ends_the_process(
    redis: Redis,
    shared_redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, session_folder(tmp_path), writing(shared_redis_server.url) as writer:
        process = DeviceProcess(SESSION, Channel(theirs), Settings(data_dir=tmp_path))

        def opened() -> bool:
            process._writer = writer
            writer.offer(receipt("WA1"))
            eventually(lambda: events(redis))
            writer.offer(receipt("WA2"))  # it waits for others
            raise LedgerBroken("damaged")

        monkeypatch.setattr(device_process, "Leash", lambda *_, **__: threading.Thread())
        monkeypatch.setattr(process, "_open", opened)
        _, code = process.run()
        assert code == Exit.STORE_BROKEN
        assert [entry["payload"]["wa_message_id"] for entry in events(redis)] == ["WA1", "WA2"]


def test_receipts_of_what_the_phone_sent_do_not_keep_the_ledger_busy(
    redis: Redis,
    shared_redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    with closing(Ledger.open(tmp_path / "ledger.db", SESSION)) as ledger:
        monkeypatch.setattr(ledger, "find_by_wa_id", asked.append)
        with writing(shared_redis_server.url, ledger=ledger) as writer:
            for _ in range(1000):
                writer.offer(receipt("WA-of-the-phone"))
            eventually(lambda: redis.xlen("wa:events") == 1000)
    assert len(asked) < 100, "once in a while is enough"


def test_a_receipt_names_the_message_of_the_crm(
    redis: Redis, shared_redis_server: RedisServer
) -> None:
    with writing(shared_redis_server.url) as writer:
        writer.sent("WA1", "m1")
        writer.offer(receipt("WA1"))
        [entry] = eventually(lambda: events(redis))
    assert entry["event"] == "message.delivered"
    assert entry["payload"]["message_id"] == "m1"
    assert entry["payload"]["wa_message_id"] == "WA1"


@pytest.mark.parametrize(
    ("phone", "wa_id", "told"),
    [
        ("5511999990001", "5511999990009", "5511999990001"),
        ("", "5511999990009", "5511999990009"),
        ("", "120363000000000001@g.us", "182736451928@lid"),
        ("", None, "182736451928@lid"),
    ],
)
def test_a_hidden_id_is_never_told_as_a_number(
    redis: Redis, shared_redis_server: RedisServer, phone: str, wa_id: str | None, told: str
) -> None:
    with writing(shared_redis_server.url) as writer:
        writer.sent("WA1", "m1", wa_id=wa_id)
        sender = "182736451928:3@lid"
        writer.offer(Receipt(ReceiptKind.READ, ("WA1",), sender, sender, phone, 1.0))
        writer.offer(Inbound("WA2", sender, sender, phone, "Ana", "text", "Hi", 2.0))
        read, received = eventually(lambda: len(events(redis)) == 2 and events(redis))
    assert read["payload"]["wa_id"] == told
    assert received["payload"]["from"] == (phone or "182736451928@lid")


def test_a_receipt_that_overtakes_its_send_still_names_the_message(
    redis: Redis, shared_redis_server: RedisServer
) -> None:
    with writing(shared_redis_server.url) as writer:
        writer.offer(receipt("WA1"))
        writer.offer(receipt("WA1", kind=ReceiptKind.READ))
        time.sleep(0.1)
        writer.sent("WA1", "m1")
        found = eventually(lambda: len(events(redis)) == 2 and events(redis))
    assert [entry["event"] for entry in found] == ["message.delivered", "message.read"]
    assert {entry["payload"]["message_id"] for entry in found} == {"m1"}


def test_a_receipt_for_an_earlier_process_is_looked_up_in_the_ledger(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path
) -> None:
    ledger = Ledger.open(tmp_path / "ledger.db", SESSION)
    claimed(ledger, "m1")
    ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=1.0))
    with writing(shared_redis_server.url, ledger=ledger) as writer:
        writer.offer(receipt("WA1"))
        [entry] = eventually(lambda: events(redis))
    assert entry["payload"]["message_id"] == "m1"


def test_a_receipt_for_nobodys_message_is_told_without_one(
    redis: Redis, shared_redis_server: RedisServer
) -> None:
    with writing(shared_redis_server.url) as writer:
        writer.offer(receipt("WA-of-the-phone"))
        [entry] = eventually(lambda: events(redis))
    assert entry["payload"]["message_id"] is None


def test_a_frozen_database_does_not_hold_up_receipts(
    redis: Redis,
    shared_redis_server: RedisServer,
    postgres_server: postgres.Server | None,
    postgres_url: str,
) -> None:
    if postgres_server is None:
        pytest.skip("freezing a PostgreSQL needs its programs here: initdb and postgres")
    with (
        postgres.fresh_schema(postgres_server.url, "frozen") as location,
        closing(Ledger.open(location, SESSION, timeout_s=2)) as ledger,
        writing(shared_redis_server.url, ledger=ledger) as writer,
    ):
        claimed(ledger, "m1")
        ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=1.0))
        with postgres_server.frozen():
            writer.offer(receipt(*(f"WA{n}" for n in range(50))))
            eventually(lambda: len(events(redis)) == 50, within_s=20)

        def is_named() -> bool:
            writer.offer(receipt("WA1", kind=ReceiptKind.READ))
            return events(redis)[-1]["payload"]["message_id"] == "m1"

        eventually(is_named, what="the ledger is asked again")


def test_an_inbound_text_reaches_the_stream_under_a_stable_id(
    redis: Redis, shared_redis_server: RedisServer
) -> None:
    fact = Inbound("WA9", "1@lid", "1@lid", "5511999990001", "Ana", "text", "Oi", 5.0)
    with writing(shared_redis_server.url) as writer:
        writer.offer(fact)
        writer.offer(fact)
        first, second = eventually(lambda: len(events(redis)) == 2 and events(redis))
    assert first["event"] == "message.received"
    assert first["payload"]["text"] == "Oi"
    assert first["payload"]["from"] == "5511999990001"
    assert first["id"] == second["id"]


def test_facts_wait_for_redis_and_never_block_the_client(redis_server: RedisServer) -> None:
    with writing(redis_server.url) as writer:
        redis_server.kill()
        begun = time.monotonic()
        for number in range(MAX_WAITING + 500):
            writer.offer(receipt(f"WA{number}"))
            writer.sent(f"WA{number}", f"m{number}")
        assert time.monotonic() - begun < 5
        redis_server.start()
        redis = redis_server.client()
        eventually(lambda: redis.xlen("wa:events") >= 1000, within_s=30)


def test_receipts_reach_the_ledger_and_are_acknowledged_afterwards(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path
) -> None:
    stream = EventStream(redis)
    with session_folder(tmp_path) as folder, serving(shared_redis_server.url, tmp_path):
        ledger = Ledger.open(folder / "ledger.db", SESSION)
        claimed(ledger, "m1")
        ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=1.0))
        for event in (Event.DELIVERED, Event.READ, Event.DELIVERED):
            stream.add(event, SESSION, {"wa_message_id": "WA1", "at": 2.0})
        eventually(lambda: has_status(ledger, "m1", "read"))
        eventually(lambda: redis.xpending("wa:events", "ledger")["pending"] == 0)
        ledger.close()


def test_rubbish_on_the_stream_and_unknown_sessions_do_not_stop_it(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path
) -> None:
    stream = EventStream(redis)
    redis.xadd("wa:events", {"nonsense": "1"})
    for payload in (
        "{",
        "[" * 100_000,
        '{"wa_message_id": "WA1", "at": 1' + "0" * 400 + "}",
        '{"wa_message_id": "\\ud800", "at": 2.0}',
        '{"wa_message_id": "\\u0000", "at": 2.0}',
    ):
        redis.xadd("wa:events", {"event": "message.read", "session": SESSION, "payload": payload})
    stream.add(Event.DELIVERED, "../../etc", {"wa_message_id": "WA1", "at": 2.0})
    stream.add(Event.DELIVERED, "nobody", {"wa_message_id": "WA1", "at": 2.0})
    with session_folder(tmp_path) as folder, serving(shared_redis_server.url, tmp_path):
        ledger = Ledger.open(folder / "ledger.db", SESSION)
        claimed(ledger, "m1")
        ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=1.0))
        stream.add(Event.DELIVERED, SESSION, {"wa_message_id": "WA1", "at": 2.0})
        eventually(lambda: has_status(ledger, "m1", "delivered"))
        eventually(lambda: redis.xpending("wa:events", "ledger")["pending"] == 0)
        ledger.close()


def test_a_receipt_before_its_message_is_kept_and_applied_later(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path
) -> None:
    with session_folder(tmp_path) as folder, serving(shared_redis_server.url, tmp_path):
        ledger = Ledger.open(folder / "ledger.db", SESSION)
        claimed(ledger, "m1")
        EventStream(redis).add(Event.DELIVERED, SESSION, {"wa_message_id": "WA1", "at": 2.0})
        eventually(lambda: ledger.pending_receipts())
        ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=1.0))
        eventually(lambda: has_status(ledger, "m1", "delivered"))
        ledger.close()


@contextmanager
def unusable(ledger: Path, how: str) -> Iterator[None]:
    """For now: damaged and not repaired yet, or upgraded by newer software."""
    content = ledger.read_bytes()
    if how == "damaged":
        _replace(ledger, b"x" * 4096 + content[4096:])
    else:
        with closing(sqlite3.connect(ledger)) as connection, connection:
            connection.execute("UPDATE ledger_version SET version_num = '9999'")
    yield
    _replace(ledger, content)


def _replace(path: Path, content: bytes) -> None:
    other = path.with_name("other.db")
    other.write_bytes(content)
    other.rename(path)


@pytest.fixture
def ledger_path(tmp_path: Path) -> Iterator[Path]:
    """Of a session whose message `m1` was sent; closed."""
    with session_folder(tmp_path) as folder:
        with closing(Ledger.open(folder / "ledger.db", SESSION)) as ledger:
            claimed(ledger, "m1")
            ledger.receipts([Kept("WA1", "delivered", 2.0)], now=time.time())  # it overtook
            ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=1.0))
        yield folder / "ledger.db"


@pytest.mark.parametrize("how", ["damaged", "newer"])
def test_receipts_wait_for_a_ledger_that_cannot_be_used_yet(
    redis: Redis,
    shared_redis_server: RedisServer,
    tmp_path: Path,
    ledger_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    with ExitStack() as stack:
        with unusable(ledger_path, how):
            stack.enter_context(serving(shared_redis_server.url, tmp_path))
            for count in (1, 2):
                EventStream(redis).add(Event.READ, SESSION, {"wa_message_id": "WA1", "at": 2.0})
                eventually(lambda count=count: pending(redis) == count)
        ledger = stack.enter_context(closing(Ledger.open(ledger_path, SESSION)))
        eventually(lambda: has_status(ledger, "m1", "read"))
        eventually(lambda: pending(redis) == 0)
    assert caplog.messages.count("events.ledger_failed") == 1


def test_what_waits_for_one_ledger_holds_up_nobody_else_however_much_it_is(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path, ledger_path: Path
) -> None:
    sessions = Sessions(tmp_path)
    sessions.create("other", network="sandbox", now=time.time())
    other_path = sessions.folder("other") / "ledger.db"
    with ExitStack() as stack:
        other = stack.enter_context(closing(Ledger.open(other_path, "other")))
        claimed(other, "m2")
        other.settle(Settlement("m2", "sent", wa_message_id="WA2", at=1.0))
        stream = EventStream(redis)
        redis.xgroup_create("wa:events", "ledger", id="0", mkstream=True)
        read = {"wa_message_id": "WA1", "at": 2.0}
        many = [stream.entry(Event.READ, SESSION, read, id=str(n)) for n in range(1200)]
        with unusable(ledger_path, "newer"):
            stream.add_many(many)
            stream.add(Event.READ, "other", {"wa_message_id": "WA2", "at": 2.0})
            # Read and not acknowledged, by the process before.
            name = Settings(data_dir=tmp_path).host
            redis.xreadgroup("ledger", name, {"wa:events": ">"}, count=len(many) + 1)
            stack.enter_context(serving(shared_redis_server.url, tmp_path))
            eventually(lambda: has_status(other, "m2", "read"))
            eventually(lambda: pending(redis) == len(many))  # the commit comes before the XACK
        eventually(lambda: pending(redis) == 0)


@pytest.mark.parametrize("how", ["damaged", "newer"])
def test_receipts_that_were_kept_wait_for_a_ledger_that_cannot_be_used_yet(
    redis: Redis,
    shared_redis_server: RedisServer,
    tmp_path: Path,
    ledger_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    with ExitStack() as stack:
        with unusable(ledger_path, how):
            stack.enter_context(serving(shared_redis_server.url, tmp_path))
            eventually(lambda: "events.ledger_failed" in caplog.messages)
        ledger = stack.enter_context(closing(Ledger.open(ledger_path, SESSION)))
        eventually(lambda: has_status(ledger, "m1", "delivered"))


def pending(redis: Redis) -> int:
    """Read by the events process and not acknowledged."""
    try:
        return int(redis.xpending("wa:events", "ledger")["pending"])
    except ResponseError:  # there is no group yet
        return 0


def test_a_receipt_settles_an_unknown_message_in_ledger_job_and_events(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path
) -> None:
    url = shared_redis_server.url
    with session_folder(tmp_path) as folder, serving(url, tmp_path):
        enqueue(redis, "m1")
        device = FakeDevice(folder, takes_s=30)
        with Running(Parts(url, folder, device=device, send_timeout_s=0.3)) as running:
            assert running.join() is Ending.SEND_HUNG
        with Running(Parts(url, folder)) as running:
            assert outcome(redis, "m1")["status"] == "unknown"
            assert fetch(redis, "m1").get_status() == "failed"
            wa_message_id = outcome(redis, "m1")["wa_message_id"]
            payload = {"wa_message_id": wa_message_id, "at": 2.0}
            EventStream(redis).add(Event.DELIVERED, SESSION, payload)
            eventually(lambda: fetch(redis, "m1").get_status() == "finished")
            assert has_status(running.parts.ledger, "m1", "delivered")
        told = outcome(redis, "m1")
        assert (told["status"], told["error"]) == ("delivered", None)
        assert redis.zscore("rq:failed:wa:out:s1", "job-m1") is None
        eventually(lambda: [e["event"] for e in events(redis)].count("message.sent") == 1)


def test_a_killed_events_process_loses_no_receipt(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    redis = redis_server.client()
    stream = EventStream(redis)
    settings = Settings(data_dir=tmp_path, redis_url=redis_server.url, host="h")
    with session_folder(tmp_path) as folder:
        ledger = Ledger.open(folder / "ledger.db", SESSION)
        ids = [f"m{number}" for number in range(300)]
        for id in ids:
            claimed(ledger, id)
            ledger.settle(Settlement(id, "sent", wa_message_id=f"WA-{id}", at=1.0))
            stream.add(Event.DELIVERED, SESSION, {"wa_message_id": f"WA-{id}", "at": 2.0})
        ledger.close()
        # Read and not acknowledged, by a process that died long ago.
        redis.xgroup_create("wa:events", "ledger", id="0")
        redis.xreadgroup("ledger", "dead", {"wa:events": ">"}, count=100)
        pending = redis.xpending_range("wa:events", "ledger", "-", "+", 100)
        oldest = [entry["message_id"] for entry in pending]
        redis.xclaim("wa:events", "ledger", "dead", 0, oldest, idle=120_000)
        for _ in range(5):
            pid = fork_events(settings)
            time.sleep(0.05)
            kill(pid)
        pid = fork_events(settings)
        ledger = Ledger.open(folder / "ledger.db", SESSION)
        eventually(lambda: ledger.counts().get("delivered") == 300)
        eventually(lambda: redis.xpending("wa:events", "ledger")["pending"] == 0)
        assert terminate(pid) == 0
        ledger.close()


def test_a_stop_is_heeded_though_ledgers_are_locked(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    redis = redis_server.client()
    settings = Settings(
        data_dir=tmp_path, redis_url=redis_server.url, host="h", shutdown_timeout_s=6
    )
    with ExitStack() as stack:
        sessions = Sessions(tmp_path)
        for session in ("a", "b", "c"):
            sessions.create(session, network="sandbox", now=time.time())
            path = sessions.folder(session) / "ledger.db"
            Ledger.open(path, session).close()
            other = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
            other.execute("BEGIN EXCLUSIVE")
            EventStream(redis).add(Event.READ, session, {"wa_message_id": "WA1", "at": 2.0})
        pid = fork_events(settings)
        eventually(lambda: pending(redis) == 3)
        began = time.monotonic()
        assert terminate(pid) == 0
        assert time.monotonic() - began < settings.shutdown_timeout_s


def fork_events(settings: Settings) -> int:
    pid = os.fork()
    if not pid:
        os._exit(serve(settings))
    return pid


def test_the_stream_is_trimmed_behind_its_slowest_group(redis: Redis) -> None:
    stream = EventStream(redis, events_max=1000)
    redis.xgroup_create("wa:events", "slow", id="0", mkstream=True)
    redis.xgroup_create("wa:events", "fast", id="0")
    for _ in range(900):
        stream.add(Event.SENT, SESSION, {})
    redis.xreadgroup("fast", "a", {"wa:events": ">"}, count=900, noack=True)
    assert stream.trim() == 0.9
    assert redis.xlen("wa:events") == 900
    redis.xreadgroup("slow", "a", {"wa:events": ">"}, count=500)
    assert stream.trim() == 0.9  # read, but not acknowledged
    ids = [e["message_id"] for e in redis.xpending_range("wa:events", "slow", "-", "+", 500)]
    redis.xack("wa:events", "slow", *ids)
    assert 0.69 <= stream.trim() <= 0.8


def test_the_stream_never_grows_beyond_its_ceiling(redis: Redis) -> None:
    stream = EventStream(redis, events_max=1000)
    redis.xgroup_create("wa:events", "dead", id="0", mkstream=True)
    for _ in range(1050):
        stream.add(Event.SENT, SESSION, {})
    assert redis.xlen("wa:events") == 1000
    assert stream.trim() == 1.0


def test_a_ledger_is_looked_through_for_damage_when_its_file_is_new_to_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(tmp_path)
    sessions.prepare()
    looked: list[str] = []
    problems = sqlite_files.problems

    def look(path: Path, **limit: Any) -> list[str]:
        looked.append(path.parent.name)
        return problems(path, **limit)

    monkeypatch.setattr(sqlite_files, "problems", look)
    monkeypatch.setattr(events_module, "_OPEN_LEDGERS", 1)
    for name in ("one", "two"):
        sessions.create(name, network="sandbox", now=1.0)
        Ledger.open(sessions.folder(name) / "ledger.db", name).close()
    looked.clear()
    ledgers = events_module._Ledgers(Settings(data_dir=tmp_path))
    for _ in range(3):  # each time the other one's place is needed
        assert ledgers.get("one") is not None and ledgers.get("two") is not None
    assert looked == ["one", "two"]
    ledgers.close()
    path = sessions.folder("one") / "ledger.db"
    path.rename(path.with_name("kept"))  # so that its inode is not taken again
    Ledger.open(path, "one").close()
    looked.clear()
    assert ledgers.get("one") is not None
    ledgers.close()
    assert looked == ["one"]
