"""Which networks count as configured and not served."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from imdsproxy.core.endpoints import Endpoint, Foreign, LeftOut, LeftOutCode
from imdsproxy.core.hoststate import Effect, Family, ListeningSocket, SocketOwner
from imdsproxy.core.model import METADATA_IPV4, NamespaceListener, Network, NetworkId, Subnet
from imdsproxy.listeners.endpoints import find_degraded

RED, BLUE = NetworkId("red"), NetworkId("blue")
NETWORK = Network(RED, NamespaceListener("red"))
V4, V6 = (Endpoint(RED, family.metadata_address, 80, None, None) for family in Family)
OTHER = ListeningSocket(METADATA_IPV4, 80, None, 7, owners=(SocketOwner(42, "python3"),))


def _left(code: LeftOutCode, family: Family | None) -> LeftOut:
    return LeftOut(RED, family, code, "why")


def test_a_network_that_is_served_is_not_degraded() -> None:
    assert find_degraded({RED: NETWORK}, (), (V4, V6), (), ()) == ()


@pytest.mark.parametrize("code", list(LeftOutCode))
def test_a_network_without_an_endpoint_is_degraded_whatever_the_reason(code: LeftOutCode) -> None:
    left = _left(code, None)
    assert find_degraded({RED: NETWORK}, (), (), (left,), ()) == (left,)


@pytest.mark.parametrize(
    ("code", "missing", "served", "degraded"),
    [
        (LeftOutCode.ADDRESS_MISSING, Family.IPV6, V4, False),
        (LeftOutCode.ADDRESS_ON_LOOPBACK, Family.IPV6, V4, False),
        (LeftOutCode.ADDRESS_MISSING, Family.IPV4, V6, True),
        (LeftOutCode.PORT_BUSY, Family.IPV4, V6, True),
        (LeftOutCode.PORT_BUSY, Family.IPV6, V4, True),
        (LeftOutCode.ADDRESS_DUPLICATE, Family.IPV6, V4, True),
    ],
)
def test_a_network_served_over_ipv4_needs_no_ipv6_address_and_every_other_fault_counts(
    code: LeftOutCode, missing: Family, served: Endpoint, *, degraded: bool
) -> None:
    found = find_degraded({RED: NETWORK}, (), (served,), (_left(code, missing),), ())
    assert bool(found) == degraded


def test_a_network_of_ipv6_subnets_needs_no_ipv4_address() -> None:
    left = _left(LeftOutCode.ADDRESS_MISSING, Family.IPV4)
    subnets = (Subnet(ip_network("2001:db8::/64")),)
    assert not find_degraded({RED: replace(NETWORK, subnets=subnets)}, (), (V6,), (left,), ())
    both = (*subnets, Subnet(ip_network("10.0.0.0/24")))
    assert find_degraded({RED: replace(NETWORK, subnets=both)}, (), (V6,), (left,), ())


@pytest.mark.parametrize(
    ("effect", "degraded"), [(Effect.SHARES, True), (Effect.YIELDS, False), (Effect.BLOCKS, False)]
)
def test_a_program_that_shares_the_port_is_named_and_one_that_yields_is_not(
    effect: Effect, *, degraded: bool
) -> None:
    foreign = Foreign(RED, Family.IPV4, effect, OTHER)
    found = find_degraded({RED: NETWORK}, (), (V4, V6), (), (foreign,))
    assert [one.code for one in found] == [LeftOutCode.FOREIGN_LISTENER] * degraded
    assert all("python3 (pid 42)" in one.reason for one in found)


def test_networks_that_no_round_has_seen_and_contradictory_ones_are_degraded_in_order() -> None:
    found = find_degraded({RED: NETWORK}, (BLUE,), (), (), ())
    assert [(one.network, one.code) for one in found] == [
        (BLUE, LeftOutCode.NETWORK_CONFLICT),
        (RED, LeftOutCode.PENDING),
    ]
