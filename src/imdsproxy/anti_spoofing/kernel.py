"""Our tables in nf_tables: MAC filters and hop limits, created, changed and removed, each in its namespace."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from imdsproxy.anti_spoofing.plan import ANY_MAC, MacFilter, PairMap
from imdsproxy.anti_spoofing.rules import (
    FORMAT,
    SETS,
    element_of,
    fill_hop_limit,
    fill_mac_filter,
    flow_of,
    packed_mac,
    pair_of,
    set_of,
)
from imdsproxy.core.hoststate import Family, NamespaceRef
from imdsproxy.core.model import METADATA_PORT, IpAddress, MacAddress, NetworkId
from imdsproxy.core.wire import VERIFIED_PORT
from imdsproxy.errors import DataplaneError, HostRefused
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import correct_neighbours
from imdsproxy.host.nftables import INET, NETDEV, Batch, NetfilterSocket, commit
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.refusal import host_refused
from imdsproxy.host.sockets import SOCK_DIAG, end_connections, list_connections, try_bind

T = TypeVar("T")

HopPlace: TypeAlias = NamespaceRef | None
"""A namespace that answers are sent from; `None` is the host's own."""

_CLOSERS: Final = 32
_HOPS_COMMENT: Final = "imdsproxy hops 1"
_NO_TABLES: Final = (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EINVAL)
_MACS_HINT: Final = (
    "until then guests with a MAC in their record get 503 there; "
    "network set --no-mac-check does without"
)
_MACS_NEED: Final = "nf_tables with netdev chains for ingress and egress (Linux 5.16) is needed"
_HOPS_HINT: Final = (
    "nf_tables with family inet is needed; "
    "until then guests with a hop_limit get no session token there"
)


class TableGone(Exception):
    """A table, or its namespace, was removed by another program."""


class _Tables:
    """Tables of one family in many namespaces.

    Args:
        thread: Where namespaces are entered.
    """

    family: int
    family_name: str

    def __init__(self, thread: NamespaceThread) -> None:
        self.thread = thread

    async def close(self, places: Collection[tuple[str | None, str]]) -> None:
        """Remove tables of these names (namespace or `None` for the host's own, table).

        Raises:
            HostRefused: The kernel refuses.
        """
        # For each the kernel waits 12 ms, for many at once not much longer.
        work = iter(places)
        count = min(len(places), _CLOSERS)
        await asyncio.gather(*(self._close_some(work) for _ in range(count)))

    async def _close_some(self, places: Iterator[tuple[str | None, str]]) -> None:
        with contextlib.closing(NamespaceThread(self.thread.directory)) as thread:
            for namespace, table in places:
                await thread.inside(namespace, partial(self._drop, table))

    def _drop(self, table: str, _: NamespaceRef | None) -> None:
        batch = Batch(table, self.family)
        batch.drop_table()
        try:
            commit(batch)
        except NetlinkRefused as error:
            # A kernel without such tables has none.
            if error.errno not in _NO_TABLES:
                raise host_refused(f"remove table {self.family_name} {table}", error) from error

    def _at(self, namespace: NamespaceRef | None, work: Callable[[], T]) -> T:
        name = None if namespace is None else namespace.name
        # A name may lead to another namespace by now.
        found = self.thread.enter(name, lambda ref: (work(),) if ref == namespace else None)
        if found is None:
            raise TableGone(f"namespace {name} is gone")
        return found[0]

    def _attempt(
        self, namespace: NamespaceRef | None, work: Callable[[], T], action: str, hint: str
    ) -> T | DataplaneError:
        try:
            return self._at(namespace, work)
        except DataplaneError as error:
            return error
        except TableGone as error:
            return HostRefused(f"cannot {action}: {error}", hint=hint)
        except OSError as error:
            need = f"{_MACS_NEED}; " if self.family == NETDEV and error.errno in _NO_TABLES else ""
            return host_refused(action, error, hint=f"{need}{hint}")


@dataclass(frozen=True, slots=True)
class Opened:
    """A MAC filter that exists.

    Attributes:
        pairs: Those that it lets through; a filter from before keeps its own.
        fresh: It was created just now.
    """

    pairs: PairMap
    fresh: bool


