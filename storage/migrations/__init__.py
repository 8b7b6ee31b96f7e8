"""Alembic's migrations of the ledger. Loaded only when an older ledger must be upgraded."""
