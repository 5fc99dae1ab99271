"""Executor of planned operations on the host, in idempotent steps. Also replaces tables and links.

If a process is killed between two steps, the next observation finds the remains.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Final, assert_never

from imdsproxy.errors import (
    DataplaneError,
    Ignoring,
    Problem,
    SourceUnavailable,
    host_refused,
    refusing,
)
from imdsproxy.host import netlink
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import NamespaceMissing, NamespaceThread
from imdsproxy.host.nftables import (
    INET,
    Batch,
    Change,
    NetfilterSocket,
    ensure_table,
    replace_table,
)
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.ovsdb import Row, Table, Transaction
from imdsproxy.host.state import Family, ObservedDevice
from imdsproxy.model.entities import IpAddress, NetworkId
from imdsproxy.network import planned
from imdsproxy.network.anti_spoofing.kernel import close_tables
from imdsproxy.network.listeners.rules import ROUTER_COMMENT, fill_router_table
from imdsproxy.network.ovn.plan import plan_interface
from imdsproxy.network.planned import LOOPBACK
from imdsproxy.sources.ovn.ports import NETWORK_KEY, IpInterface, devices_of, namespace_of
from imdsproxy.sources.ovn.source import OvnSource

HAPROXY_NETNS: Final = Path("/var/run/netns")
"""Directory in which HAProxy opens namespaces (compiled in: `src/namespace.c`)."""

_READ_ONLY: Final = "/proc/sys must be writable (ProtectKernelTunables=no in the unit)"
_NO_NAT: Final = "nf_tables with family inet and NAT is needed; guests behind this router get no answer until then"
_WRITTEN_S: Final = 5.0
_VSWITCH: Final = "ovn.open_vswitch"
_NO_BRIDGE: Final = "ovn-controller creates the bridge; external_ids:ovn-bridge names another one"
_NO_WRITE: Final = "look at ovsdb-server and its log; imdsproxy tries again"
_PREFIXES: Final = {Family.IPV4: 32, Family.IPV6: 64}
_SWITCHED_OFF: Final = (
    # Packets from a guest must not give us routes or addresses, nor make us a router.
    *("ipv4/conf/{}/accept_redirects", "ipv4/conf/{}/forwarding"),
    *("ipv6/conf/{}/accept_ra", "ipv6/conf/{}/accept_redirects", "ipv6/conf/{}/forwarding"),
    # A new namespace inherits these from the host. Every guest must get an answer, whatever its subnet.
    *("ipv4/conf/{}/rp_filter", "ipv4/conf/{}/arp_filter", "ipv4/conf/{}/arp_ignore"),
)


async def apply_ops(
    thread: NamespaceThread,
    ops: Iterable[planned.HostOp],
    ovn: OvnSource | None = None,
) -> dict[planned.HostOp, Problem]:
    """Carry out ops in order; a failed op never stops the others. Return the failed ops, with the reasons."""
    failures: dict[planned.HostOp, Problem] = {}
    for _, group in groupby(ops, _kind):
        some = tuple(group)
        if in_thread := [op for op in some if isinstance(op, planned.ThreadOp)]:
            failures |= await thread.run(partial(_try_each, thread, in_thread))
        if tables := [op for op in some if isinstance(op, planned.RemoveTable)]:
            failures |= await _remove_tables(thread, tables)
        for op in some:
            if isinstance(op, planned.ChangePorts) and ovn is not None:
                problem = await _change_ports(ovn, op)
                failures |= {} if problem is None else {op: problem}
    return failures


def _kind(op: planned.HostOp) -> type[planned.HostOp] | None:
    return type(op) if isinstance(op, planned.ChangePorts | planned.RemoveTable) else None


async def _remove_tables(
    thread: NamespaceThread, ops: Collection[planned.RemoveTable]
) -> dict[planned.HostOp, Problem]:
    try:
        await close_tables(thread.directory, INET, [(op.namespace.name, op.name) for op in ops])
    except DataplaneError as error:
        return dict.fromkeys(ops, Problem("host", error.message, error.hint))
    return {}


def _try_each(
    thread: NamespaceThread, ops: Iterable[planned.ThreadOp]
) -> dict[planned.HostOp, Problem]:
    failures: dict[planned.HostOp, Problem] = {}
    for op in ops:
        try:
            _do(thread, op)
        except (DataplaneError, OSError) as error:
            if isinstance(error, OSError):
                # The only file system that refuses is /proc/sys.
                hint = _READ_ONLY if error.errno == errno.EROFS else ""
                hint = _NO_NAT if isinstance(op, planned.MakeTable) else hint
                error = host_refused(op.action.format(op), error, hint=hint)
            of_ovn = isinstance(op, planned.AttachOvn | planned.DetachOvn)
            field = f"ovn.{error.code}" if of_ovn else "host"
            failures[op] = Problem(field, error.message, error.hint)
    return failures


def _do(thread: NamespaceThread, op: planned.ThreadOp) -> None:
    match op:
        case planned.AttachBridge():
            _attach_bridge(thread, op)
        case planned.AttachOvn(place, naming):
            _attach_ovn(thread, naming, place)
        case planned.DetachOvn(network, naming):
            _detach_ovn(thread, naming, network)
        case planned.AddAddress(_, name, device, address, mark):
            with thread.inside(name), NetlinkSocket() as channel:
                _add(channel, name, device, address, mark)
        case planned.RemoveAddress(name, device, address, prefix):
            gone = Ignoring(errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL)
            with gone, thread.inside(name), NetlinkSocket() as channel:
                netlink.remove_address(channel, _find(channel, device).index, address, prefix)
        case planned.DeleteNamespace(name):
            thread.directory.delete(name)
        case planned.MakeTable():
            _make_table(thread, op)
        case planned.DeleteLink(name):
            with Ignoring(errno.ENODEV), NetlinkSocket() as channel:
                netlink.delete_link(channel, _find(channel, name).index)
        case never:
            assert_never(never)


def _make_table(thread: NamespaceThread, op: planned.MakeTable) -> None:
    fill = partial(fill_router_table, op.table)
    with contextlib.suppress(NamespaceMissing), thread.inside(op.namespace.name) as ref:
        # The name may belong to another namespace by now.
        if ref == op.namespace:
            with NetfilterSocket() as channel:
                ensure_table(channel, Batch(op.name, INET), ROUTER_COMMENT, fill)


def _find(channel: NetlinkSocket, device: str) -> ObservedDevice:
    found = netlink.find_link(channel, device)
    if found is None:
        raise NetlinkRefused(errno.ENODEV, device)
    return found


def _add(
    channel: NetlinkSocket, namespace: str | None, device: str, address: IpAddress, mark: int
) -> None:
    family = Family(address.version)
    try:
        with Ignoring(errno.EEXIST):
            index = _find(channel, device).index
            netlink.add_address(channel, index, address, _PREFIXES[family], protocol=mark)
    except NetlinkRefused as error:
        hint = ""
        if family is Family.IPV6 and error.errno == errno.EACCES:
            hint = f"IPv6 is switched off there: sysctl net.ipv6.conf.{device}.disable_ipv6=0"
        where = f" in namespace {namespace}" if namespace else ""
        raise host_refused(f"add {address} on device {device}{where}", error, hint=hint) from error


def _attach_bridge(thread: NamespaceThread, op: planned.AttachBridge) -> None:
    naming, alias = op.naming, op.naming.alias(op.network)
    name, link, inner = naming.namespace(op.network), naming.link(op.network), naming.inner_device
    thread.create_now(name)
    with thread.inside(name), NetlinkSocket() as channel:
        _prepare(channel, alias)
    with NetlinkSocket() as channel:
        bridge = _find(channel, op.bridge).index
        _connect(thread, channel, name, (link, inner), master=bridge, mtu=op.mtu)
        _set_up(channel, link, alias, op.mtu, bridge)
    with thread.inside(name), NetlinkSocket() as channel:
        index = _set_up(channel, inner, alias, op.mtu)
        for family in Family:
            _add(channel, name, inner, family.metadata_address, naming.protocol)
            netlink.add_default_route(channel, index, family)


def _connect(
    thread: NamespaceThread,
    channel: NetlinkSocket,
    name: str,
    ends: tuple[str, str],
    *,
    master: int | None,
    mtu: int | None,
) -> ObservedDevice | None:
    """Create a veth pair into a namespace if an end is missing. Return the outer end if the pair was there."""
    link, inner = ends
    outside = netlink.find_link(channel, link)
    with thread.inside(name), NetlinkSocket() as within:
        inside = netlink.find_link(within, inner)
        if inside is not None and outside is None:
            # The other end is not on this host.
            netlink.delete_link(within, inside.index)
    if outside is not None and inside is not None:
        return outside
    if outside is not None:
        netlink.delete_link(channel, outside.index)
    with contextlib.closing(thread.directory.open(name)) as opened:
        netlink.create_veth(
            channel,
            link=link,
            master=master,
            mtu=mtu,
            peer=inner,
            peer_namespace=opened.descriptor,
        )
    return None


def _prepare(channel: NetlinkSocket, alias: str) -> None:
    # /proc/sys/net shows the settings of the calling thread's namespace.
    for setting in _SWITCHED_OFF:
        for which in ("all", "default"):
            path = Path("/proc/sys/net", setting.format(which))
            if path.exists():  # not on a host that was started without IPv6
                path.write_text("0")
    # The alias comes last: it marks a complete namespace.
    _set_up(channel, LOOPBACK, alias)


def _set_up(
    channel: NetlinkSocket,
    device: str,
    alias: str,
    mtu: int | None = None,
    master: int | None = None,
) -> int:
    found = _find(channel, device)
    # The kernel refuses an alias for a link that is being created, and sends an event if the same alias is set again.
    new = None if found.alias == alias else alias
    netlink.set_link(channel, found.index, mtu=mtu, master=master, alias=new)
    return found.index


def _attach_ovn(thread: NamespaceThread, naming: Naming, place: planned.MetadataPlace) -> None:
    """Create the missing parts, and leave the rest unchanged: an agent's namespace stays without our mark."""
    name = place.namespace
    thread.create_now(name, lambda: _mark(naming, place.network))
    with thread.inside(name), NetlinkSocket() as channel:
        loopback = _find(channel, LOOPBACK)
        if not loopback.up:
            netlink.set_link(channel, loopback.index)
    with NetlinkSocket() as channel:
        outside = _connect(
            thread, channel, name, (place.outer, place.inner), master=None, mtu=place.mtu
        )
        if outside is not None and not (outside.up and place.mtu in (None, outside.mtu)):
            netlink.set_link(channel, outside.index, mtu=place.mtu)
    with thread.inside(name), NetlinkSocket() as channel:
        inside = _find(channel, place.inner)
        if place.in_user_space:
            # In user space nothing computes the checksums that the kernel leaves to a NIC.
            netlink.ask_ethtool(place.inner, netlink.ETHTOOL_STXCSUM)
        mac = None if inside.mac == place.mac else place.mac
        netlink.set_link(channel, inside.index, mtu=place.mtu, mac=mac)
        ipv6 = netlink.has_ipv6(place.inner)
        _set_addresses(channel, inside.index, place.addresses(ipv6=ipv6), naming)


