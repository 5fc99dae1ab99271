"""The host as loops and look-up use it: observer, host ops, nft(8), links, neighbour tables and a journal."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import ObservedHost
from imdsproxy.core.model import IpAddress, MacAddress, Network
from imdsproxy.errors import HostRefused
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import find_link, neighbour_mac
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.process import run_program
from imdsproxy.host.refusal import host_refused
from imdsproxy.listeners.apply import apply_ops
from imdsproxy.listeners.nft_scripts import Diversion, render_arp_guard, render_diversions
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.listeners.plan import (
    AddAddress,
    HostOp,
    ManagedPlace,
    OpFailure,
    RemoveAddress,
    place_of,
)

HAPROXY_NETNS: Final = Path("/var/run/netns")
"""Where HAProxy looks (compiled in: `src/namespace.c`)."""

_NFT_DEADLINE_S: Final = 30.0


class SystemHost:
    """This host.

    Args:
        links: The directory of symbolic links to namespaces, for HAProxy.
        journal: Where we have added addresses: `[[namespace or null, device], …]` as JSON.
    """

    def __init__(
        self,
        thread: NamespaceThread,
        naming: Naming,
        *,
        observer: HostObserver,
        links: Path,
        journal: Path,
    ) -> None:
        self.observer = observer
        self.thread = thread
        self.naming = naming
        self._links = links
        self._journal = journal
        self._arp_guard = NftTable(
            "cannot keep the host from answering ARP for 169.254.169.254 on other devices",
            "until then guests of other networks may reach the wrong one: nft list tables arp",
        )
        self._diverter = NftTable(
            "cannot redirect guests' packets for 169.254.169.254 that go to their gateway",
            "until then guests of bridges need a route, by DHCP option 121",
        )

    async def observe(
        self, networks: Iterable[Network], our_pids: Collection[int], *, everything: bool = False
    ) -> ObservedHost:
        """Look at what these networks' listeners need; with `everything`, at the whole host.

        Raises:
            HostRefused: The host's own namespace cannot be looked at.
        """
        managed = self.managed() if everything else None
        return await self.observer.observe(
            networks, our_pids, everything=everything, managed=managed
        )

    async def apply(self, ops: Iterable[HostOp]) -> tuple[OpFailure, ...]:
        """Do these things; returns what the host refused, the others are done all the same."""
        given = tuple(ops)
        # Before anything is done: what a killed process has added is known to the next one.
        added = {(one.namespace, one.device) for one in given if isinstance(one, AddAddress)}
        self._note(added, set())
        failures = await apply_ops(self.thread, given)
        done = set(given) - {one.op for one in failures}
        self._note(set(), {(o.namespace, o.device) for o in done if isinstance(o, RemoveAddress)})
        return failures

    def managed(self) -> frozenset[ManagedPlace]:
        """Where we have added addresses, in this process or an earlier one.

        Raises:
            HostRefused: Our journal of it cannot be read.
        """
        try:
            places = json.loads(self._journal.read_bytes())
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise HostRefused(
                f"cannot read {self._journal}: {error}",
                hint="remove it; addresses that are no longer needed are then yours to remove",
            ) from error
        return frozenset((place[0], place[1]) for place in places)

    def _note(self, added: set[ManagedPlace], removed: set[ManagedPlace]) -> None:
        known = self.managed() if added or removed else frozenset()
        places = (known | added) - removed
        if places != known:
            listed = sorted(places, key=lambda place: (place[0] or "", place[1]))
            write_atomic(self._journal, json.dumps(listed).encode(), mode=0o600)

    def apply_links(self, links: Mapping[str, str]) -> None:
        """Create exactly these symbolic links, by which HAProxy opens namespaces.

        Raises:
            HostRefused: The file system refused.
        """
        base = str(self.thread.directory.path)
        apply_links(
            self._links,
            {name: os.path.join(base, target) for name, target in links.items()},  # noqa: PTH118 - a Path for each network takes ten times as long
        )

    async def apply_arp_guard(self, devices: frozenset[str]) -> None:
        """Make the host answer ARP for the metadata address on these devices only.

        Raises:
            HostRefused: It cannot be kept from answering elsewhere.
        """
        script = render_arp_guard(self.naming.prefix, devices)
        await self._arp_guard.apply(script, empty=not devices)

    async def apply_diversions(self, diversions: tuple[Diversion, ...]) -> None:
        """Redirect frames for the metadata address to our veths on these bridges, and on no others.

        Raises:
            HostRefused: They still go to the guests' gateways.
        """
        script = render_diversions(self.naming.prefix, diversions)
        await self._diverter.apply(script, empty=not diversions)

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        """The MAC that the kernel has for an address behind a network's listener, if it has one."""
        place = place_of(network, self.naming)
        return await self.thread.inside(place.namespace, lambda _: _ask(address, place.device))


