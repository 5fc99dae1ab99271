"""This host, for loops and look-up: observe, plan, act.

An observation has namespaces, devices, addresses, listening sockets and the results of trial binds. One namespace costs
about 0.2 ms in the namespace thread. `host.state.merge_observed` merges an observation of some networks into the
last one.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

import structlog

from imdsproxy.errors import DataplaneError, HostRefused, Problem, refusing
from imdsproxy.host import netlink
from imdsproxy.host.files import Journal, write_atomic
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import MISSING, NamespaceMissing, NamespaceThread
from imdsproxy.host.nftables import ARP, BRIDGE
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.sockets import SOCK_DIAG, SocketOwners, listening_inodes
from imdsproxy.host.state import (
    REDIRECTED,
    ListeningSocket,
    NamespaceRef,
    ObservedHost,
    ObservedNamespace,
    merge_observed,
)
from imdsproxy.model.entities import METADATA_PORT, IpAddress, MacAddress, Network, NetworkId
from imdsproxy.model.records import Refused, parse_network, render_record
from imdsproxy.network.listeners.apply import HostTable, apply_ops
from imdsproxy.network.listeners.look import REDIRECTED_PORTS, look
from imdsproxy.network.listeners.plan import (
    ListenerPlan,
    ManagedPlace,
    Place,
    PlanMemo,
    explain_pending,
    find_left_to_others,
    note_tables,
    ovn_place,
    place_of,
    plan_listeners,
)
from imdsproxy.network.listeners.rules import plan_arp_filter, plan_diversions
from imdsproxy.network.ovn.plan import OvnWanted, network_of
from imdsproxy.network.planned import (
    AddAddress,
    AttachOvn,
    DetachOvn,
    HostOp,
    MakeTable,
    Removal,
    RemoveAddress,
    RemoveTable,
    RouterTable,
)
from imdsproxy.sources.neutron_namespaces.records import router_of
from imdsproxy.sources.ovn.source import OvnSource

Peek: TypeAlias = tuple[int, frozenset[int]]
"""Inode of a namespace, and inodes of the sockets that listen there."""

_HALF_MADE_S: Final = 10.0
"""Seconds after which a file without a namespace counts as abandoned by the program that created it."""

_LISTENED_S: Final = 10.0
"""Maximum seconds for which a namespace without ports here waits for a process that listens there."""

_HOST_ROUNDS: Final = 4
"""Maximum number of plans in a round: objects that one plan creates are observed before the next plan uses them."""


class SystemHost:
    """This host.

    Args:
        our_pids: Returns the pids of HAProxy's master and workers: without them, HAProxy's own sockets would count as
            another program's.
        ovn: Source of OVN's networks, and Open vSwitch's database; `None` without that source.
        journal: File of the places where imdsproxy added addresses: `[[namespace or null, device], …]` as JSON.

    Attributes:
        looking: Lock held during an observation. When it is released, `seen` includes all earlier changes.
        operations: Number of ops so far, by `ok` and `failed`.
        arp_filter: Drops ARP requests for the metadata address on devices that no network listens on.
        diverter: Redirects frames for the metadata address to our veths on bridges that have one.
        planned_needs: Needs of OVN's networks with which the last round planned.
    """

    def __init__(
        self,
        thread: NamespaceThread,
        naming: Naming,
        *,
        links: Path,
        journal: Path,
        owners: SocketOwners | None = None,
        our_pids: Callable[[], Collection[int]] = tuple,
        ovn: OvnSource | None = None,
    ) -> None:
        self.thread, self.naming = thread, naming
        self._owners = owners or SocketOwners()
        self.seen = ObservedHost()
        self.looking = asyncio.Lock()
        self.operations: Counter[str] = Counter(ok=0, failed=0)
        self.links = links
        hint = "remove it; addresses that are no longer needed are then yours to remove"
        self._journal: Journal[list[tuple[str | None, str]]] = Journal(journal, [], hint)
        self._memo: PlanMemo = {}
        self._networks: Mapping[NetworkId, Network] = {}
        self._all_dirty = True
        self._dirty: set[NetworkId] = set()
        self._cleared: set[Place] = set()
        self.ovn = ovn
        self.planned_needs: OvnWanted | None = None
        self._needs: tuple[int, OvnWanted] | None = None
        self._waits: dict[NetworkId, float] = {}
        self._unfinished: set[NetworkId] = set()
        self.our_pids = our_pids
        self.arp_filter = HostTable(
            thread,
            naming.prefix,
            ARP,
            "cannot keep the host from answering ARP for 169.254.169.254 on other devices",
            "until then guests of other networks may reach the wrong one: nft list tables arp",
        )
        self.diverter = HostTable(
            thread,
            naming.prefix,
            BRIDGE,
            "cannot redirect guests' packets for 169.254.169.254 that go to their gateway",
            "until then guests of bridges need a route, by DHCP option 121",
        )

    def touch(self, networks: Iterable[NetworkId] | None) -> None:
        """Observe these networks' places again in the next round; `None` for the whole host."""
        if networks is None:
            self._all_dirty = True
        else:
            self._dirty.update(networks)

    def touch_place(self, place: Place) -> None:
        """Observe a place again in the next round, even if it belongs to no network."""
        self._cleared.add(place)

    async def settle(
        self,
        networks: Mapping[NetworkId, Network],
        in_force: Mapping[NetworkId, Network],
        *,
        sweep: bool = True,
    ) -> ListenerPlan:
        """Observe and act until the host needs no further operation.

        Raises:
            HostRefused: The host's own namespace cannot be observed, or our journal cannot be read.
        """
        # The ARP table comes first: the host answers for an address as soon as a device has it. Observing is harmless.
        filtering = self.arp_filter.apply(plan_arp_filter(networks.values()))
        wanted = self.planned_needs = self.ovn_needs()
        if wanted is not None:
            unseen = (
                n for n, p in wanted.places.items() if p.namespace not in self.seen.namespaces
            )
            self._cleared |= {ovn_place(network) for network in (*unseen, *self._waits)}
        self._unfinished.clear()
        problems, _ = await asyncio.gather(filtering, self._observe(networks))
        now = asyncio.get_running_loop().time()
        overdue = {network for network, since in self._waits.items() if now - since > _LISTENED_S}
        failures: dict[HostOp, Problem] = {}
        tried: set[HostOp] = set()
        if sweep and (managed := self.managed()):
            theirs = find_left_to_others(networks.values(), self.seen, self.naming, managed)
            self._note(managed - theirs)
        for _ in range(_HOST_ROUNDS):
            plan = plan_listeners(
                networks,
                self.seen,
                self.naming,
                sweep=sweep,
                managed=self.managed(),
                memo=self._memo,
                first=in_force,
                ovn=wanted,
                overdue=overdue,
            )
            ops = [one for one in plan.ops if one not in tried]
            if not ops:
                break
            tried.update(ops)
            self._dirty.update(one.network for one in plan.not_served)
            failures.update(await self.carry_out(ops))
            await self._observe(networks)
        # No event reports that a namespace will never be finished.
        plan = replace(plan, waiting=plan.waiting | self._unfinished)
        self._waits = {network: self._waits.get(network, now) for network in plan.waiting}
        problems += tuple(failures.values())
        diversions = plan_diversions(networks, self.seen, self.naming)
        problems += await self.diverter.apply(diversions.content())
        plan = explain_pending(plan, failures)
        return replace(plan, problems=problems, operations=len(tried))

    async def _observe(self, networks: Mapping[NetworkId, Network]) -> None:
        """Observe the whole host, or only the parts that may have changed, and merge them into `seen`."""
        async with self.looking:
            # Take the marks before the observation: marks set meanwhile are for the next one.
            everything, self._all_dirty = self._all_dirty, False
            dirty, self._dirty = self._dirty, set()
            cleared, self._cleared = self._cleared, set()
            try:
                if everything:
                    # A redirecting table of a router without a network is still to be removed.
                    others = [
                        Place(name, None, redirected=True)
                        for name, seen in self.seen.namespaces.items()
                        if seen.tables
                    ]
                    self.seen = await self.observe(networks.values(), others, everything=True)
                elif dirty or cleared:
                    given = (networks, self._networks)
                    some = [known[one] for known in given for one in dirty if one in known]
                    self.seen = merge_observed(self.seen, await self.observe(some, cleared))
                else:
                    return
            except BaseException:
                # The marks are lost, so the next round observes everything.
                self._all_dirty = True
                raise
            self._networks = dict(networks)

    async def look_at(self, networks: Iterable[Network]) -> ObservedHost:
        """Return the host as of the last round, with these networks' places observed now."""
        return merge_observed(self.seen, await self.observe(networks))

    async def observe(
        self,
        networks: Iterable[Network],
        others: Collection[Place] = (),
        *,
        everything: bool = False,
    ) -> ObservedHost:
        """Observe the parts of the host that these networks' listeners need.

        Args:
            networks: Networks of interest; for a partial observation, also networks that were just removed.
            everything: Also observe the host's own devices and namespaces in which earlier processes may have left
                objects. A host may have thousands of namespaces without a name of our form; only those in our journal
                are observed.

        Raises:
            HostRefused: The host's own namespace cannot be observed, or our journal cannot be read. (A failure in
                another namespace is reported as its `problem`.)
        """
        places = [*others, *(place_of(one, self.naming) for one in networks)]
        managed = {name for name, _ in self.managed()} if everything else frozenset()
        wanted: dict[str | None, set[str | None]] = {}
        for place in places:
            device = REDIRECTED if place.redirected else place.device
            wanted.setdefault(place.namespace, set()).add(device)
        asked = frozenset(name for name in wanted if name is not None)
        near = {name for place in places for name in place.observed_devices}
        pids = self.our_pids()

        def observe() -> ObservedHost:
            left = self._left_over(managed) - asked if everything else frozenset()
            names = (*asked, *left)
            seen = {name: self._namespace(name, wanted.get(name, set())) for name in names}
            namespaces = {name: one for name, one in seen.items() if one is not None}
            root = ObservedNamespace(None)
            if everything or near:
                with refusing("look at the host's devices"):
                    some = () if everything else near
                    root = look(self.naming, None, wanted.get(None, set()), some)
            sockets = (one for place in (root, *namespaces.values()) for one in place.sockets)
            owned = self._owners.resolve(sockets, pids)
            return ObservedHost(
                root=_with_owners(root, owned),
                namespaces={name: _with_owners(one, owned) for name, one in namespaces.items()},
                asked=None if everything else asked,
                devices=frozenset(near),
            )

        return await self.thread.run(observe)

    async def peek(self, places: Collection[str | None]) -> dict[str | None, Peek | None]:
        """Return only the sockets that listen in these namespaces (`None`: the host's own).

        This costs a fifth of a full observation. The value is `None` if a namespace is missing or cannot be entered.
        """

        def ask(place: str | None) -> Peek | None:
            # A failure counts as a difference, so a full observation follows and reports the reason.
            with contextlib.suppress(DataplaneError, OSError), self.thread.inside(place) as ref:
                with NetlinkSocket(SOCK_DIAG) as channel:
                    inodes = listening_inodes(channel, (METADATA_PORT, *REDIRECTED_PORTS))
                return 0 if ref is None else ref.inode, inodes
            return None

        given = tuple(places)
        return await self.thread.run(lambda: {name: ask(name) for name in given})

    async def find_ours(self, inodes: Collection[int]) -> frozenset[int]:
        pids = self.our_pids()
        return await self.thread.run(lambda: self._owners.find_ours(inodes, pids))

    def ovn_needs(self) -> OvnWanted | None:
        """Return the needs of OVN's networks as of now; `None` until Open vSwitch's database was read."""
        source = self.ovn
        if source is None or source.local is None:
            return None
        if self._needs is None or self._needs[0] != source.changes:
            needs = OvnWanted.of(source.known, source.local, sweep=source.settled)
            self._needs = source.changes, needs
        return self._needs[1]

    def ovn_places(self) -> list[Place]:
        found = map(network_of, self.thread.directory.names())
        return [ovn_place(network) for network in found if network is not None]

    def _left_over(self, managed: Collection[str | None]) -> frozenset[str]:
        return frozenset(
            name
            for name in self.thread.directory.names()
            if name in managed
            or self.naming.is_namespace(name)
            or (self.ovn is not None and network_of(name) is not None)
            # `root` already covers the host's own namespace, also under another name.
            if not self.thread.is_home(name)
        )

    def _namespace(self, name: str, wanted: set[str | None]) -> ObservedNamespace | None:
        try:
            with (
                refusing(f"look into namespace {name}"),
                contextlib.suppress(NamespaceMissing),
                self.thread.inside(name) as ref,
            ):
                return look(self.naming, ref, wanted)
        except DataplaneError as error:
            return ObservedNamespace(None, problem=error.message)
        file = self.thread.directory.path / name
        half_made = self.naming.is_namespace(name) and file.exists()
        network = network_of(name)
        if half_made or (network is not None and _is_abandoned(file)):
            return ObservedNamespace(None)
        if network is not None and file.exists():
            # An agent may be creating a namespace of OVN's network.
            self._unfinished.add(network)
        return None

    async def carry_out(self, ops: Collection[HostOp]) -> Mapping[HostOp, Problem]:
        """Carry out all ops, also after one failed; observe their places again. Return the refused ones."""
        # The place of such an operation may belong to no network, so `_dirty` does not cover it.
        self._cleared |= {place for one in ops if (place := _place_of(one)) is not None}
        # Before the removal: its event must not bring the table back.
        self.seen = note_tables(self.seen, [op for op in ops if isinstance(op, RemoveTable)])
        refused = await self.apply(ops)
        made = [op for op in ops if isinstance(op, MakeTable) and op not in refused]
        self.seen = note_tables(self.seen, made)
        self.operations["failed"] += len(refused)
        self.operations["ok"] += len(ops) - len(refused)
        return refused

    async def drop_others(self, routers: Collection[NamespaceRef]) -> None:
        """Keep requests for metadata from leaving new routers, without waiting for a round that is under way."""
        await self._make_at_once([MakeTable(ref, RouterTable.DROP, self.naming) for ref in routers])

    async def restore_tables(self, name: str | None) -> bool:
        """Create routers' tables of this name (`None`: any) again after one was removed, perhaps by us.

        Return whether a round must look at them.
        """
        tables = {one.name_in(self.naming): one for one in RouterTable}
        some = tables.keys() if name is None else {name} & tables.keys()
        await self._make_at_once(
            [
                MakeTable(seen.ref, tables[table], self.naming)
                for seen in self.seen.namespaces.values()
                for table in seen.tables & some
                if seen.ref is not None
            ]
        )
        return bool(some)

    async def _make_at_once(self, ops: Collection[MakeTable]) -> None:
        """Create tables now. A later round reports those that the kernel refuses, and tries them again."""
        self._cleared |= {place for one in ops if (place := _place_of(one)) is not None}
        if ops:
            # Use a separate thread: with many namespaces an observation blocks the host's thread for seconds.
            with contextlib.closing(NamespaceThread(self.thread.directory)) as thread:
                await apply_ops(thread, ops)

    async def remove_tables(self) -> None:
        """Remove all our tables from routers, also those of an earlier process."""
        directory = self.thread.directory
        found = (directory.identity(name) for name in directory.names() if router_of(name))
        routers = [ref for ref in found if ref is not None]
        # Two calls, because one removes its tables in any order: while a redirecting table is there, the dropping table
        # must keep other packets from the port to which requests are redirected.
        for table in (RouterTable.REDIRECT, RouterTable.DROP):
            ops = [RemoveTable(ref, table, self.naming) for ref in routers]
            for problem in (await self.carry_out(ops)).values():
                raise HostRefused(problem.reason, hint=problem.hint)

    async def apply(self, ops: Iterable[HostOp]) -> Mapping[HostOp, Problem]:
        given = tuple(ops)
        # Write the journal first, so that the next process knows what this one added if it is killed.
        added = {(one.namespace, one.device) for one in given if isinstance(one, AddAddress)}
        self._note(self.managed() | added)
        failures = await apply_ops(self.thread, given, self.ovn)
        removals = {o: (o.namespace, o.device) for o in given if isinstance(o, RemoveAddress)}
        left = {place for op, place in removals.items() if op in failures}
        self._note(self.managed() - (set(removals.values()) - left))
        return failures

    def managed(self) -> frozenset[ManagedPlace]:
        """Return the places where this process or an earlier one added addresses.

        Raises:
            HostRefused: Our journal cannot be read.
        """
        return frozenset((place[0], place[1]) for place in self._journal.load())

    def _note(self, places: Collection[ManagedPlace]) -> None:
        if places != self.managed():
            self._journal.store(sorted(places, key=lambda one: (one[0] or "", one[1])))

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        """Return the MAC in the kernel's neighbour table for an address behind a network's listener, if any."""
        place = place_of(network, self.naming)

        def ask() -> MacAddress | None:
            inside = self.thread.inside(place.namespace)
            with contextlib.suppress(NamespaceMissing), inside, NetlinkSocket() as channel:
                return netlink.neighbour_mac(channel, address, place.device)
            return None

        return await self.thread.run(ask)


