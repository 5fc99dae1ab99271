"""What nft(8) gets to read for bridges and ARP."""

from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import (
    NamespaceRef,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
)
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    MacAddress,
    Network,
    NetworkId,
)
from imdsproxy.listeners.nft_scripts import (
    Diversion,
    plan_diversions,
    render_arp_guard,
    render_diversions,
)

_NAMING = Naming("imds")
_BLUE = NetworkId("blue")
_LINK = _NAMING.link(_BLUE)
_MAC = MacAddress("02:00:00:00:00:01")
_TAP = ObservedDevice("tap0", 11, up=True, mtu=1500, kind="tun", master=9)
_UPLINK = replace(_TAP, name="eno1", kind="")
_DIVERSION = Diversion(_LINK, _MAC, (_UPLINK, _TAP))


def _networks(listener: Listener | None = None) -> dict[NetworkId, Network]:
    return {_BLUE: Network(_BLUE, listener or BridgeListener("br0"))}


def _observed(*ports: ObservedDevice, mac: str = _MAC) -> ObservedHost:
    veth = ObservedDevice(_NAMING.inner_device, 2, up=True, mtu=1500, mac=mac)
    name = _NAMING.namespace(_BLUE)
    inside = ObservedNamespace(NamespaceRef(name, 1), {_NAMING.inner_device: veth})
    bridge = ObservedDevice("br0", 9, up=True, mtu=1500, kind="bridge")
    other = replace(_TAP, name="tap9", master=8)
    root = ObservedNamespace(None, {one.name: one for one in (bridge, other, *ports)})
    return ObservedHost(root, {name: inside})


def test_frames_of_every_port_of_a_bridge_but_our_own_go_to_our_veth() -> None:
    seen = _observed(_UPLINK, replace(_TAP, name=_LINK, kind="veth"), _TAP)
    assert plan_diversions(_networks(), seen, _NAMING) == (_DIVERSION,)


@pytest.mark.parametrize(
    "seen",
    [ObservedHost(), _observed(), _observed(_TAP, mac=""), _observed(replace(_TAP, name='a"*'))],
    ids=["no namespace yet", "no port", "no MAC", "only a name that nft would not take literally"],
)
def test_nothing_is_diverted_without_a_namespace_a_mac_and_a_port(seen: ObservedHost) -> None:
    assert plan_diversions(_networks(), seen, _NAMING) == ()


def test_an_interface_listener_needs_no_diversion() -> None:
    seen = _observed(_TAP)
    assert plan_diversions(_networks(InterfaceListener("br0")), seen, _NAMING) == ()


def test_only_guests_are_forbidden_to_answer_as_the_metadata_service() -> None:
    script = render_diversions("imds", (_DIVERSION,))
    assert 'set guests { type ifname; elements = { "tap0" } }' in script
    assert 'elements = { "eno1" : 02:00:00:00:00:01, "tap0" : 02:00:00:00:00:01 }' in script


def test_without_diversions_the_table_is_only_removed() -> None:
    assert render_diversions("imds", ()) == "table bridge imds\ndelete table bridge imds\n"


def _arp_guard(**listeners: Listener) -> str:
    given = [Network(NetworkId(name), one) for name, one in listeners.items()]
    return render_arp_guard("imds", given)


def test_only_devices_of_interface_listeners_answer_arp_by_a_rule_that_replaces_the_last() -> None:
    one, other = (InterfaceListener(name) for name in ("virbr1", "virbr0"))
    script = _arp_guard(a=one, b=BridgeListener("br1"), c=other)
    assert script.splitlines()[:2] == ["table arp imds", "delete table arp imds"]
    assert 'iifname != { "virbr0", "virbr1" }' in script
    assert "169.254.169.254 drop" in script
    assert _arp_guard(b=BridgeListener("br1")) == "table arp imds\ndelete table arp imds\n"
