"""What became of each message: one row a message id, claimed before it is sent.

SQLite (WAL, synchronous FULL), one file a session, or PostgreSQL, one table for all. Statuses are
the words of the callers: a row is `sending` from its claim until it is settled as sent, failed,
unknown, expired or cancelled; receipts then move it to delivered, read, played. It only moves
forward. A certain failure may be claimed again; its former attempt goes to `ledger_attempts`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from storage import ledger_schema
from storage.database import Database, Rows, Statement, Transaction
from storage.ledger_tables import attempts, messages, receipts

log = logging.getLogger(__name__)

PENDING_RECEIPT_S = 86_400.0  # how long a receipt waits for its message
MAX_PENDING_RECEIPTS = 2_000  # a session; most are for what a person sent by hand, and wait in vain

# A receipt may replace a status of lower rank.
RANK = {
    "failed": 1,
    "expired": 1,
    "cancelled": 1,
    "sending": 2,
    "unknown": 3,
    "sent": 4,
    "delivered": 5,
    "read": 6,
    "played": 7,
}
FINAL = ("sent", "failed", "unknown", "expired", "cancelled")
_MOVES_UNKNOWN = ("sent", "unknown")  # outcomes that an unknown message may still get
REOPENABLE = ("failed", "expired", "cancelled")
_RECEIPT_COLUMN = {"delivered": "delivered_at", "read": "read_at", "played": "played_at"}
_BATCH = 500


class Row(NamedTuple):
    """One message. Times are unix seconds, None when that has not happened."""

    session: str
    message_id: str
    status: str
    attempt: int
    content_hash: str
    job_id: str
    recipient_hash: str
    wa_message_id: str | None
    wa_id: str | None
    error: str | None
    claimed_at: float
    sent_at: float | None
    delivered_at: float | None
    read_at: float | None
    played_at: float | None
    settled_at: float | None
    secret: bytes | None
    metadata: str | None


class Attempt(NamedTuple):
    """One attempt before the present one."""

    session: str
    message_id: str
    attempt: int
    status: str
    content_hash: str
    job_id: str
    wa_message_id: str | None
    error: str | None
    claimed_at: float
    settled_at: float | None


@dataclass(frozen=True, slots=True)
class Claim:
    """What is about to be sent.

    Attributes:
        now: Unix seconds; becomes `claimed_at`. A repeated claim carries the same.
        resend: An unknown message may be claimed again: the CRM asked for it.
        metadata: The caller's own words, kept with the row.
    """

    message_id: str
    content_hash: str
    job_id: str
    recipient_hash: str
    now: float
    resend: bool = False
    metadata: str | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of a claimed message: one of `FINAL`, at unix seconds `at`."""

    message_id: str
    status: str
    wa_message_id: str | None = None
    wa_id: str | None = None
    error: str | None = None
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """WhatsApp's word that a message was delivered, read or played, at unix seconds `at`."""

    wa_message_id: str
    status: str
    at: float


class Change(NamedTuple):
    """A row whose status a receipt changed, as it is now, and the status that it had."""

    row: Row
    was: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """It may be sent, now, with this secret."""

    attempt: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class Settled:
    """It has its outcome already: do not send; answer with the row."""

    row: Row


