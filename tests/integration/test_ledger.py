"""The ledger: one row a message id, forward only, on SQLite and on PostgreSQL."""

import contextlib
import functools
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from storage import ledger as ledger_module
from storage.errors import LedgerUnavailable
from storage.ledger import (
    MAX_PENDING_RECEIPTS,
    RANK,
    Attempt,
    Claim,
    Claimed,
    Conflict,
    Ledger,
    Receipt,
    Settled,
    Settlement,
    Unsettled,
)


def secret(attempt: int) -> bytes:
    return bytes([attempt]) * 32


def a_claim(
    id: str = "m1",
    content: str = "hash",
    job: str = "j1",
    now: float = 1.0,
    *,
    resend: bool = False,
) -> Claim:
    return Claim(id, content, job, "recipient", now, resend)


@pytest.fixture
def ledger(location: str | Path) -> Iterator[Ledger]:
    opened = Ledger.open(location, "sales")
    yield opened
    opened.close()


def claimed(ledger: Ledger, id: str = "m1", **more: object) -> None:
    answer = ledger.claim(a_claim(id, **more), secret=secret)  # type: ignore[arg-type]
    assert isinstance(answer, Claimed)


def settled(ledger: Ledger, status: str, id: str = "m1", wa: str | None = None) -> None:
    claimed(ledger, id)
    ledger.settle(Settlement(id, status, wa_message_id=wa, at=2.0))


# Claims


def test_a_new_message_is_claimed_and_its_secret_kept(ledger: Ledger) -> None:
    assert ledger.claim(a_claim(), secret=secret) == Claimed(1, secret(1))
    (row,) = ledger.sending()
    assert row == ledger.find("m1")
    assert (row.session, row.status, row.attempt, row.secret) == ("sales", "sending", 1, secret(1))
    assert (row.job_id, row.content_hash, row.claimed_at) == ("j1", "hash", 1.0)


def test_the_same_claim_after_a_lost_answer_is_claimed_again(ledger: Ledger) -> None:
    claimed(ledger)
    assert ledger.claim(a_claim(), secret=secret) == Claimed(1, secret(1))


def test_a_row_in_the_making_is_unsettled_for_any_other_claim(ledger: Ledger) -> None:
    claimed(ledger)
    for other in (a_claim(now=2.0), a_claim(job="j2")):
        answer = ledger.claim(other, secret=secret)
        assert isinstance(answer, Unsettled)
        assert answer.row.message_id == "m1"


def test_the_same_id_with_other_content_is_refused(ledger: Ledger) -> None:
    for status in ("sending", "unknown", "sent"):
        claimed(ledger, status)
        if status != "sending":
            ledger.settle(Settlement(status, status, at=2.0))
        answer = ledger.claim(a_claim(status, content="other", job="j2"), secret=secret)
        assert isinstance(answer, Conflict)


@pytest.mark.parametrize("status", ["sent", "unknown"])
def test_what_may_have_been_sent_is_never_claimed_again(ledger: Ledger, status: str) -> None:
    settled(ledger, status, wa="WA1")
    answer = ledger.claim(a_claim(job="j2", now=9.0), secret=secret)
    assert isinstance(answer, Settled)
    assert (answer.row.status, answer.row.wa_message_id) == (status, "WA1")


@pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
def test_what_was_certainly_not_sent_may_be_claimed_with_any_content(
    ledger: Ledger, status: str
) -> None:
    claimed(ledger)
    ledger.settle(Settlement("m1", status, error="because", at=2.0))
    answer = ledger.claim(a_claim(content="other", job="j2", now=3.0), secret=secret)
    assert answer == Claimed(2, secret(2))
    row = ledger.find("m1")
    assert row is not None
    assert (row.status, row.attempt, row.content_hash, row.job_id, row.error, row.settled_at) == (
        "sending",
        2,
        "other",
        "j2",
        None,
        None,
    )
    assert ledger.attempts("m1") == [
        Attempt("sales", "m1", 1, status, "hash", "j1", None, "because", 1.0, 2.0)
    ]


