"""What waits in vain ends within seconds, whether anybody consumes the queue or not."""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import postgres
import pytest
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from support import eventually

from storage.errors import LedgerUnavailable
from storage.ledger import Claim, Ledger, Settlement
from storage.sessions import Sessions, StateRecord
from whatsapp_worker import client
from whatsapp_worker.client import Outbox
from whatsapp_worker.errors import CommandTimeout, InvalidMessage, UsageError
from whatsapp_worker.errors import LedgerUnavailable as Unanswered
from whatsapp_worker.event_names import Status
from whatsapp_worker.keeper import Keeper
from whatsapp_worker.message import validate
from whatsapp_worker.outbox import Finished
from whatsapp_worker.outbox import Outbox as OutboxOf
from whatsapp_worker.rq_job import MAX_HASH, Outcome
from whatsapp_worker.stream import EventStream

TO = "+5511999990001"


class Host:
    """A data folder with one session, and the keeper of its queues."""

    def __init__(
        self,
        redis: Redis,
        folder: Path,
        *,
        ledgers_are_one: bool = False,
        ledger_of: Callable[[str], Ledger] | None = None,
    ) -> None:
        self.redis = redis
        self.consumed: set[str] = set()
        self.sessions = Sessions(folder)
        self.sessions.prepare()
        self.sessions.create("sales", network="sandbox", now=1.0)
        self.out = Outbox(redis)
        self.keeper = Keeper(
            redis=redis,
            stream=EventStream(redis),
            sessions=self.sessions,
            consumed=lambda: self.consumed,
            result_ttl_s=600,
            ledger_of=ledger_of or self.ledger,
            ledgers_are_one=ledgers_are_one,
        )

    def ledger(self, session: str = "sales") -> Ledger:
        return Ledger.open(self.sessions.folder(session) / "ledger.db", session)

    def send(self, message_id: str, *, to: str = "sales", **options: Any) -> Job:
        draft = client.text(TO, f"text of {message_id}", message_id=message_id, **options)
        return self.out.send(to, draft)

    def status(self, job: Job) -> str:
        return str(self.out.outcome(job).status)

    def in_hand(self, job: Job, message_id: str) -> None:
        """As if a device process had claimed it."""
        content_hash = validate(job.kwargs).content_hash
        claim = Claim(message_id, content_hash, job.id, "r", time.time())
        with contextlib.closing(self.ledger()) as ledger:
            ledger.claim(claim, secret=lambda attempt: b"s" * 32)

    def row(self, message_id: str) -> str | None:
        with contextlib.closing(self.ledger()) as ledger:
            row = ledger.find(message_id)
        return row and row.status

    def events(self) -> list[str]:
        return [fields[b"event"].decode() for _, fields in self.redis.xrange("wa:events")]

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Requests are answered meanwhile."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(0.02):
                self.keeper.answer_requests()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        done.set()
        thread.join(5)


@pytest.fixture
def host(redis: Redis, tmp_path: Path) -> Host:
    return Host(redis, tmp_path)


def test_expired_messages_of_a_queue_that_nobody_consumes_end(host: Host) -> None:
    kept = host.send("m0")
    late = host.send("m1", expires_at=time.time() - 1)
    short = host.send("m2", ttl_s=0.2, priority="high")
    host.keeper.sweep()
    assert [host.status(job) for job in (kept, late, short)] == ["queued", "expired", "queued"]
    eventually(lambda: (host.keeper.sweep(), host.status(short) == "expired")[1], within_s=5)
    assert host.row("m1") == host.row("m2") == "expired"
    assert late.get_status() == "failed"
    assert b"text of" not in (host.redis.hget(f"rq:job:{late.id}", "data") or b"")
    assert host.events() == ["message.expired"] * 2
    assert host.redis.llen("rq:queue:wa:out:sales") == 1
    assert host.redis.llen("rq:queue:wa:out:sales:high") == 0


def test_each_waiting_job_is_read_once_and_new_ones_are_found(host: Host) -> None:
    jobs = [host.send(f"m{n}", ttl_s=1000 + n) for n in range(30)]
    waiting = host.keeper._waiting
    assert waiting.tend("sales", is_consumed=False, limit=20) == 20
    assert waiting.tend("sales", is_consumed=False, limit=20) == 10
    assert waiting.tend("sales", is_consumed=False, limit=20) == 0
    late = host.send("late", expires_at=time.time() - 1)
    assert waiting.tend("sales", is_consumed=False, limit=20) == 2  # one read, one ended
    assert host.status(late) == "expired"
    host.redis.lrem("rq:queue:wa:out:sales", 1, jobs[3].id)  # places moved: all is read anew
    also_late = host.send("also-late", expires_at=time.time() - 1)
    host.keeper.sweep()
    assert host.status(also_late) == "expired"


