"""`whatsapp-worker doctor`: looks at everything that the worker stands on, and mends what is safe.

A pre-flight: it may run before the first start, while everything runs, and when nothing does.
"""

import dataclasses
from collections.abc import Callable, Sequence

from storage.errors import StorageError
from whatsapp_worker.doctor import data, host, services
from whatsapp_worker.doctor.finding import Finding, Verdict, problem
from whatsapp_worker.errors import WorkerError
from whatsapp_worker.settings import Settings

__all__ = ["Finding", "Verdict", "run"]

Check = Callable[[Settings], Sequence[Finding]]

CHECKS: dict[str, Check] = {
    "data-folder": data.check_folder,
    "data-persists": data.check_persistence,
    "disk-space": data.check_space,
    "locks": data.check_locks,
    "redis": services.check_redis,
    "database": services.check_database,
    "clock": services.check_clock,
    "ports": host.check_ports,
    "settings": host.check_environment,
    "open-files": host.check_open_files,
    "ffmpeg": host.check_ffmpeg,
    "neonize": host.check_neonize,
    "leftovers": data.check_leftovers,
    "state-files": data.check_state_files,
    "device-databases": data.check_device_databases,
    "ledgers": data.check_ledgers,
}


def run(settings: Settings, *, fix: bool = False) -> list[Finding]:
    """Look at everything, in the order in which it matters.

    Args:
        fix: Mend what is safe to mend, and look again.

    Returns:
        At least one finding of each check. Never raises: a check that fails is a finding.
    """
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        found = _look(name, check, settings)
        if fix and any(finding.mend for finding in found):
            found = _mended(name, check, settings, found)
        findings += found
    return findings


def _look(name: str, check: Check, settings: Settings) -> list[Finding]:
    try:
        return list(check(settings))
    except Exception as error:  # whatever is broken, the other checks still help
        words = f"{type(error).__name__}: {error}"
        return [problem(name, f"could not be checked: {words}", "Mend what the others say first")]


def _mended(name: str, check: Check, settings: Settings, found: Sequence[Finding]) -> list[Finding]:
    """Mend, look again, and say beside what is found now what was done."""
    done = [did for finding in found if finding.mend for did in [_mend(finding.mend)]]
    now = _look(name, check, settings)
    return [dataclasses.replace(now[0], did="; ".join(done)), *now[1:]]


def _mend(mend: Callable[[], str]) -> str:
    try:
        return mend()
    except (OSError, StorageError, WorkerError) as error:
        return f"not mended: {error}"
