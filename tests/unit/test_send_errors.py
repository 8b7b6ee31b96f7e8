"""The table of send failures: one test a row."""

import pytest

from whatsapp_worker.send_errors import Kind, classify


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("no LID found for 5511999990001 from server", Kind.RECIPIENT),
        ("client is nil", Kind.NOT_CONNECTED),
        ("the store doesn't contain a device JID", Kind.LOGGED_OUT),
        ("websocket not connected", Kind.NOT_CONNECTED),
        ("failed to send message node: websocket not connected", Kind.NOT_CONNECTED),
        ("timed out waiting for message send response", Kind.UNSURE),
        ("websocket disconnected before message send returned response", Kind.UNSURE),
        ("server returned error 400", Kind.RECIPIENT),
        ("server returned error 479", Kind.RECIPIENT),
        ("server returned error 500", Kind.TRANSIENT),
        ("server returned error 503", Kind.TRANSIENT),
        ("server returned error 429", Kind.STOP_SENDING),
        ("server returned error 463", Kind.STOP_SENDING),
        ("failed to send usync query: info query returned status 429: x", Kind.STOP_SENDING),
        ("failed to get group members: info query returned status 503: x", Kind.TRANSIENT),
        ("failed to get device list: info query returned status 530: x", Kind.TRANSIENT),
        ("failed to send usync query: info query returned status 400: x", Kind.RECIPIENT),
        ("failed to send usync query: info query returned status 403: x", Kind.TRANSIENT),
        ("websocket disconnected before info query returned response", Kind.UNSURE),
        ("that group does not exist", Kind.RECIPIENT),
        ("something nobody has seen", Kind.UNSURE),
        ("", Kind.UNSURE),
    ],
)
def test_every_known_failure_has_its_meaning(text: str, kind: Kind) -> None:
    assert classify(text) is kind


def test_the_breaker_does_not_count_what_concerns_one_recipient_or_asks_for_a_pause() -> None:
    counted = {kind for kind in Kind if kind.is_transport_fault}
    assert counted == {Kind.UNSURE, Kind.NOT_CONNECTED, Kind.TRANSIENT}
