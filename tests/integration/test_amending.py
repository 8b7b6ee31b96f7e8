"""A message that nobody knew to be sent turns out to be, or not to be: afterwards ledger, job and
events say the same. On SQLite and PostgreSQL."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sending import KEY, SESSION, FakeDevice, Parts, Running, enqueue, fetch, outcome
from support import RedisServer, events, eventually

from storage import ledger as ledger_module
from storage.ledger import Ledger, Row
from storage.sessions import Sessions
from whatsapp_worker import cli, redis_client
from whatsapp_worker.cancelling import cancel
from whatsapp_worker.consumer import Ending
from whatsapp_worker.device import SendFailed
from whatsapp_worker.event_names import Event
from whatsapp_worker.events import ReceiptWriter
from whatsapp_worker.keys import LEDGER_GROUP
from whatsapp_worker.rq_job import RELEASED
from whatsapp_worker.settings import Settings
from whatsapp_worker.stream import EventStream

METADATA = {"deal": 7}
FAILED, FINISHED = "rq:failed:wa:out:s1", "rq:finished:wa:out:s1"


class Host:
    """A host whose only session has one message, m1, of which WhatsApp's answer never came."""

    def __init__(self, redis: Redis, url: str, data: Path, location: str | Path) -> None:
        self.redis = redis
        self.url = url
        database = None if isinstance(location, Path) else location
        self.settings = Settings(data_dir=data, redis_url=url, database_url=database, host="h")
        sessions = Sessions(data)
        sessions.prepare()
        sessions.create(SESSION, network="sandbox", now=time.time())
        self.folder = sessions.folder(SESSION)
        self.location = database or self.folder / "ledger.db"

    def parts(self, **more: Any) -> Parts:
        return Parts(self.url, self.folder, location=self.location, **more)

    def lose_an_answer(self, **options: Any) -> None:
        enqueue(self.redis, "m1", metadata=METADATA, **options)
        device = FakeDevice(self.folder, takes_s=30)
        with Running(self.parts(device=device, send_timeout_s=0.3)) as running:
            assert running.join() is Ending.SEND_HUNG

    def recover(self) -> None:
        parts = self.parts()
        assert parts.recover()
        parts.close()

    def row(self) -> Row:
        ledger = Ledger.open(self.location, SESSION)
        row = ledger.find("m1")
        ledger.close()
        assert row is not None
        return row

    def told(self) -> list[str]:
        """The events, in order; each names the message and repeats its metadata."""
        names = []
        for entry in events(self.redis):
            payload = entry["payload"]
            assert (payload["message_id"], payload["metadata"]) == ("m1", METADATA)
            assert payload["job_id"] == "job-m1"
            names.append(entry["event"])
        return names

    def receive(self, kind: Event = Event.DELIVERED) -> None:
        """Whom the message reached says so."""
        [id] = FakeDevice(self.folder).handed_over([self.secret]).values()
        payload = {"wa_message_id": id, "at": time.time(), "message_id": "m1"}
        payload |= {"metadata": METADATA, "job_id": "job-m1"}  # for `told`
        EventStream(self.redis).add(kind, SESSION, payload)

    @property
    def secret(self) -> bytes:
        rows = (json.loads(line) for line in (self.folder / "handed_over").open())
        return bytes.fromhex(next(rows)["secret"])

    def read_receipts(self) -> None:
        """The events process, for as long as it takes."""
        with reading(self) as writer:
            while writer._redis.xpending("wa:events", LEDGER_GROUP)["pending"] or unread(self):
                writer._turn()


def unread(host: Host) -> bool:
    [group] = host.redis.xinfo_groups("wa:events")
    last = host.redis.xinfo_stream("wa:events")["last-generated-id"]
    return bool(group["last-delivered-id"] != last)


@contextmanager
def reading(host: Host) -> Iterator[ReceiptWriter]:
    writer = ReceiptWriter(redis_client.connect(host.url), host.settings, stop=threading.Event())
    writer._join()
    yield writer
    writer._ledgers.close()


@pytest.fixture
def host(
    redis: Redis, shared_redis_server: RedisServer, tmp_path: Path, location: str | Path
) -> Host:
    return Host(redis, shared_redis_server.url, tmp_path, location)