def test_a_cancelled_job_put_back_at_the_head_is_not_revived(ledger: Ledger) -> None:
    ledger.record([(a_claim(), Settlement("m1", "cancelled", at=2.0))])
    assert isinstance(ledger.claim(a_claim(now=3.0), secret=secret), Settled)
    assert isinstance(ledger.claim(a_claim(job="j2"), secret=secret), Claimed)


def test_of_all_jobs_of_a_cancelled_message_none_is_revived_but_a_new_one_is_sent(
    ledger: Ledger,
) -> None:
    jobs = ("j1", "j2", "j3")
    ledger.record([(a_claim(job=job), Settlement("m1", "cancelled", at=2.0)) for job in jobs])
    for job in jobs:
        answer = ledger.claim(a_claim(job=job, now=3.0), secret=secret)
        assert isinstance(answer, Settled)
        assert (answer.row.status, answer.row.job_id) == ("cancelled", job)
    assert isinstance(ledger.claim(a_claim(job="new", now=4.0), secret=secret), Claimed)
    ledger.settle(Settlement("m1", "failed", at=5.0))
    for job in jobs:
        answer = ledger.claim(a_claim(job=job, now=6.0), secret=secret)
        assert isinstance(answer, Settled)
        assert answer.row.status == "cancelled"
    assert isinstance(ledger.claim(a_claim(job="newer", now=7.0), secret=secret), Claimed)


def test_an_unknown_message_is_claimed_again_only_where_the_crm_asked_for_it(
    ledger: Ledger,
) -> None:
    settled(ledger, "unknown", wa="WA1")
    assert isinstance(ledger.claim(a_claim(now=3.0), secret=secret), Settled)
    answer = ledger.claim(a_claim(now=3.0, resend=True), secret=secret)
    assert answer == Claimed(2, secret(2))
    (former,) = ledger.attempts("m1")
    assert (former.status, former.wa_message_id) == ("unknown", "WA1")


def test_settling_one_and_claiming_the_next_is_one_commit(ledger: Ledger) -> None:
    claimed(ledger, "m1")

    def broken(attempt: int) -> bytes:
        raise ZeroDivisionError

    sent = Settlement("m1", "sent", wa_message_id="WA1", wa_id="55", at=2.0)
    with pytest.raises(ZeroDivisionError):
        ledger.claim(a_claim("m2"), secret=broken, settle=sent)
    assert [row.message_id for row in ledger.sending()] == ["m1"]
    assert ledger.claim(a_claim("m2"), secret=secret, settle=sent) == Claimed(1, secret(1))
    (row,) = ledger.sending()
    assert (row.message_id, row.secret, row.claimed_at) == ("m2", secret(1), 1.0)
    row = ledger.find("m1")  # type: ignore[assignment]
    assert (row.status, row.wa_message_id, row.wa_id, row.sent_at) == ("sent", "WA1", "55", 2.0)
    assert (row.secret, row.attempt, row.content_hash) == (None, 1, "hash")


def test_the_settlement_counts_though_the_claim_is_refused(ledger: Ledger) -> None:
    settled(ledger, "sent", "m1")
    claimed(ledger, "m2")
    answer = ledger.claim(a_claim("m1"), secret=secret, settle=Settlement("m2", "failed", at=2.0))
    assert isinstance(answer, Settled)
    assert ledger.counts() == {"sent": 1, "failed": 1}


# Settling


def test_settling_wipes_the_secret_and_may_be_repeated(ledger: Ledger) -> None:
    claimed(ledger)
    first = ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=2.0))
    assert first is not None
    assert first.secret is None
    assert ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=2.0)) == first


@pytest.mark.parametrize("first", ["sent", "failed", "expired", "cancelled"])
@pytest.mark.parametrize("second", ["sent", "failed", "unknown", "expired", "cancelled"])
def test_an_outcome_is_not_overwritten(ledger: Ledger, first: str, second: str) -> None:
    settled(ledger, first)
    row = ledger.settle(Settlement("m1", second, error="late", at=9.0))
    assert row is not None
    assert (row.status, row.error) == (first, None)


