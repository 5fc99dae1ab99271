from collections.abc import Iterator

import pytest

from support.hostlab import HostLab, host_lab
from support.world import World, open_world


@pytest.fixture(scope="session")
def shared_world() -> Iterator[World]:
    """One lab and daemon for a process; use `world`, which restores it after each test."""
    # Unknown addresses need not be held for as long as guests need.
    with open_world({"resolver": {"hold_s": 1.0}}) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """A lab with a daemon, as it was at first."""
    yield shared_world
    shared_world.heal()


@pytest.fixture
def lab() -> Iterator[HostLab]:
    """Namespaces, links and servers that are gone at the end."""
    with host_lab() as made:
        yield made
