"""A minute of `script/chaos`: whatever is broken of a fleet, no guest gets what it may not."""

import sys

import pytest

from support.fleet_chaos import ETCD_FLAGS, Chaos
from support.fleet_faults import FAULTS
from support.fleet_world import fleet_world

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_no_guest_of_a_fleet_that_is_broken_in_every_way_gets_what_it_may_not() -> None:
    with fleet_world(etcd_flags=ETCD_FLAGS, clocks=True) as world:
        chaos = Chaos(world, 20_261_201, sys.stdout)
        chaos.prepare()
        found = chaos.run(60)
    assert not found[:5]
    counts = chaos.history.counts()
    # A busy machine may need longer for an answer than its guest waits.
    assert len(chaos.history.unserved()) <= counts["answered 200"] / 1000
    assert counts["answered 200"] > 100 * len(world.hosts)
    assert counts["written: in force on all its hosts"] > len(world.hosts)
    assert len(chaos.faults) >= len(FAULTS) // 3
