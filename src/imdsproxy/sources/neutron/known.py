"""The ports that are known, the addresses behind routers that they have, and the instances made of those in force."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from imdsproxy.core.addresses import link_local_of, mac_of
from imdsproxy.core.model import Instance, InstanceId, IpAddress, NetworkId
from imdsproxy.core.observation import AddressKey, RecordSet
from imdsproxy.errors import Problem
from imdsproxy.sources.neutron.ports import NeutronPort, plan_instance

_MAX_REFUSED: Final = 100
_REFUSED_S: Final = 300.0
"""How long a refused port is reported after it was seen: nothing looks at it again by itself."""

_PATIENCE_S: Final = 3.0
"""For how long answers without any port must repeat to be believed. A Neutron that starts gives such answers: while one
of its threads reads the policy's rules, the others omit every port, and answer 200."""


@dataclass(slots=True)
class Known:
    """A port as Neutron last described it; times by the monotonic clock.

    Attributes:
        confirmed: When Neutron was asked.
        until: Until when its guest's last request keeps it in force.
        listed: It is on the list of all ports, which keeps it in force whether or not its guest asks.
        aside: Its time is over. Kept up to date for a while, in case its guest asks again.
        doubted: It was on the list and is not now. Due at once: it is gone, or elsewhere, or the list was not whole.
        unseen: When an answer first had no port at all.
    """

    port: NeutronPort
    confirmed: float
    until: float
    listed: bool = False
    aside: bool = False
    doubted: bool = False
    unseen: float | None = None


@dataclass(slots=True)
class Route:
    """A port's address behind a router.

    Attributes:
        router: Its id.
        key: The address in the port's own network.
        port: The port's id.
        confirmed: When Neutron was asked, by the monotonic clock.
        unseen: When an answer first had no port at all.
    """

    router: NetworkId
    key: AddressKey
    port: str
    confirmed: float
    unseen: float | None = None


def _is_gone(entry: Known | Route, asked: float, steady: float | None) -> bool:
    """Whether it is gone by an answer that does not have it; `steady` as in `KnownPorts.lose`."""
    if steady is None or entry.confirmed > asked:
        return entry.confirmed <= asked
    if entry.unseen is None or entry.unseen < steady:
        entry.unseen = asked
    return asked - entry.unseen >= _PATIENCE_S


