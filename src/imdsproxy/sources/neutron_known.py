"""The ports that are known, and the instances that are made of those in force."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from imdsproxy.core.addresses import link_local_of, mac_of
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    IpAddress,
    NetworkId,
    Port,
    Upstream,
)
from imdsproxy.core.observation import AddressKey
from imdsproxy.errors import Problem

if TYPE_CHECKING:
    from imdsproxy.sources.neutron_api import NeutronPort

__all__ = ["Changes", "Known", "KnownPorts", "plan_instance"]

_MAX_REFUSED: Final = 100
_REFUSED_S: Final = 300.0
"""How long a refused port is told of after it was seen: nobody looks at it again by itself."""


@dataclass(slots=True)
class Known:
    """A port, as it was when Neutron last told of it; times by the monotonic clock.

    Attributes:
        confirmed: When Neutron was asked.
        until: Until when its guest's last request keeps it in force.
        listed: It is on the list of all ports: that keeps it in force, whoever asks.
        aside: Its time is over. Kept up to date for a while, in case its guest asks again.
        doubted: It was on the list and is not now. To be asked for at once: it is gone, or elsewhere, or the list
            was not whole.
        unseen: When it was first left out of an answer that had no port at all.
    """

    port: NeutronPort
    confirmed: float
    until: float
    listed: bool = False
    aside: bool = False
    doubted: bool = False
    unseen: float | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What is in force otherwise than it was told the last time."""

    instances: Mapping[InstanceId, Instance]
    removed: tuple[InstanceId, ...]


