"""What the worker is measured against: neonize alone, `send_message` in a loop.

    raw_loop.py DATABASE TO COUNT

Prints one JSON line on stderr: seconds from connect to Connected, milliseconds a send, and this
process's private memory once logged in and after the sends.
"""

import json
import os
import sys
import threading
import time

import psutil

from whatsapp_worker.sandbox import patch


def main(database: str, to: str, count: int) -> None:
    patch.check_environment(os.environ)
    import neonize.client
    import neonize.events
    from neonize.utils.jid import build_jid

    patch.trust_sandbox()
    client = neonize.client.NewClient(database)
    connected = threading.Event()
    client.event(neonize.events.ConnectedEv)(lambda *_: connected.set())
    started = time.monotonic()
    threading.Thread(target=client.connect, daemon=True).start()
    assert connected.wait(30)
    connect_s = time.monotonic() - started
    private_mib = _private_mib()
    jid = build_jid(to)
    for _ in range(20):
        client.send_message(jid, neonize.client.Message(conversation="bench"))
    started = time.monotonic()
    for _ in range(count):
        client.send_message(jid, neonize.client.Message(conversation="bench"))
    send_ms = (time.monotonic() - started) / count * 1000
    facts = {
        "connect_s": connect_s,
        "send_ms": send_ms,
        "private_mib": private_mib,
        "loaded_mib": _private_mib(),
    }
    print(json.dumps(facts), file=sys.stderr, flush=True)
    os._exit(0)


def _private_mib() -> float:
    return float(psutil.Process().memory_full_info().uss / 2**20)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
