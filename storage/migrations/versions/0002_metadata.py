"""What a producer wants repeated in every event of its message."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("ledger_messages", sa.Column("metadata", sa.Text, nullable=True))