class KnownPorts:
    """Ports by id and by address; of two that have an address, the one told of later has it.

    A network has an address once: a port that still has one which another was just seen to have is out of date.

    Attributes:
        unsaved: Ids of ports that came, changed or went; emptied by who writes them down.
    """

    def __init__(self) -> None:
        self.unsaved: set[str] = set()
        self._ports: dict[str, Known] = {}
        self._by_address: dict[AddressKey, str] = {}
        self._by_instance: dict[InstanceId, set[str]] = {}
        self._refused: dict[str, tuple[Problem, float]] = {}
        self._touched: set[InstanceId] = set()
        self._told: dict[InstanceId, Instance] = {}
        self._networks: Counter[NetworkId] = Counter()

    def __len__(self) -> int:
        return len(self._ports)

    def __iter__(self) -> Iterator[Known]:
        return iter(tuple(self._ports.values()))

    def get(self, port_id: str) -> Known | None:
        """The port of that id, in force or aside."""
        return self._ports.get(port_id)

    def at(self, network: NetworkId, address: IpAddress) -> Known | None:
        """The port that has the address in the network, in force or aside."""
        port_id = self._by_address.get((network, address))
        return None if port_id is None else self._ports[port_id]

    def of(self, instance: InstanceId) -> tuple[Known, ...]:
        """The instance's ports that are in force, in order of their ids."""
        ports = (self._ports[each] for each in sorted(self._by_instance.get(instance, ())))
        return tuple(each for each in ports if not each.aside)

    @property
    def networks(self) -> frozenset[NetworkId]:
        """The networks of what was last told."""
        return frozenset(self._networks)

    # What Neutron tells

    def put(self, port: NeutronPort, asked: float) -> Known | None:
        """Take in what Neutron said of a port when it was asked then; what it said later stays.

        Returns:
            What is known of it now: nothing, where nobody behind the port may be told anything.
        """
        known = self._ports.get(port.id)
        if known is not None and known.confirmed > asked:
            return known
        self._note(port, asked)
        port = self._take_addresses(port, asked)
        if not port.serves:
            self._drop(port.id)
            return None
        if known is None:
            known = Known(port, asked, until=asked)
            self._ports[port.id] = known
        else:
            known.confirmed = asked
            known.listed = known.listed and not known.doubted
            known.doubted = False
            known.unseen = None
            if known.port == port:
                return known
            self._unindex(known)
            known.port = port
        self._index(known)
        return known

    def remove(self, port_id: str, asked: float) -> None:
        """There was no such port when Neutron was asked then."""
        self._refused.pop(port_id, None)
        known = self._ports.get(port_id)
        if known is not None and known.confirmed <= asked:
            self._drop(port_id)

    def miss(
        self, port_id: str, asked: float, patience_s: float, *, steady: float = -math.inf
    ) -> None:
        """An answer had no port at all: believed once another says so that was asked for so much later.

        Args:
            port_id: The port's.
            asked: When.
            patience_s: How much.
            steady: Since when Neutron has had no outage: what it left out before that does not count.
        """
        known = self._ports.get(port_id)
        if known is None or known.confirmed > asked:
            return
        if known.unseen is None or known.unseen < steady:
            known.unseen = asked
        elif asked - known.unseen >= patience_s:
            self._drop(port_id)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why ports seen lately get nothing, in order of their ids; at most a hundred."""
        return tuple(problem for _, (problem, _) in sorted(self._refused.items()))

    def refused_only(self, port_ids: Container[str], asked: float) -> None:
        """There were no other ports than these when Neutron was asked then."""
        for port_id, (_, seen) in tuple(self._refused.items()):
            if port_id not in port_ids and seen <= asked:
                del self._refused[port_id]

    def _note(self, port: NeutronPort, asked: float) -> None:
        problem = port.problem()
        self._refused.pop(port.id, None)
        if problem is not None and len(self._refused) < _MAX_REFUSED:
            self._refused[port.id] = (problem, asked)

    def _take_addresses(self, port: NeutronPort, asked: float) -> NeutronPort:
        for key in _keys(port):
            holder = self._ports.get(self._by_address.get(key, ""))
            if holder is None or holder.port.id == port.id:
                continue
            if holder.confirmed > asked:
                port = _without(port, key[1])
            else:
                self._unindex(holder)
                holder.port = _without(holder.port, key[1])
                self._index(holder)
        return port

    # How long it is in force

    def keep(self, known: Known, until: float) -> None:
        """Its guest has asked: have it in force until then."""
        known.until = max(known.until, until)
        if known.aside:
            known.aside = False
            self._touched.add(known.port.instance)

    def enlist(self, known: Known) -> None:
        """It is on the list."""
        known.listed = True
        if known.aside:
            known.aside = False
            self._touched.add(known.port.instance)

    def expire(self, now: float, aside_s: float) -> None:
        """Put aside what no guest has asked for in time, and forget what has been aside so long."""
        for port_id, (_, seen) in tuple(self._refused.items()):
            if seen + _REFUSED_S <= now:
                del self._refused[port_id]
        for known in self:
            if known.listed or known.until > now:
                continue
            if known.until + aside_s <= now:
                self._drop(known.port.id)
            elif not known.aside:
                known.aside = True
                self._touched.add(known.port.instance)

    # What is told of it

    def changes(self) -> Changes:
        """What has changed since the last time."""
        changed: dict[InstanceId, Instance] = {}
        removed: list[InstanceId] = []
        for instance in self._touched:
            before = self._told.get(instance)
            after = plan_instance(
                instance,
                (known.port for known in self.of(instance)),
                created_at=None if before is None else before.created_at,
            )
            if before == after:
                continue
            if before is not None:
                self._count(before, -1)
            if after is None:
                del self._told[instance]
                removed.append(instance)
            else:
                self._told[instance] = changed[instance] = after
                self._count(after, 1)
        self._touched.clear()
        return Changes(changed, tuple(removed))

    @property
    def told(self) -> Mapping[InstanceId, Instance]:
        """Everything, as it was last told."""
        return dict(self._told)

    def _count(self, instance: Instance, step: int) -> None:
        for port in instance.ports:
            self._networks[port.network] += step
            if not self._networks[port.network]:
                del self._networks[port.network]

    def _drop(self, port_id: str) -> None:
        known = self._ports.pop(port_id, None)
        if known is not None:
            self._unindex(known)

    def _index(self, known: Known) -> None:
        port = known.port
        self._by_address.update(dict.fromkeys(_keys(port), port.id))
        self._by_instance.setdefault(port.instance, set()).add(port.id)
        self._changed(port)

    def _unindex(self, known: Known) -> None:
        port = known.port
        for key in _keys(port):
            del self._by_address[key]
        ports = self._by_instance[port.instance]
        ports.discard(port.id)
        if not ports:
            del self._by_instance[port.instance]
        self._changed(port)

    def _changed(self, port: NeutronPort) -> None:
        self._touched.add(port.instance)
        self.unsaved.add(port.id)


def plan_instance(
    instance: InstanceId, ports: Iterable[NeutronPort], *, created_at: int | None = None
) -> Instance | None:
    """The record of an instance of Nova's, of all that is known of its ports.

    Whoever may make a port may write any instance's id on it. So each port keeps its own project, by which Nova
    is asked: it says 404 where the instance is not that project's (OSSA-2013-033). What is the instance's own
    is then without meaning; it is that of the first port.

    It was made when the oldest port was that was ever seen of it: a port that is added later, or taken away, must not
    begin its boot anew, and an instance with a port from before it is only open for less long.

    Args:
        instance: Its id.
        ports: Those in force.
        created_at: What was told of it before, Unix time.

    Returns:
        `None` where there is no port.
    """
    known = tuple(ports)
    if not known:
        return None
    project = known[0].project
    times = [port.created_at for port in known if port.created_at is not None]
    if created_at is not None:
        times.append(created_at)
    return Instance(
        id=instance,
        name=instance,
        hostname=instance,
        project=project,
        ports=tuple(
            Port(
                port.network,
                port.mac,
                port.addresses,
                project=None if port.project == project else port.project,
            )
            for port in known
        ),
        upstream=Upstream.NOVA,
        created_at=min(times, default=None),
    )


def _keys(port: NeutronPort) -> frozenset[AddressKey]:
    addresses = set(port.addresses)
    if port.mac is not None:
        addresses.add(link_local_of(port.mac))
    return frozenset((port.network, address) for address in addresses)


def _without(port: NeutronPort, address: IpAddress) -> NeutronPort:
    left = tuple(each for each in port.addresses if each != address)
    mac = None if port.mac is not None and mac_of(address) == port.mac else port.mac
    return replace(port, addresses=left, mac=mac)
