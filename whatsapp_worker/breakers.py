"""Circuit breakers: counts of consecutive failures that decide when to leave a service alone.

Closed, everything passes. `threshold` failures in a row open it: nothing passes for `reset_s`.
Then it is half-open: one try, whose success closes it and whose failure opens it again. Pure: the
clock is an argument, wall-clock seconds since the state outlives the process.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

MAX_REMEMBERED = 5  # failures kept for the alert


class Phase(StrEnum):
    """pybreaker's words."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """What is known of one service.

    Attributes:
        failures: Consecutive ones.
        opened_at: UTC seconds of the last opening; None while closed.
        last: What the last failures were, oldest first: {"at", "failure"}.
    """

    failures: int = 0
    opened_at: float | None = None
    last: tuple[Mapping[str, Any], ...] = ()

    def phase(self, now: float, *, reset_s: float) -> Phase:
        if self.opened_at is None:
            return Phase.CLOSED
        # A clock that was set back must not keep it open for longer than it would have been.
        is_over = not self.opened_at <= now < self.opened_at + reset_s
        return Phase.HALF_OPEN if is_over else Phase.OPEN

    def failed(self, now: float, failure: str, *, threshold: int) -> "Breaker":
        """After a failure; open when it was one too many, or the try of a half-open one."""
        last = (*self.last, {"at": now, "failure": failure})[-MAX_REMEMBERED:]
        failures = self.failures + 1
        opens = failures >= threshold or self.opened_at is not None
        return Breaker(failures, now if opens else None, last)

    def succeeded(self) -> "Breaker":
        """After a success: closed, nothing counted."""
        return self if self == Breaker() else Breaker()

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; `read` takes it back."""
        return {
            "failures": self.failures,
            "opened_at": self.opened_at,
            "last": [dict(failure) for failure in self.last],
        }

    @classmethod
    def read(cls, stored: Mapping[str, Any] | None) -> "Breaker":
        """What was stored; a closed one where there is nothing, or nothing that can be read."""
        try:
            fields = stored or {}
            at = fields.get("opened_at")
            opened_at = None if at is None else float(at)
            if opened_at is not None and not math.isfinite(opened_at):
                return cls()
            return replace(
                cls(),
                failures=max(0, int(fields.get("failures", 0))),
                opened_at=opened_at,
                last=tuple(dict(failure) for failure in fields.get("last", ()))[-MAX_REMEMBERED:],
            )
        except (TypeError, ValueError, OverflowError):
            return cls()