@dataclass(slots=True)
class KeptNetworks:
    """File of the networks that HAProxy is configured for. The next process listens for them from its start."""

    path: Path
    _networks: Mapping[NetworkId, Network] | None = None
    _written: Mapping[NetworkId, Network] = field(default_factory=dict)

    def keep(self, networks: Mapping[NetworkId, Network]) -> None:
        """Store the networks that HAProxy is configured for now.

        Only the next process needs the file, so a failure is only logged.
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


def _place_of(op: HostOp) -> Place | None:
    """Return the place that an operation changes, if no network leads to it."""
    if isinstance(op, AttachOvn):
        return ovn_place(op.network)
    if isinstance(op, DetachOvn):
        return ovn_place(op.owner)
    if isinstance(op, MakeTable | RemoveTable):
        return Place(op.namespace.name, None, redirected=True)
    return Place(op.namespace, op.device) if isinstance(op, Removal) else None


def _is_abandoned(file: Path) -> bool:
    try:
        return time.time() - file.stat().st_mtime > _HALF_MADE_S
    except MISSING:
        return False


def _with_owners(seen: ObservedNamespace, owned: dict[int, ListeningSocket]) -> ObservedNamespace:
    if not seen.sockets:
        return seen
    return replace(seen, sockets=tuple(owned[one.inode] for one in seen.sockets))
