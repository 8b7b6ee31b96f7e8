"""How fast a session may send: a pace that a person could keep. Pure: clock and dice are arguments.

Between two messages lies a gap of 60 s / per_minute, more or less by the jitter, and longer before
a contact that was never written to. A cap ends the day (UTC) early.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Pace:
    """The rules.

    Attributes:
        per_minute: Messages a minute on average; more than 0.
        jitter: Share by which a gap is longer or shorter, 0 to 1.
        per_day: Most messages of a day; 0: no cap.
        new_contact_factor: How many times longer the gap before a new contact is; 1 and up.
    """

    per_minute: float
    jitter: float = 0.0
    per_day: int = 0
    new_contact_factor: float = 1.0

    def gap_s(self, lot: float, *, is_new_contact: bool) -> float:
        """The gap before a message; `lot` is drawn from -1 to 1."""
        factor = self.new_contact_factor if is_new_contact else 1.0
        return 60.0 / self.per_minute * (1.0 + self.jitter * lot) * factor


@dataclass(frozen=True, slots=True)
class Paced:
    """What one session sent lately.

    Attributes:
        last_at: UTC seconds of the last message; None before the first.
        lot: Drawn for the gap after it, -1 to 1.
        day: Its day, counted from 1970 in UTC.
        sent: Messages of that day.
    """

    last_at: float | None = None
    lot: float = 0.0
    day: int = 0
    sent: int = 0

    def sent_today(self, now: float) -> int:
        return self.sent if self.day == int(now // DAY_S) else 0

    def due_at(self, now: float, pace: Pace, *, is_new_contact: bool) -> float:
        """UTC seconds from which the next message may be sent; at most `now` when it may be."""
        if pace.per_day and self.sent_today(now) >= pace.per_day:
            return float((self.day + 1) * DAY_S)
        if self.last_at is None or self.last_at > now:  # the clock was set back: no wait
            return now
        return self.last_at + pace.gap_s(self.lot, is_new_contact=is_new_contact)

    def after(self, now: float, lot: float) -> "Paced":
        """After a message was handed over."""
        return Paced(now, lot, int(now // DAY_S), self.sent_today(now) + 1)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; `read` takes it back."""
        return {"last_at": self.last_at, "lot": self.lot, "day": self.day, "sent": self.sent}

    @classmethod
    def read(cls, stored: Mapping[str, Any] | None) -> "Paced":
        """What was stored; nothing sent where there is nothing, or nothing that can be read."""
        try:
            fields = stored or {}
            last_at = float(fields.get("last_at") or "nan")
            return replace(
                cls(),
                last_at=last_at if math.isfinite(last_at) else None,
                lot=min(1.0, max(-1.0, float(fields.get("lot", 0.0)))),
                day=int(fields.get("day", 0)),
                sent=max(0, int(fields.get("sent", 0))),
            )
        except (TypeError, ValueError, OverflowError):
            return cls()
