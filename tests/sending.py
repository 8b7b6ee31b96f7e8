"""A consumer with a pretended WhatsApp client, in a process of its own that may be killed.

Only the client is pretended: Redis and the ledger are real. The client keeps two files as neonize
would: the secrets that it took (before anything is transmitted), and what WhatsApp received.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from judging import allowed
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from support import events, eventually

from storage.ledger import Ledger
from whatsapp_worker import redis_client
from whatsapp_worker.consumer import Consumer, Ending
from whatsapp_worker.device import SendAck
from whatsapp_worker.event_names import Status
from whatsapp_worker.outbox import Outbox
from whatsapp_worker.rq_job import Outcome
from whatsapp_worker.settings import Settings
from whatsapp_worker.stored_breakers import Breakers
from whatsapp_worker.stream import EventStream

KEY = b"k" * 32
SESSION = "s1"
QUEUE = "wa:out:s1"


def queue_of(redis: "Redis", name: str = QUEUE) -> Queue:
    return Queue(name, connection=redis, serializer=JSONSerializer)


def enqueue(redis: "Redis", message_id: str, *, queue: str = QUEUE, **changes: Any) -> Job:
    """Exactly as a CRM would, without importing our code."""
    job_id = changes.pop("job_id", f"job-{message_id}")
    arguments = {
        "session": SESSION,
        "to": "+5511999990001",
        "message_id": message_id,
        "message": {"type": "text", "text": {"body": f"text of {message_id}"}},
    } | changes
    return queue_of(redis, queue).enqueue(
        "jobs.outbound.send_message", description="send_message", job_id=job_id, kwargs=arguments
    )


def enqueue_many(redis: "Redis", count: int) -> list[str]:
    """Messages m0, m1 ... in a few round trips; their ids."""
    ids = [f"m{number}" for number in range(count)]
    jobs = [
        Queue.prepare_data(
            "jobs.outbound.send_message",
            description="send_message",
            job_id=f"job-{id}",
            kwargs={
                "session": SESSION,
                "to": "+5511999990001",
                "message_id": id,
                "message": {"type": "text", "text": {"body": f"text of {id}"}},
                "metadata": {"of": id},
            },
        )
        for id in ids
    ]
    queue_of(redis).enqueue_many(jobs)
    return ids


def fetch(redis: "Redis", message_id: str) -> Job:
    """As a CRM without our code reads it."""
    return Job.fetch(f"job-{message_id}", connection=redis, serializer=JSONSerializer)


def outcome(redis: "Redis", message_id: str) -> dict[str, Any]:
    found: dict[str, Any] = fetch(redis, message_id).meta.get("outcome", {})
    return found


def settled(redis: "Redis", *message_ids: str) -> bool:
    """Whether the jobs of all of them have ended."""
    return all(fetch(redis, id).get_status() in ("finished", "failed") for id in message_ids)


def event_names(redis: "Redis") -> list[str]:
    return [event["event"] for event in events(redis)]


def limbo(redis: "Redis", queue: str = QUEUE) -> int:
    """Entries of the lists in which a job must not stay."""
    return int(redis.llen(f"rq:queue:{queue}:intermediate")) + int(redis.zcard(f"rq:wip:{queue}"))


class FakeDevice:
    """neonize's `send_message`, as far as the consumer sees it."""

    def __init__(self, folder: Path, *, takes_s: float = 0.002) -> None:
        self.handed_over_file = folder / "handed_over"
        self.network_file = folder / "network"
        self.takes_s = takes_s
        self.at: Callable[[str], None] = lambda step: None

    def send(self, recipient: str, content: Mapping[str, Any], secret: bytes) -> SendAck:
        text = content["text"]["body"]
        self.at("before")
        id = os.urandom(8).hex().upper()
        _append(self.handed_over_file, {"secret": secret.hex(), "id": id})
        self.at("stored")
        time.sleep(self.takes_s)
        _append(self.network_file, {"id": id, "to": recipient, "text": text})
        self.at("transmitted")
        return SendAck(id, recipient.partition("@")[0], time.time())

    def handed_over(self, secrets: Iterable[bytes]) -> dict[bytes, str]:
        wanted = set(secrets)
        rows = _lines(self.handed_over_file)
        return {
            secret: row["id"] for row in rows if (secret := bytes.fromhex(row["secret"])) in wanted
        }

    def received(self) -> list[str]:
        """Texts in the order in which WhatsApp got them."""
        return [row["text"] for row in _lines(self.network_file)]


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """One write call, so that a kill leaves the line whole or absent."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, json.dumps(row).encode() + b"\n")
    os.close(fd)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


class Parts:
    """A consumer and what it is made of."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        device: FakeDevice | None = None,
        location: str | Path | None = None,  # of the ledger; else a SQLite file in the folder
        ledger_timeout_s: float = 5.0,
        options: Mapping[str, Any] | None = None,  # of the consumer
        breakers: Mapping[str, Any] | None = None,  # what they get; else they are in memory only
        **settings: Any,
    ) -> None:
        self.device = device or FakeDevice(folder)
        self.redis = redis_client.connect(url)
        where = location or folder / "ledger.db"
        self.ledger = Ledger.open(where, SESSION, timeout_s=ledger_timeout_s)
        stream = EventStream(self.redis)
        self.outbox = Outbox(self.redis, SESSION, stream=stream, result_ttl_s=3600)
        known = {"folder": None, "session": SESSION, "stream": stream} | dict(breakers or {})
        self.breakers = Breakers(settings=Settings(**settings), **known)
        self.consumer = Consumer(
            session=SESSION,
            send=lambda *call: self.device.send(*call),
            ledger=self.ledger,
            outbox=self.outbox,
            breakers=self.breakers,
            install_key=KEY,
            settings=Settings(**settings),
            **(options or {}),
        )

    def recover(self) -> bool:
        return self.consumer.recover(self.device.handed_over)

    def close(self) -> None:
        self.redis.close()
        self.ledger.close()