@dataclass(frozen=True, slots=True)
class Conflict:
    """The id was used for other content: refuse."""

    row: Row


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A row is `sending` still: recovery must settle it first."""

    row: Row


Answer = Claimed | Settled | Conflict | Unsettled


class Ledger:
    """The ledger of one session. Its threads take turns; other processes may use the same rows.

    Every method raises LedgerUnavailable (transient: the same call may be repeated) or
    LedgerBroken (an operator must act).
    """

    def __init__(self, database: Database, session: str) -> None:
        self._database = database
        self.session = session

    @classmethod
    def open(
        cls,
        location: str | Path,
        session: str,
        *,
        timeout_s: float = 5.0,
        is_owner: bool = False,
        was_sound: bool = False,
    ) -> Self:
        """Connect, check, and bring the schema up to date.

        Args:
            location: Path of a SQLite file (made when missing) or a PostgreSQL URL.
            timeout_s: The most that one call may take.
            is_owner: The caller alone runs the session, and has not opened the ledger yet: it
                repairs a damaged SQLite file, or sets it aside.
            was_sound: The caller has opened this very file before, and need not look for damage
                again, which takes up to 0.2 s of CPU for a large one.

        Raises:
            LedgerUnavailable: The database does not answer, or is damaged and its owner has not
                looked after it yet (transient).
            LedgerNewer: Newer software upgraded it.
            LedgerBroken: It is damaged beyond repair, or was and waits for an operator.
        """
        database = Database(location, timeout_s=timeout_s)
        try:
            ledger_schema.prepare(database, is_owner=is_owner, was_sound=was_sound)
        except BaseException:
            database.close()
            raise
        return cls(database, session)

    def of(self, session: str) -> "Ledger":
        """The ledger of another session on the same PostgreSQL connection."""
        return Ledger(self._database, session)

    def close(self) -> None:
        self._database.close()

    def claim(
        self,
        claim: Claim,
        *,
        secret: Callable[[int], bytes],
        settle: Settlement | None = None,
    ) -> Answer:
        """Take a message for sending, in one commit with settling the one before it.

        The same claim again (same job, same `now`) after a lost answer is Claimed again.

        Args:
            secret: Makes the secret of an attempt, counted from 1.
            settle: The outcome of the message before; committed whatever the answer is.
        """
        first = secret(1)
        if not self._database.is_sqlite and self._claim_at_once(claim, first, settle):
            return Claimed(1, first)
        with self._database.transaction() as transaction:
            if settle is not None:
                self._settle(transaction, settle)
            if transaction.execute(_INSERT_CLAIM, self._claim_values(claim, first)):
                return Claimed(1, first)
            row = self._lock(transaction, claim.message_id)
            former = _attempts(transaction.fetch(_ATTEMPTS, self._key(claim.message_id)))
            answer = _judge(row, claim, former)
            if answer is not None:
                return answer
            claimed = Claimed(row.attempt + 1, secret(row.attempt + 1))
            self._reopen(transaction, claim, claimed.secret)
            return claimed

    def record(self, outcomes: Iterable[tuple[Claim, Settlement]]) -> list[Row]:
        """Write outcomes of messages that were never sent: expired, cancelled, failed.

        A row that was claimed, or is settled as sent or unknown, stays as it is, and one with a
        `doubtful` attempt becomes unknown: so compare the rows returned (one for each outcome, in
        order) with what was asked for. One commit.
        """
        rows = []
        with self._database.transaction() as transaction:
            for claim, settlement in outcomes:
                rows.append(self._record(transaction, claim, settlement))
        return rows

    def settle(self, settlement: Settlement) -> Row | None:
        """Write what became of a claimed message; the row as it is afterwards.

        Only `sending` changes, and `unknown` when it turns out sent. Repeating is harmless. None
        when there is no such row.
        """
        with self._database.transaction() as transaction:
            self._settle(transaction, settlement)
            return _row(transaction.fetch(_FIND, self._key(settlement.message_id)))

    def resolve(self, settlement: Settlement) -> Row | None:
        """An operator's word on an unknown message: sent or failed. As `settle` otherwise."""
        with self._database.transaction() as transaction:
            transaction.execute(_RESOLVE, self._settle_values(settlement))
            return _row(transaction.fetch(_FIND, self._key(settlement.message_id)))

    def sending(self) -> list[Row]:
        """The claimed rows without an outcome, oldest first; at most one when all is well."""
        return _rows(self._database.run(_SENDING, {"session": self.session}))

    def find(self, message_id: str) -> Row | None:
        return _row(self._database.run(_FIND, self._key(message_id)))

    def find_by_wa_id(self, wa_message_id: str) -> Row | None:
        """The message that has this id at WhatsApp, in its present or a former attempt."""
        found = self._database.run(_FIND_BY_WA_ID, self._wa_key(wa_message_id))
        if not found:
            found = self._database.run(_FIND_BY_FORMER_WA_ID, self._wa_key(wa_message_id))
        return _row(found)

    def has_written_to(self, recipient_hash: str) -> bool:
        """Whether a message to this recipient was sent, as far back as rows are kept."""
        values = {"session": self.session, "recipient_hash": recipient_hash}
        return bool(self._database.run(_WRITTEN_TO, values))

    def attempts(self, message_id: str) -> list[Attempt]:
        """The attempts before the present one, oldest first."""
        return _attempts(self._database.run(_ATTEMPTS, self._key(message_id)))

    def doubtful(self, message_id: str) -> Attempt | None:
        """The last attempt before the present one that may have been sent: while there is one, the
        message is not `failed`, whatever became of the present one."""
        return _doubtful(self.attempts(message_id))

    def recent(
        self, limit: int = 100, *, status: str | None = None, before: float | None = None
    ) -> list[Row]:
        """Messages by time of claim, newest first.

        Args:
            before: Only those claimed earlier than these unix seconds.
        """
        values = {"session": self.session, "limit": limit}
        values["before"] = _END_OF_TIME if before is None else before
        if status is None:
            return _rows(self._database.run(_RECENT, values))
        return _rows(self._database.run(_RECENT_OF_STATUS, {**values, "status": status}))

    def counts(self) -> dict[str, int]:
        """How many rows have each status."""
        found = self._database.run(_COUNTS, {"session": self.session})
        return {status: count for status, count in found}

    def receipt(self, wa_message_id: str, status: str, at: float) -> Row | None:
        """Apply one receipt: the row if its status changed. See `receipts`."""
        changes = self.receipts([Receipt(wa_message_id, status, at)], now=at)
        return changes[0].row if changes else None

    def receipts(self, found: Iterable[Receipt], *, now: float) -> list[Change]:
        """Apply receipts in one commit; only forward, so repeating is harmless.

        One that matches no message is kept for 24 h and applied by `apply_pending`; the newest
        2,000 or so of a session are.
        """
        changed = []
        is_kept = False
        with self._database.transaction() as transaction:
            for receipt in found:
                applied = self._apply(transaction, receipt)
                if not applied.is_matched:
                    values = {**self._receipt_key(receipt), "at": receipt.at, "kept_at": now}
                    transaction.execute(_KEEP_RECEIPT, values)
                    is_kept = True
                elif applied.changed is not None:
                    changed.append(applied.changed)
            if is_kept:
                transaction.execute(_DROP_MOST_RECEIPTS, {"session": self.session})
        return changed

    def apply_pending(self, *, now: float) -> tuple[list[Receipt], list[Change]]:
        """Apply the kept receipts whose message has its WhatsApp id by now; drop the old ones.

        Cheap when there is nothing to do: meant to be called about every second.

        Returns:
            Those that found their message, which are kept until `drop_pending`, so that a process
            killed before it could tell anybody finds them again; and what they changed.
        """
        values = {"session": self.session, "before": now - PENDING_RECEIPT_S}
        if not self._database.run(_DUE, values):
            return [], []
        matched, changed = [], []
        with self._database.transaction() as transaction:
            transaction.execute(_DROP_OLD_RECEIPTS, values)
            for fields in transaction.fetch(_MATCHING, {"session": self.session}):
                receipt = Receipt(*fields)
                applied = self._apply(transaction, receipt)
                if applied.is_matched:
                    matched.append(receipt)
                if applied.changed is not None:
                    changed.append(applied.changed)
        return matched, changed

    def drop_pending(self, receipts: Iterable[Receipt]) -> None:
        """Forget kept receipts."""
        with self._database.transaction() as transaction:
            for receipt in receipts:
                transaction.execute(_DROP_RECEIPT, self._receipt_key(receipt))

    def pending_receipts(self) -> list[Receipt]:
        """The receipts that match no message yet."""
        found = self._database.run(_PENDING, {"session": self.session})
        return [Receipt(*fields) for fields in found]

    def probe(self) -> None:
        """Show that the database takes writes: insert a row and roll it back."""
        claim = Claim("", "", "", "", 0.0)
        with contextlib.suppress(_RollBack), self._database.transaction() as transaction:
            transaction.execute(_INSERT_CLAIM, self._claim_values(claim, b""))
            raise _RollBack

    def purge(self, older_than: float, *, limit: int = 100_000) -> int:
        """Remove rows settled before `older_than` (unix seconds); at most about `limit`.

        Rows that are `sending` stay whatever their age. In small commits, so that senders are
        not kept waiting.

        Returns:
            How many messages were removed.
        """
        values = {"session": self.session, "before": older_than, "limit": _BATCH}
        removed = 0
        while removed < limit:
            with self._database.transaction() as transaction:
                keys = transaction.fetch(_PURGEABLE, values)
                for (message_id,) in keys:
                    transaction.execute(_DELETE_ATTEMPTS, self._key(message_id))
                    transaction.execute(_DELETE, self._key(message_id))
                transaction.execute(_DROP_OLD_RECEIPTS, values)
            removed += len(keys)
            if len(keys) < _BATCH:
                break
        self._database.shrink()
        return removed

    def forget(self) -> int:
        """Remove every row of the session, for its deletion; how many messages that were."""
        with self._database.transaction() as transaction:
            values = {"session": self.session}
            transaction.execute(_FORGET_ATTEMPTS, values)
            transaction.execute(_FORGET_RECEIPTS, values)
            return transaction.execute(_FORGET, values)

    def copy_to(self, other: "Ledger") -> int:
        """Add every row of this session to another ledger; rows that it has already stay.

        Returns:
            How many messages were read.
        """
        copied, after = 0, ""
        while True:
            values = {"session": self.session, "after": after, "limit": _BATCH}
            rows = self._database.run(_PAGE, values)
            with other._database.transaction() as transaction:
                for row in rows:
                    other._add(transaction, messages, row)
                    for former in self._database.run(_ATTEMPTS, self._key(row[1])):
                        other._add(transaction, attempts, former)
            copied += len(rows)
            if len(rows) < _BATCH:
                break
            after = rows[-1][1]
        for receipt in self.pending_receipts():
            other.receipts([receipt], now=receipt.at)
        return copied

    def _add(self, transaction: Transaction, table: sa.Table, row: tuple[Any, ...]) -> None:
        values = dict(zip(table.c.keys(), row, strict=True))
        transaction.execute(_ADD[table.name], {**values, "session": self.session})

    def _claim_at_once(self, claim: Claim, secret: bytes, settle: Settlement | None) -> bool:
        """PostgreSQL takes all of it as one statement: one round trip instead of four.

        False when the id is known already; the settlement is committed all the same.
        """
        values = self._claim_values(claim, secret)
        if settle is None:
            return bool(self._database.change(_INSERT_CLAIM, values))
        settled = self._settle_values(settle)
        values |= {**settled, "message_id": claim.message_id, "settled_id": settle.message_id}
        moves = settle.status in _MOVES_UNKNOWN
        statement = _SETTLE_SENDING_OR_UNKNOWN_AND_CLAIM if moves else _SETTLE_SENDING_AND_CLAIM
        return bool(self._database.change(statement, values))

    def _settle(self, transaction: Transaction, settlement: Settlement) -> None:
        moves = settlement.status in _MOVES_UNKNOWN
        statement = _SETTLE_SENDING_OR_UNKNOWN if moves else _SETTLE_SENDING
        transaction.execute(statement, self._settle_values(settlement))

    def _record(self, transaction: Transaction, claim: Claim, settlement: Settlement) -> Row:
        if transaction.execute(_INSERT_CLAIM, self._claim_values(claim, None)):
            self._settle(transaction, settlement)
        else:
            row = self._lock(transaction, claim.message_id)
            is_repeat = row.job_id == claim.job_id and row.status == settlement.status
            if row.status in REOPENABLE and not is_repeat:
                found = transaction.fetch(_ATTEMPTS, self._key(claim.message_id))
                self._reopen(transaction, claim, None)
                self._settle(transaction, honest(settlement, _doubtful(_attempts(found))))
        return self._lock(transaction, claim.message_id)

    def _reopen(self, transaction: Transaction, claim: Claim, secret: bytes | None) -> None:
        transaction.execute(_ARCHIVE, self._key(claim.message_id))
        transaction.execute(_REOPEN, self._claim_values(claim, secret))

    def _apply(self, transaction: Transaction, receipt: Receipt) -> "_Applied":
        key = self._wa_key(receipt.wa_message_id)
        row = _row(transaction.fetch(_FIND_BY_WA_ID_LOCKED, key))
        if row is None:
            row = _row(transaction.fetch(_FIND_BY_FORMER_WA_ID, key))
            if row is None or row.status == "sending":
                return _Applied(False, None)  # the attempt in hand is settled first
            # A former attempt proves to be sent: noted there, and it proves the message too.
            transaction.execute(_APPLY_TO_FORMER, {**key, "status": receipt.status})
        after = _after(row, receipt)
        if after != row:
            transaction.execute(_APPLY, {name: getattr(after, name) for name in _APPLY_FIELDS})
        return _Applied(True, Change(after, row.status) if after.status != row.status else None)

    def _lock(self, transaction: Transaction, message_id: str) -> Row:
        row = _row(transaction.fetch(_FIND_LOCKED, self._key(message_id)))
        assert row is not None, "inserting it just failed because it is there"
        return row

    def _key(self, message_id: str) -> dict[str, Any]:
        return {"session": self.session, "message_id": message_id}

    def _wa_key(self, wa_message_id: str) -> dict[str, Any]:
        return {"session": self.session, "wa_message_id": wa_message_id}

    def _receipt_key(self, receipt: Receipt) -> dict[str, Any]:
        return {**self._wa_key(receipt.wa_message_id), "status": receipt.status}

    def _claim_values(self, claim: Claim, secret: bytes | None) -> dict[str, Any]:
        return {
            **self._key(claim.message_id),
            "content_hash": claim.content_hash,
            "job_id": claim.job_id,
            "recipient_hash": claim.recipient_hash,
            "claimed_at": claim.now,
            "secret": secret,
            "metadata": claim.metadata,
        }

    def _settle_values(self, settlement: Settlement) -> dict[str, Any]:
        if settlement.status not in FINAL:
            raise ValueError(f"{settlement.status!r} is no outcome")
        return {
            **self._key(settlement.message_id),
            "new_status": settlement.status,
            "new_wa_message_id": settlement.wa_message_id,
            "new_wa_id": settlement.wa_id,
            "error": settlement.error,
            "settled_at": settlement.at,
            "new_sent_at": settlement.at if settlement.status == "sent" else None,
        }


