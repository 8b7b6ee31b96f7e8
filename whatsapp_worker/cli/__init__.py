"""The command `whatsapp-worker`: verbs for operators, data on stdout, talk on stderr."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence

from whatsapp_worker.cli import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after the program's name; those of this process without it.

    Returns:
        The exit code; `arguments.EXIT_CODES` names them.
    """
    options = arguments.parser().parse_args(argv)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return arguments.INTERRUPTED
    except BrokenPipeError:  # `whatsapp-worker messages list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.verbose:
            raise
        if options.serves and not hasattr(error, "exit_code"):
            logging.getLogger(__name__).critical("process.crashed", exc_info=True)
        return _explain(error)


def _run(options: arguments.Options) -> int:
    from whatsapp_worker import telemetry
    from whatsapp_worker.settings import Settings

    settings = Settings.read(os.environ)
    os.umask(0o077)  # DATA_DIR and all else that is made is for this user alone
    telemetry.set_up(settings, quiet=not (options.serves or options.verbose))
    return arguments.command(options)(options, settings)


def _explain(error: BaseException) -> int:
    """Say what happened as a chain of causes; the exit code of the outermost error."""
    for number, cause in enumerate(_causes(error)):
        lead = "whatsapp-worker: " if number == 0 else "  because: "
        print(lead + cause.replace("\n", "\n" + " " * len(lead)), file=sys.stderr)
    known = hasattr(error, "exit_code")
    if not known:
        print("  This was not expected; --verbose shows where it happened.", file=sys.stderr)
    return int(getattr(error, "exit_code", 1))


def _causes(error: BaseException) -> Iterator[str]:
    """One line a cause, outermost first, none said twice."""
    said: set[str] = set()
    link: BaseException | None = error
    while link is not None and len(said) < 10:
        text = _sentence(link)
        if text not in said:
            yield text
        said.add(text)
        link = link.__cause__


def _sentence(error: BaseException) -> str:
    text = str(error).strip()
    if hasattr(error, "exit_code") and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
