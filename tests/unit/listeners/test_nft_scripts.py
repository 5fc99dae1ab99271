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
from imdsproxy.listeners.nft_scripts import render_arp_guard, render_diversions

_NAMING = Naming("imds")
_BLUE = NetworkId("blue")
_LINK = _NAMING.link(_BLUE)
_MAC = MacAddress("02:00:00:00:00:01")
_TAP = ObservedDevice("tap0", 11, up=True, mtu=1500, kind="tun", master=9)
_UPLINK = replace(_TAP, name="eno1", kind="")


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


def _diversions(seen: ObservedHost, listener: Listener | None = None) -> str:
    return render_diversions(_networks(listener), seen, _NAMING)


def test_frames_of_every_port_of_a_bridge_but_our_own_go_to_our_veth() -> None:
    script = _diversions(_observed(_UPLINK, replace(_TAP, name=_LINK, kind="veth"), _TAP))
    assert f'elements = {{ "eno1" : {_MAC}, "tap0" : {_MAC} }}' in script
    assert f'set links {{ type ifname; elements = {{ "{_LINK}" }} }}' in script
    # Only guests are forbidden to answer as the metadata service.
    assert 'set guests { type ifname; elements = { "tap0" } }' in script


@pytest.mark.parametrize(
    ("seen", "listener"),
    [
        pytest.param(ObservedHost(), None, id="no namespace yet"),
        pytest.param(_observed(), None, id="no port"),
        pytest.param(_observed(_TAP, mac=""), None, id="no MAC"),
        pytest.param(_observed(replace(_TAP, name='a"*')), None, id="a name that nft would read"),
        pytest.param(_observed(_TAP), InterfaceListener("br0"), id="no bridge listener"),
    ],
)
def test_without_a_namespace_a_mac_and_a_port_the_table_is_only_removed(
    seen: ObservedHost, listener: Listener | None
) -> None:
    assert _diversions(seen, listener) == "table bridge imds\ndelete table bridge imds\n"


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