class KernelMacFilters(_Tables):
    """MAC filters: a table of family `netdev` for each network."""

    family = NETDEV
    family_name = "netdev"

    async def open(self, filters: Iterable[MacFilter]) -> dict[NetworkId, Opened | DataplaneError]:
        """Create these filters, empty; one that is as it should be stays as it is."""
        return await self._attempt_all((one, partial(_open, one)) for one in filters)

    async def fill(
        self, filters: Iterable[tuple[MacFilter, PairMap]], *, busy: Collection[NetworkId]
    ) -> dict[NetworkId, DataplaneError | None]:
        """Add pairs to new filters.

        Args:
            filters: The pairs of each.
            busy: Networks that HAProxy listened in before: connections that are open there go on as they began.
        """
        return await self._attempt_all(
            (one, partial(_fill, one, pairs, busy=one.network in busy)) for one, pairs in filters
        )

    async def _attempt_all(
        self, work: Iterable[tuple[MacFilter, Callable[[], T]]]
    ) -> dict[NetworkId, T | DataplaneError]:
        given = tuple(work)
        if not given:
            return {}
        return await self.thread.run(
            lambda: {
                one.network: self._attempt(one.namespace, do, _action(one), _MACS_HINT)
                for one, do in given
            }
        )

    async def withdraw(self, one: MacFilter, pairs: PairMap) -> None:
        """Remove pairs, and end their connections with all that is still to be sent.

        Raises:
            TableGone: There is no such filter.
            HostRefused: The kernel refuses.
        """
        await self._change(one, lambda: _withdraw(one, pairs))

    async def grant(self, one: MacFilter, pairs: PairMap) -> None:
        """Add pairs.

        Raises:
            TableGone: There is no such filter.
            HostRefused: The kernel refuses.
        """
        await self._change(one, lambda: _add(one, pairs))

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
            batch = Batch(one.table)
            batch.add_value(f"told{address.version}", flow_of(address, port), packed_mac(mac))
            try:
                commit(batch)
            except NetlinkRefused as error:
                if error.errno not in (errno.EEXIST, errno.EBUSY):
                    raise
                return False
            return True

        return await self._change(one, bind)

    async def sender(self, one: MacFilter, address: IpAddress, port: int) -> MacAddress | None:
        """The MAC that an unverified connection came from; `None` where that is not known (any more).

        Raises:
            HostRefused: The kernel refuses.
        """

        def ask() -> bytes | None:
            with NetfilterSocket() as channel:
                return channel.value(one.table, f"from{address.version}", flow_of(address, port))

        try:
            found = await self._change(one, ask)
        except TableGone:
            return None
        return None if found is None else MacAddress(found.hex(":"))

    async def _change(self, one: MacFilter, work: Callable[[], T]) -> T:
        def change() -> T:
            try:
                return self._at(one.namespace, work)
            except NetlinkRefused as error:
                if error.errno == errno.ENOENT:
                    raise TableGone(f"its table {one.table} is gone") from error
                raise host_refused(_action(one), error, hint=_MACS_HINT) from error

        return await self.thread.run(change)


class KernelHopLimits(_Tables):
    """The rule for hop limits: one table of family `inet` in each namespace.

    Args:
        thread: Where namespaces are entered.
        table: Its name in nf_tables, ours alone.
    """

    family = INET
    family_name = "inet"

    def __init__(self, thread: NamespaceThread, table: str) -> None:
        super().__init__(thread)
        self.table = table

    async def open(self, places: Iterable[HopPlace]) -> dict[HopPlace, DataplaneError | None]:
        """Create the rule; one that is as it should be stays as it is."""
        given = tuple(places)
        action = "limit the hops of answers"
        return await self.thread.run(
            lambda: {one: self._attempt(one, self._open, action, _HOPS_HINT) for one in given}
        )

    def _open(self) -> None:
        with NetfilterSocket() as channel:
            _ensure(channel, Batch(self.table, INET), _HOPS_COMMENT, fill_hop_limit)

    async def present(self, names: Collection[str | None]) -> frozenset[HopPlace]:
        """Which of these namespaces (`None`: the host's own) have the rule."""
        if not names:
            return frozenset()

        def look() -> frozenset[HopPlace]:
            identity = self.thread.directory.identity
            found = {None if name is None else identity(name) for name in names}
            places = found if None in names else found - {None}
            return frozenset(one for one in places if self._is_there(one))

        return await self.thread.run(look)

    def _is_there(self, place: HopPlace) -> bool:
        def comment() -> str | None:
            with NetfilterSocket() as channel:
                return channel.comment(self.table, INET)

        return self._attempt(place, comment, "look at the hop limits", "") == _HOPS_COMMENT


