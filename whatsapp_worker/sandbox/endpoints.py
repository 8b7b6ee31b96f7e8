"""Where a running sandbox is found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ENDPOINTS_FILE = "sandbox.json"


@dataclass(frozen=True)
class Endpoints:
    """The addresses of a sandbox, and its key; kept in `sandbox.json` of its state folder."""

    proxy_url: str
    control_url: str
    ca_file: str
    api_key: str
    pid: int

    def environment(self) -> dict[str, str]:
        """What a worker must be exec'd with to run on this network, and on no other."""
        return {
            "WHATSAPP_NETWORK": "sandbox",
            "HTTPS_PROXY": self.proxy_url,
            "SSL_CERT_FILE": self.ca_file,
        }

    def to_json(self) -> bytes:
        """The content of `sandbox.json`."""
        return json.dumps(asdict(self)).encode()


def read_endpoints(state_dir: Path) -> Endpoints | None:
    """What the last sandbox of a state folder wrote; None when missing or damaged."""
    try:
        return Endpoints(**json.loads((state_dir / ENDPOINTS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
