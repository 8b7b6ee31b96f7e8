"""Bytes, rows and locks on disk or in a database. Knows nothing of WhatsApp.

Layers, lowest first: errors, locks, documents, tombstones, sessions; and beside them sqlite_files
and ledger.
"""