def agrees(host: Host, status: str) -> None:
    """Everybody says the same of m1, and RQ's bookkeeping fits."""
    job = fetch(host.redis, "m1")
    is_sent = status not in ("failed", "unknown")
    assert host.row().status == outcome(host.redis, "m1")["status"] == status
    assert outcome(host.redis, "m1")["wa_message_id"] == host.row().wa_message_id
    assert job.get_status() == ("finished" if is_sent else "failed")
    here, there = (FINISHED, FAILED) if is_sent else (FAILED, FINISHED)
    assert host.redis.zscore(there, "job-m1") is None
    expires_at = host.redis.zscore(here, "job-m1")
    assert expires_at == pytest.approx(time.time() + host.redis.ttl("rq:job:job-m1"), abs=2)
    assert 0 < host.redis.ttl("rq:results:job-m1") <= 3600
    result = job.latest_result()
    assert result is not None
    assert (result.return_value or {}).get("status", "") == (status if is_sent else "")
    assert is_sent or result.exc_string.startswith(f"{status}: ")


def resolve(host: Host, word: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("DATA_DIR", str(host.settings.data_dir))
    monkeypatch.setenv("REDIS_URL", host.url)
    if host.settings.database_url:
        monkeypatch.setenv("DATABASE_URL", host.settings.database_url)
    return cli.main(["messages", "resolve", SESSION, "m1", word])


@pytest.mark.parametrize("word", ["sent", "failed"])
def test_an_operators_word_is_everybodys(
    host: Host, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.lose_an_answer()
    host.recover()
    agrees(host, "unknown")
    assert resolve(host, word, monkeypatch) == 0
    agrees(host, word)
    assert host.told() == ["message.unknown", f"message.{word}"]
    assert resolve(host, word, monkeypatch) == 0, "harmless"
    assert host.told() == ["message.unknown", f"message.{word}"]
    assert resolve(host, "failed" if word == "sent" else "sent", monkeypatch) != 0
    agrees(host, word)


def test_an_operators_word_is_told_though_its_job_is_gone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.lose_an_answer()
    host.recover()
    host.redis.delete("rq:job:job-m1")
    assert resolve(host, "failed", monkeypatch) == 0
    assert host.row().status == "failed"
    assert host.told() == ["message.unknown", "message.failed"]
    assert not host.redis.exists("rq:job:job-m1"), "none was made up"


def test_a_receipt_is_everybodys_word(host: Host) -> None:
    host.lose_an_answer()
    host.recover()
    host.receive()
    host.read_receipts()
    agrees(host, "delivered")
    host.receive(Event.READ)
    host.read_receipts()
    assert host.told() == [
        *("message.unknown", "message.delivered", "message.sent"),
        "message.read",
    ]


def test_a_receipt_after_an_operators_no_is_the_stronger_word(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.lose_an_answer()
    host.recover()
    assert resolve(host, "failed", monkeypatch) == 0
    host.receive()
    host.read_receipts()
    agrees(host, "delivered")
    assert host.told()[-2:] == ["message.delivered", "message.sent"]


def test_a_receipt_whose_message_has_no_job_any_more_is_told(host: Host) -> None:
    host.lose_an_answer()
    host.recover()
    host.redis.delete("rq:job:job-m1")
    host.receive()
    host.read_receipts()
    host.receive(Event.READ)
    host.read_receipts()
    assert host.row().status == "read"
    assert host.told().count("message.sent") == 1


def test_a_job_whose_meta_is_long_is_amended_like_any_other(host: Host) -> None:
    note = "ж" * 16_000
    host.redis.hset("rq:job:job-m1", "meta", json.dumps({"note": note}, ensure_ascii=False))
    host.lose_an_answer()
    host.recover()
    host.receive()
    host.read_receipts()
    agrees(host, "delivered")
    assert fetch(host.redis, "m1").meta["note"] == note


def test_killed_between_ledger_and_job_the_next_process_tells_it(host: Host) -> None:
    host.lose_an_answer()
    host.recover()
    host.receive()
    with reading(host) as writer:  # it reads, commits, and gets no further
        [(_, fields)] = [e for e in writer._read(">") if e[1][b"event"] == b"message.delivered"]
        ledger = Ledger.open(host.location, SESSION)
        ledger.receipt(json.loads(fields[b"payload"])["wa_message_id"], "delivered", time.time())
        ledger.close()
    assert outcome(host.redis, "m1")["status"] == "unknown"
    host.read_receipts()
    agrees(host, "delivered")
    assert host.told() == ["message.unknown", "message.delivered", "message.sent"]


def test_killed_after_a_kept_receipt_was_applied_the_next_process_tells_it(host: Host) -> None:
    host.lose_an_answer()
    host.recover()
    host.receive()
    ledger = Ledger.open(host.location, SESSION)
    wa_message_id = host.row().wa_message_id
    assert wa_message_id
    with ledger._database.transaction() as transaction:  # it was read before its message had an id
        values = {"session": SESSION, "wa_message_id": wa_message_id, "status": "delivered"}
        now = time.time()
        transaction.execute(ledger_module._KEEP_RECEIPT, {**values, "at": now, "kept_at": now})
    receipts, changes = ledger.apply_pending(now=time.time())  # and killed here
    ledger.close()
    assert (len(receipts), len(changes)) == (1, 1)
    assert outcome(host.redis, "m1")["status"] == "unknown"
    host.read_receipts()
    agrees(host, "delivered")
    assert host.told().count("message.sent") == 1


def test_a_receipt_read_while_recovery_is_under_way_is_not_forgotten(host: Host) -> None:
    host.lose_an_answer()
    parts = host.parts()
    exchange = parts.outbox.exchange

    def late(finished: Any = (), **more: Any) -> None:
        """A receipt comes after the ledger was asked and before the job says anything."""
        if finished:
            host.receive()
            host.read_receipts()
        exchange(finished, **more)

    parts.outbox.exchange = late  # type: ignore[method-assign]
    assert parts.recover()
    parts.close()
    agrees(host, "delivered")
    assert host.told()[-1] == "message.sent"


def test_what_may_have_arrived_before_is_not_failed_when_it_is_refused_now(host: Host) -> None:
    host.lose_an_answer(on_unknown="resend")
    with Running(host.parts(device=Refusing(host.folder, "server returned error 400"))):
        eventually(host.told)
    agrees(host, "unknown")
    assert host.told() == ["message.unknown"]
    host.receive()
    host.read_receipts()
    agrees(host, "delivered")
    assert host.told()[-1] == "message.sent"


def test_what_may_have_arrived_before_is_not_cancelled_when_it_waits_again(host: Host) -> None:
    host.lose_an_answer(on_unknown="resend")
    device = Refusing(host.folder, "failed to send message node: websocket not connected")
    with Running(host.parts(device=device)) as running:
        assert running.join() is Ending.NOT_CONNECTED
    assert host.row().error in RELEASED
    parts = host.parts()
    cancel({"m1"}, outbox=parts.outbox, ledger=parts.ledger, install_key=KEY)
    parts.close()
    agrees(host, "unknown")
    assert host.told() == ["message.unknown"]


class Refusing(FakeDevice):
    def __init__(self, folder: Path, error: str) -> None:
        super().__init__(folder)
        self.error = error

    def send(self, *_: Any) -> Any:
        raise SendFailed(self.error)


def test_a_job_that_was_deleted_while_it_was_in_hand_ends_as_its_message_did(host: Host) -> None:
    host.lose_an_answer()
    host.redis.delete("rq:job:job-m1")
    with Running(host.parts()):
        eventually(lambda: host.told() == ["message.unknown"])
        eventually(lambda: host.redis.llen("rq:queue:wa:out:s1") == 0)
    assert host.told() == ["message.unknown"], "and nobody was told that it failed"
    assert host.row().status == "unknown"


def test_a_job_that_was_deleted_before_its_message_was_handed_over_failed(host: Host) -> None:
    enqueue(host.redis, "m1", metadata=METADATA)
    device = FakeDevice(host.folder)
    device.send = lambda *_: time.sleep(30)  # type: ignore[method-assign, return-value, assignment]
    with Running(host.parts(device=device, send_timeout_s=0.3)) as running:
        assert running.join() is Ending.SEND_HUNG
    host.redis.delete("rq:job:job-m1")
    with Running(host.parts()):
        eventually(lambda: host.told() == ["message.failed"])
    assert (host.row().status, host.row().error) == ("failed", "its job is gone")
    assert host.told() == ["message.failed"]
