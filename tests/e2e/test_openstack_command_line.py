"""What the command line says of guests whom only Neutron knows, also before they have asked anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.lab import until
from support.openstack.lab import OpenStack
from support.openstack.ways import Ways, open_ways

pytestmark = [pytest.mark.root, pytest.mark.slow]

_HOSTNAME = "/latest/meta-data/hostname"


@pytest.fixture(scope="module")
def ways(openstack: OpenStack) -> Iterator[Ways]:
    with open_ways(openstack, source="neutron", ways=()) as opened:
        yield opened


@pytest.mark.parametrize("scope", ["net-green", "r-red"])
@pytest.mark.parametrize("declared", [True, False], ids=["listener", "behind-the-socket"])
def test_get_says_what_a_guest_that_never_asked_would_be_told(
    ways: Ways, scope: str, *, declared: bool
) -> None:
    ident = ways.ids[scope]
    if not declared:
        ways.daemon.remove_network(ident)
    try:
        row = next(one for one in ways.openstack.lookups if one.scope == scope and one.instance)
        assert row.instance is not None
        stranger = ("get", "--include", "--network", ident, "--from", "10.0.0.251", _HOSTNAME)
        # A test before may have ended Neutron, and then it is not asked for a while.
        until(lambda: " 503 " not in ways.daemon.command(*stranger).out, within_s=40)
        told = ways.daemon.command("get", "--network", ident, "--from", row.address, _HOSTNAME)
        nobody = ways.daemon.command(*stranger)
        explained = ways.daemon.command(
            "explain", "--probe", "--network", ident, "--from", row.address
        )
    finally:
        if not declared:
            ways.daemon.put(ways.networks())

    assert (told.status, told.out) == (0, f"{row.instance.name}.novalocal")
    assert (nobody.status, nobody.out.partition("\n")[0]) == (1, "HTTP/1.1 404 Not Found")
    assert row.instance.uuid in explained.out
    assert "its requests are sent to Nova" in explained.out
    assert (explained.status, "GET /latest/meta-data/: 200 OK" in explained.out) == (0, True)


def test_get_says_503_while_neutron_cannot_be_asked(ways: Ways) -> None:
    ways.openstack.neutron.stop()
    try:
        told = ways.daemon.command(
            "get", "--include", "--network", ways.ids["net-blue"], "--from", "10.0.0.252", "/"
        )
    finally:
        ways.openstack.neutron.start()
    assert told.out.partition("\n")[0] == "HTTP/1.1 503 Service Unavailable"
