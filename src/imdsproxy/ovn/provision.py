"""Gives each network of OVN its namespace and its port on the integration bridge, and takes them away again."""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from imdsproxy.core.endpoints import LOOPBACK
from imdsproxy.core.model import NetworkId
from imdsproxy.errors import DataplaneError, ImdsproxyError, Problem, host_refused
from imdsproxy.host import netlink
from imdsproxy.host.namespaces import NamespaceMissing, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.ovsdb import Row, Table, Transaction
from imdsproxy.ovn.plan import (
    NAMESPACE_PREFIX,
    MetadataPlace,
    OvnPlan,
    SeenPlace,
    is_metadata_namespace,
    plan_host,
    plan_places,
)
from imdsproxy.sources.ovn.ports import devices_of
from imdsproxy.sources.ovn.source import OvnSource

_LOOK_EVERY_S: Final = 10.0
"""How often the host is looked at without an event: another program may have changed a namespace."""

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_STXCSUM: Final = 0x17
_log: Final = structlog.get_logger()


@dataclass(slots=True)
class Provisioner:
    """Keeps this host as `ovn.plan` says.

    Args:
        source: Which networks have ports here, and Open vSwitch's database.
        thread: Where namespaces are entered.
        protocol: Marks the addresses that are added here (`Naming.protocol`).

    Attributes:
        problems: What the host refuses, by network or namespace.
        changed: Set to look at once.
    """

    source: OvnSource
    thread: NamespaceThread
    protocol: int
    problems: dict[str, Problem] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Compare and act until cancelled, at each change of the databases and now and then."""
        while True:
            self.changed.clear()
            try:
                await self.converge()
            except ImdsproxyError as error:
                self.problems = {"": Problem("ovn", error.message, error.hint)}
                _log.warning("networks not provisioned", error=error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), _LOOK_EVERY_S)

    async def converge(self) -> OvnPlan:
        """Look, plan and act once; what was planned.

        Raises:
            DataplaneError: The host cannot be looked at.
            SourceUnavailable: Open vSwitch refuses.
        """
        local, known = self.source.local, self.source.known
        if local is None:
            return OvnPlan()
        places = plan_places(known, local)
        seen = await self.thread.run(self._look)
        plan = plan_host(places, seen, local, sweep=self.source.settled)
        if plan:
            _log.info(
                "networks provisioned",
                made=[place.network for place in plan.make],
                plugged=[place.network for place in plan.plug],
                removed=plan.remove,
            )
        self.problems = await self.thread.run(lambda: self._make(plan.make))
        plug = [place for place in plan.plug if place.network not in self.problems]
        if plug or plan.unplug:
            await self.source.change_vswitch(partial(_plug, plug, plan.unplug))
        self.problems |= await self.thread.run(lambda: self._remove(plan.remove))
        return plan

    # In the namespaces' thread

    def _look(self) -> Mapping[str, SeenPlace]:
        names = [one for one in self.thread.directory.names() if is_metadata_namespace(one)]
        found: dict[str, SeenPlace] = {}
        with NetlinkSocket() as outside:
            for name in names:
                outer, inner = devices_of(NetworkId(name.removeprefix(NAMESPACE_PREFIX)))
                there = netlink.find_link(outside, outer)
                found[name] = SeenPlace(outer=there)
                with (
                    contextlib.suppress(NamespaceMissing),
                    self.thread.inside(name),
                    NetlinkSocket() as channel,
                ):
                    device = netlink.find_link(channel, inner)
                    if device is not None:
                        interfaces = frozenset(netlink.list_interfaces(channel, device.index))
                        found[name] = SeenPlace(device, there, interfaces)
        return found

    def _make(self, places: Collection[MetadataPlace]) -> dict[str, Problem]:
        problems: dict[str, Problem] = {}
        for place in places:
            try:
                self._make_one(place)
            except (DataplaneError, OSError) as error:
                if isinstance(error, OSError):
                    error = host_refused(f"make namespace {place.namespace}", error)
                problems[place.network] = Problem("ovn", error.message, error.hint)
        return problems

    def _make_one(self, place: MetadataPlace) -> None:
        self.thread.create_now(place.namespace)
        with self.thread.inside(place.namespace), NetlinkSocket() as channel:
            loopback = netlink.find_link(channel, LOOPBACK)
            if loopback is not None and not loopback.up:
                netlink.set_link(channel, loopback.index)
            inside = netlink.find_link(channel, place.inner)
        opened = self.thread.directory.open(place.namespace)
        with contextlib.closing(opened), NetlinkSocket() as channel:
            outside = netlink.find_link(channel, place.outer)
            if outside is not None and inside is None:
                netlink.delete_link(channel, outside.index)
            if outside is None or inside is None:
                netlink.create_veth(
                    channel,
                    link=place.outer,
                    master=None,
                    mtu=place.mtu,
                    peer=place.inner,
                    peer_namespace=opened.descriptor,
                )
            elif not outside.up or (place.mtu is not None and outside.mtu != place.mtu):
                netlink.set_link(channel, outside.index, mtu=place.mtu)
        with self.thread.inside(place.namespace), NetlinkSocket() as channel:
            self._set_up_inner(channel, place)

    def _set_up_inner(self, channel: NetlinkSocket, place: MetadataPlace) -> None:
        inside = netlink.find_link(channel, place.inner)
        if inside is None:
            raise host_refused(f"find {place.inner}", OSError(errno.ENODEV, "No such device"))
        mac = None if inside.mac == place.mac else place.mac
        netlink.set_link(channel, inside.index, mtu=place.mtu, mac=mac)
        if place.in_user_space:
            # Nothing fills in the checksums that the kernel leaves to a network card.
            _switch_checksums_off(place.inner)
        present = frozenset(netlink.list_interfaces(channel, inside.index))
        for one in present - place.interfaces:
            netlink.remove_address(channel, inside.index, one.ip, one.network.prefixlen)
        for one in place.interfaces - present:
            netlink.add_address(
                channel, inside.index, one.ip, one.network.prefixlen, protocol=self.protocol
            )

    def _remove(self, names: Collection[str]) -> dict[str, Problem]:
        problems: dict[str, Problem] = {}
        for name in names:
            try:
                with NetlinkSocket() as channel:
                    outer = devices_of(NetworkId(name.removeprefix(NAMESPACE_PREFIX)))[0]
                    link = netlink.find_link(channel, outer)
                    if link is not None:
                        netlink.delete_link(channel, link.index)
                self.thread.directory.delete(name)
            except (DataplaneError, OSError) as error:
                if isinstance(error, OSError):
                    error = host_refused(f"remove namespace {name}", error)
                problems[name] = Problem("ovn", error.message, error.hint)
        return problems


def _switch_checksums_off(device: str) -> None:
    """In the namespace that the calling thread is in (linux/ethtool.h, `struct ethtool_value`)."""
    value = bytearray(struct.pack("=II", _ETHTOOL_STXCSUM, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        buffer = (ctypes.c_char * len(value)).from_buffer(value)
        request = struct.pack("@16sP", device.encode(), ctypes.addressof(buffer))
        fcntl.ioctl(channel.fileno(), _SIOCETHTOOL, request)


def _plug(
    places: Collection[MetadataPlace],
    unplug: Collection[str],
    tables: Mapping[str, Table],
    transaction: Transaction,
) -> None:
    """Have Open vSwitch's bridges as planned; in the connection's thread."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    interfaces = {row.name: row for row in tables["Interface"].rows.values()}
    for place in places:
        bridge = bridges.get(place.bridge)
        if bridge is None:
            continue
        port, interface = ports.get(place.outer), interfaces.get(place.outer)
        if port is None or interface is None:
            interface = transaction.insert(tables["Interface"])
            interface.name = place.outer
            port = transaction.insert(tables["Port"])
            port.name = place.outer
            port.interfaces = [interface.uuid]
        interface.external_ids = {"iface-id": place.port}
        _move(port, bridges, bridge)
    for name in unplug:
        if (port := ports.get(name)) is not None:
            _move(port, bridges, None)


def _move(port: Row, bridges: Mapping[str, Row], to: Row | None) -> None:
    for bridge in bridges.values():
        if bridge is not to and port.uuid in bridge.ports:
            bridge.delvalue("ports", port.uuid)
    if to is not None and port.uuid not in to.ports:
        to.addvalue("ports", port.uuid)