def test_unknown_becomes_sent_and_learns_its_whatsapp_id_but_never_fails(ledger: Ledger) -> None:
    settled(ledger, "unknown")
    row = ledger.settle(Settlement("m1", "failed", at=3.0))
    assert row is not None
    assert row.status == "unknown"
    row = ledger.settle(Settlement("m1", "unknown", wa_message_id="WA1", at=3.0))
    assert row is not None
    assert (row.status, row.wa_message_id) == ("unknown", "WA1")
    row = ledger.settle(Settlement("m1", "sent", at=4.0))
    assert row is not None
    assert (row.status, row.wa_message_id, row.sent_at) == ("sent", "WA1", 4.0)


def test_an_operator_may_say_what_became_of_an_unknown_message(ledger: Ledger) -> None:
    settled(ledger, "unknown", "m1")
    settled(ledger, "sent", "m2")
    for id, expected in (("m1", "failed"), ("m2", "sent")):
        row = ledger.resolve(Settlement(id, "failed", at=3.0))
        assert row is not None
        assert row.status == expected
    assert ledger.resolve(Settlement("m3", "failed", at=3.0)) is None


def test_settling_what_was_never_claimed_says_so(ledger: Ledger) -> None:
    assert ledger.settle(Settlement("m1", "sent", at=1.0)) is None
    with pytest.raises(ValueError, match="no outcome"):
        ledger.settle(Settlement("m1", "delivered", at=1.0))


# Outcomes without a send


def test_outcomes_of_messages_never_sent_are_written_in_one_go(ledger: Ledger) -> None:
    settled(ledger, "sent", "m2")
    claimed(ledger, "m3")
    outcomes = [(a_claim(id, job="x"), Settlement(id, "expired", at=5.0)) for id in ("m1", "m2")]
    outcomes.append((a_claim("m3", job="x"), Settlement("m3", "cancelled", at=5.0)))
    rows = ledger.record(outcomes)
    assert [row.status for row in rows] == ["expired", "sent", "sending"]
    assert rows == [ledger.find(id) for id in ("m1", "m2", "m3")]


@pytest.mark.parametrize("status", ["failed", "expired", "cancelled"])
def test_what_an_earlier_attempt_may_have_sent_has_no_certain_end(
    ledger: Ledger, status: str
) -> None:
    settled(ledger, "unknown", wa="WA1")
    assert ledger.doubtful("m1") is None
    claimed(ledger, now=3.0, resend=True)
    doubtful = ledger.doubtful("m1")
    assert doubtful is not None and doubtful.wa_message_id == "WA1"
    ledger.settle(Settlement("m1", "failed", error="refused for the moment", at=4.0))
    [row] = ledger.record([(a_claim(job="j2"), Settlement("m1", status, at=5.0))])
    assert (row.status, row.wa_message_id) == ("unknown", "WA1")
    assert row == ledger.find("m1")


def test_the_same_outcome_again_adds_no_attempt(ledger: Ledger) -> None:
    outcome = (a_claim(), Settlement("m1", "expired", at=5.0))
    assert ledger.record([outcome]) == ledger.record([outcome])
    assert ledger.attempts("m1") == []
    ledger.record([(a_claim(job="j2"), Settlement("m1", "expired", at=6.0))])
    assert len(ledger.attempts("m1")) == 1


# Receipts


def test_receipts_move_a_message_forward_only(ledger: Ledger) -> None:
    settled(ledger, "sent", wa="WA1")
    row = ledger.receipt("WA1", "read", 5.0)
    assert row is not None
    assert (row.status, row.read_at, row.delivered_at) == ("read", 5.0, None)
    assert row == ledger.find("m1")
    assert ledger.receipt("WA1", "read", 6.0) is None
    assert ledger.receipt("WA1", "delivered", 4.0) is None
    row = ledger.receipt("WA1", "played", 7.0)
    assert row is not None
    assert (row.status, row.delivered_at, row.read_at, row.played_at) == ("played", 4.0, 5.0, 7.0)


def test_a_receipt_settles_an_unknown_message(ledger: Ledger) -> None:
    settled(ledger, "unknown", wa="WA1")
    row = ledger.receipt("WA1", "delivered", 5.0)
    assert row is not None
    assert (row.status, row.sent_at, row.error) == ("delivered", 5.0, None)


