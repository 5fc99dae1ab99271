"""Gates (`core.gates`) in the kernel: opened, filled, changed and closed, each in its namespace."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from imdsproxy.core.gates import VERIFIED_PORT, Gate
from imdsproxy.core.hoststate import Family, NamespaceRef
from imdsproxy.core.model import METADATA_PORT, IpAddress, MacAddress, NetworkId
from imdsproxy.core.pairs import ANY_MAC
from imdsproxy.errors import DataplaneError, HostRefused
from imdsproxy.host.established import end_connections, list_connections
from imdsproxy.host.gate_table import (
    FORMAT,
    SETS,
    element_of,
    fill_table,
    flow_of,
    packed_mac,
    pair_of,
    set_of,
)
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import correct_neighbours
from imdsproxy.host.nftables import Batch, NetfilterSocket
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.refusal import host_refused
from imdsproxy.host.sockets import SOCK_DIAG, try_bind

T = TypeVar("T")

_CLOSERS: Final = 32

PairMap = Mapping[IpAddress, MacAddress]
"""Which MAC each address of a network goes with; `core.pairs.ANY_MAC` for any."""

_HINT = "until then guests with a MAC in their record get 503 there; network set --no-mac-check does without"


class GateMissing(Exception):
    """Somebody has taken a gate away, or its namespace."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A gate that is there.

    Attributes:
        pairs: What it lets through; of one that was there before, as it was left.
        fresh: It was made now.
    """

    pairs: PairMap
    fresh: bool


@dataclass(slots=True)
class KernelGates:
    """Speaks to nf_tables in the namespaces of gates.

    Args:
        thread: Where namespaces are entered.
    """

    thread: NamespaceThread

    async def open(self, gates: Iterable[Gate]) -> dict[NetworkId, Opened | DataplaneError]:
        """Have these gates, letting nobody through yet; one that is as it should be stays as it is."""
        given = tuple(gates)
        if not given:
            return {}
        return await self.thread.run(lambda: {one.network: self._try_open(one) for one in given})

    def _try_open(self, gate: Gate) -> Opened | DataplaneError:
        try:
            return self._at(gate, lambda: _open(gate))
        except DataplaneError as error:
            return error
        except (OSError, GateMissing) as error:
            action = f"check MACs of network {gate.network}"
            if isinstance(error, GateMissing):
                return HostRefused(f"cannot {action}: {error}", hint=_HINT)
            return host_refused(action, error, hint=_hint(error))

    async def fill(
        self, gates: Iterable[tuple[Gate, PairMap]], *, busy: Collection[NetworkId]
    ) -> dict[NetworkId, DataplaneError | None]:
        """Let pairs through new gates.

        Args:
            gates: What to let through each.
            busy: Networks that were listened in before: connections that are open there go on as they began.
        """
        given = tuple(gates)
        if not given:
            return {}
        return await self.thread.run(
            lambda: {
                gate.network: self._try_fill(gate, pairs, busy=gate.network in busy)
                for gate, pairs in given
            }
        )

    def _try_fill(self, gate: Gate, pairs: PairMap, *, busy: bool) -> DataplaneError | None:
        try:
            self._at(gate, lambda: _fill(gate, pairs, busy=busy))
        except (OSError, GateMissing) as error:
            if isinstance(error, GateMissing):
                return HostRefused(f"cannot check MACs of network {gate.network}: {error}")
            return host_refused(f"check MACs of network {gate.network}", error, hint=_hint(error))
        return None

    async def withdraw(self, gate: Gate, pairs: PairMap) -> None:
        """Let these through no more, and end their connections with all that is still to be sent.

        Raises:
            GateMissing: There is no such gate.
            HostRefused: The kernel refuses.
        """
        await self._change(gate, lambda: _withdraw(gate, pairs))

    async def grant(self, gate: Gate, pairs: PairMap) -> None:
        """Let these through from now on.

        Raises:
            GateMissing: There is no such gate.
            HostRefused: The kernel refuses.
        """
        await self._change(gate, lambda: _add(gate, pairs))

    async def tell(self, gate: Gate, address: IpAddress, port: int, mac: MacAddress) -> bool:
        """Let answers on an unverified connection go to this MAC, and to no other.

        Returns:
            False where those on a connection from that port go to another MAC already: what was sent to that one may
            have to be sent again.

        Raises:
            GateMissing: There is no such gate.
            HostRefused: The kernel refuses.
        """
        told = True

        def tell() -> None:
            nonlocal told
            batch = Batch(gate.table)
            batch.add_value(f"told{address.version}", flow_of(address, port), packed_mac(mac))
            try:
                with NetfilterSocket() as channel:
                    channel.commit(batch)
            except NetlinkRefused as error:
                if error.errno not in (errno.EEXIST, errno.EBUSY):
                    raise
                told = False

        await self._change(gate, tell)
        return told

    async def sender(self, gate: Gate, address: IpAddress, port: int) -> MacAddress | None:
        """The MAC that an unverified connection came from; `None` where that is not known (any more).

        Raises:
            HostRefused: The kernel refuses.
        """

        def ask() -> bytes | None:
            name = f"from{address.version}"
            with NetfilterSocket() as channel:
                return channel.value(gate.table, name, flow_of(address, port))

        try:
            found = await self.thread.run(lambda: self._at(gate, ask))
        except GateMissing:
            return None
        except NetlinkRefused as error:
            raise host_refused(f"look at network {gate.network}", error, hint=_HINT) from error
        return None if found is None else MacAddress(found.hex(":"))

    async def _change(self, gate: Gate, work: Callable[[], None]) -> None:
        def change() -> None:
            try:
                self._at(gate, work)
            except NetlinkRefused as error:
                if error.errno == errno.ENOENT:
                    raise GateMissing(f"its table {gate.table} is gone") from error
                raise host_refused(
                    f"check MACs of network {gate.network}", error, hint=_HINT
                ) from error

        await self.thread.run(change)

    async def close(self, places: Collection[tuple[str | None, str]]) -> None:
        """Have no table of these names (namespace or `None`, table).

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
                if namespace is None:
                    await thread.run(partial(_drop, table))
                else:
                    await thread.inside(namespace, partial(_drop_there, table))

    def _at(self, gate: Gate, work: Callable[[], T]) -> T:
        if gate.namespace is None:
            return work()
        opened = self.thread.directory.identity(gate.namespace.name)
        if opened != gate.namespace:
            raise GateMissing(f"namespace {gate.namespace.name} is gone")
        found = self.thread.enter(gate.namespace.name, lambda _: (work(),))
        if found is None:
            raise GateMissing(f"namespace {gate.namespace.name} is gone")
        return found[0]


