"""`whatsapp-worker health`: one yes or no for monitors, and why."""

from typing import Any

from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.host import Host
from whatsapp_worker.cli.status import gather
from whatsapp_worker.cli.terminal import emit, paint, printable
from whatsapp_worker.session import State
from whatsapp_worker.settings import Settings

# States that a session which should run does not leave without a person.
_NEEDS_SOMEBODY = {
    State.FAILED,
    State.LOGGED_OUT,
    State.REPLACED,
    State.BANNED,
    State.OUTDATED,
}


def health(options: Options, settings: Settings) -> int:
    """Serve `health`."""
    found = problems(gather(Host(settings)), sessions=options.sessions)
    if options.json:
        emit({"healthy": not found, "problems": found})
    elif found:
        print("\n".join(f"{paint('problem', 'red', 'bold')}  {printable(each)}" for each in found))
    else:
        print(paint("healthy", "green"))
    return 1 if found else 0


def problems(found: dict[str, Any], *, sessions: bool) -> list[str]:
    """What is wrong, one sentence each.

    Args:
        found: From `status.gather`.
        sessions: Whether sessions count, beside the host's services.
    """
    problems = []
    if not found["supervisor"]["alive"]:
        problems.append("No supervisor runs on this data folder.")
    for service in ("redis", "database"):
        if not found[service]["ok"]:
            problems.append(f"{service}: {found[service]['error']}")
    if sessions:
        problems += [
            f"session {row['session']} is {row['state']}. {row['sentence']}"
            for row in found["sessions"]
            if row["state"] in _NEEDS_SOMEBODY or row["degraded"]
        ]
    return problems
