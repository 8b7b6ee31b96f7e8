"""The ledger's tables. Migrations bring older databases to this; new ones are made from it."""

import sqlalchemy as sa

HEAD = "0002"  # the revision of the migrations that these tables correspond to
KNOWN_REVISIONS = frozenset({"0001", HEAD})  # an unknown one was made by newer software

metadata = sa.MetaData()
_SECONDS = sa.Float(53)  # unix time

messages = sa.Table(
    "ledger_messages",
    metadata,
    sa.Column("session", sa.Text, primary_key=True),
    sa.Column("message_id", sa.Text, primary_key=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("content_hash", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("recipient_hash", sa.Text, nullable=False),
    sa.Column("wa_message_id", sa.Text),
    sa.Column("wa_id", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("claimed_at", _SECONDS, nullable=False),
    sa.Column("sent_at", _SECONDS),
    sa.Column("delivered_at", _SECONDS),
    sa.Column("read_at", _SECONDS),
    sa.Column("played_at", _SECONDS),
    sa.Column("settled_at", _SECONDS),
    sa.Column("secret", sa.LargeBinary),
    sa.Column("metadata", sa.Text),
    sqlite_with_rowid=False,
)
sa.Index("ledger_messages_by_wa_id", messages.c.session, messages.c.wa_message_id)
sa.Index("ledger_messages_by_time", messages.c.session, messages.c.claimed_at)
_IS_SENDING = messages.c.status == "sending"
sa.Index(
    "ledger_messages_sending",
    messages.c.session,
    sqlite_where=_IS_SENDING,
    postgresql_where=_IS_SENDING,
)

# What became of the attempts before the one in `ledger_messages`.
attempts = sa.Table(
    "ledger_attempts",
    metadata,
    sa.Column("session", sa.Text, primary_key=True),
    sa.Column("message_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("content_hash", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("wa_message_id", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("claimed_at", _SECONDS, nullable=False),
    sa.Column("settled_at", _SECONDS),
    sqlite_with_rowid=False,
)
sa.Index("ledger_attempts_by_wa_id", attempts.c.session, attempts.c.wa_message_id)

# Receipts that matched nothing yet.
receipts = sa.Table(
    "ledger_receipts",
    metadata,
    sa.Column("session", sa.Text, primary_key=True),
    sa.Column("wa_message_id", sa.Text, primary_key=True),
    sa.Column("status", sa.Text, primary_key=True),
    sa.Column("at", _SECONDS, nullable=False),
    sa.Column("kept_at", _SECONDS, nullable=False),
    sqlite_with_rowid=False,
)
