"""A fleet as it is run: etcd, hubs, hosts and guests."""

from collections.abc import Iterator

import pytest

from support.daemon import instance
from support.fleet_world import FleetWorld, fleet_world
from support.guest import Guest, Lost
from support.lab import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


def _name(guest: Guest) -> str | int | None:
    """Its host name, or the status of another answer, or nothing where there is none."""
    try:
        answer = guest.ask("/latest/meta-data/hostname")
    except Lost:
        return None
    return answer.text if answer.status == 200 else answer.status


def test_an_instance_that_is_stored_once_is_served_on_its_host_and_follows_its_place(
    world: FleetWorld,
) -> None:
    first, second = world.add_host("a"), world.add_host("b")
    record = instance("web", "blue")
    world.store_network("blue")
    world.place(record, "a")
    here, there = first.lab.guest("blue"), second.lab.guest("blue")
    until(lambda: _name(here) == "web", within_s=20, what="an answer")
    assert _name(here) == "web"
    # To move it, both serve it for a while.
    world.place(record, "a", "b")
    until(lambda: _name(there) == "web", within_s=20, what="an answer at the other host")
    assert _name(here) == "web"
    world.place(record, "b")
    until(lambda: _name(here) in {404, None}, within_s=20, what="its end at the first host")
    assert _name(there) == "web"
    world.place(record)
    until(lambda: _name(there) in {404, None}, within_s=20, what="its removal")
