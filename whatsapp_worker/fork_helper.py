"""A small process that has imported everything but Go, and forks the device processes.

`python -m whatsapp_worker.fork_helper FD ROOM`, started by the supervisor with one end of a Unix
socket pair. One request a packet: JSON, with the child's end of its channel beside it (SCM_RIGHTS)
and, where wanted, a file for the stderr of its native libraries; one answer a packet. It stays
single-threaded, so that a fork is safe, and never loads neonize's Go library, since a forked Go
runtime hangs: `neonize_loader.py`.
At the end of its socket it exits; its children go on, since each hangs on its own channel, and the
supervisor adopts them.

    request  {"run": id, "kind": "device" or "pairing", "session", "settings": {}, "args": {}}
    answers  {"forked": id, "pid": n}    {"failed": id, "problem": "..."}
             {"exited": pid, "status": wait status}    {"ready": true}
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from whatsapp_worker import device, heap, neonize_loader, process, telemetry, warmup
from whatsapp_worker.reports import Channel, Exit
from whatsapp_worker.settings import Network, Settings

log = logging.getLogger(__name__)

PACKET = 65_536
ROOM = " " * 88  # argument: children write "whatsapp-worker device SESSION" over ours, for `ps`
PLAIN = "plain"  # argument: without neonize's Python

# What the children will need, neonize's own needs included. Missing ones cost a child time only.
PRELOAD = (
    "whatsapp_worker.device_process",
    "whatsapp_worker.pairing",
    "jobs.outbound",
    "google.protobuf.message",
    "google.protobuf.descriptor_pool",
    "google.protobuf.internal.builder",
    "google.protobuf.internal.enum_type_wrapper",
    "google.protobuf.json_format",
    "segno",
    "phonenumbers",
    "PIL.Image",
    "PIL.ImageSequence",
    "linkpreview",
    "requests",
    "httpx",
    "bs4",
    "tqdm",
    "asyncio",
    "concurrent.futures",
    "multiprocessing.pool",
    "sqlite3",
    "uuid",
)


def encode_settings(settings: Settings) -> dict[str, Any]:
    """Settings as they travel to the helper; not through the environment, which Go reads too."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
    }


def decode_settings(values: Mapping[str, Any]) -> Settings:
    """The inverse of `encode_settings`."""
    known: dict[str, Any] = {
        field.name: values[field.name] for field in fields(Settings) if field.name in values
    }
    for name in ("data_dir", "media_dir"):
        known[name] = Path(known[name]) if known[name] is not None else None
    known["reconnect_waits_s"] = tuple(known["reconnect_waits_s"])
    return Settings(**known)


class ForkHelper:
    """The loop: fork on request, reap, report."""

    def __init__(self, sock: socket.socket, *, children: Mapping[str, Callable[..., Any]]) -> None:
        """`children` maps a kind to its main function: (session, channel, settings, **args)."""
        self._sock = sock
        self._children = children

    def run(self) -> None:
        """Serve until the supervisor is gone. SIGCHLD wakes the wait."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(wake_read, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._wake = (wake_read, wake_write)
        self._say(ready=True)
        while True:
            readable, _, _ = select.select([self._sock.fileno(), wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                self._reap()
            if self._sock.fileno() in readable and not self._serve():
                return

    def _serve(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, PACKET, 2)
        except ConnectionResetError:  # it died with an answer of ours unread
            return False
        if not data:
            return False
        request = json.loads(data)
        try:
            # Here, and not in the child: it has these pages from us.
            settings = decode_settings(request["settings"])
            pid = self._fork(request, settings, descriptors)
        except (OSError, KeyError, TypeError) as error:
            self._say(failed=request["run"], problem=str(error))
        else:
            self._say(forked=request["run"], pid=pid)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _fork(self, request: dict[str, Any], settings: Settings, descriptors: Sequence[int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become(request, settings, *descriptors)
        return pid

    def _become(
        self,
        request: dict[str, Any],
        settings: Settings,
        descriptor: int,
        output: int | None = None,
    ) -> None:
        """In the child: shed what is the helper's, and run; never returns."""
        code = Exit.CRASHED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._sock.close()
            for fd in self._wake:
                os.close(fd)
            if output is not None:
                telemetry.leave_stderr_to_libraries(output)
                os.close(output)
            main = self._children[request["kind"]]
            channel = Channel(socket.socket(fileno=descriptor))
            main(request["session"], channel, settings, **request["args"])
            code = Exit.OK
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else Exit.CRASHED
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._say(exited=pid, status=status)

    def _say(self, **answer: Any) -> None:
        """A supervisor that is gone hears nothing; the end of file is noticed next."""
        with contextlib.suppress(OSError):
            self._sock.send(json.dumps(answer).encode())


def preload(network: Network, *, plain: bool) -> None:
    """Import what children need and set it aside from the garbage collector, which would touch,
    and so copy, every page in every child.

    Args:
        network: Of the children.
        plain: Of neonize, its protobuf classes only.

    Raises:
        Surprise: neonize is not as expected: start anew, plain.
    """
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.debug("fork_helper.not_preloaded", extra={"module": name, "problem": str(error)})
    neonize_loader.preload()
    if not plain:
        neonize_loader.preload_python()
    device.prepare(network)
    warmup.warm_up()
    if problem := neonize_loader.unfit_to_fork():
        raise RuntimeError(f"the fork helper must not fork: {problem}")
    gc.collect()
    gc.freeze()
    heap.close_gaps()


def main(descriptor: int, *, plain: bool) -> int:
    """Entry point of the process."""
    environ = dict(os.environ)
    settings = Settings.read(environ)
    telemetry.set_up(settings)
    process.set_name("wa-forker")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # neonize prints on stdout, which belongs to commands
    try:
        preload(settings.network, plain=plain)
    except neonize_loader.Surprise as surprise:
        log.warning("fork_helper.neonize_not_shared", extra={"problem": str(surprise)})
        os.execve(sys.executable, [*sys.orig_argv, PLAIN], environ)
    from whatsapp_worker import device_process, pairing

    children: dict[str, Callable[..., Any]] = {
        "device": device_process.main,
        "pairing": pairing.main,
    }
    ForkHelper(socket.socket(fileno=descriptor), children=children).run()
    return 0


if __name__ == "__main__":
    # Without waiting for a thread that a package may have started.
    os._exit(main(int(sys.argv[1]), plain=PLAIN in sys.argv[2:]))
