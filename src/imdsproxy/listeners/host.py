"""The host as loops and look-up use it: look, plan, act, with links, nft(8), neighbour tables and journals."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.core.hoststate import ObservedHost, merge_observed
from imdsproxy.core.model import IpAddress, MacAddress, Network, NetworkId
from imdsproxy.core.records import Refused, parse_network, render_record
from imdsproxy.errors import HostRefused, Problem, refusing
from imdsproxy.host.files import Journal, write_atomic
from imdsproxy.host.netlink import find_link, neighbour_mac
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.process import run_program
from imdsproxy.listeners.apply import apply_ops
from imdsproxy.listeners.nft_scripts import (
    plan_diversions,
    render_arp_guard,
    render_diversions,
)
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.listeners.plan import (
    AddAddress,
    HostOp,
    ListenerPlan,
    ManagedPlace,
    Place,
    PlanMemo,
    Removal,
    RemoveAddress,
    explain_pending,
    place_of,
    plan_listeners,
)

HAPROXY_NETNS: Final = Path("/var/run/netns")
"""Where HAProxy looks (compiled in: `src/namespace.c`)."""

_HOST_ROUNDS: Final = 4
"""What one step makes is planned with when it has been seen."""

_NFT_DEADLINE_S: Final = 30.0


class SystemHost:
    """This host.

    Args:
        links: The directory of symbolic links to namespaces, for HAProxy.
        journal: Where we have added addresses: `[[namespace or null, device], …]` as JSON.

    Attributes:
        seen: The host as of the last round.
        known: The same, `None` when all of it has to be looked at again.
        operations: Ops so far, by `ok` and `failed`.
        arp_guard: Keeps the host from answering ARP for the metadata address where no network listens on its device.
        diverter: Redirects frames for the metadata address to our veths on bridges that have one.
    """

    def __init__(self, observer: HostObserver, *, links: Path, journal: Path) -> None:
        self.observer, self.thread, self.naming = observer, observer.thread, observer.naming
        self.seen = ObservedHost()
        self.known: ObservedHost | None = None
        self.operations: Counter[str] = Counter()
        self.links = links
        hint = "remove it; addresses that are no longer needed are then yours to remove"
        self._journal: Journal[list[tuple[str | None, str]]] = Journal(journal, [], hint)
        self._memo: PlanMemo = {}
        self._networks: Mapping[NetworkId, Network] = {}
        self._dirty: set[NetworkId] = set()
        self._cleared: set[Place] = set()
        self._pids: Collection[int] = ()
        self.arp_guard = NftTable(
            "cannot keep the host from answering ARP for 169.254.169.254 on other devices",
            "until then guests of other networks may reach the wrong one: nft list tables arp",
        )
        self.diverter = NftTable(
            "cannot redirect guests' packets for 169.254.169.254 that go to their gateway",
            "until then guests of bridges need a route, by DHCP option 121",
        )

    def touch(self, networks: Iterable[NetworkId] | None) -> None:
        """Look at these networks' places again in the next round; `None` for the whole host."""
        if networks is None:
            self.known = None
        else:
            self._dirty.update(networks)

    async def settle(
        self,
        networks: Mapping[NetworkId, Network],
        in_force: Mapping[NetworkId, Network],
        our_pids: Collection[int] = (),
        *,
        sweep: bool = True,
    ) -> ListenerPlan:
        """Observe and act until there is nothing more to do on the host.

        Args:
            networks: All that are to be listened for.
            in_force: Those that HAProxy is configured for.
            our_pids: HAProxy's master and workers.
            sweep: Also remove what belongs to no network.

        Returns:
            The last plan, with what the host refused, and how many ops there were.

        Raises:
            HostRefused: The host's own namespace cannot be looked at, or our journal cannot be read.
        """
        self._pids = our_pids
        # First of all: from the moment that an address is there, the host answers for it. A look changes nothing.
        guarding = self.arp_guard.apply(render_arp_guard(self.naming.prefix, networks.values()))
        problems, self.seen = await asyncio.gather(guarding, self._observe(networks))
        failures: Mapping[HostOp, Problem] = {}
        operations = 0
        for _ in range(_HOST_ROUNDS):
            plan = plan_listeners(
                networks,
                self.seen,
                self.naming,
                sweep=sweep,
                managed=self.managed(),
                memo=self._memo,
                first=in_force,
            )
            if not plan.ops or failures:
                break
            operations += len(plan.ops)
            self._dirty.update(one.network for one in plan.left_out)
            # Which may be a place of no network any more.
            removals = (one for one in plan.ops if isinstance(one, Removal))
            self._cleared |= {Place(one.namespace, one.device) for one in removals}
            failures = await self.apply(plan.ops)
            self.operations["failed"] += len(failures)
            self.operations["ok"] += len(plan.ops) - len(failures)
            self.seen = await self._observe(networks)
        problems += tuple(failures.values())
        diversions = plan_diversions(networks, self.seen, self.naming)
        script = render_diversions(self.naming.prefix, diversions)
        problems += await self.diverter.apply(script)
        plan = explain_pending(plan, failures)
        return replace(plan, problems=problems, operations=operations)

    async def _observe(self, networks: Mapping[NetworkId, Network]) -> ObservedHost:
        """Look at all of the host, or at what may have changed and lay it over what was known."""
        dirty, self._dirty = self._dirty, set()
        cleared, self._cleared = self._cleared, set()
        known = self.known
        if known is None:
            # In place while we look: who asks for all of it meanwhile takes it away again.
            known = self.known = ObservedHost()
            seen = await self.observe(networks.values(), everything=True)
        elif dirty or cleared:
            some = [by[one] for by in (networks, self._networks) for one in dirty if one in by]
            seen = merge_observed(known, await self.observe(some, cleared))
        else:
            return known
        if self.known is known:
            self.known = seen
        self._networks = dict(networks)
        return seen

    async def look_at(self, networks: Iterable[Network]) -> ObservedHost:
        """The host as the last round saw it, but for the places of these networks, which are looked at now."""
        return merge_observed(self.seen, await self.observe(networks))

    async def observe(
        self,
        networks: Iterable[Network],
        others: Collection[Place] = (),
        *,
        everything: bool = False,
    ) -> ObservedHost:
        """Look at what these networks' listeners need, and at other places; with `everything`, at the whole host.

        Raises:
            HostRefused: The host's own namespace cannot be looked at.
        """
        places = {*others, *(place_of(one, self.naming) for one in networks)}
        managed = self.managed() if everything else None
        return await self.observer.observe(
            places, self._pids, everything=everything, managed=managed
        )

    async def apply(self, ops: Iterable[HostOp]) -> Mapping[HostOp, Problem]:
        """Do these things; returns what the host refused, the others are done all the same."""
        given = tuple(ops)
        # Before anything is done: what a killed process has added is known to the next one.
        added = {(one.namespace, one.device) for one in given if isinstance(one, AddAddress)}
        self._note(added, set())
        failures = await apply_ops(self.thread, given)
        done = set(given) - failures.keys()
        self._note(set(), {(o.namespace, o.device) for o in done if isinstance(o, RemoveAddress)})
        return failures

    def managed(self) -> frozenset[ManagedPlace]:
        """Where we have added addresses, in this process or an earlier one.

        Raises:
            HostRefused: Our journal of it cannot be read.
        """
        return frozenset((place[0], place[1]) for place in self._journal.load())

    def _note(self, added: set[ManagedPlace], removed: set[ManagedPlace]) -> None:
        if added or removed:
            places = (self.managed() | added) - removed
            self._journal.store(sorted(places, key=lambda one: (one[0] or "", one[1])))

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

    async def apply(self, script: str) -> tuple[Problem, ...]:
        """Run a script that replaces the table, if another one was run last; what is in the way of it.

        Args:
            script: For nft(8); without a block it only removes the table.
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
        except HostRefused as error:
            return (Problem("host", error.message, error.hint),)
        # A kernel that knows no such tables refuses to remove one as well: then there is none.
        if status != 0 and (wanted or self.applied):
            reason = f"{self.failing}: nft refuses: {output[:500]}"
            return (Problem("host", reason, self.until),)
        self.applied = wanted
        return ()


def haproxy_name(directory: Path) -> str:
    """What to write after `namespace` in a bind line, before `/NAME`, so that HAProxy opens `directory/NAME`.

    HAProxy hands a listening socket over to its next worker by the names of its namespace and device. When
    one of them was deleted and made again under its name, that would be the dead one's socket; a link with
    another name (`listeners.endpoints.link_name`) makes it open a new one. HAProxy opens `/var/run/netns/NAME` and
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
    base = os.fspath(directory)
    with refusing(f"link namespaces in {base}"):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        # At each reload, for every network: a Path for each costs more than the kernel's part.
        with os.scandir(base) as entries:
            present = {one.name: os.readlink(one.path) for one in entries if one.is_symlink()}  # noqa: PTH115 - as above
        # The temporary one of a process that was killed too.
        for name in present.keys() - links.keys():
            os.unlink(f"{base}/{name}")  # noqa: PTH108 - as above
        for name, target in links.items():
            if present.get(name) != target:
                os.symlink(target, f"{base}/.tmp")  # noqa: PTH211 - as above
                os.replace(f"{base}/.tmp", f"{base}/{name}")  # noqa: PTH105 - as above


