"""Our tables in nf_tables: creation, change and removal of MAC filters and hop limits in their namespaces."""

import asyncio
import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias, TypeVar

from imdsproxy.errors import DataplaneError, HostRefused, Ignoring, host_refused, refusing
from imdsproxy.host.files import Journal
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceMissing, NamespaceThread
from imdsproxy.host.netlink import correct_neighbours
from imdsproxy.host.nftables import (
    INET,
    NETDEV,
    Batch,
    Element,
    NetfilterSocket,
    commit,
    ensure_table,
)
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.sockets import SOCK_DIAG, end_connections, list_connections, try_bind
from imdsproxy.host.state import Family, NamespaceRef
from imdsproxy.model.entities import METADATA_PORT, IpAddress, MacAddress, NetworkId
from imdsproxy.model.wire import VERIFIED_PORT
from imdsproxy.network.anti_spoofing import rules
from imdsproxy.network.anti_spoofing.plan import ANY_MAC, MacFilter, PairMap

K = TypeVar("K")
T = TypeVar("T")

TableJournal: TypeAlias = Journal[dict[NetworkId, list[str | None]]]
"""Names of namespaces by network (`None`: the host's own), or the names of one namespace and its table."""

HopPlace: TypeAlias = NamespaceRef | None
"""Namespace that sends answers; `None` is the host's own."""

FilterChange: TypeAlias = tuple[MacFilter, PairMap, PairMap]
"""Filter, its current pairs, and its wanted pairs."""


@dataclass(frozen=True, slots=True)
class Claims:
    """Claims of guests, by ARP or ND, to addresses whose pair has another MAC.

    Attributes:
        count: Number of claims since the filter was created.
        macs: MACs that claimed an address in the last ten minutes, by address.
    """

    count: int
    macs: Mapping[IpAddress, tuple[MacAddress, ...]]


_NO_CLAIMS: Final = Claims(0, MappingProxyType({}))

_NO_PAIRS: Final[PairMap] = MappingProxyType({})
_CLOSERS: Final = 32
_FAMILIES: Final = {INET: "inet", NETDEV: "netdev"}
_HOPS_COMMENT: Final = "imdsproxy hops 1"
_NO_TABLES: Final = (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EINVAL)


def table_journal(path: Path) -> TableJournal:
    return Journal(path, {}, "remove it; nft list tables shows what is left")


def name_of(namespace: NamespaceRef | None) -> str | None:
    return None if namespace is None else namespace.name


class TableGone(HostRefused):
    """Another program removed a table or its namespace."""


async def close_tables(
    directory: NamespaceDirectory, family: int, places: Collection[Sequence[str | None]]
) -> None:
    """Remove tables of a family, given by namespace (`None` for the host's own) and name."""
    work = iter(places)

    async def close_some() -> None:
        with contextlib.closing(NamespaceThread(directory)) as thread:
            for namespace, table in work:
                await thread.run(partial(drop, thread, namespace, table or ""))

    def drop(thread: NamespaceThread, namespace: str | None, table: str) -> None:
        batch = Batch(table, family)
        batch.drop_table()
        # A kernel without such tables, or a removed namespace, has nothing to remove.
        none, action = Ignoring(*_NO_TABLES), f"remove table {_FAMILIES[family]} {table}"
        with refusing(action), none, thread.inside(namespace):
            commit(batch)

    # The kernel waits 12 ms per table, but not much longer for many in parallel.
    await asyncio.gather(*(close_some() for _ in range(min(len(places), _CLOSERS))))


class KernelTables:
    family: int
    hint: str
    need: str = ""

    def __init__(self, thread: NamespaceThread) -> None:
        self.thread = thread

    async def close(self, places: Collection[Sequence[str | None]]) -> None:
        """Remove tables, given by namespace (`None` for the host's own) and name."""
        await close_tables(self.thread.directory, self.family, places)

    def _at(self, namespace: NamespaceRef | None, action: str, work: Callable[[], T]) -> T:
        name = name_of(namespace)
        try:
            with contextlib.suppress(NamespaceMissing), self.thread.inside(name) as ref:
                # The name may belong to another namespace by now.
                if ref == namespace:
                    return work()
        except OSError as error:
            need = self.need if error.errno in _NO_TABLES else ""
            raise host_refused(action, error, hint=f"{need}{self.hint}") from error
        raise TableGone(f"cannot {action}: namespace {name} is gone", hint=self.hint)

    async def attempt(
        self, works: Mapping[K, tuple[NamespaceRef | None, str, Callable[[], T]]]
    ) -> dict[K, T | DataplaneError]:
        """Run functions in their namespaces, each with a description. Return the results or errors."""

        def try_all() -> dict[K, T | DataplaneError]:
            found: dict[K, T | DataplaneError] = {}
            for key, work in works.items():
                try:
                    found[key] = self._at(*work)
                except DataplaneError as error:
                    found[key] = error
            return found

        return await self.thread.run(try_all) if works else {}


