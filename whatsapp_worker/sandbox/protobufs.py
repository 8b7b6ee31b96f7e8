"""WhatsApp's protobuf classes, taken from the installed neonize without loading its library."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(name: str) -> ModuleType:
    """Import one generated module, such as `waE2E.WAWebProtobufsE2E_pb2`.

    neonize's modules import each other as top-level packages, so their folder has to be on
    `sys.path`, as neonize itself does it. It goes to the end, where it shadows nothing.

    Raises:
        ModuleNotFoundError: neonize is not installed, or has no such module.
    """
    spec = importlib.util.find_spec("neonize")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("neonize is not installed")
    folder = str(Path(spec.submodule_search_locations[0]) / "proto")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
