"""Executor of the operations planned by `network.listeners.plan`, step by step. Also replaces tables and links."""

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from imdsproxy.errors import DataplaneError, Ignoring, Problem, host_refused, refusing
from imdsproxy.host import netlink
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.process import run_program
from imdsproxy.host.state import Family, ObservedDevice
from imdsproxy.model.entities import IpAddress
from imdsproxy.network.endpoints import LOOPBACK
from imdsproxy.network.listeners import plan

HAPROXY_NETNS: Final = Path("/var/run/netns")
"""Directory in which HAProxy opens namespaces (compiled in: `src/namespace.c`)."""

_NFT_DEADLINE_S: Final = 30.0
_READ_ONLY: Final = "/proc/sys must be writable (ProtectKernelTunables=no in the unit)"
_PREFIXES: Final = {Family.IPV4: 32, Family.IPV6: 64}
_SWITCHED_OFF: Final = (
    # Packets from a guest must not give us routes or addresses, nor make us a router.
    *("ipv4/conf/{}/accept_redirects", "ipv4/conf/{}/forwarding"),
    *("ipv6/conf/{}/accept_ra", "ipv6/conf/{}/accept_redirects", "ipv6/conf/{}/forwarding"),
    # A new namespace inherits these from the host. Every guest must get an answer, whatever its subnet.
    *("ipv4/conf/{}/rp_filter", "ipv4/conf/{}/arp_filter", "ipv4/conf/{}/arp_ignore"),
)


async def apply_ops(
    thread: NamespaceThread, ops: tuple[plan.HostOp, ...]
) -> dict[plan.HostOp, Problem]:
    """Carry out ops in order; a failed op never stops the others.

    Args:
        thread: Thread that enters namespaces.
        ops: Operations to carry out.

    Returns:
        The failed ops, with the reasons.
    """
    failures: dict[plan.HostOp, Problem] = {}

    def work() -> None:
        for op in ops:
            try:
                _do(thread, op)
            except (DataplaneError, OSError) as error:
                if isinstance(error, OSError):
                    # The only file system that refuses is /proc/sys.
                    hint = _READ_ONLY if error.errno == errno.EROFS else ""
                    error = host_refused(op.action.format(op), error, hint=hint)
                failures[op] = Problem("host", error.message, error.hint)

    if ops:
        await thread.run(work)
    return failures


def _do(thread: NamespaceThread, op: plan.HostOp) -> None:
    match op:
        case plan.AttachBridge():
            _attach(thread, op)
        case plan.AddAddress(_, name, device, address, mark):
            with thread.inside(name), NetlinkSocket() as channel:
                _add(channel, name, device, address, mark)
        case plan.RemoveAddress(name, device, address, prefix):
            gone = Ignoring(errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL)
            with gone, thread.inside(name), NetlinkSocket() as channel:
                netlink.remove_address(channel, _find(channel, device).index, address, prefix)
        case plan.DeleteNamespace(name):
            thread.directory.delete(name)
        case plan.DeleteLink(name):
            with Ignoring(errno.ENODEV), NetlinkSocket() as channel:
                netlink.delete_link(channel, _find(channel, name).index)
        case never:
            assert_never(never)


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


def _attach(thread: NamespaceThread, op: plan.AttachBridge) -> None:
    naming, alias = op.naming, op.naming.alias(op.network)
    name, link, inner = naming.namespace(op.network), naming.link(op.network), naming.inner_device
    thread.create_now(name)
    with thread.inside(name), NetlinkSocket() as channel:
        inside = _prepare(channel, inner, alias)
    with contextlib.closing(thread.directory.open(name)) as opened, NetlinkSocket() as channel:
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
    with thread.inside(name), NetlinkSocket() as channel:
        index = _set_up(channel, inner, alias, op.mtu)
        for family in Family:
            _add(channel, name, inner, family.metadata_address, naming.protocol)
            netlink.add_default_route(channel, index, family)


def _prepare(channel: NetlinkSocket, inner: str, alias: str) -> ObservedDevice | None:
    # /proc/sys/net shows the settings of the calling thread's namespace.
    for setting in _SWITCHED_OFF:
        for which in ("all", "default"):
            path = Path("/proc/sys/net", setting.format(which))
            if path.exists():  # not on a host that was started without IPv6
                path.write_text("0")
    # The alias comes last: it marks a complete namespace.
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
    # The kernel refuses an alias for a link that is being created, and sends an event if the same alias is set again.
    new = None if found.alias == alias else alias
    netlink.set_link(channel, found.index, mtu=mtu, master=master, alias=new)
    return found.index


@dataclass(slots=True)
class NftTable:
    """One of our nftables tables, which nft(8) replaces and removes as a whole (`network.listeners.nft_scripts`).

    Attributes:
        failing: Reason to report if nft(8) is missing or refuses.
        until: Hint to report: the consequence until the script is applied.
        program: Name or path of nft(8).
        applied: Script in force; empty without a table, `None` while the table of an earlier process is unknown.
    """

    failing: str
    until: str
    program: str = "nft"
    applied: str | None = None

    async def apply(self, script: str) -> tuple[Problem, ...]:
        """Run a script that replaces the table, unless the same script is in force. Return the problems.

        Args:
            script: Script for nft(8); without a block it only removes the table.
        """
        wanted = script if "{" in script else ""
        if wanted == self.applied:
            return ()
        try:
            status, output = await run_program(
                self.program, "-f", "-", deadline_s=_NFT_DEADLINE_S, text=script
            )
        except FileNotFoundError:
            # Without the program there can be no table.
            if wanted or self.applied is not None:
                hint = f"apt install nftables; {self.until}"
                return (Problem("host", f"{self.failing}: no nft", hint),)
            status, output = 0, ""
        except DataplaneError as error:
            return (Problem("host", error.message, error.hint),)
        # A kernel without such tables also refuses to remove one: then no table exists.
        if status != 0 and (wanted or self.applied):
            reason = f"{self.failing}: nft refuses: {output[:500]}"
            return (Problem("host", reason, self.until),)
        self.applied = wanted
        return ()


def haproxy_name(directory: Path) -> str:
    """Return the prefix of namespace names in bind lines, so that HAProxy opens `directory/NAME`.

    HAProxy hands a listening socket over to its next worker by the names of its namespace and device. If a namespace
    or device was deleted and created again under its name, the worker would get the socket of the deleted one. A link
    with another name (`network.listeners.endpoints.link_name`) makes HAProxy open a new socket. HAProxy opens
    `/var/run/netns/NAME` and accepts slashes in NAME, so the links are in a directory of ours, hidden from `ip netns`:
    `bind … namespace ../imdsproxy/netns/blue@4026532317`.
    """
    return os.path.relpath(os.path.realpath(directory), os.path.realpath(HAPROXY_NETNS))


def apply_links(directory: Path, links: Mapping[str, str]) -> None:
    """Make `directory` contain exactly these symbolic links.

    Links are replaced atomically; unchanged links are not touched. A missing directory is created. Other kinds of
    files in the directory are left alone.

    Raises:
        HostRefused: The file system refused.
        PrivilegeMissing: This process may not write there.
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
