"""neonize's database file, read while no process has it open.

neonize opens SQLite without WAL or a busy time-out: a reader at the wrong moment makes it fail.
Hold the session's `session.lock` around every call here.
"""

from collections.abc import Iterable
from pathlib import Path

from whatsapp_worker.errors import WorkerError
from whatsapp_worker.facts import Identity


class DeviceStoreBroken(WorkerError):
    """The credentials file cannot be read; linking again makes a new one."""


def identity(path: Path) -> Identity | None:
    """Whose credentials the file holds; None when there is no file or no credentials in it.

    Raises:
        DeviceStoreBroken: It is not a device database, or damaged.
    """
    raise NotImplementedError


def handed_over(path: Path, secrets: Iterable[bytes]) -> dict[bytes, str]:
    """The WhatsApp message ids of those secrets that neonize ever took: absent means never sent.

    Raises:
        DeviceStoreBroken: It is not a device database, or damaged.
    """
    raise NotImplementedError


def adopt(pairing: Path, device: Path) -> Identity:
    """Make a finished pairing.db the session's device.db, whole or not at all.

    Raises:
        DeviceStoreBroken: It holds no usable credentials; nothing was changed.
    """
    raise NotImplementedError


def check(path: Path) -> list[str]:
    """SQLite's own integrity check: problems found, empty when sound. Slow on a large file."""
    raise NotImplementedError
