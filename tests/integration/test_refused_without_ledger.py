"""What certainly was not sent while the ledger was away is sent afterwards, never unknown."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sending import (
    FakeDevice,
    Parts,
    Running,
    enqueue,
    fork_consumer,
    kill,
    limbo,
    outcome,
    settled,
)
from support import eventually

from storage.errors import LedgerUnavailable
from whatsapp_worker.consumer import Ending
from whatsapp_worker.device import SendFailed

DISCONNECTED = "failed to send message node: websocket not connected"
LEDGER_CALLS = ("claim", "settle", "record", "find", "attempts", "doubtful", "probe")


class Refused(FakeDevice):
    """Keeps the secret, as neonize does, and fails; at the last refusal the ledger goes away."""

    def __init__(self, folder: Path, *refusals: str) -> None:
        super().__init__(folder)
        self.refusals = list(refusals)
        self.away = folder / "away"

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> Any:
        refusal = self.refusals.pop(0)
        self.at = lambda step: self._fail(refusal) if step == "stored" else None
        return super().send(recipient, content, secret)

    def _fail(self, refusal: str) -> None:
        if not self.refusals:
            self.away.touch()
        raise SendFailed(refusal)


def watch_ledger(parts: Parts, away: Path) -> None:
    """It does not answer while there is this file."""

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **options: Any) -> Any:
            if away.exists():
                raise LedgerUnavailable("it is away")
            return call(*args, **options)

        return answer

    for name in LEDGER_CALLS:
        setattr(parts.ledger, name, watched(getattr(parts.ledger, name)))


@pytest.mark.parametrize(
    ("threshold", "refusals"),
    [
        (9, ("server returned error 503",)),
        (1, ("server returned error 503",)),  # the breaker opens
        (9, (DISCONNECTED,)),
        (9, ("the store doesn't contain a device JID",)),
        (9, ("server returned error 463",)),
        (9, ("server returned error 503", "server returned error 400")),
        (9, ("server returned error 503", "server returned error 503")),
        (9, ("server returned error 503", DISCONNECTED)),
    ],
)
def test_a_refusal_while_the_ledger_is_away_is_not_forgotten_by_a_stop(
    redis: Redis, url: str, tmp_path: Path, threshold: int, refusals: tuple[str, ...]
) -> None:
    enqueue(redis, "m1")
    device = Refused(tmp_path, *refusals)
    parts = Parts(url, tmp_path, device=device, msg_failure_threshold=threshold)
    watch_ledger(parts, device.away)
    with Running(parts) as running:
        eventually(lambda: parts.consumer.queue_state()["state"] == "database")
        parts.consumer.stop()
        assert running.join(60) is Ending.STOPPED
    device.away.unlink()
    with Running(Parts(url, tmp_path)) as running:
        eventually(lambda: settled(redis, "m1"))
    assert outcome(redis, "m1")["status"] == "sent"
    assert FakeDevice(tmp_path).received() == ["text of m1"]
    assert limbo(redis) == 0


@pytest.mark.parametrize(
    "refusals",
    [
        (DISCONNECTED,),
        ("server returned error 463",),
        ("server returned error 503", "server returned error 400"),
    ],
)
def test_a_refusal_while_the_ledger_is_away_is_not_forgotten_by_a_kill(
    redis: Redis, url: str, tmp_path: Path, refusals: tuple[str, ...]
) -> None:
    enqueue(redis, "m1")
    device = Refused(tmp_path, *refusals)
    lost = tmp_path / "lost"

    def prepare(parts: Parts) -> None:
        watch_ledger(parts, device.away)
        rested = parts.breakers.database.failed

        def failed(why: str) -> None:
            lost.touch()  # the consumer waits for the database from here on
            rested(why)

        parts.breakers.database.failed = failed  # type: ignore[method-assign]

    pid = fork_consumer(url, tmp_path, device=device, prepare=prepare)
    try:
        eventually(lost.exists)
    finally:
        kill(pid)
    device.away.unlink()
    with Running(Parts(url, tmp_path)):
        eventually(lambda: settled(redis, "m1"))
    assert outcome(redis, "m1")["status"] == "sent"
    assert FakeDevice(tmp_path).received() == ["text of m1"]