class _RollBack(Exception):
    """Ends a transaction that was never meant to be committed."""


class _Applied(NamedTuple):
    """Whether a receipt found its message, and what that changed."""

    is_matched: bool
    changed: Change | None


def honest(settlement: Settlement, doubtful: Attempt | None) -> Settlement:
    """What became of a message, where this became of its present attempt.

    Args:
        doubtful: `Ledger.doubtful`.
    """
    if doubtful is None or settlement.status not in REOPENABLE:
        return settlement
    id, error = doubtful.wa_message_id, doubtful.error
    return replace(settlement, status="unknown", wa_message_id=id, error=error)


def _judge(row: Row, claim: Claim, former: list[Attempt]) -> Answer | None:
    """What a claim of a known message id gets; None when the message may be claimed again."""
    if row.status in REOPENABLE:
        # A job that was cancelled is not revived, whatever became of other jobs of its message; it
        # may be in hand or back at the head. A new job may be sent.
        known: list[Row | Attempt] = [row, *former]
        for each in known:
            if each.status == "cancelled" and each.job_id == claim.job_id:
                return Settled(row._replace(**each._asdict()))
        return None
    if row.content_hash != claim.content_hash:
        return Conflict(row)
    if row.status == "unknown" and claim.resend:
        return None
    if row.status != "sending":
        return Settled(row)
    is_same_claim = row.job_id == claim.job_id and row.claimed_at == claim.now
    if is_same_claim and row.secret is not None:
        return Claimed(row.attempt, row.secret)
    return Unsettled(row)