def test_a_receipt_before_its_message_waits_for_it(ledger: Ledger) -> None:
    claimed(ledger)
    assert ledger.receipts([Receipt("WA1", "delivered", 3.0)], now=3.0) == []
    assert ledger.receipts([Receipt("WA1", "delivered", 3.0)], now=3.5) == []
    assert ledger.apply_pending(now=4.0) == ([], [])
    assert ledger.pending_receipts() == [Receipt("WA1", "delivered", 3.0)]
    ledger.settle(Settlement("m1", "sent", wa_message_id="WA1", at=4.0))
    receipts, [(row, was)] = ledger.apply_pending(now=5.0)
    assert (was, row.status, row.sent_at, row.delivered_at) == ("sent", "delivered", 4.0, 3.0)
    assert ledger.apply_pending(now=6.0) == (receipts, []), "found again until it was told"
    ledger.drop_pending(receipts)
    assert ledger.pending_receipts() == []
    assert ledger.apply_pending(now=7.0) == ([], [])


def test_a_receipt_without_a_message_is_forgotten_after_a_day(ledger: Ledger) -> None:
    ledger.receipts([Receipt("WA1", "delivered", 0.0)], now=1000.0)
    ledger.apply_pending(now=1000.0 + 86_399)
    assert len(ledger.pending_receipts()) == 1
    ledger.apply_pending(now=1000.0 + 86_401)
    assert ledger.pending_receipts() == []


@pytest.mark.parametrize("name", ["_FIND_BY_WA_ID", "_FIND_BY_WA_ID_LOCKED", "_MATCHING", "_DUE"])
def test_sqlite_finds_the_message_of_a_receipt_by_its_index(tmp_path: Path, name: str) -> None:
    with contextlib.closing(Ledger.open(tmp_path / "ledger.db", "sales")):
        pass
    known = {"session": "sales", "wa_message_id": "WA1", "before": 0.0}
    text, values = getattr(ledger_module, name).on(sqlite.dialect(), known)
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]
    assert any("by_wa_id (session=? AND wa_message_id=?)" in step for step in plan), plan
    whole = [step for step in plan if step.endswith("(session=?)") and "receipts" not in step]
    assert not whole, "else each receipt reads all messages of its session"


def test_receipts_that_wait_in_vain_are_bounded_and_the_newest_stay(ledger: Ledger) -> None:
    for n in range(25):
        batch = [Receipt(f"BY-HAND-{n}-{m}", "delivered", float(n)) for m in range(100)]
        ledger.receipts(batch, now=float(n))
    kept = ledger.pending_receipts()
    assert MAX_PENDING_RECEIPTS <= len(kept) <= MAX_PENDING_RECEIPTS + 100
    assert kept[-1].wa_message_id.startswith("BY-HAND-24-")
    assert kept[0].wa_message_id.startswith("BY-HAND-4-")


def test_a_receipt_of_a_former_attempt_proves_the_message_once_the_present_one_is_settled(
    ledger: Ledger,
) -> None:
    settled(ledger, "unknown", wa="WA1")
    claimed(ledger, now=3.0, resend=True)
    found = ledger.find_by_wa_id("WA1")
    assert found is not None
    assert found.message_id == "m1"
    assert ledger.receipt("WA1", "delivered", 4.0) is None
    assert len(ledger.sending()) == 1
    ledger.settle(Settlement("m1", "failed", at=5.0))
    _, [(row, was)] = ledger.apply_pending(now=6.0)
    assert (was, row.status, row.wa_message_id) == ("failed", "delivered", "WA1")
    assert [former.status for former in ledger.attempts("m1")] == ["delivered"]


def test_many_receipts_are_one_commit(ledger: Ledger) -> None:
    for number in range(50):
        settled(ledger, "sent", f"m{number}", f"WA{number}")
    receipts = [Receipt(f"WA{number}", "delivered", 3.0) for number in range(60)]
    assert len(ledger.receipts(receipts, now=3.0)) == 50
    assert ledger.counts() == {"delivered": 50}
    assert len(ledger.pending_receipts()) == 10


# Looking


