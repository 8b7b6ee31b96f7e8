"""A loopback WhatsApp network that unchanged neonize pairs with, logs in to and sends through."""
