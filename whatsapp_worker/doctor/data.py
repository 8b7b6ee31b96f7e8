"""Checks of the data folder and of what lies in it."""

import contextlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from storage import locks, sqlite_files, tombstones
from storage.documents import Document, write_synced
from storage.errors import DocumentNewer, LockHeld, LockUnusable, RecordLost, StorageError
from storage.ledger_schema import held_path
from storage.locks import check_locking
from storage.sessions import Sessions
from whatsapp_worker import device_store, process
from whatsapp_worker.doctor.finding import Finding, ok, problem, warning
from whatsapp_worker.leftovers import Leftovers
from whatsapp_worker.settings import Settings

ROOM_PROBLEM = 50 * 1024 * 1024  # bytes
ROOM_WARNING = 500 * 1024 * 1024
LOCK_WAIT_S = 0.5
END_S = 10.0
# Their content is gone after a restart of the host or of its container.
_FLEETING = frozenset({"tmpfs", "ramfs", "devtmpfs", "overlay", "aufs"})


def check_folder(settings: Settings) -> list[Finding]:
    """DATA_DIR can be written, and nobody else can read it."""
    folder = settings.data_dir
    sessions = _sessions(settings)
    if not folder.exists():
        return [
            warning(
                "data-folder",
                f"{folder.absolute()} does not exist yet.",
                "whatsapp-worker run makes it",
                mend=lambda: _make(sessions),
            )
        ]
    try:
        _try_writing(folder)
        if (folder / "sessions").exists():
            _try_writing(folder / "sessions")
    except OSError as error:
        return [
            problem(
                "data-folder",
                f"{error.filename or folder} cannot be written: {error.strerror}.",
                f"Give it to the user that runs the worker: chown -R {os.getuid()} {folder}",
            )
        ]
    return _open_to_others(settings, sessions) or [
        ok("data-folder", f"{folder.absolute()} can be written.")
    ]


def _make(sessions: Sessions) -> str:
    sessions.prepare()
    return f"made {sessions.data_dir}"


def _try_writing(folder: Path) -> None:
    path = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        write_synced(path, b"doctor", 0o600)
    finally:
        path.unlink(missing_ok=True)


def _open_to_others(settings: Settings, sessions: Sessions) -> list[Finding]:
    """Credentials and keys that others on this host may read."""
    paths = [settings.data_dir / "sessions", settings.data_dir / "install.key"]
    for id in sessions.ids():
        paths += [sessions.folder(id) / name for name in ("device.db", "pairing.db", "link.json")]
    found = [path for path in paths if path.exists() and path.stat().st_mode & 0o077]
    if not found:
        return []

    def close() -> str:
        for path in found:
            path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o700)
        return f"closed {_names(found)} to others"

    return [
        problem(
            "data-folder",
            f"Others on this host may read credentials: {_names(found)}.",
            "Run: whatsapp-worker doctor --fix",
            mend=close,
        )
    ]


def check_persistence(settings: Settings) -> list[Finding]:
    """DATA_DIR outlives a restart of the host or container."""
    kind = _filesystem(_existing(settings.data_dir))
    return [judge_persistence(settings.data_dir, kind)]


def judge_persistence(folder: Path, kind: str | None) -> Finding:
    """`kind` is the filesystem's name as the kernel says it, None when it does not."""
    if kind in _FLEETING:
        return warning(
            "data-persists",
            f"{folder.absolute()} lies on {kind}: it is gone when this host or container restarts,"
            " and every phone must be linked again.",
            "Set DATA_DIR to a folder on a disk or volume that lasts",
        )
    return ok("data-persists", f"The data folder lies on {kind or 'a filesystem that lasts'}.")


def _filesystem(path: Path) -> str | None:
    """The type of the filesystem that holds a path; None without /proc."""
    with contextlib.suppress(OSError):
        return filesystem_of(path.resolve(), Path("/proc/self/mountinfo").read_text())
    return None


def filesystem_of(path: Path, mountinfo: str) -> str | None:
    """The type of the innermost mount above a path; later lines of mountinfo cover earlier ones."""
    best: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        mount = fields[4].replace("\\040", " ")
        if path.is_relative_to(mount) and (best is None or len(mount) >= best[0]):
            best = (len(mount), right.split(" ")[0])
    return best[1] if best else None


