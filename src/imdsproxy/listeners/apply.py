"""Does to the host what `listeners.plan` planned, one idempotent step after the other."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
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


class HostApplier:
    """Carries out host ops.

    Args:
        thread: Where namespaces are entered.
    """

    def __init__(self, thread: NamespaceThread) -> None:
        self._thread = thread

    async def apply(self, ops: Iterable[HostOp]) -> tuple[OpFailure, ...]:
        """Carry out ops in order; one that fails never stops those of other networks.

        Returns:
            Those that failed. Ops that build upon one of them are not tried.
        """
        given = tuple(ops)
        if not given:
            return ()
        return await self._thread.run(lambda: tuple(self._apply(given)))

    def _apply(self, ops: tuple[HostOp, ...]) -> Iterator[OpFailure]:
        broken: set[NetworkId] = set()
        for op in ops:
            if op.network in broken:
                continue
            refused: DataplaneError
            try:
                self._do(op)
            except DataplaneError as error:
                refused = error
            except OSError as error:
                refused = host_refused(_action(op), error, hint=_hint(op, error))
            else:
                continue
            yield OpFailure(op, refused.message, refused.hint)
            if isinstance(op, CreateNamespace | CreateVeth):
                broken.add(op.network)

    def _do(self, op: HostOp) -> None:
        match op:
            case CreateNamespace():
                self._thread.create_now(op.namespace)
                self._at(op.namespace, lambda channel: _prepare(channel, op.alias))
            case DeleteNamespace():
                self._thread.directory.delete(op.namespace)
            case CreateVeth():
                self._create_veth(op)
            case DeleteLink():
                self._at(None, lambda channel: _delete_link(channel, op.link))
            case SetLink():
                self._at(op.namespace, lambda channel: _set_link(channel, op))
            case AddAddress():
                self._at(op.namespace, lambda channel: _add_address(channel, op))
            case RemoveAddress():
                self._at(
                    op.namespace, lambda channel: _remove_address(channel, op), must_exist=False
                )
            case AddDefaultRoute():
                self._at(op.namespace, lambda channel: _add_route(channel, op))
            case _ as never:
                assert_never(never)

    def _at(
        self,
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
        elif self._thread.enter(namespace, lambda _: with_channel()) is None and must_exist:
            raise NetlinkRefused(errno.ENOENT, f"no namespace {namespace}")

    def _create_veth(self, op: CreateVeth) -> None:
        opened = self._thread.directory.open(op.namespace)
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
        self._at(
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


def _delete_link(channel: NetlinkSocket, name: str) -> None:
    found = find_link(channel, name)
    if found is not None:
        delete_link(channel, found.index)


def _set_link(channel: NetlinkSocket, op: SetLink) -> None:
    master = None if op.bridge is None else _index(channel, op.bridge)
    index = _index(channel, op.device)
    set_link(channel, index, up=op.up or None, mtu=op.mtu, master=master)


def _add_route(channel: NetlinkSocket, op: AddDefaultRoute) -> None:
    add_default_route(channel, _index(channel, op.device), op.family)


def _add_address(channel: NetlinkSocket, op: AddAddress) -> None:
    try:
        add_address(
            channel, _index(channel, op.device), op.address, op.prefix, protocol=op.protocol
        )
    except NetlinkRefused as error:
        if error.errno != errno.EEXIST:
            raise


def _remove_address(channel: NetlinkSocket, op: RemoveAddress) -> None:
    found = find_link(channel, op.device)
    if found is None:
        return
    try:
        remove_address(channel, found.index, op.address, op.prefix)
    except NetlinkRefused as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
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
