"""Owns WhatsApp linked-device sessions and sends through them, reliably, unattended."""

__version__ = "0.1.0"
