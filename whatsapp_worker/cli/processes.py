"""The commands that are processes: run, events, maintenance, sandbox, demo."""

import shlex
import sys
from pathlib import Path

from whatsapp_worker.cli.arguments import Options
from whatsapp_worker.cli.terminal import emit, talk
from whatsapp_worker.errors import CommandFailed
from whatsapp_worker.settings import Settings


def run(options: Options, settings: Settings) -> int:
    """Serve `run`: the supervisor, in the foreground."""
    from whatsapp_worker import supervisor

    if sys.stderr.isatty():
        talk(f"Sessions lie in {settings.data_dir.absolute()}. In another terminal:")
        talk("  whatsapp-worker link SESSION, status, send ...   (Ctrl-C here stops everything)")
    return supervisor.run(settings, also=["events", "maintenance"] if options.all else [])


def events(options: Options, settings: Settings) -> int:
    """Serve `events`: the consumer group on wa:events."""
    from whatsapp_worker import events

    return events.run(settings)


def maintenance(options: Options, settings: Settings) -> int:
    """Serve `maintenance`: the RQ worker of this host's periodic jobs."""
    from whatsapp_worker import maintenance

    return maintenance.run(settings)


def demo(options: Options, settings: Settings) -> int:
    """Serve `demo`."""
    from whatsapp_worker.cli import demo

    return demo.run(settings.data_dir / "demo", keep=options.keep)


def sandbox(options: Options, settings: Settings) -> int:
    """Serve `sandbox`: the network itself, or with --env how to reach the one that runs."""
    folder = Path(options.state_dir) if options.state_dir else settings.data_dir / "sandbox"
    if options.env:
        return _print_environment(folder)
    try:
        from whatsapp_worker.sandbox import server
    except ModuleNotFoundError as missing:
        raise CommandFailed(
            f"the sandbox needs {missing.name}, of the extra `sandbox`: pip install '.[sandbox]'"
        ) from None

    def ready(endpoints: server.Endpoints) -> None:
        if options.json:
            emit(
                {
                    "proxy_url": endpoints.proxy_url,
                    "control_url": endpoints.control_url,
                    "ca_file": str(endpoints.ca_file),
                    "state_dir": str(folder),
                }
            )
            return
        talk(f"The sandbox WhatsApp network runs; its keys and devices lie in {folder}.")
        talk(f"  control API  {endpoints.control_url}  (key: {folder / 'sandbox.json'})")
        talk("  put a worker on it, in another terminal:")
        where = f" --state-dir {shlex.quote(options.state_dir)}" if options.state_dir else ""
        talk(f"    eval $(whatsapp-worker sandbox --env{where}) && whatsapp-worker run --all")

    try:
        return server.serve(
            state_dir=folder,
            proxy_port=options.proxy_port,
            control_port=options.control_port,
            ready=ready,
        )
    except (ValueError, OSError) as error:  # the folder or a port is taken: its text says which
        raise CommandFailed(str(error)) from None


def _print_environment(folder: Path) -> int:
    """Shell lines that put a worker on the running sandbox."""
    from whatsapp_worker import process
    from whatsapp_worker.sandbox.endpoints import read_endpoints

    endpoints = read_endpoints(folder)
    if endpoints is None or not process.is_alive(endpoints.pid):
        raise CommandFailed(f"no sandbox runs on {folder}; start one: whatsapp-worker sandbox")
    for name, value in endpoints.environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0