def test_messages_are_listed_newest_first_in_pages(ledger: Ledger) -> None:
    for number in range(5):
        claimed(ledger, f"m{number}", now=float(number))
    ledger.settle(Settlement("m3", "sent", wa_message_id="WA3", at=9.0))
    assert [row.message_id for row in ledger.recent(2)] == ["m4", "m3"]
    assert [row.message_id for row in ledger.recent(2, before=3.0)] == ["m2", "m1"]
    assert [row.message_id for row in ledger.recent(9, status="sent")] == ["m3"]
    assert ledger.counts() == {"sending": 4, "sent": 1}
    found = ledger.find_by_wa_id("WA3")
    assert found is not None
    assert found.message_id == "m3"
    assert ledger.find("none") is None
    assert ledger.find_by_wa_id("none") is None


def test_sessions_do_not_see_each_other(ledger: Ledger) -> None:
    other = ledger.of("other")
    settled(ledger, "sent", wa="WA1")
    assert other.find("m1") is None
    assert other.find_by_wa_id("WA1") is None
    assert other.claim(a_claim(), secret=secret) == Claimed(1, secret(1))
    assert other.receipt("WA1", "read", 3.0) is None
    assert ledger.forget() == 1
    assert ledger.counts() == {}
    assert other.counts() == {"sending": 1}


def test_any_text_fits(ledger: Ledger) -> None:
    id = "ünï-" + "x" * 250
    claimed(ledger, id)
    row = ledger.settle(Settlement(id, "failed", error="why\n" * 1000, at=1.0))
    assert row is not None
    assert row == ledger.find(id)


# Bounds


def test_old_settled_rows_are_removed_and_unsettled_ones_never(ledger: Ledger) -> None:
    for number in range(700):
        ledger.record([(a_claim(f"m{number}"), Settlement(f"m{number}", "expired", at=10.0))])
    claimed(ledger, "sending")
    settled(ledger, "sent", "m700")  # at 2.0
    ledger.claim(a_claim("m0", job="again"), secret=secret)
    ledger.settle(Settlement("m0", "sent", at=50.0))
    assert ledger.purge(5.0) == 1
    assert ledger.purge(20.0, limit=400) == 500
    assert ledger.purge(20.0) == 199
    assert ledger.counts() == {"sending": 1, "sent": 1}
    assert ledger.purge(1e12) == 1
    assert ledger.attempts("m0") == []
    assert ledger.counts() == {"sending": 1}


def test_a_probe_writes_and_leaves_nothing(ledger: Ledger) -> None:
    ledger.probe()
    assert ledger.counts() == {}
    is_sqlite = ledger._database.is_sqlite
    words = "PRAGMA query_only = ON" if is_sqlite else "SET default_transaction_read_only = on"
    ledger._database._connect().cursor().execute(words)
    assert ledger.counts() == {}, "it can be read"
    with pytest.raises(LedgerUnavailable, match=r"read-?only"):
        ledger.probe()


def test_a_probe_tries_more_than_to_begin_to_write(tmp_path: Path) -> None:
    with contextlib.closing(Ledger.open(tmp_path / "ledger.db", "sales")) as ledger:
        no = "BEFORE INSERT ON ledger_messages BEGIN SELECT RAISE(ABORT, 'no more rows'); END"
        ledger._database._connect().execute(f"CREATE TEMP TRIGGER full {no}")
        with pytest.raises(LedgerUnavailable, match="no more rows"):
            ledger.probe()


# Processes


def in_children(count: int, work: Callable[[int], object]) -> list[int]:
    """Run it in forked processes; their exit codes."""
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(number)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_of_many_processes_exactly_one_claims_a_message(
    location: str | Path, tmp_path: Path
) -> None:
    def claim_all(number: int) -> None:
        ledger = Ledger.open(location, "sales", timeout_s=30)
        won = []
        for id in range(40):
            answer = ledger.claim(a_claim(f"m{id}", job=f"j{number}"), secret=secret)
            assert isinstance(answer, Claimed | Unsettled)
            if isinstance(answer, Claimed):
                won.append(str(id))
        (tmp_path / f"won{number}").write_text(" ".join(won))
        ledger.close()

    assert in_children(4, claim_all) == [0, 0, 0, 0]  # they make the tables at once, too
    won = " ".join((tmp_path / f"won{number}").read_text() for number in range(4)).split()
    assert sorted(won, key=int) == [str(id) for id in range(40)]