def test_a_queue_that_is_consumed_is_its_consumers_unless_an_operator_paused_it(
    host: Host,
) -> None:
    host.consumed = {"sales"}
    late = host.send("m1", expires_at=time.time() - 1)
    host.keeper.sweep()
    assert host.status(late) == "queued"
    host.sessions.hold("sales").pause(time.time())
    host.keeper.sweep()
    assert host.status(late) == "expired"


def test_due_messages_are_moved_in_where_nobody_consumes(host: Host) -> None:
    queue = Queue("wa:out:sales", connection=host.redis, serializer=JSONSerializer)
    kwargs = client.text(TO, "Hi", message_id="m1").kwargs("sales")
    at = datetime.now(UTC) + timedelta(seconds=2)
    queue.enqueue_at(at, "jobs.outbound.send_message", description="send_message", kwargs=kwargs)
    host.keeper.sweep()
    assert queue.count == 0
    eventually(lambda: (host.keeper.sweep(), queue.count == 1)[1], within_s=5)


def test_a_due_message_keeps_its_place_by_time_of_enqueueing(host: Host) -> None:
    queue = Queue("wa:out:sales", connection=host.redis, serializer=JSONSerializer)
    at = datetime.now(UTC) + timedelta(seconds=1)
    for number in range(9):
        if number in (3, 6):
            kwargs = client.text(TO, "Hi", message_id=f"m{number}").kwargs("sales")
            due = at + timedelta(seconds=6 - number)  # the later one is due first
            queue.enqueue_at(due, "jobs.outbound.send_message", kwargs=kwargs, job_id=f"{number}")
        else:
            host.send(f"m{number}")

    def order() -> list[str]:
        return [job.kwargs["message_id"] for job in queue.get_jobs()]

    waiting = [f"m{number}" for number in range(9) if number not in (3, 6)]
    assert order() == waiting
    outbox = OutboxOf(host.redis, "sales", stream=EventStream(host.redis), result_ttl_s=60)
    due = host.redis.zrange("rq:scheduled:wa:out:sales", 0, -1)
    outbox.survey(until=time.time() + 60)
    assert order() == [f"m{number}" for number in range(9)]
    outbox._move(outbox._lane("wa:out:sales"), due)  # another saw the same ones due
    assert order() == [f"m{number}" for number in range(9)]
    outbox.close()


def popped(host: Host, job: Job) -> None:
    """As if a device process had begun to send it, and died."""
    host.in_hand(job, job.kwargs["message_id"])
    host.redis.lmove("rq:queue:wa:out:sales", "rq:queue:wa:out:sales:intermediate")
    job.set_status(JobStatus.STARTED)


def test_what_is_in_hand_when_a_session_ends_for_good_is_settled_though_none_follows(
    host: Host,
) -> None:
    job, later = host.send("m1"), host.send("m2")
    popped(host, job)
    wanted = host.sessions.wanted("sales")
    assert wanted is not None

    def is_now(state: str) -> None:
        record = StateRecord(generation=wanted.generation, state=state, since=1.0)
        host.sessions.put_state("sales", record)
        host.keeper.sweep()

    is_now("reconnecting")
    assert host.status(job) == host.row("m1") == "sending", "the next one looks"
    with host.sessions.session_lock("sales"):
        is_now("logged_out")
        assert host.status(job) == host.row("m1") == "sending", "it has not ended yet"
    is_now("logged_out")
    assert host.status(job) == host.row("m1") == "unknown", "its credentials went, and their proof"
    assert host.status(later) == "queued"
    assert host.events() == ["message.unknown"]
    assert not host.redis.exists("rq:queue:wa:out:sales:intermediate")


def test_what_rqs_own_cancel_took_out_is_cancelled_for_everybody(host: Host) -> None:
    job = host.send("m1")
    job.cancel()
    host.consumed = {"sales"}
    host.keeper.sweep()
    assert host.status(job) == host.row("m1") == "cancelled"
    assert host.events() == ["message.cancelled"]
    assert not host.redis.exists("rq:canceled:wa:out:sales")
    assert host.keeper.sweep() == 0


