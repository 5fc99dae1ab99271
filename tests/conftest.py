from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.libvirt_daemon import Libvirtd, open_libvirtd
from support.openstack.lab import OpenStack, open_openstack

# The first test that uses it pays for its start, and once in a checkout for its installation.
_OPENSTACK_S = 300


# How long an example takes is the machine's business, which may have other work.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure() -> None:
    # A shell ignores Ctrl-C for what it starts in the background, and so would every program that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        uses = "openstack" in getattr(item, "fixturenames", ())
        if uses and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_OPENSTACK_S))


@pytest.fixture(scope="session")
def openstack() -> Iterator[OpenStack]:
    """Genuine Nova and Neutron, one of each for all tests; both run at the beginning of each test."""
    with open_openstack() as lab:
        yield lab


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    """A genuine libvirtd, one for all tests; who uses it takes away what it has made."""
    with open_libvirtd() as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def _openstack_mended(request: pytest.FixtureRequest) -> Iterator[None]:
    if "openstack" not in request.fixturenames:
        yield
        return
    lab: OpenStack = request.getfixturevalue("openstack")
    yield
    lab.heal()
