"""Bytes, rows and locks on disk; knows nothing of WhatsApp."""