def _mark(naming: Naming, network: NetworkId) -> None:
    with NetlinkSocket() as channel:
        netlink.set_link(channel, _find(channel, LOOPBACK).index, alias=naming.alias(network))


def _set_addresses(
    channel: NetlinkSocket, index: int, wanted: frozenset[IpInterface], naming: Naming
) -> None:
    for _ in range(2):
        # The kernel removes all addresses of a subnet with the first one: the second pass adds them again.
        present = {plan_interface(one): one for one in netlink.list_interfaces(channel, index)}
        for one in sorted(wanted - present.keys(), key=str):
            with Ignoring(errno.EEXIST):  # the kernel has added its own link-local address
                prefix, protocol = one.network.prefixlen, naming.protocol
                netlink.add_address(channel, index, one.ip, prefix, protocol=protocol)
        for interface, one in present.items():
            if interface not in wanted:
                with Ignoring(errno.EADDRNOTAVAIL):
                    netlink.remove_address(channel, index, one.ip, one.network.prefixlen)


def _detach_ovn(thread: NamespaceThread, naming: Naming, network: NetworkId) -> None:
    """Remove the namespace last, with our mark: a later process finds what a killed one left."""
    name = namespace_of(network)
    with contextlib.suppress(NamespaceMissing), thread.inside(name):
        _mark(naming, network)
    with Ignoring(errno.ENODEV), NetlinkSocket() as channel:
        netlink.delete_link(channel, _find(channel, devices_of(network)[0]).index)
    thread.directory.delete(name)