def test_a_kill_at_a_random_moment_loses_nothing_that_was_acknowledged(
    location: str | Path,
) -> None:
    Ledger.open(location, "sales").close()
    chance = random.Random(3)
    for turn in range(12):
        claims = functools.partial(_claims, location, turn)
        acknowledged = faults.steps_until_killed(claims, after_s=chance.uniform(0.03, 0.12)) - 1
        ledger = Ledger.open(location, "sales")
        sending = ledger.sending()
        assert len(sending) <= 1
        rows = [ledger.find(f"{turn}-{number}") for number in range(acknowledged + 3)]
        for row in rows[: max(0, acknowledged)]:
            assert row is not None
            assert row.status == "sent"
        if acknowledged >= 0:
            assert rows[acknowledged] is not None
        assert rows[acknowledged + 2] is None
        for row in sending:
            ledger.settle(Settlement(row.message_id, "failed", at=3.0))
        ledger.close()


def _claims(location: str | Path, turn: int) -> Iterator[None]:
    """Settle one message and claim the next, a step each."""
    ledger = Ledger.open(location, "sales")
    settle = None
    for number in range(100_000):
        ledger.claim(a_claim(f"{turn}-{number}"), secret=secret, settle=settle)
        yield
        settle = Settlement(f"{turn}-{number}", "sent", at=2.0)


def test_claiming_is_cheap(ledger: Ledger) -> None:
    count = 300
    for id in range(20):
        claimed(ledger, f"warm{id}")
    began, began_cpu = time.perf_counter(), time.process_time()
    settle = None
    for number in range(count):
        ledger.claim(a_claim(f"m{number}"), secret=secret, settle=settle)
        settle = Settlement(f"m{number}", "sent", wa_message_id=f"WA{number}", at=2.0)
    cpu_ms = (time.process_time() - began_cpu) / count * 1000
    wall_ms = (time.perf_counter() - began) / count * 1000
    print(f"settle and claim: {cpu_ms:.3f} ms of CPU, {wall_ms:.3f} ms in all")
    assert cpu_ms < 2.0  # some 0.15 and 0.45 when nothing else runs


# Anything at all

STEP = st.one_of(
    st.tuples(st.just("claim"), st.sampled_from("ab"), st.sampled_from("xy"), st.booleans()),
    st.tuples(
        st.just("settle"),
        st.sampled_from("ab"),
        st.sampled_from(["sent", "failed", "unknown", "expired", "cancelled"]),
        st.booleans(),
    ),
    st.tuples(
        st.just("receipt"),
        st.sampled_from(["a1", "a2", "b1"]),
        st.sampled_from(["delivered", "read", "played"]),
        st.booleans(),
    ),
    st.tuples(st.just("pending"), st.just(""), st.just(""), st.booleans()),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(STEP, max_size=15))
def test_whatever_happens_a_status_only_moves_forward(ledger: Ledger, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    ledger.forget()
    for number, (kind, name, word, flag) in enumerate(steps):
        before = {id: ledger.find(id) for id in "ab"}
        match kind:
            case "claim":
                job = f"j{number}"
                claim = a_claim(name, content=word, job=job, now=number, resend=flag)
                ledger.claim(claim, secret=secret)
            case "settle":
                row = before[name]
                wa = f"{name}{row.attempt}" if row and word in ("sent", "unknown") else None
                ledger.settle(Settlement(name, word, wa_message_id=wa, at=number))
            case "receipt":
                ledger.receipt(name, word, number)
            case "pending":
                ledger.drop_pending(ledger.apply_pending(now=number)[0])
        for id, old in before.items():
            new = ledger.find(id)
            if old is None:
                continue
            assert new is not None
            assert new.attempt in (old.attempt, old.attempt + 1)
            if new.attempt > old.attempt:
                assert old.status in ("failed", "expired", "cancelled", "unknown")
                assert old.status != "unknown" or flag
            elif old.status != "sending":
                assert RANK[new.status] >= RANK[old.status]
            if old.status in ("sent", "delivered", "read", "played"):
                assert new.attempt == old.attempt
        assert len(ledger.sending()) == sum(
            row is not None and row.status == "sending" for row in map(ledger.find, "ab")
        )
