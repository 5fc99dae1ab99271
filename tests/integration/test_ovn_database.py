"""OVN's Southbound database as the source has it: every kind of endpoint, losses of all kinds, many foreign ports."""

from collections.abc import Iterator

import pytest

from bench.southbound import SbPort
from support.southbound import SouthboundWorld, open_southbound

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[SouthboundWorld]:
    with open_southbound() as made:
        ports = [port for number in range(2) for port in made.add_network(number, 2)]
        made.start_daemon()
        for port in ports:
            made.plug(port)
            made.wait_asks_as(port, port.instance)
        yield made


def test_a_port_that_moves_away_is_not_served_and_one_that_comes_back_is(
    world: SouthboundWorld,
) -> None:
    port = SbPort(world.network(0), 0)
    world.rows.bind(port, "")
    world.wait_asks_as(port, "404")
    world.rows.bind(port, "imdst-chassis")
    world.wait_asks_as(port, port.instance)