async def _change_ports(source: OvnSource, op: planned.ChangePorts) -> Problem | None:
    """Change Open vSwitch's ports. Return the reason if they stay as they were."""
    local, plug, problem = source.local, op.plug, None
    if plug and local is not None and local.datapath is None:
        problem = Problem(_VSWITCH, f"there is no bridge {local.bridge}", _NO_BRIDGE)
        plug = ()
    if plug or op.unplug:
        try:
            async with asyncio.timeout(_WRITTEN_S):
                await source.change_vswitch(partial(_write_ports, plug, op.unplug))
        except SourceUnavailable as error:
            problem = Problem(_VSWITCH, error.message, error.hint or _NO_WRITE)
        except TimeoutError:
            problem = Problem(_VSWITCH, f"no answer within {_WRITTEN_S:g} s", _NO_WRITE)
    return problem


def _write_ports(
    places: Collection[planned.MetadataPlace],
    unplug: Collection[str],
    tables: Mapping[str, Table],
    transaction: Transaction,
) -> None:
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
            unplug_port(port, bridges)
            interface = transaction.insert(tables["Interface"])
            interface.name = place.outer
            port = transaction.insert(tables["Port"])
            port.name = place.outer
            port.interfaces = [interface.uuid]
            bridge.addvalue("ports", port.uuid)
        interface.setkey("external_ids", "iface-id", place.port)
        interface.setkey("external_ids", NETWORK_KEY, place.network)
    for name in unplug:
        unplug_port(ports.get(name), bridges)


