"""The table of send failures: one test a row."""

import re

import pytest

from whatsapp_worker.send_errors import TABLE, Kind, classify, in_words, upload_in_words

QUERY = "failed to send usync query: info query returned status"
TOLD = (Kind.RECIPIENT, Kind.TRANSIENT)  # in the others the message is not `failed`
CASES = [
    ("no LID found for 5511999990001 from server", Kind.RECIPIENT),
    ("client is nil", Kind.NOT_CONNECTED),
    ("the store doesn't contain a device JID", Kind.LOGGED_OUT),
    ("websocket not connected", Kind.NOT_CONNECTED),
    ("failed to send message node: websocket not connected", Kind.NOT_CONNECTED),
    ("timed out waiting for message send response", Kind.UNSURE),
    ("websocket disconnected before message send returned response", Kind.UNSURE),
    ("not logged in", Kind.LOGGED_OUT),
    *((f"server returned error {code}", Kind.RECIPIENT) for code in (400, 401, 479, 501, 4630)),
    *((f"server returned error {code}", Kind.TRANSIENT) for code in (408, 500, 502, 503, 504)),
    *((f"server returned error {code}", Kind.STOP_SENDING) for code in (420, 429, 463)),
    *((f"{QUERY} {code}: x", Kind.STOP_SENDING) for code in (420, 429, 463)),
    ("failed to get group members: info query returned status 503: x", Kind.TRANSIENT),
    ("failed to get device list: info query returned status 530: x", Kind.TRANSIENT),
    *((f"{QUERY} {code}: x", Kind.RECIPIENT) for code in (400, 404, 406)),
    (f"{QUERY} 403: x", Kind.TRANSIENT),
    ("websocket disconnected before info query returned response", Kind.UNSURE),
    ("that group does not exist", Kind.RECIPIENT),
    ("you're not participating in that group", Kind.RECIPIENT),
    ("can't send message to unknown server x", Kind.RECIPIENT),
    ("message recipient must be a user JID with no device part", Kind.RECIPIENT),
    ("something nobody has seen", Kind.UNSURE),
    ("", Kind.UNSURE),
]


@pytest.mark.parametrize(("text", "kind"), CASES)
def test_every_known_failure_has_its_meaning(text: str, kind: Kind) -> None:
    assert classify(text) is kind


def test_no_row_is_without_a_test() -> None:
    decided = {
        next((pattern for pattern, _ in TABLE if re.search(pattern, text)), None)
        for text, _ in CASES
    }
    assert {pattern for pattern, _ in TABLE} - decided == set()


@pytest.mark.parametrize("kind", Kind)
def test_the_breaker_counts_transport_faults_and_time_outs_only(kind: Kind) -> None:
    counted = (Kind.UNSURE, Kind.NOT_CONNECTED, Kind.TRANSIENT)
    assert kind.is_transport_fault == (kind in counted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "no LID found for 5511999990001@s.whatsapp.net from server",
            "the number is not on WhatsApp",
        ),
        ("server returned error 479", "WhatsApp refused the message (error 479)"),
        (f"{QUERY} 404: x", "WhatsApp refused a question about the recipient (error 404)"),
        ("that group does not exist", "the group does not exist"),
        ("something nobody has seen", "something nobody has seen"),
    ],
)
def test_a_failure_is_told_in_words_that_people_know(text: str, words: str) -> None:
    assert in_words(text) == words


@pytest.mark.parametrize("text", [text for text, kind in CASES if kind in TOLD])
def test_no_failure_that_a_crm_is_told_is_in_the_librarys_words(text: str) -> None:
    assert in_words(text) != text
    assert re.findall(r"\d+", in_words(text)) == re.findall(r"(?<!\d)\d{3,4}(?!\d)", text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("upload failed with status code 503", "WhatsApp did not take the file (error 503)"),
        (
            "failed to refresh media connections: info query returned status 500: x",
            "WhatsApp did not take the file (error 500)",
        ),
        ("dial tcp 5511999990001: connection refused", "WhatsApp did not take the file"),
    ],
)
def test_a_failed_upload_is_told_in_words_that_people_know(text: str, words: str) -> None:
    assert upload_in_words(text) == words