class KernelMacFilters(KernelTables):
    """MAC filters: a table of family `netdev` for each network."""

    family = NETDEV
    hint = (
        "until then guests with a MAC in their record get 503 there; "
        "`imdsproxy network set --no-mac-check` serves them unchecked"
    )
    need = "nf_tables with netdev chains for ingress and egress (Linux 5.16) is needed; "

    async def open(
        self, filters: Iterable[MacFilter]
    ) -> dict[NetworkId, PairMap | DataplaneError | None]:
        """Create empty filters; an existing filter with the same rules and devices stays.

        Returns:
            By network, the pairs of an existing filter, `None` for a new filter, or an error.
        """
        return await self.attempt(
            {one.network: (one.namespace, _action(one), partial(_open, one)) for one in filters}
        )

    async def fill(
        self,
        changes: Iterable[FilterChange],
        *,
        fresh: Collection[NetworkId],
        busy: Collection[NetworkId],
    ) -> dict[NetworkId, DataplaneError | None]:
        """Change the pairs of many filters.

        Args:
            fresh: Networks whose filter is new; in the others, an address may have changed its guest.
            busy: Networks in which HAProxy listened before the filter existed: their open connections continue as they
                began.
        """
        works: dict[NetworkId, tuple[NamespaceRef | None, str, Callable[[], None]]] = {}
        for one, has, wanted in changes:
            name = one.network
            fill = partial(_fill, one, has, wanted, busy=name in busy, fresh=name in fresh)
            works[name] = (one.namespace, _action(one), fill)
        return await self.attempt(works)

    async def change(
        self, one: MacFilter, *, has: PairMap = _NO_PAIRS, wanted: PairMap = _NO_PAIRS
    ) -> None:
        """Remove pairs and end their connections, discarding unsent data; add the wanted pairs.

        Raises:
            TableGone: There is no such filter.
            HostRefused: The kernel refuses.
        """
        await self._change(one, partial(_fill, one, has, wanted))

    async def release(self, places: Collection[Sequence[str | None]]) -> None:
        """Make filters redirect only connections that are open now: another process gets new connections.

        Args:
            places: Tables by namespace (`None` for the host's own) and name.
        """

        def release() -> None:
            for namespace, table in places:
                # A removed filter redirects nothing.
                none = Ignoring(*_NO_TABLES)
                with refusing(f"release table {table}"), none, self.thread.inside(namespace):
                    _release(table or "")

        await self.thread.run(release)

    async def has_connections(self, namespace: str | None) -> bool:
        """Return whether a namespace has open connections to the metadata addresses, including other processes'."""

        def look() -> bool:
            with (
                contextlib.suppress(NamespaceMissing),
                self.thread.inside(namespace),
                NetlinkSocket(SOCK_DIAG) as diagnosis,
            ):
                return any(
                    any(list_connections(diagnosis, port))
                    for port in (VERIFIED_PORT, METADATA_PORT)
                )
            return False

        return await self.thread.run(look)

    async def bind_answers(
        self, one: MacFilter, address: IpAddress, port: int, mac: MacAddress
    ) -> bool:
        """Send answers on an unverified connection to this MAC only.

        Returns:
            False if answers to that port already go to another MAC: data sent to that MAC may need retransmission.

        Raises:
            TableGone: There is no such filter.
            HostRefused: The kernel refuses.
        """

        def bind() -> bool:
            batch, flow = Batch(one.table), rules.flow_of(address, port)
            batch.add_elements(f"confirmed{address.version}", [(flow, rules.packed_mac(mac))])
            with Ignoring(errno.EEXIST, errno.EBUSY):
                commit(batch)
                return True
            return False

        return await self._change(one, bind)

    async def sender(self, one: MacFilter, address: IpAddress, port: int) -> MacAddress | None:
        """Return the MAC that an unverified connection came from; `None` if unknown or expired."""

        def ask() -> bytes | None:
            flow = rules.flow_of(address, port)
            with NetfilterSocket() as channel:
                return channel.value(one.table, f"from{address.version}", flow)

        found = None
        with contextlib.suppress(TableGone):
            found = await self._change(one, ask)
        return None if found is None else MacAddress(found.hex(":"))

    async def read_claims(
        self, filters: Iterable[MacFilter], before: Mapping[NetworkId, Claims]
    ) -> dict[NetworkId, Claims | DataplaneError]:
        """Read the counters of forged claims.

        Args:
            before: Claims of the last reading. If the counter is unchanged and no claim was recent then, the sets are
                not read.
        """
        return await self.attempt(
            {
                one.network: (
                    one.namespace,
                    f"count forged claims in network {one.network}",
                    partial(_read_claims, one.table, before.get(one.network, _NO_CLAIMS)),
                )
                for one in filters
            }
        )

    async def _change(self, one: MacFilter, work: Callable[[], T]) -> T:
        def change() -> T:
            try:
                return work()
            except NetlinkRefused as error:
                if error.errno == errno.ENOENT:
                    raise TableGone(f"cannot {_action(one)}: its table is gone") from error
                raise

        return await self.thread.run(lambda: self._at(one.namespace, _action(one), change))


