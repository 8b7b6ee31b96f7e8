"""Every error that this package raises on purpose.

    WorkerError                   root; the command line turns it into a sentence and an exit code
    ├── SettingsError             the environment is wrong (2)
    ├── UsageError                a command was called with bad input (2)
    │   └── InvalidMessage        a message or recipient that can never be sent; names the field
    ├── SessionError
    │   ├── UnknownSession        no such session (3)
    │   ├── SessionDeleted        only a tombstone is left of it (3)
    │   └── CapacityReached       MAX_SESSIONS sessions exist already (4)
    ├── AlreadyRunning            another process holds this data folder or session (5)
    ├── Unavailable               a service did not answer; transient (6)
    │   ├── RedisUnavailable
    │   ├── LedgerUnavailable
    │   └── SupervisorUnavailable
    ├── CommandFailed             a command was understood and did not succeed (1)
    │   ├── LinkFailed
    │   └── CommandTimeout        not done in time; transient (7)
    ├── SandboxUnsafe             sandbox mode in an environment that could reach WhatsApp (8)
    └── SendError                 one send did not succeed; see send_errors.py for the kinds
        └── MediaFailed           the file of a message cannot be had or sent; that message alone

`transient` says whether the same call may succeed later without anybody acting; retry, breakers,
the command line and the supervisor read it instead of listing classes. `storage` has a root of
its own (`storage.errors.StorageError`) with the same two class variables.
"""

from typing import ClassVar


class WorkerError(Exception):
    """Root of the tree. The text is for people: what happened and what to do next."""

    transient: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class SettingsError(WorkerError):
    """The environment holds values that cannot be used; lists every problem at once."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UsageError(WorkerError):
    """A command or a job was given input that can never work."""

    exit_code = 2


class InvalidMessage(UsageError):
    """A job's arguments are wrong. `field` is the path of the offending field, for example
    `message.text.body`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class SessionError(WorkerError):
    """A command or job concerns a session that cannot serve it."""

    exit_code = 3


class UnknownSession(SessionError):
    """There is no session of this id."""


class SessionDeleted(SessionError):
    """The session was deleted; creating it again on purpose is allowed."""


class CapacityReached(SessionError):
    """The host runs MAX_SESSIONS sessions already; delete one or raise the limit."""

    exit_code = 4


class AlreadyRunning(WorkerError):
    """Another process holds this data folder or this session."""

    exit_code = 5


class Unavailable(WorkerError):
    """A service that this call needs did not answer."""

    transient = True
    exit_code = 6


class RedisUnavailable(Unavailable):
    """Redis did not answer."""


class LedgerUnavailable(Unavailable):
    """The ledger's database did not answer or refused the call."""


class SupervisorUnavailable(Unavailable):
    """No supervisor runs on this data folder."""


class CommandFailed(WorkerError):
    """The command was understood and did not succeed."""


class LinkFailed(CommandFailed):
    """The device was not linked. `reason` is the session's reason code."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class CommandTimeout(CommandFailed):
    """The command did not take effect in time; it may still."""

    transient = True
    exit_code = 7


class SandboxUnsafe(WorkerError):
    """Sandbox mode was asked for in an environment that could reach the real WhatsApp."""

    exit_code = 8


class SendError(WorkerError):
    """One send did not succeed. Classified in `send_errors.py`."""


class MediaFailed(SendError):
    """The file that a message points at cannot be fetched, is not allowed or not fit to be sent.
    Certainly nothing was sent; it concerns this message alone."""
