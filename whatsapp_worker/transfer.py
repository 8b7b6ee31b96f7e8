"""Moves one session to another host in one encrypted file, so that no new QR is needed.

The file is a tar archive under AES-256-GCM, with a key from the passphrase by scrypt: what lies in
it is as good as the phone's own linked device. After an export the source does not run the session
again unless it is forced to: two hosts with the same credentials would break both.
"""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import shutil
import sqlite3
import struct
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from storage.documents import sync_folder
from storage.errors import LockHeld
from storage.ledger import Ledger
from storage.sessions import Sessions, StateRecord, Wanted
from whatsapp_worker import device_store
from whatsapp_worker.device_store import DeviceStoreBroken
from whatsapp_worker.errors import AlreadyRunning, CommandFailed, UnknownSession, UsageError
from whatsapp_worker.keys import session_id
from whatsapp_worker.session import Reason, State, sentence

FORMAT = 1
MIN_PASSPHRASE = 12  # characters

_MAGIC = b"whatsapp-worker session 1\n"
_COST = 16  # log2 of scrypt's N: 64 MiB and some 0.2 s
_MAX_COST = 20
_CHUNK = 65_536
_LAST = 0x8000_0000
_NAMES = ("manifest.json", "device.db", "ledger.db")
_MAX_MANIFEST = 1_048_576
_KEPT = ("jid", "lid", "phone", "push_name", "banned_until", "proof_of_life_at", "touched_at")


class TransferFailed(CommandFailed):
    """The file cannot be read or does not fit here; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What was moved."""

    session: str
    messages: int
    bytes: int


