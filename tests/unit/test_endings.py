"""Every row of "How a session ends", and what no row foresees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whatsapp_worker import facts
from whatsapp_worker.endings import BAN_WITHOUT_END_S, Ending, EndingKind, of_exit, of_fact
from whatsapp_worker.reports import Exit
from whatsapp_worker.session import Reason

NOW = 1_700_000_000.0

ROWS = [
    # what the client told, kind, reason, heals by itself
    (facts.Disconnected(), EndingKind.LOST, Reason.CONNECTION_FAILED, True),
    (facts.NotConnected(), EndingKind.LOST, Reason.CONNECTION_FAILED, True),
    (facts.Silent(130.0), EndingKind.LOST, Reason.KEEPALIVE_TIMEOUT, True),
    (facts.StreamError("516"), EndingKind.LOST, Reason.STREAM_ERROR, True),
    (facts.LoggedOut(True, "LOGGED_OUT"), EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, False),
    (facts.LoggedOut(True, "UNKNOWN_LOGOUT"), EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, False),
    (facts.LoggedOut(False, "unknown"), EndingKind.LOGGED_OUT, Reason.LOGGED_OUT, False),
    (
        facts.LoggedOut(True, "MAIN_DEVICE_GONE"),
        EndingKind.LOGGED_OUT,
        Reason.MAIN_DEVICE_GONE,
        False,
    ),
    (facts.TemporaryBan("BROADCAST_LIST", 60), EndingKind.BANNED, Reason.TEMPORARY_BAN, False),
    (facts.ClientOutdated(), EndingKind.OUTDATED, Reason.CLIENT_OUTDATED, False),
    (
        facts.ConnectFailure("BAD_USER_AGENT", ""),
        EndingKind.OUTDATED,
        Reason.CLIENT_OUTDATED,
        False,
    ),
    (facts.ConnectFailure("GENERIC", ""), EndingKind.LOST, Reason.CONNECTION_FAILED, True),
    (facts.ConnectFailure("EXPERIMENTAL", ""), EndingKind.LOST, Reason.CONNECTION_FAILED, True),
    (facts.ConnectFailure("unknown", ""), EndingKind.LOST, Reason.CONNECTION_FAILED, True),
    (facts.StreamReplaced(), EndingKind.REPLACED, Reason.STREAM_REPLACED, False),
    (
        facts.ConnectReturned("failed to dial whatsapp web websocket: refused"),
        EndingKind.LOST,
        Reason.CONNECTION_FAILED,
        True,
    ),
    (
        facts.ConnectReturned("proto: required field defproto.ConnectFailure.Reason not set"),
        EndingKind.LOST,
        Reason.CONNECTION_FAILED,
        True,
    ),
    (
        facts.ConnectReturned("proto: required field defproto.TemporaryBan.Code not set"),
        EndingKind.BANNED,
        Reason.TEMPORARY_BAN,
        False,
    ),
    (
        facts.ConnectReturned("proto: required field defproto.LoggedOut.Reason not set"),
        EndingKind.LOGGED_OUT,
        Reason.LOGGED_OUT,
        False,
    ),
    (facts.ConnectReturned(""), EndingKind.LOST, Reason.CONNECTION_FAILED, True),
]


@pytest.mark.parametrize(("fact", "kind", "reason", "heals"), ROWS)
def test_each_fact_that_ends_a_connection_has_its_meaning(fact, kind, reason, heals):
    ending = of_fact(fact, now=NOW)
    assert (ending.kind, ending.reason, ending.transient) == (kind, reason, heals)


@pytest.mark.parametrize(
    "fact",
    [
        facts.Connected(),
        facts.KeepAliveTimeout(1, NOW),
        facts.KeepAliveRestored(),
        facts.QrCode("x"),
        facts.Identity("1:2@s.whatsapp.net", "", "", ""),
    ],
)
def test_other_facts_end_nothing(fact):
    assert of_fact(fact, now=NOW) is None


def test_a_ban_ends_when_whatsapp_says_or_after_an_hour():
    assert of_fact(facts.TemporaryBan("x", 90), now=NOW).until == NOW + 90
    assert of_fact(facts.TemporaryBan("x", 0), now=NOW).until == NOW + BAN_WITHOUT_END_S


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Exit.OK, EndingKind.STOPPED),
        (Exit.NOT_DRAINED, EndingKind.STOPPED),
        (Exit.CRASHED, EndingKind.CRASHED),
        (Exit.CONNECTION_ENDED, EndingKind.LOST),
        (Exit.SEND_HUNG, EndingKind.LOST),
        (Exit.LOCKED, EndingKind.CRASHED),
        (Exit.ORPHANED, EndingKind.CRASHED),
        (Exit.UNSAFE, EndingKind.REFUSED),
        (Exit.STORE_BROKEN, EndingKind.REFUSED),
        (2, EndingKind.CRASHED),  # what failure 413 does to the Go runtime
        (-9, EndingKind.CRASHED),
        (-11, EndingKind.CRASHED),
    ],
)
def test_a_process_that_said_nothing_is_judged_by_its_exit(code, kind):
    assert of_exit(code, None).kind is kind


def test_the_last_word_of_a_process_outweighs_its_exit():
    said = Ending(EndingKind.LOGGED_OUT, Reason.LOGGED_OUT)
    assert of_exit(-11, said) is said


def test_a_refusal_never_heals_by_itself():
    assert not of_exit(Exit.UNSAFE, None).transient


@given(st.integers(-128, 255))
def test_every_exit_code_has_a_meaning(code):
    assert of_exit(code, None).kind in EndingKind


@pytest.mark.parametrize("fact", [row[0] for row in ROWS])
def test_an_ending_survives_the_channel(fact):
    ending = of_fact(fact, now=NOW)
    assert Ending.from_report(ending.report()) == ending


@pytest.mark.parametrize("garbage", [{}, {"kind": "nonsense"}, {"kind": "lost", "reason": "x"}])
def test_an_unreadable_last_word_is_a_crash(garbage):
    assert Ending.from_report(garbage).kind is EndingKind.CRASHED
