"""The periodic job: `jobs.purge.purge_sessions`, on `wa:maintenance:<host>`."""

from collections.abc import Callable
from typing import Any

_run: Callable[[], dict[str, Any]] | None = None


def bind(run: Callable[[], dict[str, Any]]) -> None:
    """Say what purges in this process; once, before its worker starts."""
    global _run
    _run = run


def purge_sessions() -> dict[str, Any]:
    """Remove what nobody needs any more; what was done, as `whatsapp-worker purge --json`.

    Raises:
        RuntimeError: This process is no maintenance process.
        AlreadyRunning: Another purge runs on the data folder (transient).
    """
    if _run is None:
        raise RuntimeError("jobs.purge.purge_sessions runs in `whatsapp-worker maintenance` only")
    return _run()
