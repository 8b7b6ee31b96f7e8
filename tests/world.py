"""A whole small world for tests and the bench: sandbox network, Redis, supervisor, CRM.

Everything is a real process on loopback, started as a user would start it, and all of it ends
with `close`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from support import RedisServer, events, eventually

from storage import locks
from whatsapp_worker.sandbox.control import Control

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from whatsapp_worker.cli import main; sys.exit(main(sys.argv[1:]))",
]


class World:
    """One host with its sandbox network; sessions are linked by simulated phones."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.data = Path(environ.get("DATA_DIR", folder / "data"))
        self.redis_server = RedisServer(folder / "redis").start()
        self.redis = Redis.from_url(self.redis_server.url)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and not name.startswith("SSL_CERT")
        }
        self.environ |= {
            "DATA_DIR": str(self.data),
            "REDIS_URL": self.redis_server.url,
            "RECONNECT_WAITS_S": "0.2,0.4,0.8",
            "RECONNECT_JITTER_S": "0.05",
            "FAILED_COOLDOWN_S": "1",
            "MAX_SESSIONS": "100",
        } | environ
        self.state_dir = folder / "sandbox"
        self.supervisor: subprocess.Popen[bytes] | None = None
        self._numbers = 0

    @classmethod
    @contextlib.contextmanager
    def running(cls, folder: Path, **environ: str) -> Iterator["World"]:
        """A world from its start to its end; what its processes logged is printed then, which
        pytest shows when the test fails."""
        it = cls(folder, **environ)
        try:
            yield it.start()
        finally:
            it.close()
            print(it.logs())

    def start(self) -> "World":
        """Sandbox, supervisor and events process."""
        self.start_sandbox()
        self.start_supervisor()
        self.events = self.spawn("events")
        return self

    def start_sandbox(self) -> None:
        self.sandbox = self.spawn("sandbox", "--state-dir", str(self.state_dir))
        eventually((self.state_dir / "sandbox.json").exists, what="the sandbox is up")
        self.control = Control.from_state_dir(self.state_dir)
        eventually(self._sandbox_answers, what="the sandbox answers")
        endpoints = json.loads((self.state_dir / "sandbox.json").read_text())
        self.environ |= {
            "WHATSAPP_NETWORK": "sandbox",
            "HTTPS_PROXY": endpoints["proxy_url"],
            "SSL_CERT_FILE": endpoints["ca_file"],
        }

    def _sandbox_answers(self) -> bool:
        with contextlib.suppress(Exception):
            self.control.health()
            return True
        return False

    def start_supervisor(self) -> None:
        """Start it; it is up when it returns, since commands wait only so long for one."""
        self.supervisor = self.spawn("run")
        lock = self.data / "supervisor.lock"
        eventually(lambda: locks.is_locked(lock), what="the supervisor is up")

    def spawn(self, *words: str) -> subprocess.Popen[bytes]:
        """Start `whatsapp-worker WORDS`; its stderr goes to WORD.log in the folder."""
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                [*COMMAND, *words], env=self.environ, stdout=log, stderr=log, cwd=self.folder
            )
        self._processes.append(process)
        return process

    def run(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run `whatsapp-worker WORDS` to its end."""
        return subprocess.run(
            [*COMMAND, *words],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def link(self, session: str, *, phone: str | None = None) -> str:
        """Create and link a session as an admin would, to a new number or to this one; returns
        its phone number."""
        if phone is None:
            self._numbers += 1
            phone = f"55219{self._numbers:08d}"  # not one that the sandbox gives away
        with self.linking(session) as lines:
            return self.scan(lines, phone)

    def scan(self, lines: Iterator[dict[str, Any]], phone: str) -> str:
        """A phone scans the first code of `linking`; returns its number once it is linked."""
        is_scanned = False
        for line in lines:
            if line["event"] == "qr" and not is_scanned:
                self.control.scan(line["code"], phone=phone)
                is_scanned = True
            if line["event"] == "linked":
                return str(line["phone"])
            if line["event"] == "failed":
                raise AssertionError(f"link failed: {line}")
        raise AssertionError("link ended without a word")

    @contextlib.contextmanager
    def linking(self, session: str, *words: str) -> Iterator[Iterator[dict[str, Any]]]:
        """The JSON lines of `link SESSION --json`."""
        process = subprocess.Popen(
            [*COMMAND, "link", session, "--json", *words],
            env=self.environ,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "link.log").open("ab"),
            text=True,
        )
        assert process.stdout is not None
        try:
            yield (json.loads(line) for line in process.stdout)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def status(self) -> dict[str, Any]:
        """What `status --json` says."""
        done = self.run("status", "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[0]))

    def session(self, session: str) -> dict[str, Any]:
        """One session's row of `status --json`; empty when there is none."""
        return next((row for row in self.status()["sessions"] if row["session"] == session), {})

    def state(self, session: str) -> dict[str, Any]:
        """state.json as it lies on disk; empty before the first write."""
        path = self.data / "sessions" / session / "state.json"
        with contextlib.suppress(FileNotFoundError):
            return dict(json.loads(path.read_text()))
        return {}

    def await_state(self, session: str, state: str, *, within_s: float = 60) -> dict[str, Any]:
        eventually(
            lambda: self.state(session).get("state") == state,
            within_s=within_s,
            what=f"{session} is {state}, not {self.state(session)}",
        )
        return self.state(session)

    def enqueue(
        self, session: str, to: str, text: str, message_id: str, *, queue: str = "", **extra: Any
    ) -> Job:
        """As a CRM does it: plain RQ, none of our code."""
        name = queue or f"wa:out:{session}"
        message = {"type": "text", "text": {"body": text}}
        return Queue(name, connection=self.redis, serializer=JSONSerializer).enqueue(
            "jobs.outbound.send_message",
            description="send_message",
            kwargs={
                "session": session,
                "to": to,
                "message_id": message_id,
                "message": message,
                **extra,
            },
        )

    def outcome(self, job: Job) -> dict[str, Any]:
        """meta["outcome"] once the job has ended; empty before."""
        fresh = Job.fetch(job.id, connection=self.redis, serializer=JSONSerializer)
        if fresh.get_status() not in ("finished", "failed"):
            return {}
        return dict(fresh.meta.get("outcome") or {})

    def await_outcomes(self, jobs: list[Job], *, within_s: float = 90) -> list[dict[str, Any]]:
        """Wait until every job has ended."""
        eventually(
            lambda: all(self.outcome(job) for job in jobs),
            within_s=within_s,
            what="every job ends",
        )
        return [self.outcome(job) for job in jobs]

    def status_of(self, session: str, message_id: str) -> str:
        """The ledger's word, by `messages show`."""
        done = self.run("messages", "show", session, message_id, "--json")
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["status"])

    def states_told(self) -> list[str]:
        """By the events, in order."""
        told = events(self.redis)
        return [e["payload"]["state"] for e in told if e["event"] == "session.state_changed"]

    def arrived(self, **where: Any) -> list[dict[str, Any]]:
        """What reached the sandbox's contacts, in order."""
        return list(self.control.messages(**where))

    def kill_redis(self) -> None:
        """SIGKILL, once all that was written has left its memory."""
        eventually(lambda: self.redis.info("persistence")["aof_buffer_length"] == 0)
        self.redis_server.kill()

    def kill_supervisor(self) -> list[int]:
        """SIGKILL the supervisor; the pids that were its children."""
        assert self.supervisor is not None
        children = psutil.Process(self.supervisor.pid).children(recursive=True)
        self.supervisor.kill()
        self.supervisor.wait()
        return [child.pid for child in children]

    def replace_process(self, session: str) -> None:
        """SIGKILL a session's device process, and wait until there is another."""
        pid = self.state(session)["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.state(session).get("pid") not in (None, pid), what="a new process")

    def limbo(self, session: str) -> dict[str, int]:
        """Lengths of everything that must be empty when a queue is done."""
        queue = f"wa:out:{session}"
        return {
            "queue": int(self.redis.llen(f"rq:queue:{queue}")),
            "intermediate": int(self.redis.llen(f"rq:queue:{queue}:intermediate")),
            "started": int(self.redis.zcard(f"rq:wip:{queue}")),
        }

    def logs(self) -> str:
        """Everything that the processes wrote; for the message of a failed test."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-6000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def close(self) -> None:
        """End everything, the supervisor first and kindly."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            if process.poll() is None:
                process.kill()
                process.wait()
        self.redis.close()
        self.redis_server.kill()
