"""A worker that is not in sandbox mode never loads the sandbox's code."""

import os
import subprocess
import sys
from pathlib import Path

_PROCESSES = """
import sys
from whatsapp_worker import device_process, events, fork_helper, maintenance, pairing, supervisor
fork_helper.warmup.warm_up()
print([name for name in sys.modules if name.startswith("whatsapp_worker.sandbox")])
"""

# `load` builds the client and dials nobody.
_CLIENT = """
import sys
from pathlib import Path
from whatsapp_worker.device import Device
device = Device(Path(sys.argv[1]), session="s", network="whatsapp", on_fact=print)
device.load()
print([name for name in sys.modules if name.startswith("whatsapp_worker.sandbox")], flush=True)
import os
os._exit(0)
"""


def _loaded(code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "WHATSAPP_NETWORK": "whatsapp"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_no_process_loads_it():
    assert _loaded(_PROCESSES) == "[]"


def test_no_client_of_the_real_network_loads_it(tmp_path: Path):
    assert _loaded(_CLIENT, str(tmp_path / "device.db")) == "[]"