class Running:
    """A consumer on a thread of this process."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.ending: Ending | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.ending = self.parts.consumer.run()

    def __enter__(self) -> "Running":
        assert self.parts.recover()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.parts.consumer.stop(drain_s=2.0)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.parts.close()

    def join(self, timeout_s: float = 10.0) -> Ending | None:
        """How it ended by itself."""
        self._thread.join(timeout_s)
        return self.ending


def fork_consumer(
    url: str, folder: Path, *, prepare: Callable[[Parts], None] | None = None, **settings: Any
) -> int:
    """A process that recovers and then sends until SIGTERM; its pid. It exits with 0."""
    # A SIGTERM that comes before there is a handler waits for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return pid
    code = 1
    try:
        parts = Parts(url, folder, **settings)
        signal.signal(signal.SIGTERM, lambda *_: parts.consumer.stop())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if prepare is not None:
            prepare(parts)
        is_fine = not parts.recover() or parts.consumer.run() is Ending.STOPPED
        code = 0 if is_fine else 2
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def terminate(pid: int) -> int:
    """SIGTERM; the exit code."""
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def told_once(redis: "Redis") -> dict[str, list[tuple[str, dict[str, Any], Any]]]:
    """By message id the events, their outcome and metadata; repetitions dropped as a CRM does."""
    found: dict[str, list[tuple[str, dict[str, Any], Any]]] = {}
    for entry in {entry["id"]: entry for entry in events(redis)}.values():
        payload = entry["payload"]
        told = {name: payload.get(name) for name in Outcome(Status.SENT).as_dict()}
        event = (entry["event"], told, payload.get("metadata"))
        found.setdefault(payload.get("message_id"), []).append(event)
    return found


def check_outcomes(
    redis: "Redis", folder: Path, ids: list[str], *, location: str | Path | None = None
) -> dict[str, int]:
    """Every message ended in exactly one way, it is the truth, and everybody was told the same;
    how many in each."""
    received = FakeDevice(folder).received()
    ledger = Ledger.open(location or folder / "ledger.db", SESSION)
    counts: dict[str, int] = {}
    told_of = told_once(redis)
    for id in ids:
        told = outcome(redis, id)
        times = received.count(f"text of {id}")
        assert told, f"{id} has no outcome"
        status = told["status"]
        assert times in allowed(status), f"{id} is {status} and arrived {times} times"
        row = ledger.find(id)
        assert row is not None
        assert row.status == status, f"{id}: ledger {row.status}, job {status}"
        assert told_of[id] == [(f"message.{status}", told, {"of": id})]
        is_finished = fetch(redis, id).get_status() == "finished"
        assert is_finished == (status == "sent")
        counts[status] = counts.get(status, 0) + 1
    ledger.close()
    assert limbo(redis) == 0
    assert redis.llen(f"rq:queue:{QUEUE}") == 0
    numbers = [int(text.removeprefix("text of m")) for text in received]
    assert numbers == sorted(numbers), "order was not kept"
    return counts
