"""Runs migrations on the connection, and in the transaction, that `ledger_schema` hands over."""

from alembic import context

from storage.ledger_schema import VERSION_TABLE
from storage.ledger_tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
context.run_migrations()