class KnownPorts:
    """Ports by id and by address.

    A network has an address once: it is the port's that was confirmed last, and the other is out of date.

    Attributes:
        routes: The addresses behind routers that they have.
        published: The instances as `changes` last had them.
        unsaved: Ids of ports that came, changed or went; emptied by who saves them.
    """

    def __init__(self) -> None:
        self.routes = Routes(self)
        self.published: dict[InstanceId, Instance] = {}
        self.unsaved: set[str] = set()
        self._ports: dict[str, Known] = {}
        self._by_address: dict[AddressKey, str] = {}
        self._by_instance: dict[InstanceId, set[str]] = {}
        self._refused: dict[str, tuple[Problem, float]] = {}
        self._touched: set[InstanceId] = set()
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
        """The networks of the published instances."""
        return frozenset(self._networks)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why ports seen lately get nothing, in order of their ids; at most a hundred."""
        return tuple(problem for _, (problem, _) in sorted(self._refused.items()))

    # Answers

    def put(self, port: NeutronPort, asked: float) -> Known | None:
        """Take in a port from an answer; a later answer stays.

        Args:
            port: As Neutron described it.
            asked: When Neutron was asked.

        Returns:
            What is known of it now: `None` where it does not serve.
        """
        known = self._ports.get(port.id)
        if known is not None and known.confirmed > asked:
            return known
        self._note_problem(port, asked)
        port = self._take_addresses(port, asked)
        if not port.serves:
            self._drop(port.id)
            return None
        if known is None:
            known = self._ports[port.id] = Known(port, asked, until=asked)
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

    def lose(self, port_id: str, asked: float, steady: float | None = None) -> None:
        """An answer did not have the port.

        Args:
            port_id: The port's.
            asked: When Neutron was asked.
            steady: Of an answer without any port: since when Neutron has had no outage. It is believed once another has
                none for some seconds; answers before that do not count.
        """
        known = self._ports.get(port_id)
        if known is not None and _is_gone(known, asked, steady):
            self._drop(port_id)

    def take_list(
        self, seen: dict[str, tuple[NeutronPort, float]], host: str | None, began: float
    ) -> None:
        """Have in force what is on the list of all ports, and doubt what is not on it any more.

        Args:
            seen: By id, with when Neutron was asked.
            host: Only ports bound there, or where that is not answered; `None` for all.
            began: When the list was begun.
        """
        listed = set()
        for port, asked in seen.values():
            if host is not None and port.host not in {None, host}:
                continue
            known = self.put(replace(port, host=None), asked)
            if known is not None:
                self.keep(known)
                listed.add(port.id)
        self._forget_refused(seen, began)
        for known in self:
            if known.listed and known.port.id not in listed and known.confirmed <= began:
                known.doubted = True

    def _forget_refused(self, present: Container[str], asked: float) -> None:
        for port_id, (_, seen) in tuple(self._refused.items()):
            if port_id not in present and seen <= asked:
                del self._refused[port_id]

    def _note_problem(self, port: NeutronPort, asked: float) -> None:
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

    # Lifetimes

    def keep(self, known: Known, until: float | None = None) -> None:
        """Have it in force: its guest has asked, until then; without a time it is on the list."""
        if until is None:
            known.listed = True
        else:
            known.until = max(known.until, until)
        if known.aside:
            known.aside = False
            self._touched.add(known.port.instance)

    def expire(self, now: float, aside_s: float) -> None:
        """Put aside what no guest has asked for in time, and forget what has been aside so long."""
        self._forget_refused((), now - _REFUSED_S)
        for known in self:
            if known.listed or known.until > now:
                continue
            if known.until + aside_s <= now:
                self._drop(known.port.id)
            elif not known.aside:
                known.aside = True
                self._touched.add(known.port.instance)

    def due(self, before: float) -> list[str]:
        """Ids of ports in use that were confirmed before then, and of doubted ones."""
        return [known.port.id for known in self if _is_due(known, before)]

    # Instances

    def changes(self) -> RecordSet:
        """The instances that differ from `published`, which then has them."""
        changed: dict[InstanceId, Instance | None] = {}
        for instance in self._touched:
            before = self.published.pop(instance, None)
            after = plan_instance(
                instance,
                (known.port for known in self.of(instance)),
                created_at=None if before is None else before.created_at,
            )
            if after is not None:
                self.published[instance] = after
            if before != after:
                changed[instance] = after
                self._networks.update(port.network for port in (after.ports if after else ()))
                self._networks.subtract(port.network for port in (before.ports if before else ()))
        if changed:
            self._networks = +self._networks
        self._touched.clear()
        return RecordSet.changes({}, changed)

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


class Routes:
    """Which port has an address behind a router; a route holds while its port has the address.

    A router's networks share no address among the subnets that it joins, but each may have other subnets. So an address
    behind it is known only while exactly one port has it in all of the router's networks.

    Attributes:
        unsaved: Keys of routes that came, changed or went; emptied by who saves them.
    """

    def __init__(self, known: KnownPorts) -> None:
        self.unsaved: set[AddressKey] = set()
        self._known = known
        self._routes: dict[AddressKey, Route] = {}

    def get(self, key: AddressKey) -> Route | None:
        """The route to a router's address."""
        return self._routes.get(key)

    def port_behind(self, key: AddressKey) -> Known | None:
        """The port that has a router's address, in force or aside."""
        route = self._routes.get(key)
        if route is None:
            return None
        known = self._known.at(*route.key)
        return known if known is not None and known.port.id == route.port else None

    def in_force(self) -> Iterator[tuple[AddressKey, Known]]:
        """Each router's address that holds, with its port."""
        for key in self._routes:
            known = self.port_behind(key)
            if known is not None and not known.aside:
                yield key, known

    def put(self, route: Route) -> None:
        """Take in a route; one that was confirmed later stays."""
        key = (route.router, route.key[1])
        before = self._routes.get(key)
        if before is not None and before.confirmed > route.confirmed:
            return
        self._routes[key] = route
        if before is None or (before.key, before.port) != (route.key, route.port):
            self.unsaved.add(key)

    def lose(self, key: AddressKey, asked: float, steady: float | None) -> None:
        """As `KnownPorts.lose`, for an address behind a router."""
        route = self._routes.get(key)
        if route is not None and _is_gone(route, asked, steady):
            self._drop(key)

    def prune(self) -> None:
        """Forget those whose port has gone, or has the address no more."""
        for key in tuple(self._routes):
            if self.port_behind(key) is None:
                self._drop(key)

    def due(self, before: float) -> dict[NetworkId, list[Route]]:
        """By router, those that were confirmed before then."""
        due: dict[NetworkId, list[Route]] = {}
        for route in self._routes.values():
            if route.confirmed <= before:
                due.setdefault(route.router, []).append(route)
        return due

    def _drop(self, key: AddressKey) -> None:
        del self._routes[key]
        self.unsaved.add(key)


def _is_due(known: Known, before: float) -> bool:
    if known.doubted:
        return True
    # Listed ports are as fresh as the list: it does not say whether they are in use.
    in_use = not known.listed or known.until > known.confirmed
    return in_use and known.confirmed <= before


def _keys(port: NeutronPort) -> frozenset[AddressKey]:
    addresses: Iterable[IpAddress] = port.addresses
    if port.mac is not None:
        addresses = (*addresses, link_local_of(port.mac))
    return frozenset((port.network, address) for address in addresses)


def _without(port: NeutronPort, address: IpAddress) -> NeutronPort:
    left = tuple(each for each in port.addresses if each != address)
    mac = None if port.mac is not None and mac_of(address) == port.mac else port.mac
    return replace(port, addresses=left, mac=mac)
