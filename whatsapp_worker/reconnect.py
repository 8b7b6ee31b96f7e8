"""When a lost session is dialled again. Pure: the clock is an argument, nothing is done here.

    loss ── 3 s ── attempt 1 ── 6 s ── attempt 2 ── 12 s ── attempt 3 ── failed
                                                                           │ 60 s, 120 s ... 900 s
                          attempt 3 ── 12 s ── attempt 2 ── 6 s ── attempt 1 (of the next series)

Each wait runs from the loss or the failed dial to the next dial. A cool-down stands in the place
of the first wait of the series that follows it. One outage of the whole host is found by `outage`:
then one canary dials for all, and its login lets the others go through the `DialGate`.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import tenacity

from whatsapp_worker.session import Reason, State
from whatsapp_worker.settings import Settings

QUICK_LOSS_S = 60.0  # a loss so soon after its login counts towards flapping
FLAPPING_LOSSES = 10
FLAPPING_WINDOW_S = 600.0
LONGEST_COOLDOWN_S = 900.0
COOLDOWN_JITTER = 0.1  # of the cool-down, at most; it is never shorter than said

CANARY_EVERY_S = 10.0
DIALS_AT_ONCE = 8
DIAL_SPACING_S = 0.05

# What an outage of the host's uplink looks like from one session.
_OUTAGE_REASONS = frozenset(
    {Reason.CONNECTION_FAILED, Reason.KEEPALIVE_TIMEOUT, Reason.STREAM_ERROR}
)


@dataclass(frozen=True, slots=True)
class History:
    """What the policy remembers of one session. Times are monotonic seconds."""

    attempt: int = 0  # attempts of this series so far
    series: int = 0  # series that failed one after another
    quick_losses: tuple[float, ...] = ()
    flapping: bool = False  # the last series ended by flapping; a login alone proves nothing


@dataclass(frozen=True, slots=True)
class Again:
    """Dial `wait_s` seconds after the loss; it is attempt `history.attempt`."""

    history: History
    wait_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The session failed; the next series begins after `cooldown_s`, or never when None."""

    history: History
    cooldown_s: float | None
    flapping: bool


class Policy:
    """The waits of one host, from its settings."""

    def __init__(self, *, waits_s: tuple[float, ...], jitter_s: float, cooldown_s: float) -> None:
        waits = tenacity.wait_chain(*(tenacity.wait_fixed(wait) for wait in waits_s))
        self._series = tenacity.Retrying(
            wait=waits + tenacity.wait_random(0, jitter_s),
            stop=tenacity.stop_after_attempt(len(waits_s)),
        )
        self._cooldowns = tenacity.Retrying(
            wait=tenacity.wait_exponential(multiplier=cooldown_s, max=LONGEST_COOLDOWN_S),
            stop=tenacity.stop_never if cooldown_s > 0 else tenacity.stop_after_attempt(0),
        )
        self._jitter = tenacity.wait_random(0, COOLDOWN_JITTER)

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        return cls(
            waits_s=settings.reconnect_waits_s,
            jitter_s=settings.reconnect_jitter_s,
            cooldown_s=settings.failed_cooldown_s,
        )

    def lost(self, history: History, *, now: float, login_at: float | None) -> Again | GiveUp:
        """What follows a loss (`login_at` says when that connection had logged in) or a failed
        dial (`login_at` None)."""
        history = _noted(history, now=now, login_at=login_at)
        flapping = len(history.quick_losses) >= FLAPPING_LOSSES
        if flapping or self._series.stop(_call(self._series, history.attempt)):
            return self._give_up(history, flapping=flapping)
        history = dataclasses.replace(history, attempt=history.attempt + 1)
        return Again(history, self._series.wait(_call(self._series, history.attempt)))

    def _give_up(self, history: History, *, flapping: bool) -> GiveUp:
        call = _call(self._cooldowns, history.series + 1)
        cooldown_s = None
        if not self._cooldowns.stop(call):
            cooldown_s = self._cooldowns.wait(call) * (1 + self._jitter(call))
        following = dataclasses.replace(
            history,
            attempt=1,  # the cool-down's end is attempt 1
            series=history.series + 1,
            quick_losses=() if flapping else history.quick_losses,
            flapping=flapping,
        )
        return GiveUp(following, cooldown_s, flapping)


def logged_in(history: History) -> History:
    """A login ends the series; after flapping only a connection that lasts does."""
    series = history.series if history.flapping else 0
    return dataclasses.replace(history, attempt=0, series=series)


def _noted(history: History, *, now: float, login_at: float | None) -> History:
    """The history with this loss in it."""
    recent = tuple(at for at in history.quick_losses if now - at < FLAPPING_WINDOW_S)
    if login_at is None:
        return dataclasses.replace(history, quick_losses=recent)
    if now - login_at < QUICK_LOSS_S:
        return dataclasses.replace(history, quick_losses=(*recent, now))
    return dataclasses.replace(history, quick_losses=recent, flapping=False, series=0)


def _call(retrying: tenacity.Retrying, attempt: int) -> tenacity.RetryCallState:
    call = tenacity.RetryCallState(retrying, None, (), {})
    call.attempt_number = attempt
    return call


@dataclass(frozen=True, slots=True)
class Standing:
    """One session of this host, as the outage rule sees it."""

    session: str
    state: State
    reason: Reason | None
    dialled_at: float  # when it last dialled; 0 for never

    @property
    def is_cut_off(self) -> bool:
        return self.state is State.FAILED and self.reason in _OUTAGE_REASONS


def outage(standings: Iterable[Standing]) -> bool:
    """Whether the host is cut off: no session is connected, and two or more have failed alike.

    A session alone cannot tell the uplink's fault from its own, so it keeps its cool-downs.
    """
    standings = list(standings)
    if any(standing.state is State.CONNECTED for standing in standings):
        return False
    return sum(standing.is_cut_off for standing in standings) >= 2


def canary(standings: Iterable[Standing]) -> str | None:
    """Who dials next for all: the failed session that has not dialled for longest."""
    failed = [standing for standing in standings if standing.is_cut_off]
    return min(failed, key=lambda standing: standing.dialled_at).session if failed else None


class DialGate:
    """Lets dials through one after another: a limit at once, and a distance between two."""

    def __init__(self, *, at_once: int = DIALS_AT_ONCE, spacing_s: float = DIAL_SPACING_S) -> None:
        self._at_once = at_once
        self._spacing_s = spacing_s
        self._open_at = 0.0

    def admit(self, *, now: float, dialling: int) -> bool:
        """Whether one more may dial now, while `dialling` others do; True counts as a dial."""
        if dialling >= self._at_once or now < self._open_at:
            return False
        self._open_at = now + self._spacing_s
        return True
