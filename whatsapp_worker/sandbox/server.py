"""`whatsapp-worker sandbox`: the sandbox network as a process."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from aiohttp import web

from whatsapp_worker.errors import AlreadyRunning
from whatsapp_worker.sandbox import certs
from whatsapp_worker.sandbox.api import make_app
from whatsapp_worker.sandbox.binary import Codec
from whatsapp_worker.sandbox.connection import Connection
from whatsapp_worker.sandbox.endpoints import ENDPOINTS_FILE, Endpoints, read_endpoints
from whatsapp_worker.sandbox.library import Library, find_library
from whatsapp_worker.sandbox.media import Media
from whatsapp_worker.sandbox.network import Network
from whatsapp_worker.sandbox.noise import ServerHandshake
from whatsapp_worker.sandbox.tokens import read_tokens

log = logging.getLogger(__name__)

SAVE_INTERVAL_S = 1.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

__all__ = ["Endpoints", "serve"]

T = TypeVar("T")


def serve(
    *,
    state_dir: Path,
    host: str = "127.0.0.1",
    proxy_port: int = 0,
    control_port: int = 0,
    ready: Callable[[Endpoints], None] | None = None,
) -> int:
    """Run the network until SIGTERM or SIGINT.

    Args:
        state_dir: Keys, contacts and linked devices; made (0700) when missing.
        host: A loopback address.
        proxy_port: 0 takes the port of the last run if it is free, else any.
        control_port: As `proxy_port`.
        ready: Called once everything listens.

    Returns:
        The exit code: 0.

    Raises:
        AlreadyRunning: Another sandbox holds the state folder.
        ValueError: `host` is not loopback, or the state folder cannot be used.
        OSError: A port asked for is taken.
    """
    if host not in _LOOPBACK:
        raise ValueError(f"{host}: the sandbox listens on loopback only")
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    state_dir.chmod(0o700)
    lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        asyncio.run(_serve(state_dir.resolve(), host, proxy_port, control_port, ready))
    except BlockingIOError as error:
        raise AlreadyRunning(f"a sandbox runs on {state_dir} already") from error
    finally:
        os.close(lock)
    return 0


async def _serve(
    state_dir: Path,
    host: str,
    proxy_port: int,
    control_port: int,
    ready: Callable[[Endpoints], None] | None,
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    keys = certs.load_or_make(state_dir)
    codec = Codec(read_tokens(Library(find_library())))
    tls = certs.server_context(keys, state_dir)
    certificate = certs.noise_certificate(keys)
    network = Network(state_dir=state_dir, later=loop.call_later)
    media = Media(state_dir / "media")
    last = read_endpoints(state_dir)
    api_key = last.api_key if last else secrets.token_urlsafe(32)

    def connection() -> Connection:
        return Connection(
            network=network,
            codec=codec,
            tls=tls,
            handshake=lambda: ServerHandshake(static=keys.noise_static, certificate=certificate),
            media=media,
        )

    proxy = await _listen(
        lambda port: loop.create_server(connection, host, port, backlog=512),
        proxy_port,
        _port(last.proxy_url) if last else 0,
    )
    runner = web.AppRunner(make_app(network, media, api_key), access_log=None)
    await runner.setup()

    async def listen_control(port: int) -> web.TCPSite:
        site = web.TCPSite(runner, host, port)
        await site.start()
        return site

    await _listen(listen_control, control_port, _port(last.control_url) if last else 0)
    endpoints = Endpoints(
        proxy_url=_url(proxy.sockets[0].getsockname()),
        control_url=_url(runner.addresses[0]),
        ca_file=str(state_dir / certs.CA_FILE),
        api_key=api_key,
        pid=os.getpid(),
    )
    certs.write_private(state_dir / ENDPOINTS_FILE, endpoints.to_json())
    log.info("sandbox.started", extra={"proxy": endpoints.proxy_url})
    if ready is not None:
        ready(endpoints)
    try:
        while not stop.is_set():
            network.contacts.save()
            await _wait(stop, SAVE_INTERVAL_S)
    finally:
        proxy.close()
        await runner.cleanup()
        network.close()
        log.info("sandbox.stopped")


async def _listen(start: Callable[[int], Awaitable[T]], wanted: int, last: int) -> T:
    """Listen on the port asked for, else on the last one if it is free, else on any."""
    if wanted or not last:
        return await start(wanted)
    try:
        return await start(last)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return await start(0)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


def _port(url: str) -> int:
    return urlsplit(url).port or 0


def _url(address: tuple[str, int]) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"
