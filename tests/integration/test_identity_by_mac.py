"""Guests known by their MACs, and guests that take another's address, through real namespaces and a real HAProxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.daemon import instance, user_data_of
from support.guest import IPV6, Guest
from support.world import World, open_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as made:
        yield made


@pytest.fixture(autouse=True)
def healed(world: World) -> Iterator[None]:
    yield
    world.heal()


def by_mac(guest: Guest, name: str = "by-mac") -> dict[str, object]:
    """A record that has nothing but the guest's MAC."""
    record = instance(name, guest.network)
    return {**record, "ports": [{"network": guest.network, "mac": guest.mac}]}


def test_everybody_is_served(world: World) -> None:
    world.all_right()


@pytest.mark.parametrize("network", ["red", "blue", "grey"])
def test_a_guest_is_known_by_its_mac_alone_from_its_first_request_on(
    world: World, network: str
) -> None:
    guest = world.lab.guest(network, 77)
    world.daemon.put(instances=[by_mac(guest)])
    for to in ("169.254.169.254", IPV6):
        for _ in range(3):
            reply = guest.ask("/latest/user-data", to=to)
            assert (reply.status, reply.body) == (200, user_data_of("by-mac"))
    world.all_right()
