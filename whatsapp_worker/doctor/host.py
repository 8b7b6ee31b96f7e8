"""Checks of the machine and of what is installed on it."""

import contextlib
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

from whatsapp_worker.doctor.finding import Finding, ok, problem, warning
from whatsapp_worker.process import open_files_needed
from whatsapp_worker.redis_server import SOCKET_PATH_MAX
from whatsapp_worker.settings import Settings, misspelt

WHATSAPP = ("web.whatsapp.com", 443)
DIAL_S = 3.0
NEONIZE = ((0, 5, 2), (0, 6))  # from, and below


def check_ports(settings: Settings) -> list[Finding]:
    """Loopback ports can be had where one is needed, and the network's entrance answers."""
    return [_loopback(settings), _entrance(settings)]


def _loopback(settings: Settings) -> Finding:
    path = settings.data_dir.absolute() / "redis" / "redis.sock"
    if settings.redis_url or len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return ok("ports", "No port is opened on this host.")
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
    except OSError as error:
        return problem(
            "ports",
            f"The Redis that is brought along finds no port on 127.0.0.1: {error.strerror}.",
            "Use a DATA_DIR with a shorter path, or set REDIS_URL",
        )
    return ok("ports", "A port on 127.0.0.1 is free for the Redis that is brought along.")


def _entrance(settings: Settings) -> Finding:
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if settings.network == "sandbox" and not proxy:
        return problem(
            "network",
            "WHATSAPP_NETWORK is sandbox, and HTTPS_PROXY does not lead there.",
            "Run: eval $(whatsapp-worker sandbox --env)",
        )
    where = _address(proxy) if proxy else WHATSAPP
    name = f"{where[0]}:{where[1]}" + (" (HTTPS_PROXY)" if proxy else "")
    try:
        socket.create_connection(where, timeout=DIAL_S).close()
    except OSError as error:
        return warning(
            "network",
            f"{name} cannot be reached: {error}. Sessions will not connect.",
            "Start the sandbox: whatsapp-worker sandbox"
            if settings.network == "sandbox"
            else "Check this host's network, firewall and HTTPS_PROXY",
        )
    return ok("network", f"{name} answers.")


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def check_open_files(settings: Settings) -> list[Finding]:
    """The limit of open files fits MAX_SESSIONS; `run` raises the soft one by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [judge_open_files(hard, max_sessions=settings.max_sessions)]


def judge_open_files(hard: int, *, max_sessions: int) -> Finding:
    """The hard limit as getrlimit gives it; -1 is none."""
    need = open_files_needed(max_sessions)
    if hard == resource.RLIM_INFINITY:
        return ok("open-files", f"A process may open any number of files; {need} are needed.")
    if hard >= need:
        return ok("open-files", f"A process may open {hard} files; {need} are needed.")
    return problem(
        "open-files",
        f"A process may open {hard} files; MAX_SESSIONS={max_sessions} needs {need}.",
        "Raise the hard limit (LimitNOFILE= in systemd, ulimit -Hn), or lower MAX_SESSIONS",
    )


def check_environment(settings: Settings) -> list[Finding]:
    """No variable looks like a setting whose name is misspelt."""
    found = misspelt(os.environ).items()
    return [
        warning("settings", f"{name} is set, and nobody reads it.", f"Rename it if {near} is meant")
        for name, near in found
    ] or [ok("settings", "No variable looks like a misspelt setting.")]


def check_ffmpeg(settings: Settings) -> list[Finding]:
    """ffmpeg is on PATH."""
    if shutil.which("ffmpeg"):
        return [ok("ffmpeg", "ffmpeg is installed.")]
    return [
        warning(
            "ffmpeg",
            "ffmpeg is not on PATH: voice notes go as OGG with Opus only, videos without a"
            " picture. Everything else works.",
            "Install ffmpeg (Debian and Ubuntu: apt install ffmpeg) if you send those",
        )
    ]


def check_neonize(settings: Settings) -> list[Finding]:
    """The neonize that this was made for is installed, with its Go library; not loaded here."""
    try:
        version = importlib.metadata.version("neonize")
    except importlib.metadata.PackageNotFoundError:
        version = None
    found = judge_neonize(version)
    if found.verdict == "ok" and not _go_library():
        found = problem(
            "neonize",
            f"neonize {version} is installed without its Go library for this machine.",
            "Use Linux on x86-64, or install the wheel of your platform",
        )
    return [found]


def judge_neonize(version: str | None) -> Finding:
    """A version as pip writes it; None when neonize is not installed."""
    low, below = NEONIZE
    wanted = f"neonize >={'.'.join(map(str, low))},<{'.'.join(map(str, below))}"
    remedy = f"Run: pip install '{wanted.replace(' ', '')}'"
    if version is None:
        return problem("neonize", "neonize is not installed.", remedy)
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if low <= numbers < below:
        return ok("neonize", f"neonize {version} is installed.")
    return problem("neonize", f"neonize {version} is installed; this needs {wanted}.", remedy)


def _go_library() -> bool:
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec("neonize")
        folders = (spec.submodule_search_locations or []) if spec else []
        kinds = ("neonize-*.so", "neonize-*.dylib", "neonize-*.dll")
        return any(list(Path(folder).glob(kind)) for folder in folders for kind in kinds)
    return False
