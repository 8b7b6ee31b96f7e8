"""`whatsapp-worker run`: one a host; starts, watches and ends the processes of all sessions."""

from collections.abc import Sequence

from whatsapp_worker.settings import Settings

NOT_DRAINED = 9  # exit code: the shutdown had to be forced


def run(settings: Settings, *, also: Sequence[str] = ()) -> int:
    """Run the sessions of `settings.data_dir` until SIGTERM or SIGINT; call on the main thread.

    Args:
        settings: Of this process; handed on to the device processes as they are.
        also: Commands of ours (`events`, `maintenance`) to run as children, started again when
            they end, for hosts without a process manager.

    Returns:
        0 when everything drained, NOT_DRAINED when the shutdown was forced.

    Raises:
        AlreadyRunning: Another supervisor holds the data folder; the text says who.
        SandboxUnsafe: Sandbox mode in an environment that could reach WhatsApp.
        RedisUnavailable: No REDIS_URL, and no Redis server program is installed.
    """
    raise NotImplementedError
