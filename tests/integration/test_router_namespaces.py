"""Routers of Neutron's are served in their own namespaces, and no request for metadata leaves them.

The namespaces are made by hand here; `test_neutron_l3_agent.py` has those of the genuine agent.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest

from support.daemon import Daemon
from support.guest import IPV4, IPV6, Guest, Lost
from support.lab import until
from support.routers import RouterLab

pytestmark = pytest.mark.root


@dataclass(slots=True)
class RouterWorld:
    """Two routers with two networks each, all of the same addresses."""

    routers: RouterLab
    daemon: Daemon
    guests: dict[str, Guest]

    def asks_as(self, name: str, *, to: str = IPV4) -> str:
        """The instance that a guest is; what happens where it is none."""
        try:
            reply = self.guests[name].ask("/latest/meta-data/hostname", to=to, timeout_s=2)
        except Lost as lost:
            return str(lost)
        return reply.text if reply.status == 200 else str(reply.status)

    def wait(self, name: str, *, to: str = IPV4) -> None:
        """Wait until a guest is itself."""
        until(lambda: self.asks_as(name, to=to) == name, what=f"{name} is itself")


def record(guest: Guest) -> dict[str, object]:
    ports = [{"network": guest.network, "mac": guest.mac, "addresses": list(guest.addresses)}]
    return {"id": guest.name, "name": guest.name, "ports": ports}


@pytest.fixture(scope="module")
def world() -> Iterator[RouterWorld]:
    with closing(RouterLab()) as routers, closing(Daemon(routers.lab)) as daemon:
        guests: dict[str, Guest] = {}
        daemon.configure(
            {
                "sources": {"neutron_namespaces": {"routers": True}},
                "paths": {
                    "runtime_dir": str(daemon.runtime),
                    "state_dir": str(daemon.state),
                    "netns_dir": str(routers.directory),
                },
            }
        )
        daemon.start()
        for what in ("r1", "r2"):
            routers.add(what)
            for subnet in (1, 2):
                name = f"{what}-g{subnet}"
                guests[name] = routers.guest(what, name, subnet, 5)
        world = RouterWorld(routers, daemon, guests)
        daemon.put(instances=[record(one) for one in guests.values()])
        for name in guests:
            world.wait(name)
        yield world


@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_guests_of_several_networks_behind_routers_with_equal_addresses_are_themselves(
    world: RouterWorld, to: str
) -> None:
    for name in world.guests:
        assert world.asks_as(name, to=to) == name
