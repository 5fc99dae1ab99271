"""Does to the host what `listeners.plan` planned, one idempotent step after the other."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, assert_never

from imdsproxy.core.endpoints import LOOPBACK
from imdsproxy.core.hoststate import Family, NamespaceRef, ObservedDevice
from imdsproxy.core.model import IpAddress
from imdsproxy.errors import DataplaneError, Ignoring, Problem, host_refused
from imdsproxy.host import netlink
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.listeners.plan import (
    AddAddress,
    AttachBridge,
    DeleteLink,
    DeleteNamespace,
    HostOp,
    RemoveAddress,
)

T = TypeVar("T")

_PREFIXES: Final = {Family.IPV4: 32, Family.IPV6: 64}
_SWITCHED_OFF: Final = (
    # What a guest sends must not give us routes or addresses, nor make a router of us.
    *("ipv4/conf/{}/accept_redirects", "ipv4/conf/{}/forwarding"),
    *("ipv6/conf/{}/accept_ra", "ipv6/conf/{}/accept_redirects", "ipv6/conf/{}/forwarding"),
    # A new namespace takes these from the host. Every guest is to be answered, whatever its subnet.
    *("ipv4/conf/{}/rp_filter", "ipv4/conf/{}/arp_filter", "ipv4/conf/{}/arp_ignore"),
)


async def apply_ops(thread: NamespaceThread, ops: tuple[HostOp, ...]) -> dict[HostOp, Problem]:
    """Carry out ops in order; one that fails never stops the others.

    Args:
        thread: Where namespaces are entered.
        ops: What to do.

    Returns:
        Those that failed, with the reason.
    """
    failures: dict[HostOp, Problem] = {}

    def work() -> None:
        for op in ops:
            try:
                _do(thread, op)
            except DataplaneError as error:
                failures[op] = Problem("host", error.message, error.hint)
            except OSError as error:
                # The only file system that refuses is /proc/sys.
                read_only = error.errno == errno.EROFS
                hint = "/proc/sys must be writable (ProtectKernelTunables=no in the unit)"
                refused = host_refused(op.action.format(op), error, hint=hint if read_only else "")
                failures[op] = Problem("host", refused.message, refused.hint)

    if ops:
        await thread.run(work)
    return failures


def _do(thread: NamespaceThread, op: HostOp) -> None:
    match op:
        case AttachBridge():
            _attach(thread, op)
        case AddAddress(_, name, device, address, mark):
            _at(thread, name, lambda channel: _add(channel, name, device, address, mark))
        case RemoveAddress(name, device, address, prefix):
            with Ignoring(errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL):
                _at(
                    thread,
                    name,
                    lambda channel: netlink.remove_address(
                        channel, _find(channel, device).index, address, prefix
                    ),
                )
        case DeleteNamespace(name):
            thread.directory.delete(name)
        case DeleteLink(name):
            with Ignoring(errno.ENODEV):
                _at(
                    thread,
                    None,
                    lambda channel: netlink.delete_link(channel, _find(channel, name).index),
                )
        case never:
            assert_never(never)


def _at(thread: NamespaceThread, namespace: str | None, work: Callable[[NetlinkSocket], T]) -> T:
    def with_channel(_: NamespaceRef | None) -> tuple[T]:
        with NetlinkSocket() as channel:
            return (work(channel),)

    done = thread.enter(namespace, with_channel)
    if done is None:
        raise NetlinkRefused(errno.ENOENT, f"no namespace {namespace}")
    return done[0]


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


def _attach(thread: NamespaceThread, op: AttachBridge) -> None:
    naming, alias = op.naming, op.naming.alias(op.network)
    name, link, inner = naming.namespace(op.network), naming.link(op.network), naming.inner_device

    def furnish(channel: NetlinkSocket) -> None:
        index = _set_up(channel, inner, alias, op.mtu)
        for family in Family:
            _add(channel, name, inner, family.metadata_address, naming.protocol)
            netlink.add_default_route(channel, index, family)

    thread.create_now(name)
    inside = _at(thread, name, lambda channel: _prepare(channel, inner, alias))
    opened = thread.directory.open(name)
    if opened is None:
        raise NetlinkRefused(errno.ENOENT, f"no namespace {name}")
    with contextlib.closing(opened), NetlinkSocket() as channel:
        bridge = _find(channel, op.bridge).index
        outside = netlink.find_link(channel, link)
        if outside is not None and inside is None:
            netlink.delete_link(channel, outside.index)
        if outside is None or inside is None:
            netlink.create_veth(
                channel,
                link=link,
                master=bridge,
                mtu=op.mtu,
                peer=inner,
                peer_namespace=opened.descriptor,
            )
        _set_up(channel, link, alias, op.mtu, bridge)
    _at(thread, name, furnish)


def _prepare(channel: NetlinkSocket, inner: str, alias: str) -> ObservedDevice | None:
    # These files are those of the namespace that the calling thread is in.
    for setting in _SWITCHED_OFF:
        for which in ("all", "default"):
            path = Path("/proc/sys/net", setting.format(which))
            if path.exists():  # not on a host that was started without IPv6
                path.write_text("0")
    # The alias comes last: a namespace that has it is complete.
    _set_up(channel, LOOPBACK, alias)
    return netlink.find_link(channel, inner)


def _set_up(
    channel: NetlinkSocket,
    device: str,
    alias: str,
    mtu: int | None = None,
    master: int | None = None,
) -> int:
    found = _find(channel, device)
    # The kernel takes no alias for a link that is being made, and reports one that is set again.
    new = None if found.alias == alias else alias
    netlink.set_link(channel, found.index, mtu=mtu, master=master, alias=new)
    return found.index