def test_what_rqs_own_cancel_finds_sent_already_stays_sent(host: Host) -> None:
    job = host.send("m1")
    host.in_hand(job, "m1")
    sent = Settlement("m1", "sent", wa_message_id="WA1", at=2.0)
    with contextlib.closing(host.ledger()) as ledger:
        ledger.settle(sent)
    stream = EventStream(host.redis)
    outbox = OutboxOf(host.redis, "sales", stream=stream, result_ttl_s=60)
    outbox.exchange()
    popped = outbox.next()
    assert popped is not None
    outcome = Outcome(Status.SENT, wa_message_id="WA1", sent_at=2.0)
    outbox.exchange([Finished(popped, outcome, 1)], pop=False)
    before = host.out.outcome(job)
    job.cancel()
    host.keeper.sweep()
    assert host.out.outcome(job).status == before.status == host.row("m1") == "sent"
    assert host.out.outcome(job).wa_message_id == "WA1"
    assert job.get_status() == "finished"
    ids = {fields[b"id"] for _, fields in host.redis.xrange("wa:events")}
    assert set(host.events()) == {"message.sent"} and len(ids) == 1
    assert not host.redis.exists("rq:canceled:wa:out:sales")


def test_a_message_in_hand_is_not_called_expired(host: Host) -> None:
    job = host.send("m1", expires_at=time.time() - 1)
    host.in_hand(job, "m1")
    host.keeper.sweep()
    assert (host.row("m1"), host.status(job)) == ("sending", "queued")


def test_a_ledger_that_is_away_costs_nothing_and_is_asked_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = host.send("m1", expires_at=time.time() - 1)

    def away(self: Ledger, *args: Any, **kwargs: Any) -> Any:
        raise LedgerUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record", away)
        host.keeper.sweep()
    assert host.status(late) == "queued"
    host.keeper.sweep()
    assert host.status(late) == "expired"


def test_a_crm_cancels_by_message_id_and_is_told_what_became_of_it(host: Host) -> None:
    jobs = [host.send(f"m{n}") for n in range(3)]
    with host.answering():
        assert host.out.cancel("sales", "m1").status == "cancelled"  # type: ignore[union-attr]
        assert host.out.cancel("sales", "m1").status == "cancelled"  # type: ignore[union-attr]
        assert host.out.cancel("sales", "unheard-of") is None
        assert host.out.cancel("nobody", "m0") is None
    assert [host.status(job) for job in jobs] == ["queued", "cancelled", "queued"]
    assert host.redis.keys("wa:cancel*") == []


def test_what_a_crm_enqueued_again_because_redis_failed_is_cancelled_as_one(host: Host) -> None:
    drafts = [client.text(TO, "x", message_id=f"m{n}") for n in range(3)]
    jobs = [*host.out.send_many("sales", drafts), *host.out.send_many("sales", drafts)]
    with host.answering():
        assert host.out.cancel("sales", "m1").status == "cancelled"  # type: ignore[union-attr]
    assert [host.status(job) for job in jobs] == ["queued", "cancelled", "queued"] * 2


def pops(redis: Redis) -> None:
    """As a consumer does that sends quickly."""
    for _ in range(10):
        id = redis.lpop("rq:queue:wa:out:sales")
        assert isinstance(id, bytes)
        redis.hset(f"rq:job:{id.decode()}", "status", "finished")


def puts_back(redis: Redis) -> None:
    """As a consumer does that has to rest."""
    limbo = "rq:queue:wa:out:sales:intermediate"
    redis.lmove(limbo, "rq:queue:wa:out:sales", "RIGHT", "LEFT")


