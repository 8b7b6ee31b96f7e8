"""A real, unchanged neonize client in a process of its own, for tests of the sandbox network.

The test's side is `RawClient`. The process's side, run as a script, reads commands as JSON lines
on stdin and writes answers and events as JSON lines to the file descriptor that it is given
(neonize itself prints on stdout).
"""

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class RawClient:
    """One client; `close` ends its process.

    Args:
        database: Its SQLite file; one that is paired already logs in again.
        environ: The environment to exec it with, with the sandbox's variables.
    """

    def __init__(self, database: Path, environ: Mapping[str, str]) -> None:
        read_end, write_end = os.pipe()
        with database.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(database), str(write_end)],
                env={"NEONIZE_BOT_TAG": "off", **environ},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
                text=True,
            )
        os.close(write_end)
        self._lines: queue.Queue[Line | None] = queue.Queue()
        self._seen: list[Line] = []
        self._reader = threading.Thread(target=self._read, args=(read_end,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def expect(self, event: str, *, within_s: float = 30, **facts: Any) -> Line:
        """The first line, not taken yet, that is this event with these facts."""
        deadline = time.monotonic() + within_s

        def is_wanted(line: Line) -> bool:
            facts_fit = (line.get(name) == value for name, value in facts.items())
            return line["event"] == event and all(facts_fit)

        while True:
            for line in self._seen:
                if is_wanted(line):
                    self._seen.remove(line)
                    return line
            left_s = deadline - time.monotonic()
            try:  # another thread may take what this one waits for, and lay it where both look
                new = self._lines.get(timeout=min(0.2, max(0.0, left_s)))
            except queue.Empty:
                if left_s > 0:
                    continue
                new = None
            if new is None:
                raise AssertionError(f"no {event} {facts} within {within_s} s; saw {self._seen}")
            self._seen.append(new)

    def send(self, to: str, message: Any, *, within_s: float = 30) -> str:
        """Send a `waE2E.Message`; the id that it got."""
        self._command(do="send", to=to, message=_text(message.SerializeToString()))
        return str(self._answer("sent", within_s)["id"])

    def pair_phone(self, phone: str) -> str:
        """Show a pairing code for that phone; after the first `qr`."""
        self._command(do="pair_phone", phone=phone)
        return str(self._answer("code", 30)["code"])

    def mark_read(self, message: Line) -> None:
        """Mark a message as read that `expect("message")` gave."""
        self._command(do="mark_read", id=message["id"], chat=message["chat"])
        self._answer("marked", 30)

    def upload(self, data: bytes, kind: str) -> Line:
        """Upload a file as Image, Video, Audio or Document; what `UploadResponse` says."""
        self._command(do="upload", data=_text(data), kind=kind)
        return self._answer("uploaded", 60)

    def download(self, message: Any) -> bytes:
        """Download and decrypt the file of a `waE2E.Message`."""
        self._command(do="download", message=_text(message.SerializeToString()))
        return base64.b64decode(self._answer("downloaded", 60)["data"])

    def close(self) -> None:
        """Kill the process, as a crash would."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._reader.join(10)

    def _command(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _answer(self, event: str, within_s: float) -> Line:
        answer = self.expect("answer", within_s=within_s)
        assert answer["to"] == event, answer
        return answer

    def _read(self, read_end: int) -> None:
        with os.fdopen(read_end) as lines:
            for line in lines:
                self._lines.put(json.loads(line))
        self._lines.put(None)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _Process:
    """The process's side."""

    def __init__(self, database: str, write_end: int) -> None:
        from whatsapp_worker.sandbox import patch

        patch.check_environment(os.environ)
        import neonize.client
        import neonize.events

        patch.trust_sandbox()

        self._words = os.fdopen(write_end, "w", buffering=1)
        self._lock = threading.Lock()
        self._client = neonize.client.NewClient(database)
        on = self._client.event
        on.qr(lambda _, code: self._say("qr", code=code.decode()))
        on(neonize.events.PairStatusEv)(lambda _, e: self._say("paired", phone=e.ID.User))
        on(neonize.events.ConnectedEv)(lambda _, e: self._say("connected"))
        on(neonize.events.LoggedOutEv)(lambda _, e: self._say("logged_out"))
        on(neonize.events.UndecryptableMessageEv)(lambda _, e: self._say("undecryptable"))
        on(neonize.events.MessageEv)(self._on_message)
        on(neonize.events.ReceiptEv)(self._on_receipt)

    def run(self) -> None:
        threading.Thread(target=self._client.connect, daemon=True).start()
        for line in sys.stdin:
            command = json.loads(line)
            do = getattr(self, "_" + command.pop("do"))
            try:
                do(**command)
            except Exception as error:
                self._say("answer", to="error", error=repr(error))
        os._exit(0)

    def _send(self, to: str, message: str) -> None:
        response = self._client.send_message(self._jid(to), self._message(message))
        self._say("answer", to="sent", id=response.ID)

    def _pair_phone(self, phone: str) -> None:
        code = self._client.PairPhone(phone, show_push_notification=False)
        self._say("answer", to="code", code=code)

    def _mark_read(self, id: str, chat: str) -> None:
        from neonize.utils.enum import ReceiptType

        jid = self._jid(chat)
        self._client.mark_read(id, chat=jid, sender=jid, receipt=ReceiptType.READ)
        self._say("answer", to="marked")

    def _upload(self, data: str, kind: str) -> None:
        from google.protobuf.json_format import MessageToDict
        from neonize.utils.enum import MediaType

        response = self._client.upload(base64.b64decode(data), MediaType["Media" + kind])
        self._say("answer", to="uploaded", **MessageToDict(response))

    def _download(self, message: str) -> None:
        data = self._client.download_any(self._message(message))
        self._say("answer", to="downloaded", data=_text(data))

    def _on_message(self, _: Any, event: Any) -> None:
        source = event.Info.MessageSource
        self._say(
            "message",
            id=event.Info.ID,
            chat=f"{source.Chat.User}@{source.Chat.Server}",
            sender=f"{source.SenderAlt.User}@{source.SenderAlt.Server}",
            from_me=source.IsFromMe,
            text=event.Message.conversation or event.Message.extendedTextMessage.text,
            message=_text(event.Message.SerializeToString()),
        )

    def _on_receipt(self, _: Any, event: Any) -> None:
        for message_id in event.MessageIDs:
            self._say("receipt", id=message_id, type=event.Type)

    def _say(self, event: str, **facts: Any) -> None:
        with self._lock:
            self._words.write(json.dumps({"event": event, **facts}) + "\n")

    @staticmethod
    def _message(encoded: str) -> Any:
        from neonize.proto.waE2E.WAWebProtobufsE2E_pb2 import Message

        return Message.FromString(base64.b64decode(encoded))

    @staticmethod
    def _jid(text: str) -> Any:
        from neonize.utils.jid import build_jid

        user, _, server = text.partition("@")
        return build_jid(user, server or "s.whatsapp.net")


if __name__ == "__main__":
    _Process(sys.argv[1], int(sys.argv[2])).run()
