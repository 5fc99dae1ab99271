import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.libvirt_daemon import Libvirtd, open_libvirtd
from support.openstack.lab import OpenStack, open_openstack
from support.own_netns import take_own_netns
from support.own_tree import foreign_programs

pytest_plugins = ("support.flaky", "support.progress")

# How long an example takes is the machine's business, which may have other work.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("brief", settings.get_profile("busy"), max_examples=25)
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    # The test of packages runs tests on purpose with the programs that it has installed.
    own = "IMDST_INSTALLED_PROGRAMS" not in os.environ and not hasattr(config, "workerinput")
    if own and (foreign := foreign_programs(config.rootpath)):
        raise pytest.UsageError(f"{foreign}: run script/setup in this clone, and use its .venv")
    # A shell ignores Ctrl-C for what it starts in the background, and so would every program that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    take_own_netns()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        # What takes minutes begins at once, and what takes moments comes last: nothing long is left for one worker.
        items.sort(key=lambda item: (-_allowed_s(item), _lacks(item, "slow"), _lacks(item, "root")))


def _allowed_s(item: pytest.Item) -> float:
    """How long a test may take where it may take longer than others; else 0."""
    marker = item.get_closest_marker("timeout")
    return 0.0 if marker is None else float(marker.args[0])


def _lacks(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is None


@pytest.fixture(scope="session")
def openstack() -> Iterator[OpenStack]:
    """Genuine Nova and Neutron, one of each for all tests of a process; both run at the beginning of each test."""
    with open_openstack() as lab:
        yield lab


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    """A genuine libvirtd, one for all tests of a process; who uses it takes away what it has made."""
    with open_libvirtd() as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def _openstack_mended(request: pytest.FixtureRequest) -> Iterator[None]:
    lab = request.getfixturevalue("openstack") if "openstack" in request.fixturenames else None
    yield
    if lab is not None:
        lab.heal()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long what a document times has taken: what tests have recorded as `timed`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "timed":
                terminalreporter.write_line(f"timed: {value}")
