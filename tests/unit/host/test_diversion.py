from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import (
    BridgePort,
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
from imdsproxy.errors import HostRefused
from imdsproxy.listeners.nft_scripts import Diversion, plan_diversions, render_diversions
from imdsproxy.listeners.nft_tables import Diverter

_NAMING = Naming("imds")
_BLUE = NetworkId("blue")
_LINK = _NAMING.link(_BLUE)
_MAC = MacAddress("02:00:00:00:00:01")
_TAP = BridgePort("tap0", "tun")
_UPLINK = BridgePort("eno1")
_DIVERSION = Diversion(_LINK, _MAC, (_UPLINK, _TAP))


def _networks(listener: Listener | None = None) -> dict[NetworkId, Network]:
    return {_BLUE: Network(_BLUE, listener or BridgeListener("br0"))}


def _observed(*ports: BridgePort, mac: str = _MAC) -> ObservedHost:
    cable = ObservedDevice(_NAMING.inner_device, 2, up=True, mtu=1500, mac=mac)
    name = _NAMING.namespace(_BLUE)
    inside = ObservedNamespace(NamespaceRef(name, 1), {_NAMING.inner_device: cable})
    root = ObservedNamespace(None, ports={"br0": ports})
    return ObservedHost(root, {name: inside})


def test_every_port_of_a_bridge_but_our_own_is_led_to_our_cable() -> None:
    seen = _observed(_UPLINK, BridgePort(_LINK, "veth"), _TAP)
    assert plan_diversions(_networks(), seen, _NAMING) == (_DIVERSION,)


@pytest.mark.parametrize(
    "seen",
    [ObservedHost(), _observed(), _observed(_TAP, mac=""), _observed(BridgePort('a"*', "tun"))],
    ids=["no namespace yet", "no port", "no MAC", "only a name that nft would not take literally"],
)
def test_nothing_is_diverted_before_there_is_somebody_and_somewhere(seen: ObservedHost) -> None:
    assert plan_diversions(_networks(), seen, _NAMING) == ()


def test_an_interface_listener_needs_none() -> None:
    seen = _observed(_TAP)
    assert plan_diversions(_networks(InterfaceListener("br0")), seen, _NAMING) == ()


def test_only_guests_are_forbidden_to_answer_as_the_metadata_service() -> None:
    script = render_diversions("imds", (_DIVERSION,))
    assert 'set guests { type ifname; elements = { "tap0" } }' in script
    assert 'elements = { "eno1" : 02:00:00:00:00:01, "tap0" : 02:00:00:00:00:01 }' in script


def test_without_diversions_the_table_is_only_removed() -> None:
    assert render_diversions("imds", ()) == "table bridge imds\ndelete table bridge imds\n"


def _program(directory: Path, status: int = 0) -> str:
    program = directory / "nft"
    program.write_text(f'#!/bin/sh\ncat >>"{directory}/told"\nexit {status}\n')
    program.chmod(0o755)
    return str(program)


def test_nft_is_called_only_when_something_changes(tmp_path: Path) -> None:
    diverter = Diverter("imds", _program(tmp_path))
    for wanted in ((_DIVERSION,), (_DIVERSION,), ()):
        asyncio.run(diverter.apply(wanted))
    assert (tmp_path / "told").read_text().count("delete table") == 2


def test_what_nft_refuses_is_told_and_tried_again(tmp_path: Path) -> None:
    diverter = Diverter("imds", _program(tmp_path, status=1))
    for _ in range(2):
        with pytest.raises(HostRefused, match="gateway"):
            asyncio.run(diverter.apply((_DIVERSION,)))
    assert (tmp_path / "told").read_text().count("delete table") == 2
    # Where there never was a table, none is missed.
    asyncio.run(Diverter("imds", _program(tmp_path, status=1)).apply(()))


def test_without_nft_only_a_host_that_needs_it_hears_of_it(tmp_path: Path) -> None:
    diverter = Diverter("imds", str(tmp_path / "none"))
    asyncio.run(diverter.apply(()))
    with pytest.raises(HostRefused, match="no nft"):
        asyncio.run(diverter.apply((_DIVERSION,)))