def unplug_port(port: Row | None, bridges: Mapping[str, Row]) -> None:
    for bridge in bridges.values():
        if port is not None and port.uuid in bridge.ports:
            bridge.delvalue("ports", port.uuid)


@dataclass(slots=True)
class HostTable:
    """One of our tables of nf_tables in the host's own namespace, replaced and removed as a whole.

    Attributes:
        failing: Reason to report if the kernel refuses.
        until: Hint to report: the consequence until the table is there.
        applied: Content in force; empty without a table, `None` while the table of an earlier process is unknown.
    """

    thread: NamespaceThread
    name: str
    family: int
    failing: str
    until: str
    applied: tuple[Change, ...] | None = None

    async def apply(self, content: tuple[Change, ...]) -> tuple[Problem, ...]:
        """Replace the table, unless the same content is in force; without content remove it. Return the problems."""
        if content == self.applied:
            return ()
        try:
            await self.thread.run(partial(replace_table, self.name, self.family, content))
        except OSError as error:
            # A kernel without such tables also refuses to remove one: then no table exists.
            if content or self.applied:
                refused = host_refused(f"make table {self.name}", error)
                return (Problem("host", f"{self.failing}: {refused.message}", self.until),)
        self.applied = content
        return ()


def haproxy_name(directory: Path) -> str:
    """Return the prefix of namespace names in bind lines, so that HAProxy opens `directory/NAME`.

    HAProxy hands a listening socket over to its next worker by the names of its namespace and device. If a namespace
    or device was deleted and created again under its name, the worker would get the socket of the deleted one. A link
    with another name (`network.endpoints.link_name`) makes HAProxy open a new socket. HAProxy opens
    `/var/run/netns/NAME` and accepts slashes in NAME, so the links are in a directory of ours, hidden from `ip netns`:
    `bind … namespace ../imdsproxy/netns/blue@4026532317`.
    """
    return os.path.relpath(os.path.realpath(directory), os.path.realpath(HAPROXY_NETNS))


def apply_links(directory: Path, links: Mapping[str, str]) -> None:
    """Make `directory` contain exactly these symbolic links.

    Links are replaced atomically; unchanged links are not touched. A missing directory is created. Other kinds of
    files in the directory are left alone.
    """
    base = os.fspath(directory)
    with refusing(f"link namespaces in {base}"):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # This runs at each reload for every network: `Path` objects would cost more than the kernel's part.
        with os.scandir(base) as entries:
            present = {one.name: os.readlink(one.path) for one in entries if one.is_symlink()}  # noqa: PTH115 - as above
        # This also removes the temporary link of a killed process.
        for name in present.keys() - links.keys():
            os.unlink(f"{base}/{name}")  # noqa: PTH108 - as above
        for name, target in links.items():
            if present.get(name) != target:
                os.symlink(target, f"{base}/.tmp")  # noqa: PTH211 - as above
                os.replace(f"{base}/.tmp", f"{base}/{name}")  # noqa: PTH105 - as above
