"""The reconnect policy, the outage rule and the dial gate: pure, so the clock is a number."""

from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker.reconnect import (
    FLAPPING_LOSSES,
    FLAPPING_WINDOW_S,
    LONGEST_COOLDOWN_S,
    Again,
    DialGate,
    GiveUp,
    History,
    Policy,
    Standing,
    canary,
    logged_in,
    outage,
)
from whatsapp_worker.session import Reason, State

POLICY = Policy(waits_s=(3, 6, 12), jitter_s=0.25, cooldown_s=60)


def fail_series(history: History, now: float = 0.0, policy: Policy = POLICY) -> GiveUp:
    """Dials that fail until the policy gives up."""
    for _ in range(20):
        verdict = policy.lost(history, now=now, login_at=None)
        if isinstance(verdict, GiveUp):
            return verdict
        history = verdict.history
    raise AssertionError("it never gives up")


def test_a_loss_is_followed_by_three_attempts_after_3_6_and_12_seconds_then_failed() -> None:
    verdict = POLICY.lost(History(), now=1000, login_at=100)
    waits = []
    while isinstance(verdict, Again):
        waits.append(verdict.wait_s)
        assert verdict.history.attempt == len(waits)
        verdict = POLICY.lost(verdict.history, now=1000, login_at=None)
    assert len(waits) == 3
    for wait_s, base_s in zip(waits, (3, 6, 12), strict=True):
        assert base_s <= wait_s <= base_s + 0.25
    assert not verdict.flapping


def test_cool_downs_double_up_to_fifteen_minutes_and_are_never_shorter_than_said() -> None:
    history, expected = History(), [60, 120, 240, 480, 900, 900]
    for cooldown_s in expected:
        end = fail_series(history)
        assert end.cooldown_s is not None
        assert cooldown_s <= end.cooldown_s <= cooldown_s * 1.1
        history = end.history
    assert expected[-1] == LONGEST_COOLDOWN_S


def test_the_cool_downs_end_is_the_first_of_three_attempts() -> None:
    history = fail_series(History()).history
    second = POLICY.lost(history, now=0, login_at=None)
    assert isinstance(second, Again) and 6 <= second.wait_s <= 6.25
    third = POLICY.lost(second.history, now=0, login_at=None)
    assert isinstance(third, Again) and 12 <= third.wait_s <= 12.25
    assert isinstance(POLICY.lost(third.history, now=0, login_at=None), GiveUp)


def test_without_a_cool_down_failed_is_final() -> None:
    policy = Policy(waits_s=(1,), jitter_s=0, cooldown_s=0)
    assert fail_series(History(), policy=policy).cooldown_s is None


def test_a_login_resets_attempts_and_cool_downs() -> None:
    history = logged_in(fail_series(fail_series(History()).history).history)
    assert (history.attempt, history.series) == (0, 0)


def test_ten_losses_soon_after_their_logins_within_ten_minutes_are_flapping() -> None:
    history, now = History(), 0.0
    for number in range(1, FLAPPING_LOSSES + 1):
        history = logged_in(history)
        now += 50
        verdict = POLICY.lost(history, now=now, login_at=now - 10)
        assert isinstance(verdict, GiveUp) == (number == FLAPPING_LOSSES)
        history = verdict.history
    assert isinstance(verdict, GiveUp) and verdict.flapping
    # A login alone proves nothing now: the next cool-down is longer.
    assert fail_series(logged_in(history), now).cooldown_s > 100  # type: ignore[operator]


def test_losses_spread_over_more_than_ten_minutes_are_not_flapping() -> None:
    history, now = History(), 0.0
    for _ in range(3 * FLAPPING_LOSSES):
        now += FLAPPING_WINDOW_S / (FLAPPING_LOSSES - 1) + 1
        verdict = POLICY.lost(logged_in(history), now=now, login_at=now - 10)
        assert isinstance(verdict, Again)
        history = verdict.history


def test_a_connection_that_lasted_clears_the_memory_of_flapping() -> None:
    history = History(series=3, flapping=True)
    verdict = POLICY.lost(logged_in(history), now=1000, login_at=900)
    assert not verdict.history.flapping
    assert verdict.history.series == 0


@given(st.lists(st.tuples(st.floats(0, 100), st.one_of(st.none(), st.floats(0, 200))), max_size=60))
def test_whatever_happens_every_series_ends_and_the_memory_stays_small(
    losses: list[tuple[float, float | None]],
) -> None:
    history, now, attempts = History(), 0.0, 0
    for gap_s, lasted_s in losses:
        now += gap_s
        if lasted_s is not None:
            history, attempts = logged_in(history), 0
            now += lasted_s
        login_at = None if lasted_s is None else now - lasted_s
        verdict = POLICY.lost(history, now=now, login_at=login_at)
        attempts = attempts + 1 if isinstance(verdict, Again) else 0
        assert attempts <= 3
        history = verdict.history
        assert len(history.quick_losses) <= FLAPPING_LOSSES


def standing(session: str, state: State, *, at: float = 0, **more: Reason) -> Standing:
    return Standing(session, state, more.get("reason", Reason.CONNECTION_FAILED), at)


def test_all_sessions_failed_alike_are_an_outage_with_one_canary() -> None:
    cut_off = [standing("a", State.FAILED, at=5), standing("b", State.FAILED, at=3)]
    assert outage(cut_off)
    assert canary(cut_off) == "b"  # who has not dialled for longest


def test_one_connected_session_proves_that_there_is_no_outage() -> None:
    assert not outage(
        [
            standing("a", State.FAILED),
            standing("b", State.FAILED),
            standing("c", State.CONNECTED),
        ]
    )


def test_a_session_alone_is_no_outage_and_crashes_are_none_either() -> None:
    assert not outage([standing("a", State.FAILED)])
    crashed = [standing(id, State.FAILED, reason=Reason.PROCESS_CRASHED) for id in "ab"]
    assert not outage(crashed)
    assert canary(crashed) is None


def test_sessions_that_await_a_person_do_not_hide_an_outage() -> None:
    logged_out = standing("c", State.LOGGED_OUT, reason=Reason.LOGGED_OUT)
    assert outage([standing("a", State.FAILED), standing("b", State.FAILED), logged_out])


def test_the_gate_keeps_a_distance_and_a_limit() -> None:
    gate = DialGate(at_once=2, spacing_s=0.1)
    assert gate.admit(now=10.0, dialling=0)
    assert not gate.admit(now=10.05, dialling=1)
    assert gate.admit(now=10.1, dialling=1)
    assert not gate.admit(now=11.0, dialling=2)
    assert gate.admit(now=11.1, dialling=1)
