"""What makes a process a client of the sandbox network, and of no other.

Loaded in a device process in sandbox mode only, before neonize. WhatsApp's root key is a constant
in neonize's library; here it is overwritten in this process's memory. Nothing on disk changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import stat
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from whatsapp_worker.errors import SandboxUnsafe
from whatsapp_worker.sandbox.endpoints import read_endpoints
from whatsapp_worker.sandbox.library import Library, LibraryUnreadable, find_library

WHATSAPP_ROOT = bytes.fromhex("142375574d0a587166aae71ebe516437c4a28b73e3695c6ce1f7f9545da8ee6b")
ROOT_FILE = "root.pub"
WHATSAPP_HOSTS = (
    "web.whatsapp.com",
    "mmg.whatsapp.net",
    "static.whatsapp.net",
    "media.cdn.whatsapp.net",
    "graph.facebook.com",
    "rupload.facebook.com",
)


def check_environment(environ: Mapping[str, str]) -> None:
    """Make sure that this process cannot reach the real network.

    Go reads the environment that the process was exec'd with, so that is read too, from
    `/proc/self/environ`; a process forked from another has the other's.

    Args:
        environ: What Python sees: `os.environ`.

    Raises:
        SandboxUnsafe: It could, or would not reach the sandbox; the text says by which variable.
    """
    _check(environ)
    _check(_exec_environment())


def trust_sandbox(library: ctypes.CDLL | None = None, root_public_key: bytes | None = None) -> None:
    """Replace WhatsApp's root key in this process's memory, and read it back.

    Call it right after the library was loaded (by importing neonize) and before any client
    exists. Calling it again changes nothing.

    Args:
        library: neonize's library as loaded; None takes the installed one.
        root_public_key: 32 bytes; None reads `root.pub` beside `SSL_CERT_FILE`.

    Raises:
        SandboxUnsafe: The library is not loaded, or not built as we know it.
    """
    root = root_public_key or _read_root(os.environ)
    try:
        path = find_library() if library is None else Path(library._name)
        address = _position_of_root(path) + _load_base(path)
    except (LibraryUnreadable, OSError) as error:
        raise SandboxUnsafe(f"neonize's library cannot be read: {error}") from error
    present = ctypes.string_at(address, len(WHATSAPP_ROOT))
    if present not in (WHATSAPP_ROOT, root):
        raise SandboxUnsafe("neonize's library in memory does not hold WhatsApp's root key")
    ctypes.memmove(address, root, len(root))
    if ctypes.string_at(address, len(root)) != root:
        raise SandboxUnsafe("the root key could not be replaced")


def prepare() -> None:
    """For the parent of clients: look into the library's file, so that they need not, each."""
    with contextlib.suppress(LibraryUnreadable, OSError):  # a client says so
        _position_of_root(find_library())


def _check(environ: Mapping[str, str]) -> None:
    for name, value in environ.items():
        if name.upper() == "ALL_PROXY" and not _is_loopback(value):
            raise SandboxUnsafe(f"{name} is set to another proxy: unset it")
        if name.upper() == "NO_PROXY" and _exempts_whatsapp(value):
            raise SandboxUnsafe(f"{name} lets WhatsApp's hosts bypass the proxy: unset it")
    folder = _state_dir(environ)
    endpoints = read_endpoints(folder)
    proxy = endpoints.proxy_url if endpoints else None
    for name in ("HTTPS_PROXY", "https_proxy"):
        if name.islower() and name not in environ:
            continue
        value = environ.get(name, "")
        if not _is_loopback(value) or value.rstrip("/") != proxy:
            raise SandboxUnsafe(
                f"{name} is not the proxy of the sandbox in {folder}: set it to what"
                " `whatsapp-worker sandbox --env` prints"
            )


def _exempts_whatsapp(no_proxy: str) -> bool:
    """Whether a NO_PROXY list matches a host that a client asks for, as Go reads such lists."""
    for entry in no_proxy.lower().split(","):
        name = (
            entry.strip()
            .lstrip("[")
            .partition(":")[0]
            .rstrip("]")
            .removeprefix("*")
            .removeprefix(".")
        )
        if entry.strip() == "*" or (
            name and any(f".{host}".endswith(f".{name}") for host in WHATSAPP_HOSTS)
        ):
            return True
    return False


def _state_dir(environ: Mapping[str, str]) -> Path:
    """The state folder of the sandbox whose CA is trusted."""
    path = Path(environ.get("SSL_CERT_FILE", ""))
    if not path.is_file() or not (path.parent / ROOT_FILE).is_file():
        raise SandboxUnsafe(
            "SSL_CERT_FILE is not the ca.pem of a sandbox's state folder:"
            " set it to what `whatsapp-worker sandbox --env` prints"
        )
    if path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SandboxUnsafe(f"{path.parent} can be written by others: chmod 700 it")
    return path.parent


def _is_loopback(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme == "http"
            and parts.port is not None
            and parts.hostname is not None
            and ip_address(parts.hostname).is_loopback
        )
    except ValueError:
        return False


def _exec_environment() -> dict[str, str]:
    """The environment that this process was exec'd with, as the kernel keeps it."""
    try:
        content = Path("/proc/self/environ").read_bytes()
    except OSError as error:
        raise SandboxUnsafe(f"/proc/self/environ cannot be read: {error}") from error
    pairs = (entry.partition("=") for entry in content.decode(errors="replace").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def _read_root(environ: Mapping[str, str]) -> bytes:
    path = Path(environ.get("SSL_CERT_FILE", "")).parent / ROOT_FILE
    try:
        root = path.read_bytes()
    except OSError as error:
        raise SandboxUnsafe(f"{path} cannot be read: {error}") from error
    if len(root) != len(WHATSAPP_ROOT):
        raise SandboxUnsafe(f"{path} does not hold a key of 32 bytes")
    return root


@functools.cache
def _position_of_root(path: Path) -> int:
    """Where the root key lies in the library, counted from where that is loaded."""
    library = Library(path)
    if library.segments[0].offset or library.segments[0].address:
        raise LibraryUnreadable(f"{path} is laid out in an unknown way")
    return library.only_address_of(WHATSAPP_ROOT)


def _load_base(library: Path) -> int:
    """Where the library lies in this process's memory."""
    path = str(library.resolve())
    bases = [
        int(line.split("-")[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path) and line.split()[2] == "00000000"
    ]
    if not bases:
        raise SandboxUnsafe("neonize's library is not loaded in this process")
    return min(bases)
