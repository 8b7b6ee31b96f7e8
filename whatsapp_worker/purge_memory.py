"""What the purge remembers from run to run: where it stopped, and what all runs did so far."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.documents import Document, Fields
from storage.errors import StorageError

_VERSION = 1


def document(data_dir: Path) -> Document:
    """`purge.json`; losing it costs the counters and a look at every session."""
    return Document(data_dir / "purge.json", version=_VERSION, check=_check)


def counters(data_dir: Path) -> dict[str, Any] | None:
    """The purge's metric: what all purges of a data folder did.

    Returns:
        `{"runs", "incomplete", "bytes_freed", "duration_s", "purged": {kind: count}, "last_at"}`:
        sums since the file was made, and when the last run ended (UTC seconds); None before the
        first and when the file cannot be read.
    """
    with contextlib.suppress(StorageError):
        return (document(data_dir).read() or {}).get("counters")
    return None


def counted(
    memory: Fields, facts: Mapping[str, float], *, purged: Mapping[str, int], now: float
) -> Fields:
    """The field that a run adds to what is remembered."""
    before = memory.get("counters") or {}
    kinds = dict(before.get("purged") or {})
    for kind, number in purged.items():
        kinds[kind] = kinds.get(kind, 0) + number
    totals = {name: round(before.get(name, 0) + value, 3) for name, value in facts.items()}
    return {"counters": {**totals, "purged": kinds, "last_at": now}}


def _check(fields: Fields) -> None:
    for name in ("ledgers", "counters"):
        if not isinstance(fields.get(name) or {}, dict):
            raise ValueError(f"{name} is no object")
    counters = fields.get("counters") or {}
    kinds = counters.get("purged") or {}
    numbers = [value for name, value in counters.items() if name != "purged"]
    if not all(isinstance(value, int | float) for value in [*numbers, *kinds.values()]):
        raise ValueError("counters are no numbers")
