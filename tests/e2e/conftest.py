"""Fixtures of the end-to-end tests: one world a test, or a shared one a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A fresh world."""
    with World.running(tmp_path) as it:
        yield it