@dataclass(slots=True)
class KeptNetworks:
    """The file with the networks that HAProxy is configured for: the next process listens for them from its start."""

    path: Path
    _networks: Mapping[NetworkId, Network] | None = None
    _written: Mapping[NetworkId, Network] = field(default_factory=dict)

    def keep(self, networks: Mapping[NetworkId, Network]) -> None:
        """Note what HAProxy is configured for now.

        Only the next process needs it, so a failure is only logged.
        """
        self._networks = dict(networks)
        if networks == self._written:
            return
        text = json.dumps([render_record(networks[one]) for one in sorted(networks)])
        try:
            write_atomic(self.path, text.encode(), mode=0o640)
        except HostRefused as error:
            why = {"code": error.code, "error": error.message, "hint": error.hint}
            structlog.get_logger().warning("networks not kept", **why)
            return
        self._written = self._networks

    def load(self) -> Mapping[NetworkId, Network]:
        """The networks that HAProxy is configured for."""
        if self._networks is None:
            records: object = []
            try:
                records = json.loads(self.path.read_text())
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                why = {"path": str(self.path), "error": str(error)}
                structlog.get_logger().warning("kept networks not read", **why)
            parsed = [parse_network(one) for one in records] if isinstance(records, list) else []
            self._networks = {one.id: one for one in parsed if not isinstance(one, Refused)}
        return self._networks
