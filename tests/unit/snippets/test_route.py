from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from imdsproxy.core.model import BridgeListener, InterfaceListener, NamespaceListener, Network
from imdsproxy.core.snippets import ForeignNamespace, NoRoute, OnLink, Route, plan_route
from support.snippet_guests import network

GATEWAY = IPv4Address("10.0.0.1")
VIRBR0 = InterfaceListener("virbr0")


@pytest.mark.parametrize(
    ("of", "here", "route"),
    [
        pytest.param(network(VIRBR0), True, NoRoute("virbr0"), id="host-is-gateway"),
        pytest.param(network(VIRBR0), False, OnLink("virbr0", GATEWAY), id="foreign-gateway"),
        pytest.param(
            network(VIRBR0, gateway=None), False, OnLink("virbr0", None), id="isolated-interface"
        ),
        pytest.param(
            network(VIRBR0, cidr="2001:db8::/64", gateway="2001:db8::1"),
            True,
            OnLink("virbr0", None, gateway_unknown=True),
            id="no-subnet",
        ),
        pytest.param(
            network(BridgeListener("br0")), False, NoRoute("br0"), id="bridge-with-gateway"
        ),
        pytest.param(
            network(BridgeListener("br0"), gateway=None),
            True,
            OnLink("br0", None, any_gateway=True),
            id="isolated",
        ),
        pytest.param(
            network(NamespaceListener("qdhcp-1")), True, ForeignNamespace("qdhcp-1"), id="namespace"
        ),
    ],
)
def test_the_way_to_the_address_follows_from_the_listener(
    of: Network, *, here: bool, route: Route
) -> None:
    assert plan_route(of, lambda _: here) == route


def test_option_121_keeps_the_default_route_because_clients_then_look_at_no_other() -> None:
    assert OnLink("br0", GATEWAY).classless_routes == (
        "169.254.169.254/32,0.0.0.0,0.0.0.0/0,10.0.0.1"
    )
    assert OnLink("br0", None).classless_routes == "169.254.169.254/32,0.0.0.0"
