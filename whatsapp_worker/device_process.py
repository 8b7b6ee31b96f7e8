"""The process that owns one session: one neonize client, one connection, one queue."""

from typing import NoReturn

from whatsapp_worker.reports import Channel
from whatsapp_worker.settings import Settings


def main(session: str, channel: Channel, settings: Settings) -> NoReturn:
    """Run a session until its connection ends, then `os._exit` with one of `reports.Exit`.

    Called in a child just forked from the fork helper (single-threaded, neonize not loaded).
    Says `started`, `connecting`, `connected`, `heartbeat`s and, last, `ended` on the channel;
    obeys `stop` and `logout`, SIGTERM, and the end of the channel's file.
    """
    raise NotImplementedError
