"""Our tables in nf_tables: MAC filters and hop limits, created, changed and removed, each in its namespace."""

import asyncio
import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias, TypeVar

from imdsproxy.anti_spoofing import rules
from imdsproxy.anti_spoofing.plan import ANY_MAC, MacFilter, PairMap
from imdsproxy.core.hoststate import Family, NamespaceRef
from imdsproxy.core.model import METADATA_PORT, IpAddress, MacAddress, NetworkId
from imdsproxy.core.wire import VERIFIED_PORT
from imdsproxy.errors import DataplaneError, HostRefused, Ignoring, host_refused, refusing
from imdsproxy.host.files import Journal
from imdsproxy.host.namespaces import NamespaceMissing, NamespaceThread
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

K = TypeVar("K")
T = TypeVar("T")

TableJournal: TypeAlias = Journal[dict[NetworkId, list[str | None]]]
"""For each network the names of namespaces (`None`: the host's own), or that of one and of a table in it."""

HopPlace: TypeAlias = NamespaceRef | None
"""A namespace that answers are sent from; `None` is the host's own."""

FilterChange: TypeAlias = tuple[MacFilter, PairMap, PairMap]
"""A filter, the pairs in it, and those that are to be."""


@dataclass(frozen=True, slots=True)
class Claims:
    """Claims of guests, by ARP or ND, to addresses whose pair has another MAC.

    Attributes:
        count: How often, since the filter was created.
        macs: MACs that claimed an address in the last ten minutes, by address.
    """

    count: int
    macs: Mapping[IpAddress, tuple[MacAddress, ...]]


_NO_CLAIMS: Final = Claims(0, MappingProxyType({}))

_NO_PAIRS: Final[PairMap] = MappingProxyType({})
_CLOSERS: Final = 32
_HOPS_COMMENT: Final = "imdsproxy hops 1"
_NO_TABLES: Final = (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EINVAL)


def table_journal(path: Path) -> TableJournal:
    """The journal in a file."""
    return Journal(path, {}, "remove it; nft list tables shows what is left")


def name_of(namespace: NamespaceRef | None) -> str | None:
    """The name of a namespace; `None` is the host's own."""
    return None if namespace is None else namespace.name


class TableGone(HostRefused):
    """A table, or its namespace, was removed by another program."""


