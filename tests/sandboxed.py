"""The sandbox network as a process of its own, and real neonize clients on it, for tests."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raw_client import RawClient
from world import eventually

from whatsapp_worker.sandbox.control import Control, Message

SERVE = (
    "import pathlib, sys; from whatsapp_worker.sandbox.server import serve;"
    "sys.exit(serve(state_dir=pathlib.Path(sys.argv[1])))"
)


class Sandbox:
    """A running network; `close` ends it and every client.

    Args:
        folder: State, databases and logs lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "sandbox"
        self._clients: list[RawClient] = []
        self.start()

    def start(self) -> None:
        """Start it, again after `stop`."""
        with (self.folder / "sandbox.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(self.state_dir)], stdout=log, stderr=log
            )
        eventually(self._answers, what="the sandbox answers")
        self.control = Control.from_state_dir(self.state_dir)

    def stop(self) -> None:
        """Ask it to end."""
        self._process.terminate()
        assert self._process.wait(60) == 0

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End everything."""
        for client in self._clients:
            client.close()
        self.stop()

    @property
    def endpoints(self) -> dict[str, Any]:
        """What it wrote about itself."""
        return dict(json.loads((self.state_dir / "sandbox.json").read_text()))

    def client(self, name: str, **environment: str) -> RawClient:
        """A client; shows codes, or logs in when one of that name was linked before."""
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and not name.startswith("SSL_CERT")
        } | {
            "WHATSAPP_NETWORK": "sandbox",
            "HTTPS_PROXY": self.endpoints["proxy_url"],
            "SSL_CERT_FILE": self.endpoints["ca_file"],
            "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
            **environment,
        }
        client = RawClient(self.folder / f"{name}.db", environ)
        self._clients.append(client)
        return client

    def link(self, name: str, phone: str) -> RawClient:
        """A client that a phone has linked and that is connected."""
        client = self.client(name)
        scanned = self.control.scan(client.expect("qr")["code"], phone=phone)
        assert scanned["outcome"] == "paired"
        client.expect("connected")
        return client

    def is_online(self, phone: str) -> bool:
        """Whether a device of that number is connected."""
        return any(device["online"] for device in self.control.devices(phone))

    @contextlib.contextmanager
    def comes_back(self, phone: str) -> Iterator[None]:
        """Wait, at the end, until a device of that number has logged in once more."""
        (before,) = (device["logins"] for device in self.control.devices(phone))
        yield
        eventually(
            lambda: (
                [d["online"] and d["logins"] > before for d in self.control.devices(phone)]
                == [True]
            ),
            what="the client is back",
        )

    def arrived(self, message_id: str) -> Message:
        """The row of a message, once its contact has read it."""

        def row() -> Message | None:
            rows = self.control.messages(id=message_id)
            return rows[0] if rows and rows[0]["type"] else None

        found: Message = eventually(row, what="the message arrives")
        return found

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            control = Control.from_state_dir(self.state_dir)
            control.health()
            return control.devices() is not None
        return False