def check_space(settings: Settings) -> list[Finding]:
    """There is room on the disk."""
    found = os.statvfs(_existing(settings.data_dir))
    inodes = found.f_favail if found.f_files else None
    return [judge_space(found.f_bavail * found.f_frsize, inodes)]


def judge_space(free: int, inodes: int | None) -> Finding:
    """Free bytes, and free inodes where the filesystem counts them."""
    remedy = "Make room, or set DATA_DIR to a larger disk"
    text = f"{free // 2**20} MiB are free in the data folder"
    if inodes is not None and inodes < 1000:
        return problem("disk-space", f"The filesystem has room for {inodes} more files.", remedy)
    if free < ROOM_PROBLEM:
        return problem("disk-space", f"{text}: states and ledgers cannot be saved.", remedy)
    if free < ROOM_WARNING:
        return warning("disk-space", f"{text}.", remedy)
    return ok("disk-space", f"{text}.")


def check_locks(settings: Settings) -> list[Finding]:
    """Locks on this filesystem exclude."""
    try:
        with tempfile.TemporaryDirectory(
            dir=_existing(settings.data_dir), prefix=".doctor-"
        ) as folder:
            check_locking(Path(folder))
    except LockUnusable as error:
        return [problem("locks", f"{error}.", "Set DATA_DIR to a local disk")]
    return [ok("locks", "Locks work in the data folder.")]


def check_leftovers(settings: Settings) -> list[Finding]:
    """Without a supervisor nobody holds a session, and no killed process left files behind."""
    sessions = _sessions(settings)
    if locks.is_locked(settings.data_dir / "supervisor.lock"):
        return [ok("leftovers", "A supervisor runs and looks after its processes.")]
    held = {
        id: pids
        for id in sessions.ids()
        if (pids := process.lock_holders(sessions.folder(id) / "session.lock"))
    }
    if held:
        return [_held(sessions, held)]
    files = _half_written(settings, sessions)
    if files:
        return [
            warning(
                "leftovers",
                f"Killed processes left files behind: {_names(files)}.",
                "whatsapp-worker run removes them",
                mend=lambda: _clean(sessions, files),
            )
        ]
    return [ok("leftovers", "Nothing is left of earlier processes.")]


def _held(sessions: Sessions, held: dict[str, list[int]]) -> Finding:
    paths = [sessions.folder(id) / "session.lock" for id in held]

    def end() -> str:
        Leftovers().end_all(paths, timeout_s=END_S)
        left = [id for id in held if locks.is_locked(sessions.folder(id) / "session.lock")]
        ended = [id for id in held if id not in left]
        return f"ended what held {', '.join(ended)}" if ended else "they are no processes of ours"

    who = ", ".join(f"{id} (process {', '.join(map(str, pids))})" for id, pids in held.items())
    return problem(
        "leftovers",
        f"No supervisor runs, and sessions are held all the same: {who}.",
        "Run: whatsapp-worker doctor --fix, or end those processes",
        mend=end,
    )


def _clean(sessions: Sessions, files: list[Path]) -> str:
    sessions.clean()
    return f"removed {_names(files)}"


def _half_written(settings: Settings, sessions: Sessions) -> list[Path]:
    folders = [settings.data_dir, *(sessions.folder(id) for id in sessions.ids())]
    names = ("tombstones.json", "wanted.json", "state.json")
    ends = (".tmp", ".bak.tmp")
    files = [folder / f"{name}{end}" for folder in folders for name in names for end in ends]
    graves = list((settings.data_dir / "sessions").glob(".deleted-*"))
    return [path for path in files if path.exists()] + graves


def check_state_files(settings: Settings) -> list[Finding]:
    """Every record can be read."""
    sessions = _sessions(settings)
    findings = [*_install_key(settings, sessions)]
    stones = settings.data_dir / "tombstones.json"
    # Not by Tombstones, which forgives: deletions that nobody remembers are worth a word.
    reads: list[tuple[Path, Callable[[], object]]] = [
        (stones, Document(stones, version=tombstones.VERSION).read)
    ]
    for id in sessions.ids():
        folder = sessions.folder(id)
        reads.append((folder / "wanted.json", lambda id=id: sessions.wanted(id)))  # type: ignore[misc]
        reads.append((folder / "state.json", lambda id=id: sessions.state(id)))  # type: ignore[misc]
    for path, read in reads:
        try:
            read()
        except StorageError as error:
            findings.append(_unreadable(path, error))
    return findings or [ok("state-files", f"{len(reads)} records can be read.")]