class KernelTables:
    """Tables of one family in many namespaces.

    Args:
        thread: Where namespaces are entered.
    """

    family: int
    family_name: str
    hint: str
    need: str = ""

    def __init__(self, thread: NamespaceThread) -> None:
        self.thread = thread

    async def close(self, places: Collection[Sequence[str | None]]) -> None:
        """Remove tables (namespace or `None` for the host's own, name).

        Raises:
            HostRefused: The kernel refuses.
        """
        # For each the kernel waits 12 ms, for many at once not much longer.
        work = iter(places)
        count = min(len(places), _CLOSERS)
        await asyncio.gather(*(self._close_some(work) for _ in range(count)))

    async def _close_some(self, places: Iterator[Sequence[str | None]]) -> None:
        with contextlib.closing(NamespaceThread(self.thread.directory)) as thread:
            for namespace, table in places:
                await thread.run(partial(self._drop, thread, namespace, table or ""))

    def _drop(self, thread: NamespaceThread, namespace: str | None, table: str) -> None:
        batch = Batch(table, self.family)
        batch.drop_table()
        # A kernel without such tables has none, and neither has a namespace that is gone.
        none, action = Ignoring(*_NO_TABLES), f"remove table {self.family_name} {table}"
        with refusing(action), none, thread.inside(namespace):
            commit(batch)

    def _at(self, namespace: NamespaceRef | None, action: str, work: Callable[[], T]) -> T:
        name = name_of(namespace)
        try:
            with contextlib.suppress(NamespaceMissing), self.thread.inside(name) as ref:
                # A name may lead to another namespace by now.
                if ref == namespace:
                    return work()
        except OSError as error:
            need = self.need if error.errno in _NO_TABLES else ""
            raise host_refused(action, error, hint=f"{need}{self.hint}") from error
        raise TableGone(f"cannot {action}: namespace {name} is gone", hint=self.hint)

    async def attempt(
        self, works: Mapping[K, tuple[NamespaceRef | None, str, Callable[[], T]]]
    ) -> dict[K, T | DataplaneError]:
        """Do work in many namespaces (each with what it is, in words); its results, or why it failed."""

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
    family_name = "netdev"
    hint = (
        "until then guests with a MAC in their record get 503 there; "
        "network set --no-mac-check does without"
    )
    need = "nf_tables with netdev chains for ingress and egress (Linux 5.16) is needed; "

    async def open(
        self, filters: Iterable[MacFilter]
    ) -> dict[NetworkId, PairMap | DataplaneError | None]:
        """Create these filters, empty; one that is as it should be stays as it is.

        Returns:
            For each network the pairs that its filter has from before; `None` where it was created just now.
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
            changes: Of each filter.
            fresh: Networks whose filter was created just now: in others, addresses may have another guest by now.
            busy: Networks that HAProxy listened in before there was a filter: connections that are open there go on
                as they began.
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
        """Remove pairs that it has, and end their connections with all that is still to be sent; add those wanted.

        Raises:
            TableGone: There is no such filter.
            HostRefused: The kernel refuses.
        """
        await self._change(one, partial(_fill, one, has, wanted))

    async def release(self, places: Collection[Sequence[str | None]]) -> None:
        """Have filters redirect only connections that are open now: new ones are another process's.

        Args:
            places: Namespace, or `None` for the host's own, and the table's name.

        Raises:
            HostRefused: The kernel refuses.
        """

        def release() -> None:
            for namespace, table in places:
                # A filter that is gone redirects nothing.
                none = Ignoring(*_NO_TABLES)
                with refusing(f"release table {table}"), none, self.thread.inside(namespace):
                    _release(table or "")

        await self.thread.run(release)

    async def has_connections(self, namespace: str | None) -> bool:
        """Whether connections to the metadata addresses are open there, another process's too."""

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
            False where those on a connection from that port go to another MAC already: what was sent to that one may
            have to be sent again.

        Raises:
            TableGone: There is no such filter.
            HostRefused: The kernel refuses.
        """

        def bind() -> bool:
            batch, flow = Batch(one.table), rules.flow_of(address, port)
            batch.add_elements(f"told{address.version}", [(flow, rules.packed_mac(mac))])
            with Ignoring(errno.EEXIST, errno.EBUSY):
                commit(batch)
                return True
            return False

        return await self._change(one, bind)

    async def sender(self, one: MacFilter, address: IpAddress, port: int) -> MacAddress | None:
        """The MAC that an unverified connection came from; `None` where that is not known (any more).

        Raises:
            HostRefused: The kernel refuses.
        """

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
            filters: Of which networks.
            before: The claims read before. If no claim was counted since, and none was recent then, no more is read.
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
    """The rule for hop limits: one table of family `inet` in each namespace.

    Args:
        thread: Where namespaces are entered.
        table: Its name in nf_tables, ours alone.
    """

    family = INET
    family_name = "inet"
    hint = (
        "nf_tables with family inet is needed; "
        "until then guests with a hop_limit get no session token there"
    )

    def __init__(self, thread: NamespaceThread, table: str) -> None:
        super().__init__(thread)
        self.table = table

    async def open(self, places: Iterable[HopPlace]) -> dict[HopPlace, DataplaneError | None]:
        """Create the rule; one that is as it should be stays as it is."""

        def create() -> None:
            with NetfilterSocket() as channel:
                ensure_table(channel, Batch(self.table, INET), _HOPS_COMMENT, rules.fill_hop_limit)

        action = "limit the hops of answers"
        return await self.attempt({one: (one, action, create) for one in places})

    async def restore(self, names: Collection[str | None]) -> frozenset[HopPlace]:
        """Create the rule in namespaces of these names (`None`: the host's own); where it is then."""
        identity = self.thread.directory.identity
        found = {None if name is None else identity(name) for name in names}
        results = await self.open(found if None in names else found - {None})
        return frozenset(place for place, error in results.items() if error is None)


def _action(one: MacFilter) -> str:
    return f"check MACs of network {one.network}"


def _open(one: MacFilter) -> PairMap | None:
    def fill(batch: Batch) -> None:
        # HAProxy would refuse the whole configuration.
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
        # Adding them first: the kernel refuses to remove an element that is not there.
        batch.add_elements(name, keys)
        batch.remove_elements(name, keys)
    for name, keys in _elements(come).items():
        batch.add_elements(name, keys)
    if batch.changes:
        commit(batch)
    if gone:
        # Their answers are dropped now, and nothing may be sent again to the next guest that has the address.
        end_connections(VERIFIED_PORT, frozenset(gone))
    macs = {address: mac for address, mac in come.items() if mac != ANY_MAC}
    if macs and not fresh:
        # Where another guest had the address, the kernel would look for that one, for up to a minute.
        with NetlinkSocket() as route:
            for _, index in one.devices:
                correct_neighbours(route, index, macs)


def _read_claims(table: str, before: Claims) -> Claims:
    with NetfilterSocket() as channel:
        count = channel.counted(table, rules.CLAIMS)
        if count is None or (count == before.count and not before.macs):
            # A filter that is gone is created again soon.
            return before
        macs: dict[IpAddress, tuple[MacAddress, ...]] = {}
        for name in rules.CLAIMED:
            for key in channel.elements(table, name):
                address, mac = rules.pair_of(name, key)
                macs[address] = (*macs.get(address, ()), mac)
    return Claims(count, macs)


def _release(table: str) -> None:
    """In the namespace of the calling thread."""
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
