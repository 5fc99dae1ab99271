"""Does to the host what `listeners.plan` planned, one idempotent step after the other."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, assert_never

from imdsproxy.core.endpoints import LOOPBACK
from imdsproxy.core.model import NetworkId
from imdsproxy.errors import DataplaneError
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import (
    add_address,
    add_default_route,
    create_veth,
    delete_link,
    find_link,
    remove_address,
    set_link,
)
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.refusal import host_refused
from imdsproxy.listeners.ops import (
    AddAddress,
    AddDefaultRoute,
    CreateNamespace,
    CreateVeth,
    DeleteLink,
    DeleteNamespace,
    HostOp,
    OpFailure,
    RemoveAddress,
    SetLink,
)

_CONF: Final = Path("/proc/sys/net")
_SETTINGS: Final = {
    # What a guest sends must not give us routes or addresses, nor make a router of us.
    "ipv4/conf/{}/accept_redirects": "0",
    "ipv4/conf/{}/forwarding": "0",
    "ipv6/conf/{}/accept_ra": "0",
    "ipv6/conf/{}/accept_redirects": "0",
    "ipv6/conf/{}/forwarding": "0",
    # A new namespace takes these from the host. Every guest is to be answered, whatever its subnet.
    "ipv4/conf/{}/rp_filter": "0",
    "ipv4/conf/{}/arp_filter": "0",
    "ipv4/conf/{}/arp_ignore": "0",
}


async def apply_ops(thread: NamespaceThread, ops: tuple[HostOp, ...]) -> tuple[OpFailure, ...]:
    """Carry out ops in order; one that fails never stops those of other networks.

    Args:
        thread: Where namespaces are entered.
        ops: What to do.

    Returns:
        Those that failed. Ops that build upon one of them are not tried.
    """
    return await thread.run(lambda: tuple(_apply(thread, ops))) if ops else ()


def _apply(thread: NamespaceThread, ops: tuple[HostOp, ...]) -> Iterator[OpFailure]:
    broken: set[NetworkId] = set()
    for op in ops:
        if op.network in broken:
            continue
        refused: DataplaneError
        try:
            _do(thread, op)
        except DataplaneError as error:
            refused = error
        except OSError as error:
            refused = host_refused(_action(op), error, hint=_hint(op, error))
        else:
            continue
        yield OpFailure(op, refused.message, refused.hint)
        if isinstance(op, CreateNamespace | CreateVeth):
            broken.add(op.network)


def _do(thread: NamespaceThread, op: HostOp) -> None:
    match op:
        case CreateNamespace():
            thread.create_now(op.namespace)
            _at(thread, op.namespace, lambda channel: _prepare(channel, op.alias))
        case DeleteNamespace():
            thread.directory.delete(op.namespace)
        case CreateVeth():
            _create_veth(thread, op)
        case DeleteLink():
            _at(thread, None, lambda channel: _change(channel, op))
        case RemoveAddress():
            _at(thread, op.namespace, lambda channel: _change(channel, op), must_exist=False)
        case SetLink() | AddAddress() | AddDefaultRoute():
            _at(thread, op.namespace, lambda channel: _change(channel, op))
        case _ as never:
            assert_never(never)


def _at(
    thread: NamespaceThread,
    namespace: str | None,
    work: Callable[[NetlinkSocket], None],
    *,
    must_exist: bool = True,
) -> None:
    def with_channel() -> bool:
        with NetlinkSocket() as channel:
            work(channel)
        return True

    if namespace is None:
        with_channel()
    elif thread.enter(namespace, lambda _: with_channel()) is None and must_exist:
        raise NetlinkRefused(errno.ENOENT, f"no namespace {namespace}")


def _create_veth(thread: NamespaceThread, op: CreateVeth) -> None:
    opened = thread.directory.open(op.namespace)
    if opened is None:
        raise NetlinkRefused(errno.ENOENT, f"no namespace {op.namespace}")
    try:
        with NetlinkSocket() as channel:
            bridge = _index(channel, op.bridge)
            if find_link(channel, op.link) is None:
                create_veth(
                    channel,
                    link=op.link,
                    master=bridge,
                    mtu=op.mtu,
                    peer=op.inner,
                    peer_namespace=opened.descriptor,
                )
            # The kernel takes no alias for a link that is being made.
            set_link(channel, _index(channel, op.link), up=True, master=bridge, alias=op.alias)
    finally:
        opened.close()
    _at(
        thread,
        op.namespace,
        lambda channel: set_link(channel, _index(channel, op.inner), up=True, alias=op.alias),
    )


def _index(channel: NetlinkSocket, device: str) -> int:
    found = find_link(channel, device)
    if found is None:
        raise NetlinkRefused(errno.ENODEV, device)
    return found.index


def _prepare(channel: NetlinkSocket, alias: str) -> None:
    # These files are those of the namespace that the calling thread is in.
    for setting, value in _SETTINGS.items():
        for which in ("all", "default"):
            path = _CONF / setting.format(which)
            if path.exists():  # not on a host that was started without IPv6
                path.write_text(value)
    # The alias comes last: a namespace that has it is complete.
    set_link(channel, _index(channel, LOOPBACK), up=True, alias=alias)


def _change(
    channel: NetlinkSocket, op: DeleteLink | SetLink | AddAddress | RemoveAddress | AddDefaultRoute
) -> None:
    name = op.link if isinstance(op, DeleteLink) else op.device
    found = find_link(channel, name)
    if found is None:
        if isinstance(op, DeleteLink | RemoveAddress):
            return
        raise NetlinkRefused(errno.ENODEV, name)
    index = found.index
    match op:
        case DeleteLink():
            delete_link(channel, index)
        case SetLink():
            master = None if op.bridge is None else _index(channel, op.bridge)
            set_link(channel, index, up=op.up or None, mtu=op.mtu, master=master)
        case AddAddress():
            with _unless(errno.EEXIST):
                add_address(channel, index, op.address, op.prefix, protocol=op.protocol)
        case RemoveAddress():
            with _unless(errno.EADDRNOTAVAIL, errno.ENODEV):
                remove_address(channel, index, op.address, op.prefix)
        case AddDefaultRoute():
            add_default_route(channel, index, op.family)


@contextlib.contextmanager
def _unless(*done: int) -> Iterator[None]:
    """Let these errors pass: what was asked for is so already."""
    try:
        yield
    except NetlinkRefused as error:
        if error.errno not in done:
            raise


def _action(op: HostOp) -> str:
    """An op's action, for an error's message."""
    action = op.action.format(op)
    if isinstance(op, SetLink | AddAddress | RemoveAddress | AddDefaultRoute) and op.namespace:
        return f"{action} in namespace {op.namespace}"
    return action


def _hint(op: HostOp, error: OSError) -> str:
    if isinstance(op, AddAddress) and op.address.version == 6 and error.errno == errno.EACCES:  # noqa: PLR2004 - the version of IPv6
        return f"IPv6 is switched off there: sysctl net.ipv6.conf.{op.device}.disable_ipv6=0"
    if isinstance(op, CreateNamespace) and error.errno == errno.EROFS:
        return "/proc/sys must be writable (ProtectKernelTunables=no in the unit)"
    return ""