class KernelHopLimits(KernelTables):
    """The rule for hop limits: one table of family `inet` in each namespace."""

    family = INET
    hint = (
        "nf_tables with family inet is needed; "
        "until then guests with a hop_limit get no session token there"
    )

    def __init__(self, thread: NamespaceThread, table: str) -> None:
        super().__init__(thread)
        self.table = table

    async def open(self, places: Iterable[HopPlace]) -> dict[HopPlace, DataplaneError | None]:
        """Create the rule; an equal existing rule stays. Return the errors by place."""

        def create() -> None:
            with NetfilterSocket() as channel:
                ensure_table(channel, Batch(self.table, INET), _HOPS_COMMENT, rules.fill_hop_limit)

        action = "limit the hops of answers"
        return await self.attempt({one: (one, action, create) for one in places})

    async def restore(self, names: Collection[str | None]) -> frozenset[HopPlace]:
        """Create the rule in the named namespaces (`None`: the host's own). Return the places with the rule."""
        identity = self.thread.directory.identity
        found = {None if name is None else identity(name) for name in names}
        results = await self.open(found if None in names else found - {None})
        return frozenset(place for place, error in results.items() if error is None)


def _action(one: MacFilter) -> str:
    return f"check MACs of network {one.network}"


def _open(one: MacFilter) -> PairMap | None:
    def fill(batch: Batch) -> None:
        # A port that is in use would make HAProxy refuse the whole configuration.
        for name, index in one.devices:
            for family in Family:
                if try_bind(family, name, index, VERIFIED_PORT) == errno.EADDRINUSE:
                    raise HostRefused(
                        f"cannot {_action(one)}: another program has port {VERIFIED_PORT}",
                        hint=f"ss -tlnp sport = :{VERIFIED_PORT} shows it, in its namespace; {KernelMacFilters.hint}",
                    )
        rules.fill_mac_filter(batch, [name for name, _ in one.devices])

    devices = ",".join(f"{name}={index}" for name, index in one.devices)
    with NetfilterSocket() as channel:
        comment = f"imdsproxy {rules.FORMAT} {one.network} {devices}"
        if ensure_table(channel, Batch(one.table), comment, fill):
            return None
        return dict(
            rules.pair_of(name, key)
            for name in rules.SETS
            for key in channel.elements(one.table, name)
        )


def _fill(
    one: MacFilter, has: PairMap, wanted: PairMap, *, busy: bool = False, fresh: bool = False
) -> None:
    gone = {address: mac for address, mac in has.items() if wanted.get(address) != mac}
    come = {address: mac for address, mac in wanted.items() if has.get(address) != mac}
    batch = Batch(one.table)
    if busy:
        with NetlinkSocket(SOCK_DIAG) as diagnosis:
            for connection in list_connections(diagnosis, METADATA_PORT):
                flow = rules.flow_of(connection.peer, connection.port)
                batch.add_elements(f"begun{connection.peer.version}", [(flow,)])
    for name, keys in _elements(gone).items():
        # Add the elements first: the kernel refuses to remove a missing element.
        batch.add_elements(name, keys)
        batch.remove_elements(name, keys)
    for name, keys in _elements(come).items():
        batch.add_elements(name, keys)
    if batch.changes:
        commit(batch)
    if gone:
        # Their answers are dropped now. HAProxy must not retransmit them to the next guest with the address.
        end_connections(VERIFIED_PORT, frozenset(gone))
    macs = {address: mac for address, mac in come.items() if mac != ANY_MAC}
    if macs and not fresh:
        # If another guest had the address, the kernel would keep looking for that guest for up to a minute.
        with NetlinkSocket() as route:
            for _, index in one.devices:
                correct_neighbours(route, index, macs)


def _read_claims(table: str, before: Claims) -> Claims:
    with NetfilterSocket() as channel:
        count = channel.counted(table, rules.CLAIMS)
        if count is None or (count == before.count and not before.macs):
            # A removed filter is created again soon.
            return before
        macs: dict[IpAddress, tuple[MacAddress, ...]] = {}
        for name in rules.CLAIMED:
            for key in channel.elements(table, name):
                address, mac = rules.pair_of(name, key)
                macs[address] = (*macs.get(address, ()), mac)
    return Claims(count, macs)


def _release(table: str) -> None:
    batch = Batch(table)
    rules.pass_by_new(batch)
    commit(batch)
    flows: dict[Family, list[bytes]] = {}
    with NetlinkSocket(SOCK_DIAG) as diagnosis:
        for one in list_connections(diagnosis, VERIFIED_PORT):
            flows.setdefault(Family(one.peer.version), []).append(rules.flow_of(one.peer, one.port))
    batch = Batch(table)
    rules.keep_only(batch, flows)
    commit(batch)


def _elements(pairs: PairMap) -> dict[str, list[Element]]:
    sets: dict[str, list[Element]] = {}
    for address, mac in pairs.items():
        for name, element in rules.elements_of(address, mac):
            sets.setdefault(name, []).append(element)
    return sets
