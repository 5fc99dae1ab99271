from collections.abc import Iterator

import pytest

from support.hostlab import HostLab, host_lab
from support.identity.site import Site, open_site
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


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for a module, whose `shared_world` is the site's world; use `site`."""
    with open_site(tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def site(shared_site: Site, world: World) -> Site:
    """The site with `web-1` in its project, and no file in `conf.d`."""
    assert not list((world.daemon.directory / "conf.d").iterdir())
    shared_site.have_guest()
    return shared_site
