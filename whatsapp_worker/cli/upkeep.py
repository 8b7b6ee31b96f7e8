"""`purge`, `doctor` and `session export|import`: what keeps a host and its data in order."""

import getpass
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from storage.ledger import Ledger
from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.terminal import columns, emit, paint, printable
from whatsapp_worker.errors import UsageError
from whatsapp_worker.settings import Settings

if TYPE_CHECKING:
    from whatsapp_worker.transfer import Transfer

PASSPHRASE = "SESSION_PASSPHRASE"
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def purge(options: Options, settings: Settings) -> int:
    """Serve `purge`, in this process."""
    from whatsapp_worker import maintenance

    report = maintenance.purge(settings, dry_run=options.dry_run)
    if options.json:
        emit(report.as_dict())
        return 0
    verb = "would remove" if report.dry_run else "removed"
    shown = [(f"{verb} {count}", kind.replace("_", " ")) for kind, count in report.purged.items()]
    print("\n".join(columns(shown)) if shown else "Nothing to purge.")
    for skipped in report.skipped:
        print(f"stays: {skipped['session']}: {printable(skipped['why'])}")
    if not report.is_complete:
        print("Time ran out; the next purge goes on from here.")
    return 0


def doctor(options: Options, settings: Settings) -> int:
    """Serve `doctor`; 1 when there is a problem."""
    from whatsapp_worker import doctor

    findings = doctor.run(settings, fix=options.fix)
    for finding in findings:
        if options.json:
            emit(finding.as_dict())
            continue
        verdict = paint(f"{finding.verdict:<8}", _COLOURS[finding.verdict])
        print(f"{verdict} {finding.name:<17} {printable(finding.sentence)}")
        if finding.did:
            print(f"{'':<26} mended: {printable(finding.did)}")
        if finding.remedy:
            print(f"{'':<26} → {printable(finding.remedy)}")
    return int(any(finding.verdict == "problem" for finding in findings))


def export_session(options: Options, settings: Settings) -> int:
    """Serve `session export SESSION FILE`."""
    from whatsapp_worker import transfer

    host = Host(settings)
    host.wanted(options.session)
    moved = transfer.export_session(
        host.sessions,
        options.session,
        Path(options.file),
        passphrase=_passphrase(again=True),
        open_ledger=_ledgers(host),
        now=time.time(),
    )
    _tell(options, moved, "exported")
    return 0


def import_session(options: Options, settings: Settings) -> int:
    """Serve `session import FILE`."""
    from whatsapp_worker import transfer

    host = Host(settings)
    moved = transfer.import_session(
        host.sessions,
        Path(options.file),
        passphrase=_passphrase(again=False),
        open_ledger=_ledgers(host) if settings.database_url else None,
        now=time.time(),
        name=options.name,
    )
    _tell(options, moved, "imported")
    return 0


def _tell(options: Options, moved: "Transfer", verb: str) -> None:
    if options.json:
        emit({"session": moved.session, "messages": moved.messages, "bytes": moved.bytes})
        return
    after = (
        "It does not run here any more."
        if verb == "exported"
        else f"Run it: whatsapp-worker start {moved.session}"
    )
    print(f"{moved.session}: {verb}, with {moved.messages} messages of its ledger. {after}")


def _ledgers(host: Host) -> Callable[[str], Ledger]:
    settings = host.settings

    def open_ledger(session: str) -> Ledger:
        where = settings.database_url or host.sessions.folder(session) / "ledger.db"
        return Ledger.open(where, session, timeout_s=settings.db_timeout_s)

    return open_ledger


def _passphrase(*, again: bool) -> str:
    """From the variable, else from the terminal.

    Raises:
        UsageError: No variable and nobody to ask, or the two entries differ.
    """
    if given := os.environ.get(PASSPHRASE):
        return given
    if not sys.stdin.isatty():
        raise UsageError(f"set {PASSPHRASE}, or run this on a terminal to be asked")
    first = getpass.getpass("Passphrase (at least 12 characters): ")
    if again and getpass.getpass("Once more: ") != first:
        raise UsageError("the two entries differ; nothing was done")
    return first