def _unreadable(path: Path, error: StorageError) -> Finding:
    if isinstance(error, DocumentNewer):
        return problem("state-files", f"{error}.", "Upgrade whatsapp-worker")
    if isinstance(error, RecordLost):
        return problem("state-files", f"{error}.", f"Run: whatsapp-worker start {error.session}")
    if path.name != "state.json":
        return problem("state-files", f"{error}.", f"Restore {path} from a backup")

    def set_aside() -> str:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for name in (path.name, f"{path.name}.bak"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(name).rename(path.with_name(f"{name}.broken-{stamp}"))
        return f"set {path} aside; the supervisor writes it anew"

    return problem("state-files", f"{error}.", "Run: whatsapp-worker doctor --fix", mend=set_aside)


def _install_key(settings: Settings, sessions: Sessions) -> list[Finding]:
    path = settings.data_dir / "install.key"
    linked = [id for id in sessions.ids() if (sessions.folder(id) / "device.db").exists()]
    if not path.exists():
        if not linked:
            return []
        return [
            warning(
                "state-files",
                f"{path} is missing: after a crash, messages in hand will be unknown, not settled.",
                "Restore it from a backup; a new one is made at the next start",
            )
        ]
    try:
        sessions.install_key()
    except StorageError as error:
        return [problem("state-files", f"{error}.", f"Restore {path} from a backup, or remove it")]
    return []


def check_device_databases(settings: Settings) -> list[Finding]:
    """SQLite finds nothing wrong with the credentials of sessions that do not run."""
    sessions, findings, checked, busy = _sessions(settings), [], 0, 0
    for id in sessions.ids():
        path = sessions.folder(id) / "device.db"
        if not path.exists():
            continue
        with _session_held(sessions, id) as is_held:
            if not is_held:
                busy += 1  # neonize fails when somebody else reads
                continue
            checked += 1
            findings += [
                problem(
                    "device-databases",
                    f"The credentials of session {id} are damaged: {words}.",
                    f"Run: whatsapp-worker link {id} --again",
                )
                for words in device_store.check(path)[:1]
            ]
    running = f"; {busy} in use were not looked at" if busy else ""
    return findings or [ok("device-databases", f"{checked} are sound{running}.")]


@contextlib.contextmanager
def _session_held(sessions: Sessions, id: str) -> Iterator[bool]:
    """Keep a session's processes away; False when one runs."""
    lock = sessions.session_lock(id)
    try:
        lock.acquire(LOCK_WAIT_S, note={"what": "doctor"})
    except LockHeld:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def check_ledgers(settings: Settings) -> list[Finding]:
    """SQLite finds nothing wrong with any ledger, and none was set aside."""
    if settings.database_url is not None:
        return [ok("ledgers", "The ledger is in DATABASE_URL.")]
    sessions = _sessions(settings)
    paths = [sessions.folder(id) / "ledger.db" for id in sessions.ids()]
    findings = [finding for path in paths for finding in _ledger(path)]
    return findings or [ok("ledgers", f"{sum(path.exists() for path in paths)} are sound.")]


def _ledger(path: Path) -> list[Finding]:
    session = path.parent.name
    if (held := held_path(path)).exists():
        return [
            problem(
                "ledgers",
                f"The ledger of session {session} was damaged and set aside; its queue is held.",
                f"Read {held}, look through the queue (whatsapp-worker queue {session} list), then"
                " remove that file to go on",
            )
        ]
    return [
        problem(
            "ledgers",
            f"The ledger of session {session} is damaged: {words}.",
            f"Run: whatsapp-worker restart {session}, which repairs what can be repaired",
        )
        for words in sqlite_files.problems(path)[:1]
    ]


def _sessions(settings: Settings) -> Sessions:
    return Sessions(settings.data_dir, max_tombstones=settings.max_tombstones)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _names(paths: list[Path]) -> str:
    names = [f"{path.parent.name}/{path.name}" for path in paths[:5]]
    return ", ".join(names) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
