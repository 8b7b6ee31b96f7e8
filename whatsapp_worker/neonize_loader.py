"""How neonize is loaded: its Python once, in the fork helper; its Go library in every child.

A Go runtime does not survive a fork, so the helper must never have the library. It imports
neonize's Python all the same: where neonize asks ctypes for its library it gets a stand-in, which
takes down how each function is declared and has nothing behind it until a child loads the library.
What neonize builds at import is then in pages that the children share.

That relies on how neonize is written, so the helper looks at what it got. On any surprise it has
to begin anew, with the protobuf classes alone, and its children import neonize themselves.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from whatsapp_worker import process
from whatsapp_worker.heap import Pages

# neonize's generated protobuf modules, its largest part beside the Go library.
_PROTOBUFS = (
    "Neonize_pb2",
    "waConsumerApplication.WAConsumerApplication_pb2",
    "waMsgApplication.WAMsgApplication_pb2",
    "waCompanionReg.WAWebProtobufsCompanionReg_pb2",
)
_CLIENT = "neonize.client"
_LOG = "neonize.utils.log"
_REAP_S = 1.0
# Go has a thread that looks every 20 microseconds whether a call into C has ended; each look costs
# the others their core: a quarter of what ten busy sessions get done (docs/decisions/0011).
_SLACK_S = 0.001

_protobufs: dict[str, ModuleType] = {}  # those loaded ahead, by neonize's own names
_stand_ins: "list[StandIn]" = []  # in a child of a helper with neonize's Python, one


class Surprise(Exception):
    """neonize is not as this file knows it; a process that tried it must not fork any more."""


class StandIn:
    """neonize's Go library before it is loaded: takes declarations, and calls afterwards."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._library: ctypes.CDLL | None = None
        self.GetVersion: Any = _version  # asked for at import; `load` asks the library

    def __getattr__(self, name: str) -> "_Function":
        if name.startswith("_"):
            raise AttributeError(name)
        function = _Function(self, name)
        setattr(self, name, function)
        return function

    def load(self) -> None:
        """Load the library, in the process that is to run it.

        Raises:
            OSError: It cannot be loaded.
            RuntimeError: It belongs to another version of neonize.
        """
        library = ctypes.CDLL(self._path)
        library.GetVersion.restype = ctypes.c_char_p
        found = library.GetVersion()
        if found != _version():
            raise RuntimeError(f"neonize's library is of version {found!r}, not {_version()!r}")
        self._library = library

    def function(self, name: str) -> Any:
        """The function of the loaded library.

        Raises:
            AttributeError: The library has none of that name, or is not loaded.
        """
        return getattr(self._library, name)


class _Function:
    """One function of the library, with what neonize declared: argtypes, restype, errcheck."""

    def __init__(self, library: StandIn, name: str) -> None:
        self._library = library
        self._name = name
        self._loaded: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self._loaded is None:
            self._loaded = self._declared()
        return self._loaded(*arguments)

    def _declared(self) -> Any:
        function = self._library.function(self._name)
        for name, value in vars(self).items():
            if not name.startswith("_"):
                setattr(function, name, value)
        return function


def preload() -> None:
    """Load neonize's protobuf classes and nothing else of it, for the fork helper.

    neonize's modules import each other as top-level packages from its folder `proto`, and so do
    we. Later they are found under neonize's own names, too, instead of being built again.
    """
    find_libmagic()
    folder = _folder()
    if folder is None:
        return
    proto = str(folder / "proto")
    if proto not in sys.path:
        sys.path.append(proto)
    for name in _PROTOBUFS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name, module in tuple(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(proto):
            _protobufs[f"neonize.proto.{name}"] = module


def preload_python() -> None:
    """Load the rest of neonize's Python, too, with a stand-in for the Go library.

    Raises:
        Surprise: It went differently than expected. This process may have threads or the library
            by now: it must not fork, and starts anew without this.
    """
    folder = _folder()
    if folder is None:
        raise Surprise("neonize is not installed")
    before = _logging()
    sys.modules.update(_protobufs)
    sys.modules[_LOG] = _quiet_log()
    try:
        with _held_back(folder):
            client = importlib.import_module(_CLIENT)
    except Exception as error:
        raise Surprise(f"{type(error).__name__}: {error}") from error
    _reap()
    if len(_stand_ins) != 1 or getattr(client, "gocode", None) is not _stand_ins[0]:
        raise Surprise("neonize did not ask ctypes for its library, once")
    if _logging() != before:
        raise Surprise("neonize has changed the log's handlers")
    if problem := unfit_to_fork():
        raise Surprise(problem)


def unfit_to_fork() -> str | None:
    """Why a fork of this process would be no good: a Go runtime, or threads; None when it would."""
    folder = _folder()
    if folder is not None and str(folder.resolve()) in Path("/proc/self/maps").read_text():
        return "neonize's Go library is loaded"
    threads = os.listdir("/proc/self/task")
    return f"there are {len(threads)} threads" if len(threads) != 1 else None


def load() -> ModuleType:
    """neonize's module `client`, with its Go library, in the process that will run it.

    Raises:
        ImportError, OSError, RuntimeError: neonize or its library cannot be loaded.
    """
    with process.late_timers(_SLACK_S):
        if _stand_ins:
            _stand_ins[0].load()
        else:
            sys.modules.update(_protobufs)
            find_libmagic()
        client = importlib.import_module(_CLIENT)
    _reap()
    return client


def library_pages() -> Pages:
    """The library's pages, in a process that has loaded it."""
    folder = _folder()
    assert folder is not None, "neonize is installed where it is loaded"
    return Pages(folder)


def find_libmagic() -> None:
    """Import `magic`, which neonize needs and which needs a C library that slim systems lack:
    there the copy that a package brings is taken. neonize cannot be imported without."""
    try:
        importlib.import_module("magic")
    except ImportError:
        importlib.import_module("pylibmagic")  # sets the variables that `magic` and C read
        importlib.import_module("magic")


@contextlib.contextmanager
def _held_back(folder: Path) -> Iterator[None]:
    """Where a library of this folder is asked for, give a stand-in."""
    real = ctypes.CDLL

    def stand_in(name: Any, *rest: Any, **more: Any) -> Any:
        if name is None or Path(name).parent != folder:
            return real(name, *rest, **more)
        _stand_ins.append(StandIn(name))
        return _stand_ins[-1]

    ctypes.CDLL = stand_in  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        ctypes.CDLL = real  # type: ignore[misc]


def _quiet_log() -> ModuleType:
    """What neonize's own module of this name offers, without its thread and its basicConfig: the
    device puts a log writer of ours in the place of `log_whatsmeow` anyway."""
    module = ModuleType(_LOG)
    vars(module).update(log=logging.getLogger(_LOG), log_whatsmeow=lambda binary, size: None)
    return module


def _folder() -> Path | None:
    """Where neonize is installed, without importing it."""
    spec = importlib.util.find_spec("neonize")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _version() -> bytes:
    """The version that the library must have, in neonize's words."""
    return str(sys.modules["neonize.download"].__GONEONIZE_VERSION__).encode()


def _logging() -> tuple[object, ...]:
    root = logging.getLogger()
    return (root.level, *root.handlers)


def _reap() -> None:
    """neonize runs `uname` at import and leaves a zombie each time; nothing else runs yet."""
    deadline = time.monotonic() + _REAP_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