@pytest.mark.parametrize("moves", [pops, puts_back])
def test_what_waits_is_found_though_the_queue_moves_meanwhile(
    host: Host, moves: Callable[[Redis], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"m{n}" for n in range(1000)]
    host.out.send_many("sales", [client.text(TO, "x", message_id=id) for id in ids])
    host.redis.lmove("rq:queue:wa:out:sales", "rq:queue:wa:out:sales:intermediate", "LEFT", "RIGHT")
    outbox = OutboxOf(host.redis, "sales", stream=EventStream(host.redis), result_ttl_s=60)
    ask = outbox._wire.ask

    def moving(*commands: Any) -> Any:
        answers = ask(*commands)
        moves(host.redis)
        return answers

    monkeypatch.setattr(outbox._wire, "ask", moving)
    found = outbox.find({*ids[500:], "m0", "nobody"})
    assert {job.message_id for job in found} == {*ids[500:], "m0"}
    outbox.close()


def test_a_record_that_is_no_job_is_passed_over_when_a_message_is_looked_for(host: Host) -> None:
    wrong = {"bare": b"", "large": b"x" * (MAX_HASH + 1), "other": b'["f",null,[],{}]'}
    for id, data in wrong.items():
        host.redis.hset(f"rq:job:{id}", mapping={"status": "queued", "data": data})
    host.redis.set("rq:job:text", "nonsense")
    host.redis.rpush("rq:queue:wa:out:sales", *wrong, "text", "gone", "\x00 no id")
    job = host.send("m1")
    with host.answering():
        assert host.out.cancel("sales", "m1").status == "cancelled"  # type: ignore[union-attr]
    assert host.status(job) == "cancelled"
    assert host.redis.llen("rq:queue:wa:out:sales") == 6


def test_a_crm_that_is_too_late_is_told_so(host: Host) -> None:
    job = host.send("m1")
    host.in_hand(job, "m1")
    with host.answering():
        assert host.out.cancel("sales", "m1").status == "sending"  # type: ignore[union-attr]
    assert host.status(job) == "queued"


def test_a_request_that_nobody_answers_is_taken_back(host: Host) -> None:
    with pytest.raises(CommandTimeout, match="nothing was cancelled"):
        host.out.cancel("sales", "m1", timeout_s=0.3)
    assert host.redis.llen("wa:cancel") == 0
    with pytest.raises(UsageError):
        host.out.cancel("No Session", "m1")


def test_a_database_that_is_away_is_said_to_the_crm(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.send("m1")

    def away(self: Ledger, *args: Any, **kwargs: Any) -> Any:
        raise LedgerUnavailable("away")

    monkeypatch.setattr(Ledger, "record", away)
    with host.answering(), pytest.raises(Unanswered, match="away"):
        host.out.cancel("sales", "m1")


def test_one_database_that_is_away_costs_all_who_ask_one_wait(redis: Redis, tmp_path: Path) -> None:
    asked: list[str] = []

    def away(session: str) -> Ledger:
        asked.append(session)
        raise LedgerUnavailable("away")

    host = Host(redis, tmp_path, ledgers_are_one=True, ledger_of=away)
    _ask_for_all(host)
    assert host.keeper.answer_requests() == 4
    answers = [json.loads(redis.lpop(f"wa:cancel:q{n}") or b"") for n in range(4)]
    assert answers == [{"error": "away"}] * 3 + [{"outcome": None}]
    assert len(asked) == 1
    _ask_for_all(host)
    host.keeper.answer_requests()
    assert len(asked) == 2, "the next who ask find out anew"


def test_one_database_is_connected_to_once_for_all_who_ask(
    redis: Redis, tmp_path: Path, postgres_url: str
) -> None:
    opened: list[str] = []
    with postgres.fresh_schema(postgres_url, f"test_{uuid.uuid4().hex}") as url:

        def ledger_of(session: str) -> Ledger:
            opened.append(session)
            return Ledger.open(url, session)

        host = Host(redis, tmp_path, ledgers_are_one=True, ledger_of=ledger_of)
        _ask_for_all(host)
        jobs = [host.send("m1", to=session) for session in ("sales", "s1")]
        host.keeper.answer_requests()
        assert [host.status(job) for job in jobs] == ["cancelled"] * 2
        for session in ("sales", "s1"):
            with contextlib.closing(Ledger.open(url, session)) as ledger:
                row = ledger.find("m1")
            assert row is not None and row.status == "cancelled", "each in its own"
    answers = [json.loads(redis.lpop(f"wa:cancel:q{n}") or b"")["outcome"] for n in range(4)]
    assert [answer and answer["status"] for answer in answers] == ["cancelled"] * 2 + [None] * 2
    assert opened == ["sales"]


def test_a_queue_that_is_no_list_costs_no_other_session_its_answer(host: Host) -> None:
    _ask_for_all(host)
    host.redis.set("rq:queue:wa:out:sales", "nonsense")
    job = host.send("m1", to="s1")
    host.keeper.answer_requests()
    answers = [json.loads(host.redis.lpop(f"wa:cancel:q{n}") or b"") for n in range(4)]
    assert "WRONGTYPE" in answers[0]["error"]
    assert answers[1]["outcome"]["status"] == host.status(job) == "cancelled"


def test_a_damaged_ledger_is_not_every_sessions(host: Host) -> None:
    folder = host.sessions.folder("sales")
    host.ledger().close()
    (folder / "ledger.db").write_bytes(b"nonsense" * 1000)
    _ask_for_all(host)
    host.keeper.answer_requests()
    answers = [json.loads(host.redis.lpop(f"wa:cancel:q{n}") or b"") for n in range(4)]
    assert "error" in answers[0] and answers[1:] == [{"outcome": None}] * 3


def test_a_keeper_that_is_to_leave_opens_no_more_ledgers_and_answers_all_the_same(
    redis: Redis, tmp_path: Path
) -> None:
    is_asked, may_fail = threading.Event(), threading.Event()
    asked: list[str] = []

    def slow(session: str) -> Ledger:
        asked.append(session)
        is_asked.set()
        may_fail.wait(60)
        raise LedgerUnavailable("away")

    host = Host(redis, tmp_path, ledger_of=slow)
    _ask_for_all(host)
    host.keeper.start()
    assert is_asked.wait(60)
    assert not host.keeper.stop(timeout_s=0)
    may_fail.set()
    assert host.keeper.stop(timeout_s=60)
    answers = [json.loads(host.redis.lpop(f"wa:cancel:q{n}") or b"") for n in range(4)]
    assert answers[0] == {"error": "away"}
    assert all("nothing was cancelled" in answer["error"] for answer in answers[1:3])
    assert answers[3] == {"outcome": None}
    assert asked == ["sales"]


def _ask_for_all(host: Host) -> None:
    """Requests for four sessions, the last of which there is not."""
    for n, session in enumerate(("sales", "s1", "s2", "nobody")):
        if session.startswith("s") and host.sessions.wanted(session) is None:
            host.sessions.create(session, network="sandbox", now=1.0)
        request = {"id": f"q{n}", "session": session, "message_id": "m1"}
        host.redis.rpush("wa:cancel", json.dumps(request))


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"{", b"[]", b"1", b"\xff", b'{"id":1,"session":"sales","message_id":"m"}'),
        b'{"id":"a b","session":"sales","message_id":"m"}',
    ],
)
def test_a_request_that_names_no_list_for_its_answer_is_dropped(host: Host, raw: bytes) -> None:
    host.redis.rpush("wa:cancel", raw)
    assert host.keeper.answer_requests() == 1
    assert host.keeper.answer_requests() == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ('"session":"No","message_id":"m"', "session"),
        ('"message_id":"m"', "session"),
        ('"session":"sales"', "message_id"),
        ('"session":"sales","message_id":7', "message_id"),
        ('"session":"sales","message_id":""', "message_id"),
        ('"session":"sales","message_id":"\\u0000"', "message_id"),
        ('"session":"sales","message_id":"\\ud800"', "message_id"),
    ],
)
def test_a_request_that_cannot_be_understood_is_told_why_and_costs_no_other_its_answer(
    host: Host, fields: str, field: str
) -> None:
    host.send("m1")
    good = b'{"id":"good","session":"sales","message_id":"m1"}'
    host.redis.rpush("wa:cancel", f'{{"id":"bad",{fields}}}', good)
    assert host.keeper.answer_requests() == 2
    [bad, done] = [json.loads(host.redis.lpop(f"wa:cancel:{id}") or b"") for id in ("bad", "good")]
    assert bad["error"].startswith(f"{field}: ")
    assert done["outcome"]["status"] == "cancelled"


@pytest.mark.parametrize("message_id", ["", "\0", "\ud800", "m" * 201])
def test_an_id_that_no_message_has_is_refused_at_the_call(host: Host, message_id: str) -> None:
    with pytest.raises(InvalidMessage, match="message_id"):
        host.out.cancel("sales", message_id, timeout_s=1)
    assert host.redis.llen("wa:cancel") == 0


def test_many_requests_are_answered_in_one_reading(host: Host) -> None:
    host.out.send_many("sales", [client.text(TO, "x", message_id=f"m{n}") for n in range(600)])
    found: list[str] = []
    with host.answering():
        threads = [
            threading.Thread(
                target=lambda n=n: found.append(host.out.cancel("sales", f"m{n}").status)  # type: ignore
            )
            for n in range(0, 600, 30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == ["cancelled"] * 20
    assert host.redis.llen("rq:queue:wa:out:sales") == 580
