"""The first ledger."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "ledger_attempts",
        sa.Column("session", sa.Text, primary_key=True),
        sa.Column("message_id", sa.Text, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("content_hash", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("wa_message_id", sa.Text, nullable=True),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("claimed_at", sa.Float(53), nullable=False),
        sa.Column("settled_at", sa.Float(53), nullable=True),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "ledger_messages",
        sa.Column("session", sa.Text, primary_key=True),
        sa.Column("message_id", sa.Text, primary_key=True),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("content_hash", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("recipient_hash", sa.Text, nullable=False),
        sa.Column("wa_message_id", sa.Text, nullable=True),
        sa.Column("wa_id", sa.Text, nullable=True),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("claimed_at", sa.Float(53), nullable=False),
        sa.Column("sent_at", sa.Float(53), nullable=True),
        sa.Column("delivered_at", sa.Float(53), nullable=True),
        sa.Column("read_at", sa.Float(53), nullable=True),
        sa.Column("played_at", sa.Float(53), nullable=True),
        sa.Column("settled_at", sa.Float(53), nullable=True),
        sa.Column("secret", sa.LargeBinary, nullable=True),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "ledger_receipts",
        sa.Column("session", sa.Text, primary_key=True),
        sa.Column("wa_message_id", sa.Text, primary_key=True),
        sa.Column("status", sa.Text, primary_key=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("kept_at", sa.Float(53), nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("ledger_messages_by_wa_id", "ledger_messages", ["session", "wa_message_id"])
    op.create_index("ledger_messages_by_time", "ledger_messages", ["session", "claimed_at"])
    op.create_index(
        "ledger_messages_sending",
        "ledger_messages",
        ["session"],
        sqlite_where=sa.text("status = 'sending'"),
        postgresql_where=sa.text("status = 'sending'"),
    )
    op.create_index("ledger_attempts_by_wa_id", "ledger_attempts", ["session", "wa_message_id"])
