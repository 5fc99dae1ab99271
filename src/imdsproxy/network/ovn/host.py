"""OVN on this host, besides reporting its ports: the needs of its networks, their bridge ports, and the heartbeat."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import SystemRandom
from typing import Final

from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.host.ovsdb import Row, Table, Transaction
from imdsproxy.model.entities import NetworkId
from imdsproxy.network.operations import ChangePorts, MetadataPlace
from imdsproxy.network.ovn.heartbeat import OvnHeartbeat
from imdsproxy.network.ovn.plan import OvnWanted
from imdsproxy.reconcile.part import Part
from imdsproxy.sources.ovn.ports import NETWORK_KEY, namespace_of
from imdsproxy.sources.ovn.source import OvnSource

_TOGETHER_S: Final = 0.02
"""Seconds to wait for more changes. Meanwhile guests' records come into force, which must not wait for this work."""

_WRITTEN_S: Final = 5.0
_VSWITCH: Final = "ovn.open_vswitch"
_NO_BRIDGE: Final = "ovn-controller makes it; another name belongs in external_ids:ovn-bridge"
_NO_WRITE: Final = "look at ovsdb-server and its log; it is tried again"
_NO_PORT: Final = "neutron-ovn-db-sync-util makes it again"


@dataclass(slots=True)
class OvnHost(Part):
    """Needs of one source's networks, for the loop of the listeners.

    Args:
        source: Source with the networks that have ports here, and Open vSwitch's database.
        touch: Requests a round of the listeners; gets the reason and networks to observe again.
    """

    source: OvnSource
    touch: Callable[[str, Collection[NetworkId]], object]
    heartbeat: OvnHeartbeat = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _wanted: OvnWanted | None = None
    _noticed: OvnWanted | None = None

    def __post_init__(self) -> None:
        self.heartbeat = OvnHeartbeat(self.source, SystemRandom().random)
        self.source.on_change = self._on_change

    def _on_change(self) -> None:
        self._wanted = None
        self._changed.set()
        self.heartbeat.beats.wake()

    def wanted(self) -> OvnWanted | None:
        """Return the needs as of now; `None` until Open vSwitch's database was read."""
        if self._wanted is None and (local := self.source.local) is not None:
            self._wanted = OvnWanted.of(self.source.known, local, sweep=self.source.settled)
        return self._wanted

    def work(self) -> tuple[Coroutine[object, object, None], ...]:
        """Return the coroutines to run as long as the controller runs."""
        return self._notice(), self.heartbeat.run()

    async def _notice(self) -> None:
        """Request a round at each change of the needs, until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_TOGETHER_S)
            self._changed.clear()
            wanted = self.wanted()
            if wanted is not None and wanted.is_new(self._noticed):
                self._noticed = wanted
                self.touch("OVN's networks changed", ())

    def problems(self) -> tuple[Problem, ...]:
        """Return the problems of networks without a metadata port, and of the heartbeat."""
        wanted = self.wanted()
        lacking = (
            Problem("ovn.metadata_port", f"network {network} has none", _NO_PORT, record=network)
            for network in (() if wanted is None else wanted.spared)
        )
        return (*lacking, *self.heartbeat.problems)

    async def change_ports(self, op: ChangePorts) -> Problem | None:
        """Change Open vSwitch's ports. Return the reason if they stay as they were."""
        local, plug, problem = self.source.local, op.plug, None
        if plug and local is not None and local.datapath is None:
            problem = Problem(_VSWITCH, f"there is no bridge {local.bridge}", _NO_BRIDGE)
            plug = ()
        if plug or op.unplug:
            try:
                async with asyncio.timeout(_WRITTEN_S):
                    await self.source.change_vswitch(partial(write_ports, plug, op.unplug))
            except SourceUnavailable as error:
                problem = Problem(_VSWITCH, error.message, error.hint or _NO_WRITE)
            except TimeoutError:
                problem = Problem(_VSWITCH, f"no answer within {_WRITTEN_S:g} s", _NO_WRITE)
        return problem


def write_ports(
    places: Collection[MetadataPlace],
    unplug: Collection[str],
    tables: Mapping[str, Table],
    transaction: Transaction,
) -> None:
    """Add and remove ports of Open vSwitch's bridges as planned; in the connection's thread."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    interfaces = {row.name: row for row in tables["Interface"].rows.values()}
    for place in places:
        port, interface = ports.get(place.outer), interfaces.get(place.outer)
        bridge = bridges.get(place.bridge)
        if bridge is None:  # it was removed meanwhile: the next observation shows that
            continue
        if port is None or interface is None or port.uuid not in bridge.ports:
            # Create a new port for another bridge: ovn-controller overlooks an interface that only changes its bridge.
            _remove(port, bridges)
            interface = transaction.insert(tables["Interface"])
            interface.name = place.outer
            port = transaction.insert(tables["Port"])
            port.name = place.outer
            port.interfaces = [interface.uuid]
            bridge.addvalue("ports", port.uuid)
        interface.setkey("external_ids", "iface-id", place.port)
        interface.setkey("external_ids", NETWORK_KEY, place.network)
    for name in unplug:
        _remove(ports.get(name), bridges)


def _remove(port: Row | None, bridges: Mapping[str, Row]) -> None:
    for bridge in bridges.values():
        if port is not None and port.uuid in bridge.ports:
            bridge.delvalue("ports", port.uuid)


def sweep_ports(
    staying: Collection[str], tables: Mapping[str, Table], _transaction: Transaction
) -> None:
    """Remove all our ports, except those of namespaces that stay; remove our mark from these."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    for interface in list(tables["Interface"].rows.values()):
        network = interface.external_ids.get(NETWORK_KEY)
        if network is None:
            continue
        if namespace_of(network) in staying:
            interface.delkey("external_ids", NETWORK_KEY)
        else:
            _remove(ports.get(interface.name), bridges)