def _ask(address: IpAddress, device: str | None) -> MacAddress | None:
    with NetlinkSocket() as channel:
        link = None if device is None else find_link(channel, device)
        if device is not None and link is None:
            return None
        return neighbour_mac(channel, address, index=0 if link is None else link.index)


@dataclass(slots=True)
class NftTable:
    """A table of ours that nft(8) replaces and removes as a whole (`listeners.nft_scripts`).

    Attributes:
        failing: What cannot be done without nft(8), or when it refuses.
        until: What holds until then, for the hint.
        program: nft(8).
        applied: The script in force; empty without a table, `None` while what an earlier process left is unknown.
    """

    failing: str
    until: str
    program: str = "nft"
    applied: str | None = None

    async def apply(self, script: str, *, empty: bool) -> None:
        """Run a script that replaces the table, if another one was run last.

        Args:
            script: For nft(8).
            empty: It only removes the table.

        Raises:
            HostRefused: nft is not installed, refuses, or hangs.
        """
        wanted = "" if empty else script
        if wanted == self.applied:
            return
        try:
            status, output = await run_program(
                self.program, "-f", "-", deadline_s=_NFT_DEADLINE_S, text=script
            )
        except FileNotFoundError as error:
            # Without the program there can be no table.
            if wanted or self.applied is not None:
                raise HostRefused(
                    f"{self.failing}: no nft", hint=f"apt install nftables; {self.until}"
                ) from error
            status, output = 0, ""
        # A kernel that knows no such tables refuses to remove one as well: then there is none.
        if status != 0 and (wanted or self.applied):
            raise HostRefused(f"{self.failing}: nft refuses: {output[:500]}", hint=self.until)
        self.applied = wanted


def haproxy_name(directory: Path) -> str:
    """What to write after `namespace` in a bind line, before `/NAME`, so that HAProxy opens `directory/NAME`.

    HAProxy hands a listening socket over to its next worker by the names of its namespace and device. When
    one of them was deleted and made again under its name, that would be the dead one's socket; a link with
    another name (`listeners.binds.link_name`) makes it open a new one. HAProxy opens `/var/run/netns/NAME` and
    refuses no slash in NAME, so the links are in a directory of ours, out of sight of `ip netns`:
    `bind … namespace ../imdsproxy/netns/blue@4026532317`.
    """
    return os.path.relpath(os.path.realpath(directory), os.path.realpath(HAPROXY_NETNS))


def apply_links(directory: Path, links: Mapping[str, str]) -> None:
    """Make `directory` hold exactly these symbolic links.

    Each link is there whole or not at all; links that stay are not touched. The directory is made
    when it is missing. Other kinds of files in it are left alone.

    Raises:
        HostRefused: The file system refused.
        PrivilegeMissing: This process may not write there.
    """
    base, temporary = os.fspath(directory), os.path.join(directory, ".tmp")  # noqa: PTH118 - as below
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # At each reload, for every network: a Path for each costs more than the kernel's part.
        with os.scandir(directory) as entries:
            present = {one.name: os.readlink(one.path) for one in entries if one.is_symlink()}  # noqa: PTH115 - as above
        # The temporary one of a process that was killed too.
        for name in present.keys() - links.keys():
            os.unlink(f"{base}/{name}")  # noqa: PTH108 - as above
        for name, target in links.items():
            if present.get(name) != target:
                os.symlink(target, temporary)  # noqa: PTH211 - as above
                os.replace(temporary, f"{base}/{name}")  # noqa: PTH105 - as above
    except OSError as error:
        raise host_refused(f"link namespaces in {directory}", error) from error