def _ensure(
    channel: NetfilterSocket, batch: Batch, comment: str, fill: Callable[[Batch], None]
) -> bool:
    """Create a table, or replace one with another comment; false where it is as it should be."""
    present = channel.comment(batch.table, batch.family)
    if present == comment:
        return False
    if present is not None:
        # Only then: the kernel waits 12 ms until no packet is in what is dropped.
        batch.drop_table()
    batch.make_table(comment)
    fill(batch)
    channel.commit(batch)
    return True


def _action(one: MacFilter) -> str:
    return f"check MACs of network {one.network}"


def _open(one: MacFilter) -> Opened:
    def fill(batch: Batch) -> None:
        _try_port(one)
        fill_mac_filter(batch, [name for name, _ in one.devices])

    devices = ",".join(f"{name}={index}" for name, index in one.devices)
    with NetfilterSocket() as channel:
        fresh = _ensure(
            channel, Batch(one.table), f"imdsproxy {FORMAT} {one.network} {devices}", fill
        )
        sets = () if fresh else SETS
        return Opened(
            dict(pair_of(name, key) for name in sets for key in channel.elements(one.table, name)),
            fresh=fresh,
        )


def _try_port(one: MacFilter) -> None:
    # HAProxy would refuse the whole configuration.
    for name, index in one.devices:
        for family in Family:
            if try_bind(family, name, index, VERIFIED_PORT) == errno.EADDRINUSE:
                raise HostRefused(
                    f"cannot {_action(one)}: another program has port {VERIFIED_PORT}",
                    hint=f"ss -tlnp sport = :{VERIFIED_PORT} shows it, in its namespace; {_MACS_HINT}",
                )


def _fill(one: MacFilter, pairs: PairMap, *, busy: bool) -> None:
    batch = Batch(one.table)
    if busy:
        with NetlinkSocket(SOCK_DIAG) as diagnosis:
            for open_one in list_connections(diagnosis, METADATA_PORT):
                flow = flow_of(open_one.peer, open_one.port)
                batch.add_elements(f"open{open_one.peer.version}", [flow])
    _put(batch, pairs)
    if batch.changes:
        commit(batch)


def _elements(pairs: PairMap) -> dict[str, list[bytes]]:
    sets: dict[str, list[bytes]] = {}
    for address, mac in pairs.items():
        sets.setdefault(set_of(address, mac), []).append(element_of(address, mac))
    return sets


def _put(batch: Batch, pairs: PairMap) -> None:
    for name, keys in _elements(pairs).items():
        batch.add_elements(name, keys)


def _add(one: MacFilter, pairs: PairMap) -> None:
    batch = Batch(one.table)
    _put(batch, pairs)
    commit(batch)
    # Where another guest had the address, the kernel would look for that one, for up to a minute.
    macs: Mapping[IpAddress, MacAddress] = {
        address: mac for address, mac in pairs.items() if mac != ANY_MAC
    }
    with NetlinkSocket() as route:
        for _, index in one.devices:
            correct_neighbours(route, index, macs)


def _withdraw(one: MacFilter, pairs: PairMap) -> None:
    batch = Batch(one.table)
    for name, keys in _elements(pairs).items():
        # Adding them first: the kernel refuses to remove an element that is not there.
        batch.add_elements(name, keys)
        batch.remove_elements(name, keys)
    commit(batch)
    # Their answers are dropped now, and nothing may be sent again to the next guest that has the address.
    end_connections(VERIFIED_PORT, frozenset(pairs))


@dataclass(slots=True)
class TableJournal:
    """A JSON file, read once: `{network: [namespace or null, …]}`.

    Attributes:
        write: Replaces the file as a whole.
        family: Of nftables, for the hint that shows what is left.
    """

    path: Path
    write: Callable[[Path, bytes], None]
    family: str
    _places: dict[NetworkId, list[str | None]] | None = None

    def load(self) -> dict[NetworkId, list[str | None]]:
        """The entry of each network; none without a file.

        Raises:
            HostRefused: The file cannot be read.
        """
        if self._places is None:
            try:
                found = json.loads(self.path.read_bytes())
            except FileNotFoundError:
                found = {}
            except (OSError, ValueError) as error:
                raise HostRefused(
                    f"cannot read {self.path}: {error}",
                    hint=f"remove it; nft list tables {self.family} shows what is left",
                ) from error
            self._places = {NetworkId(name): list(places) for name, places in found.items()}
        return self._places

    def store(self, places: Mapping[NetworkId, Sequence[str | None]]) -> None:
        """Replace the file unless it says that already.

        Raises:
            HostRefused: The file cannot be written.
        """
        wanted = {name: list(places[name]) for name in sorted(places)}
        if wanted != self._places:
            self.write(self.path, json.dumps(wanted).encode())
            self._places = wanted
