"""What the sandbox shall do wrong, and how often. Pure: the clock is an argument.

Times are seconds of one monotonic clock. A fault without `phone` concerns everybody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from whatsapp_worker.sandbox.binary import Node

FOREVER = float("inf")
MAX_RULES = 1000


class How(StrEnum):
    """What becomes of a message that a client hands over."""

    REFUSE = "refuse"  # not taken; the acknowledgement carries an error code
    NO_ACK = "no_ack"  # taken and delivered, never acknowledged
    DROP_AFTER = "drop_after"  # taken and delivered, then the connection is reset
    DROP_BEFORE = "drop_before"  # not taken, the connection is reset
    SLOW = "slow"  # taken and delivered, acknowledged after `delay_s`


@dataclass
class Rule:
    """Whom a fault concerns, and how long: both limits count, whichever ends first."""

    phone: str | None = None
    until: float = FOREVER
    left: float = FOREVER

    def spent(self, now: float) -> bool:
        """Whether this rule is over."""
        return self.left <= 0 or now >= self.until

    def concerns(self, phone: str | None) -> bool:
        """Whether it is about this number; a rule for one number is not about unknown ones."""
        return self.phone is None or self.phone == phone


@dataclass
class Failure(Rule):
    """Answer a login with `<failure reason=>`. `expire` (seconds) belongs to a 402."""

    reason: int = 503
    expire: int | None = None

    def node(self) -> Node:
        """The answer."""
        attrs = {"reason": str(self.reason)}
        if self.expire is not None:
            attrs |= {"expire": str(self.expire), "code": "101"}
        return Node("failure", dict(attrs))


@dataclass
class QueryFault(Rule):
    """Refuse a question that comes before a message: who is behind a number, which devices it
    has, where its file is uploaded to."""

    code: int = 429


@dataclass
class SendFault(Rule):
    """Treat messages badly: the first `after` that match pass, then `left` are hit."""

    how: How = How.NO_ACK
    to: str | None = None
    code: int = 479
    delay_s: float = 1.0
    after: int = 0


@dataclass
class Faults:
    """Every fault in force."""

    refusals: list[Rule] = field(default_factory=list)
    stalls: list[Rule] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    queries: list[QueryFault] = field(default_factory=list)
    sends: list[SendFault] = field(default_factory=list)

    def clear(self) -> None:
        """Remove them all."""
        for rules in (self.refusals, self.stalls, self.failures, self.queries, self.sends):
            rules.clear()

    def refuses(self, phone: str | None, now: float) -> bool:
        """Whether to refuse a connection; called once before and once after the number is known.

        Before, only rules for everybody count, after only those for that number.
        """
        rule = _first(self.refusals, phone, now, exact=True)
        return rule is not None and _use(rule)

    def stalled(self, phone: str | None, now: float) -> bool:
        """Whether a connection of that number shall be silent."""
        return _first(self.stalls, phone, now) is not None

    def failure(self, phone: str, now: float) -> Failure | None:
        """The failure to answer this login with."""
        rule = _first(self.failures, phone, now)
        return rule if rule is not None and _use(rule) else None

    def query(self, phone: str, now: float) -> QueryFault | None:
        """The fault that hits this question."""
        rule = _first(self.queries, phone, now)
        return rule if rule is not None and _use(rule) else None

    def send(self, phone: str, to: str, now: float) -> SendFault | None:
        """The fault that hits this message."""
        _drop_spent(self.sends, now)
        for rule in self.sends:
            if not rule.concerns(phone) or (rule.to is not None and rule.to != to):
                continue
            if rule.after > 0:
                rule.after -= 1
                continue
            _use(rule)
            return rule
        return None


R = TypeVar("R", bound=Rule)


def _use(rule: Rule) -> bool:
    rule.left -= 1
    return True


def _drop_spent(rules: list[SendFault], now: float) -> None:
    if rules:
        rules[:] = [rule for rule in rules if not rule.spent(now)]


def _first(rules: list[R], phone: str | None, now: float, *, exact: bool = False) -> R | None:
    rules[:] = [rule for rule in rules if not rule.spent(now)]
    for rule in rules:
        if rule.phone == phone if exact else rule.concerns(phone):
            return rule
    return None