def _words(gate: Gate) -> str:
    devices = ",".join(f"{name}={index}" for name, index in gate.devices)
    return f"imdsproxy {FORMAT} {gate.network} {devices}"


def _open(gate: Gate) -> Opened:
    with NetfilterSocket() as channel:
        present = channel.words(gate.table)
        if present == _words(gate):
            found: dict[IpAddress, MacAddress] = {}
            for name in SETS:
                found.update(pair_of(name, key) for key in channel.elements(gate.table, name))
            return Opened(found, fresh=False)
        _try_port(gate)
        batch = Batch(gate.table)
        if present is not None:
            # Only then: the kernel waits 12 ms until nobody is in what is dropped.
            batch.drop_table()
        batch.make_table(_words(gate))
        fill_table(batch, (name for name, _ in gate.devices))
        channel.commit(batch)
        return Opened({}, fresh=True)


def _try_port(gate: Gate) -> None:
    # HAProxy would refuse the whole configuration.
    for name, index in gate.devices:
        for family in Family:
            error = try_bind(family, name, index, VERIFIED_PORT)
            if error == errno.EADDRINUSE:
                raise HostRefused(
                    f"cannot check MACs of network {gate.network}: somebody has port {VERIFIED_PORT}",
                    hint=f"ss -tlnp sport = :{VERIFIED_PORT} shows who, in its namespace; {_HINT}",
                )


def _fill(gate: Gate, pairs: PairMap, *, busy: bool) -> None:
    batch = Batch(gate.table)
    if busy:
        with NetlinkSocket(SOCK_DIAG) as diagnosis:
            for one in list_connections(diagnosis, METADATA_PORT):
                flow = flow_of(one.address, one.port)
                batch.add_elements(f"open{one.address.version}", [flow])
    _put(batch, pairs)
    if batch.messages:
        with NetfilterSocket() as channel:
            channel.commit(batch)


def _put(batch: Batch, pairs: PairMap) -> None:
    sets: dict[str, list[bytes]] = {}
    for address, mac in pairs.items():
        sets.setdefault(set_of(address, mac), []).append(element_of(address, mac))
    for name, keys in sets.items():
        batch.add_elements(name, keys)


def _add(gate: Gate, pairs: PairMap) -> None:
    batch = Batch(gate.table)
    _put(batch, pairs)
    with NetfilterSocket() as channel:
        channel.commit(batch)
    # Where another guest had the address, the kernel would look for that one, for up to a minute.
    macs = {address: mac for address, mac in pairs.items() if mac != ANY_MAC}
    with NetlinkSocket() as route:
        for _, index in gate.devices:
            correct_neighbours(route, index, macs)


def _withdraw(gate: Gate, pairs: PairMap) -> None:
    batch = Batch(gate.table)
    for address, mac in pairs.items():
        # Adding it first makes sure that it is there: what is not cannot be removed.
        batch.add_elements(set_of(address, mac), [element_of(address, mac)])
        batch.remove_elements(set_of(address, mac), [element_of(address, mac)])
    with NetfilterSocket() as channel:
        channel.commit(batch)
    # The way back is shut to them now; nothing is sent again to whoever has the address next.
    end_connections(VERIFIED_PORT, frozenset(pairs))


def _drop(table: str) -> None:
    batch = Batch(table)
    batch.drop_table()
    try:
        with NetfilterSocket() as channel:
            channel.commit(batch)
    except NetlinkRefused as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EINVAL):
            # A kernel without such tables has none.
            return
        raise host_refused(f"remove table netdev {table}", error) from error


def _drop_there(table: str, _: NamespaceRef) -> None:
    _drop(table)


def _hint(error: OSError) -> str:
    if error.errno in (errno.EOPNOTSUPP, errno.ENOENT, errno.EPROTONOSUPPORT, errno.EINVAL):
        return (
            f"nf_tables with netdev chains for ingress and egress (Linux 5.16) is needed; {_HINT}"
        )
    return _HINT