def _after(row: Row, receipt: Receipt) -> Row:
    """The row once the receipt is known; a status only moves to one of higher rank."""
    column = _RECEIPT_COLUMN[receipt.status]
    if getattr(row, column) is None:
        times: dict[str, Any] = {column: receipt.at}
        row = row._replace(**times)
    if RANK[receipt.status] <= RANK[row.status]:
        return row
    return row._replace(
        status=receipt.status,
        wa_message_id=receipt.wa_message_id,
        sent_at=row.sent_at or receipt.at,
        settled_at=row.settled_at or receipt.at,
        error=None,
    )


def _doubtful(former: list[Attempt]) -> Attempt | None:
    return next((attempt for attempt in reversed(former) if attempt.status == "unknown"), None)


def _attempts(found: Rows) -> list[Attempt]:
    return [Attempt(*values) for values in found]


def _rows(found: Rows) -> list[Row]:
    return [Row(*values) for values in found]


def _row(found: Rows) -> Row | None:
    return Row(*found[0]) if found else None


_END_OF_TIME = 1e18

_session: sa.BindParameter[str] = sa.bindparam("session")
_message_id: sa.BindParameter[str] = sa.bindparam("message_id")
_m, _a, _r = messages.c, attempts.c, receipts.c
_MINE = _m.session == _session
_THIS = sa.and_(_MINE, _m.message_id == _message_id)
# Where nothing but ids is asked for, SQLite takes the index; else it guesses, without statistics,
# that a session has ten rows, and reads them all.
_other = messages.alias("other")
_BY_WA_ID = sa.and_(
    _MINE,
    _m.message_id.in_(
        sa.select(_other.c.message_id).where(
            _other.c.session == _session,
            _other.c.wa_message_id == sa.bindparam("wa_message_id"),
        )
    ),
)
_FORMER = sa.and_(_a.session == _session, _a.wa_message_id == sa.bindparam("wa_message_id"))
_THIS_FORMER = sa.and_(_a.session == _session, _a.message_id == _message_id)
_RECEIPTS = _r.session == _session
_FRESH: dict[str, Any] = {
    name: sa.bindparam(name)
    for name in ("content_hash", "job_id", "recipient_hash", "claimed_at", "secret", "metadata")
}
_STALE = ("wa_message_id", "wa_id", "error", "sent_at", "delivered_at", "read_at", "played_at")
_APPLY_FIELDS = (
    *("session", "message_id", "status", "wa_message_id", "error", "sent_at", "settled_at"),
    *_RECEIPT_COLUMN.values(),
)

