"""Known ports, their addresses behind routers, and the instances made from the ports in force."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.model.addresses import mac_of
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, NetworkId
from imdsproxy.model.observation import AddressKey, Observation
from imdsproxy.sources.neutron.ports import NeutronPort, plan_instance

_MAX_REFUSED: Final = 100
_REFUSED_S: Final = 300.0
"""Seconds for which a refused port is reported after it was seen, because it is not queried again."""

_PATIENCE_S: Final = 3.0
"""Seconds for which answers without any port must repeat before they count. A starting Neutron gives such answers:
while one of its threads reads the policy rules, the others omit all ports and answer 200."""

EntryKey: TypeAlias = str | AddressKey
"""A port's id, or a router's id and an address behind it."""


@dataclass(slots=True)
class Known:
    """Port as Neutron last described it, with monotonic times.

    Attributes:
        until: End of the time for which the guest's last request keeps the port in force.
        listed: Whether the port is on the list of all ports, which keeps it in force even if its guest does not ask.
        aside: Whether its time is over. It is kept up to date for a while, in case its guest asks again.
        doubted: Whether it disappeared from the list: it was deleted or moved, or the list was incomplete. It is due at
            once.
        unseen: Time of the first answer that had no port at all.
    """

    port: NeutronPort
    confirmed: float
    until: float
    listed: bool = False
    aside: bool = False
    doubted: bool = False
    unseen: float | None = None

    def is_due(self, before: float) -> bool:
        """Return whether to query the port again: it is doubted, or in use and was confirmed before then."""
        # A listed port that its guest has not used since is refreshed by the next list.
        in_use = not self.listed or self.until > self.confirmed
        return self.doubted or (in_use and self.confirmed <= before)


@dataclass(slots=True)
class Route:
    """Port that has an address behind a router; `confirmed` and `unseen` as in `Known`."""

    network: NetworkId
    port: str
    confirmed: float
    unseen: float | None = None


@dataclass(slots=True)
class KnownPorts:
    """Ports by id and by address, and routes: the addresses behind routers.

    An address is unique in a network: it belongs to the port that was confirmed last, and the other port is out of
    date. The subnets that a router joins share no address, but its networks may have other subnets. So a route exists
    only if exactly one port in all networks of the router has the address, and is valid while that port has it.

    Attributes:
        unsaved: New and changed entries, and `None` for removed ones; the caller that saves them empties it.
    """

    ports: dict[str, Known] = field(default_factory=dict)
    routes: dict[AddressKey, Route] = field(default_factory=dict)
    published: dict[InstanceId, Instance] = field(default_factory=dict)
    unsaved: dict[EntryKey | None, NeutronPort | Route | float | None] = field(default_factory=dict)
    _by_address: dict[AddressKey, str] = field(default_factory=dict)
    _by_instance: dict[InstanceId, set[str]] = field(default_factory=dict)
    _refused: dict[str, tuple[Problem, float]] = field(default_factory=dict)
    _touched: set[InstanceId] = field(default_factory=set)
    _networks: Counter[NetworkId] = field(default_factory=Counter)

    def at(self, network: NetworkId, address: IpAddress) -> Known | None:
        return self.ports.get(self._by_address.get((network, address), ""))

    def behind(self, router: NetworkId, address: IpAddress) -> Known | None:
        route = self.routes.get((router, address))
        if route is None or self._by_address.get((route.network, address)) != route.port:
            return None
        return self.ports[route.port]

    def of(self, instance: InstanceId) -> tuple[NeutronPort, ...]:
        ports = (self.ports[each] for each in sorted(self._by_instance.get(instance, ())))
        return tuple(each.port for each in ports if not each.aside)

    @property
    def networks(self) -> frozenset[NetworkId]:
        return frozenset(self._networks)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Problems of recently seen ports that are not served, in order of their ids; at most a hundred."""
        return tuple(problem for _, (problem, _) in sorted(self._refused.items()))

    # Answers

    def put(self, port: NeutronPort, asked: float) -> Known | None:
        """Store a port from an answer, unless a later one is known. Return the port, if it serves."""
        known = self.ports.get(port.id)
        if known is not None and known.confirmed > asked:
            return known
        problem = port.problem()
        self._refused.pop(port.id, None)
        if problem is not None and len(self._refused) < _MAX_REFUSED:
            self._refused[port.id] = (problem, asked)
        for network, address in port.keys:
            holder = self.at(network, address)
            if holder is None or holder.port.id == port.id:
                continue
            if holder.confirmed > asked:
                port = _without(port, address)
            else:
                self._replace(holder, _without(holder.port, address))
        if not port.serves:
            self._drop(port.id)
            return None
        if known is None:
            known = self.ports[port.id] = Known(port, asked, until=asked)
            self._index(port)
        known.confirmed, known.unseen = asked, None
        known.listed, known.doubted = known.listed and not known.doubted, False
        if known.port != port:
            self._replace(known, port)
        return known

    def put_route(
        self, router: NetworkId, address: IpAddress, port: NeutronPort, asked: float
    ) -> None:
        """Store the port that has an address behind the router, unless a later answer is known."""
        key = router, address
        before = self.routes.get(key)
        if before is not None and before.confirmed > asked:
            return
        route = self.routes[key] = Route(port.network, port.id, asked)
        if before is None or (before.network, before.port) != (port.network, port.id):
            self.unsaved[key] = route

    def lose(self, key: EntryKey, asked: float, steady: float | None = None) -> None:
        """Remove a port that an answer did not have, or a route that no longer has exactly one port.

        Args:
            steady: For an answer without any port, the end of Neutron's last outage. Such answers must repeat for some
                seconds before they count; answers from before that time are ignored.
        """
        entry = self.ports.get(key) if isinstance(key, str) else self.routes.get(key)
        if entry is None or entry.confirmed > asked:
            return
        if steady is not None:
            if entry.unseen is None or entry.unseen < steady:
                entry.unseen = asked
            if asked - entry.unseen < _PATIENCE_S:
                return
        self._drop(key)

    def take_list(
        self, seen: Mapping[str, tuple[NeutronPort, float]], host: str | None, began: float
    ) -> None:
        """Put all listed ports in force, and doubt ports that disappeared from the list.

        Args:
            host: Accept only ports bound to this host or without a host; `None` for all.
        """
        listed = set()
        for port, asked in seen.values():
            if host is not None and port.host not in {None, host}:
                continue
            known = self.put(replace(port, host=None), asked)
            if known is not None:
                known.listed = True
                self._put_aside(known, aside=False)
                listed.add(port.id)
        self._forget_refused(seen, began)
        for port_id, known in self.ports.items():
            if known.listed and port_id not in listed and known.confirmed <= began:
                known.doubted = True

    def _forget_refused(self, present: Container[str], asked: float) -> None:
        for port_id, (_, seen) in tuple(self._refused.items()):
            if port_id not in present and seen <= asked:
                del self._refused[port_id]

    # Lifetimes

    def keep(self, known: Known, until: float) -> None:
        known.until = max(known.until, until)
        self._put_aside(known, aside=False)

    def expire(self, now: float, aside_s: float) -> None:
        """Put expired ports aside; forget ports that have been aside for `aside_s`, and their routes."""
        self._forget_refused((), now - _REFUSED_S)
        for port_id, known in tuple(self.ports.items()):
            if known.listed or known.until > now:
                continue
            if known.until + aside_s <= now:
                self._drop(port_id)
            else:
                self._put_aside(known, aside=True)
        for key in tuple(self.routes):
            if self.behind(*key) is None:
                self._drop(key)

    def _put_aside(self, known: Known, *, aside: bool) -> None:
        if known.aside != aside:
            known.aside = aside
            self._touched.add(known.port.instance)

    # Instances

    def changes(self) -> Observation:
        changed: dict[InstanceId, Instance | None] = {}
        for instance in self._touched:
            before = self.published.pop(instance, None)
            created_at = None if before is None else before.created_at
            after = plan_instance(instance, self.of(instance), created_at=created_at)
            if after is not None:
                self.published[instance] = after
            if before != after:
                changed[instance] = after
                self._networks.update(port.network for port in (after.ports if after else ()))
                self._networks.subtract(port.network for port in (before.ports if before else ()))
        if changed:
            self._networks = +self._networks
        self._touched.clear()
        return Observation.of_changes({}, changed)

    def _drop(self, key: EntryKey) -> None:
        if not isinstance(key, str):
            del self.routes[key]
            self.unsaved[key] = None
        elif (known := self.ports.pop(key, None)) is not None:
            self._unindex(known.port)

    def _replace(self, known: Known, port: NeutronPort) -> None:
        self._unindex(known.port)
        known.port = port
        self._index(port)

    def _index(self, port: NeutronPort) -> None:
        self._by_address.update(dict.fromkeys(port.keys, port.id))
        self._by_instance.setdefault(port.instance, set()).add(port.id)
        self._touched.add(port.instance)
        self.unsaved[port.id] = port

    def _unindex(self, port: NeutronPort) -> None:
        for key in port.keys:
            del self._by_address[key]
        ports = self._by_instance[port.instance]
        ports.discard(port.id)
        if not ports:
            del self._by_instance[port.instance]
        self._touched.add(port.instance)
        self.unsaved[port.id] = None


def _without(port: NeutronPort, address: IpAddress) -> NeutronPort:
    left = tuple(each for each in port.addresses if each != address)
    mac = None if port.mac is not None and mac_of(address) == port.mac else port.mac
    return replace(port, addresses=left, mac=mac)
