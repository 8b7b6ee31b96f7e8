"""The process that links a device: shows codes until a phone accepts, and can be killed."""

from typing import Literal, NoReturn

from whatsapp_worker.reports import Channel
from whatsapp_worker.settings import Settings


def main(
    session: str,
    channel: Channel,
    settings: Settings,
    *,
    method: Literal["qr", "phone"],
    phone: str | None = None,
) -> NoReturn:
    """Pair into the session's pairing.db, then `os._exit` with one of `reports.Exit`.

    Called in a child just forked from the fork helper. Says `started`, `qr` for each code or
    `code` once, `paired`, and, last, `ended` with kind `linked` (adopt the credentials with
    `device_store.adopt`) or another. pairing.db is removed first if one lies there.

    Args:
        method: `qr` shows QR codes; `phone` asks for a pairing code.
        phone: Digits of the number, for `phone`.
    """
    raise NotImplementedError