# PostgreSQL's form of the insert compiles for SQLite too: both say ON CONFLICT DO NOTHING.
_NEW: sa.ColumnElement[str] = sa.literal_column("'sending'")
_FIRST: sa.ColumnElement[int] = sa.literal_column("1")
_CLAIM = (
    postgresql.insert(messages)
    .values(session=_session, message_id=_message_id, status=_NEW, attempt=_FIRST, **_FRESH)
    .on_conflict_do_nothing()
)
_INSERT_CLAIM = Statement(_CLAIM)
_REOPEN = Statement(
    sa.update(messages)
    .where(_THIS)
    .values(
        status="sending",
        attempt=_m.attempt + 1,
        settled_at=None,
        **_FRESH,
        **dict.fromkeys(_STALE),
    )
)
_ARCHIVE = Statement(
    sa.insert(attempts).from_select(
        [column.name for column in attempts.c],
        sa.select(*(_m[column.name] for column in attempts.c)).where(_THIS),
    )
)


def _settling(*statuses: str, id: str = "message_id") -> sa.Update:
    """Settles the message named by the parameter `id` where it has one of these statuses."""
    return (
        sa.update(messages)
        .where(_MINE, _m.message_id == sa.bindparam(id))
        .where(sa.or_(*(_m.status == status for status in statuses)))
        .values(
            status=sa.bindparam("new_status"),
            wa_message_id=sa.func.coalesce(sa.bindparam("new_wa_message_id"), _m.wa_message_id),
            wa_id=sa.func.coalesce(sa.bindparam("new_wa_id"), _m.wa_id),
            error=sa.bindparam("error"),
            settled_at=sa.bindparam("settled_at"),
            sent_at=sa.func.coalesce(_m.sent_at, sa.bindparam("new_sent_at")),
            secret=None,
        )
    )