def export_session(
    sessions: Sessions,
    session: str,
    target: Path,
    *,
    passphrase: str,
    open_ledger: Callable[[str], Ledger],
    now: float,
) -> Transfer:
    """Write a session that does not run into one new file, and stop it here for good.

    Args:
        target: Must not exist; made with mode 0600.
        passphrase: At least MIN_PASSPHRASE characters.
        open_ledger: Opens the ledger of a session id.
        now: Unix seconds.

    Raises:
        AlreadyRunning: A process runs the session: stop it first.
        UnknownSession, UsageError, TransferFailed, StorageError: As their texts say; the session
            is as it was.
    """
    _check_passphrase(passphrase)
    wanted = sessions.wanted(session)
    if wanted is None or wanted.run == "delete":
        raise UnknownSession(f"there is no session {session} to export")
    if target.exists():
        raise UsageError(f"{target} exists already")
    with (
        _held(sessions, session),
        tempfile.TemporaryDirectory(prefix=".export-", dir=sessions.data_dir) as name,
    ):
        folder = Path(name)
        messages = _gather(sessions, session, wanted, folder, open_ledger, now)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            _seal(folder, partial, passphrase)
            # Before anybody can use the file: two hosts must never both think it is theirs.
            sessions.want(session, lambda found: _exported(found, now))
            partial.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise TransferFailed(f"cannot write {target}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
    return Transfer(session, messages, target.stat().st_size)


def import_session(
    sessions: Sessions,
    source: Path,
    *,
    passphrase: str,
    open_ledger: Callable[[str], Ledger] | None,
    now: float,
    name: str | None = None,
) -> Transfer:
    """Make a session of an exported file; it is stopped until it is started.

    Args:
        open_ledger: Opens the ledger of a session id where that is not a file in its folder
            (PostgreSQL); else None.
        name: Another id than it had.

    Raises:
        UsageError: Wrong passphrase.
        TransferFailed: The file is damaged or none of ours.
        RecordExists, RecordBeingDeleted: There is such a session here.
        StorageError: The data folder cannot be written.
    """
    folder = sessions.incoming()
    try:
        _open_sealed(source, folder, passphrase)
        manifest = _manifest(folder)
        session = session_id(name or manifest["session"])
        _check_credentials(folder)
        messages = _take_ledger(folder, session, str(manifest["session"]), open_ledger)
        wanted, state = _records(session, manifest, now)
        (folder / "manifest.json").unlink()
        sessions.adopt(session, folder, wanted, state)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already when it was adopted
    return Transfer(session, messages, source.stat().st_size)


@contextlib.contextmanager
def _held(sessions: Sessions, session: str) -> Iterator[None]:
    lock = sessions.session_lock(session)
    try:
        lock.acquire(1.0)
    except LockHeld as error:
        raise AlreadyRunning(
            f"session {session} is running; stop it first: whatsapp-worker stop {session}"
        ) from error
    with lock:
        yield


def _gather(
    sessions: Sessions,
    session: str,
    wanted: Wanted,
    folder: Path,
    open_ledger: Callable[[str], Ledger],
    now: float,
) -> int:
    """Put consistent copies of everything that moves into a folder; how many ledger rows."""
    credentials = sessions.folder(session) / "device.db"
    if device_store.identity(credentials) is None:
        raise TransferFailed(f"session {session} is not linked: there is nothing to move")
    with (
        contextlib.closing(sqlite3.connect(credentials)) as source,
        contextlib.closing(sqlite3.connect(folder / "device.db")) as copy,
    ):
        source.backup(copy)
    state = sessions.state(session)
    manifest = {
        "format": FORMAT,
        "session": session,
        "network": wanted.network,
        "created_at": wanted.created_at,
        "exported_at": now,
        "state": {name: getattr(state, name) for name in _KEPT} if state else {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with (
        contextlib.closing(open_ledger(session)) as ledger,
        contextlib.closing(Ledger.open(folder / "ledger.db", session)) as copied,
    ):
        return ledger.copy_to(copied)


def _exported(wanted: Wanted, now: float) -> Wanted:
    why = "exported to another host"
    return dataclasses.replace(wanted, run="stop", exported_at=now, link=None, why=why)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_bytes()[:_MAX_MANIFEST])
        if found["format"] != FORMAT:
            raise TransferFailed(f"the file has format {found['format']}; this software is older")
        network, state = found["network"], found["state"]
        float(found["created_at"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TransferFailed(f"the file's manifest cannot be used: {error!r:.200}") from error
    if not isinstance(network, str) or not isinstance(state, dict):
        raise TransferFailed("the file's manifest cannot be used")
    return dict(found)


def _check_credentials(folder: Path) -> None:
    try:
        problems = device_store.check(folder / "device.db")
        if problems or device_store.identity(folder / "device.db") is None:
            raise TransferFailed(f"the file holds no usable credentials {problems[:1]}")
    except DeviceStoreBroken as error:
        raise TransferFailed(f"the file holds no usable credentials: {error}") from error


def _take_ledger(
    folder: Path, session: str, was: str, open_ledger: Callable[[str], Ledger] | None
) -> int:
    """Bring the ledger's rows where this host keeps them, under the session's id."""
    path = folder / "ledger.db"
    with contextlib.closing(Ledger.open(path, was, is_owner=True)) as packed:
        if open_ledger is None and session == was:
            return sum(packed.counts().values())
        aside = folder / "renamed.db"
        opened = Ledger.open(aside, session) if open_ledger is None else open_ledger(session)
        with contextlib.closing(opened) as ledger:
            copied = packed.copy_to(ledger)
    device_store.remove(path)
    if open_ledger is None:
        aside.rename(path)
    return copied


def _records(session: str, manifest: dict[str, Any], now: float) -> tuple[Wanted, StateRecord]:
    wanted = Wanted(
        generation=1,
        network=manifest["network"],
        run="stop",
        created_at=float(manifest["created_at"]),
        touched_at=now,
        why="imported from another host",
    )
    kept = {name: value for name, value in manifest["state"].items() if name in _KEPT}
    state = StateRecord(
        generation=1,
        state=State.STOPPED,
        since=now,
        reason=Reason.OPERATOR,
        sentence=sentence(Reason.OPERATOR, session),
        **{**kept, "touched_at": now},
    )
    return wanted, state


# The file: magic, cost, salt, nonce prefix; then chunks of a length and a sealed part each. The
# length's highest bit marks the last chunk, and the nonce holds that bit and the chunk's number,
# so chunks cannot be cut off, swapped or left out. The whole header is authenticated.


def _check_passphrase(passphrase: str) -> None:
    if len(passphrase) < MIN_PASSPHRASE:
        raise UsageError(f"the passphrase must have {MIN_PASSPHRASE} characters at least")


def _seal(folder: Path, target: Path, passphrase: str) -> None:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        header = _MAGIC + bytes([_COST]) + secrets.token_bytes(16) + secrets.token_bytes(7)
        file.write(header)
        writer = _Sealing(file, _cipher(passphrase, header), header)
        with tarfile.open(fileobj=writer, mode="w|") as archive:  # type: ignore[call-overload]
            for name in _NAMES:
                archive.add(folder / name, arcname=name)
        writer.finish()
        file.flush()
        os.fsync(file.fileno())


def _open_sealed(source: Path, folder: Path, passphrase: str) -> None:
    try:
        with source.open("rb") as file:
            header = file.read(len(_MAGIC) + 24)
            if len(header) < len(_MAGIC) + 24 or not header.startswith(_MAGIC):
                raise TransferFailed(f"{source} is no exported session")
            cipher = _cipher(passphrase, header)
            content = _Opening(file, cipher, header)
            with tarfile.open(fileobj=content, mode="r|") as archive:
                for member in archive:
                    _unpack(archive, member, folder)
            content.finish()
    except OSError as error:
        raise TransferFailed(f"cannot read {source}: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise TransferFailed(f"{source} is damaged: {error}") from error


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Only files that we name ourselves, so nothing lands anywhere else."""
    content = archive.extractfile(member) if member.isreg() else None
    if member.name not in _NAMES or content is None:
        raise TransferFailed(f"the file holds {member.name!r:.80}, which is none of ours")
    fd = os.open(folder / member.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())


def _cipher(passphrase: str, header: bytes) -> AESGCM:
    cost, salt = header[len(_MAGIC)], header[len(_MAGIC) + 1 : len(_MAGIC) + 17]
    if not 10 <= cost <= _MAX_COST:
        raise TransferFailed("the file asks for more work than is sensible: it is damaged")
    # The same passphrase typed on another keyboard is the same passphrase.
    text = unicodedata.normalize("NFKC", passphrase).encode()
    return AESGCM(Scrypt(salt=salt, length=32, n=2**cost, r=8, p=1).derive(text))


def _nonce(header: bytes, number: int, mark: int) -> bytes:
    return header[-7:] + struct.pack(">IB", number, bool(mark))


class _Sealing:
    """Takes plain bytes and writes sealed chunks."""

    def __init__(self, file: IO[bytes], cipher: AESGCM, header: bytes) -> None:
        self._file = file
        self._cipher = cipher
        self._header = header
        self._buffer = bytearray()
        self._number = 0

    def write(self, data: bytes) -> int:
        self._buffer += data
        while len(self._buffer) > _CHUNK:
            self._put(bytes(self._buffer[:_CHUNK]), 0)
            del self._buffer[:_CHUNK]
        return len(data)

    def finish(self) -> None:
        self._put(bytes(self._buffer), _LAST)

    def _put(self, plain: bytes, mark: int) -> None:
        nonce = _nonce(self._header, self._number, mark)
        sealed = self._cipher.encrypt(nonce, plain, self._header)
        self._file.write(struct.pack(">I", len(sealed) | mark) + sealed)
        self._number += 1


class _Opening(io.RawIOBase):
    """Reads sealed chunks and gives plain bytes; raises TransferFailed for anything else."""

    def __init__(self, file: IO[bytes], cipher: AESGCM, header: bytes) -> None:
        self._file = file
        self._cipher = cipher
        self._header = header
        self._buffer = b""
        self._number = 0
        self._is_done = False

    def read(self, size: int = -1) -> bytes:
        while not self._is_done and (size < 0 or len(self._buffer) < size):
            self._buffer += self._next()
        found = self._buffer if size < 0 else self._buffer[:size]
        self._buffer = self._buffer[len(found) :]
        return found

    def finish(self) -> None:
        """Make sure that nothing was cut off behind what was read, or added."""
        while not self._is_done:
            self._next()
        if self._file.read(1):
            raise TransferFailed("the file is damaged: something follows its end")

    def _next(self) -> bytes:
        prefix = self._file.read(4)
        (word,) = struct.unpack(">I", prefix) if len(prefix) == 4 else (0,)
        mark, length = word & _LAST, word & ~_LAST
        sealed = self._file.read(length) if 16 <= length <= _CHUNK + 16 else b""
        try:
            nonce = _nonce(self._header, self._number, mark)
            plain = self._cipher.decrypt(nonce, sealed, self._header)
        except (InvalidTag, ValueError):
            if self._number == 0:
                raise UsageError("wrong passphrase, or the file is damaged") from None
            raise TransferFailed("the file is damaged or was cut short") from None
        self._number += 1
        self._is_done = bool(mark)
        return plain