def _settling_and_claiming(*statuses: str) -> Statement:
    return Statement(_CLAIM.add_cte(_settling(*statuses, id="settled_id").cte("settled")))


_SETTLE_SENDING = Statement(_settling("sending"))
_SETTLE_SENDING_OR_UNKNOWN = Statement(_settling("sending", "unknown"))
_SETTLE_SENDING_AND_CLAIM = _settling_and_claiming("sending")
_SETTLE_SENDING_OR_UNKNOWN_AND_CLAIM = _settling_and_claiming("sending", "unknown")
_RESOLVE = Statement(_settling("unknown"))
_APPLY = Statement(
    sa.update(messages)
    .where(_THIS)
    .values({name: sa.bindparam(name) for name in _APPLY_FIELDS[2:]})
)
_APPLY_TO_FORMER = Statement(
    sa.update(attempts).where(_FORMER).values(status=sa.bindparam("status"))
)
_FIND = Statement(sa.select(messages).where(_THIS))
_FIND_LOCKED = Statement(sa.select(messages).where(_THIS).with_for_update())
_FIND_BY_WA_ID = Statement(sa.select(messages).where(_BY_WA_ID))
_FIND_BY_WA_ID_LOCKED = Statement(sa.select(messages).where(_BY_WA_ID).with_for_update())
_FIND_BY_FORMER_WA_ID = Statement(
    sa.select(messages).where(
        _MINE, _m.message_id.in_(sa.select(_a.message_id).where(_FORMER).scalar_subquery())
    )
)
_WRITTEN_TO = Statement(
    sa.select(_m.status)
    .where(_MINE, _m.recipient_hash == sa.bindparam("recipient_hash"), _m.sent_at.is_not(None))
    .limit(1)
)
_SENDING = Statement(
    sa.select(messages)
    .where(_MINE, _m.status == sa.literal_column("'sending'"))
    .order_by(_m.claimed_at)
)
_ATTEMPTS = Statement(sa.select(attempts).where(_THIS_FORMER).order_by(_a.attempt))
_NEWEST = (
    sa.select(messages)
    .where(_MINE, _m.claimed_at < sa.bindparam("before"))
    .order_by(_m.claimed_at.desc(), _m.message_id.desc())
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_RECENT = Statement(_NEWEST)
_RECENT_OF_STATUS = Statement(_NEWEST.where(_m.status == sa.bindparam("status")))
_COUNTS = Statement(sa.select(_m.status, sa.func.count()).where(_MINE).group_by(_m.status))
_PURGEABLE = Statement(
    sa.select(_m.message_id)
    .where(_MINE, _m.settled_at < sa.bindparam("before"), _m.status != "sending")
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_DELETE = Statement(sa.delete(messages).where(_THIS))
_DELETE_ATTEMPTS = Statement(sa.delete(attempts).where(_THIS_FORMER))
_FORGET = Statement(sa.delete(messages).where(_MINE))
_FORGET_ATTEMPTS = Statement(sa.delete(attempts).where(_a.session == _session))
_FORGET_RECEIPTS = Statement(sa.delete(receipts).where(_RECEIPTS))
_KEPT = sa.select(_r.wa_message_id, _r.status, _r.at).where(_RECEIPTS).order_by(_r.kept_at)
_IS_MATCHED = sa.or_(
    sa.exists(_m.message_id).where(_MINE, _m.wa_message_id == _r.wa_message_id),
    sa.exists(_a.message_id).where(_a.session == _session, _a.wa_message_id == _r.wa_message_id),
)
_PENDING = Statement(_KEPT)
_MATCHING = Statement(_KEPT.where(_IS_MATCHED))
_DUE = Statement(_KEPT.where(sa.or_(_IS_MATCHED, _r.kept_at < sa.bindparam("before"))).limit(1))
_ADD = {
    table.name: Statement(
        postgresql.insert(table)
        .values({name: sa.bindparam(name) for name in table.c.keys()})  # noqa: SIM118
        .on_conflict_do_nothing()
    )
    for table in (messages, attempts, receipts)
}
_KEEP_RECEIPT = _ADD[receipts.name]
_PAGE = Statement(
    sa.select(messages)
    .where(_MINE, _m.message_id > sa.bindparam("after"))
    .order_by(_m.message_id)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_DROP_RECEIPT = Statement(
    sa.delete(receipts).where(
        _RECEIPTS,
        _r.wa_message_id == sa.bindparam("wa_message_id"),
        _r.status == sa.bindparam("status"),
    )
)
_newer = receipts.alias("newer")
_DROP_MOST_RECEIPTS = Statement(
    sa.delete(receipts).where(
        _RECEIPTS,
        _r.kept_at
        < sa.select(_newer.c.kept_at)
        .where(_newer.c.session == _session)
        .order_by(_newer.c.kept_at.desc())
        .limit(1)
        .offset(MAX_PENDING_RECEIPTS)
        .scalar_subquery(),
    )
)
_DROP_OLD_RECEIPTS = Statement(
    sa.delete(receipts).where(_RECEIPTS, _r.kept_at < sa.bindparam("before"))
)
