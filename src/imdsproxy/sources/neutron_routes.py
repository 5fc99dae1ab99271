"""What is known of guests that come through a router: which port has an address behind it.

A router's networks share no address among the subnets that it joins, but each may have others. So an address
behind it is somebody's only while one port, and no second, has it in all of its networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imdsproxy.core.observation import AddressKey

if TYPE_CHECKING:
    from imdsproxy.core.model import NetworkId
    from imdsproxy.sources.neutron_known import Known, KnownPorts

__all__ = ["Route", "Routes"]


@dataclass(slots=True)
class Route:
    """A router's address, found to be a port's.

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


class Routes:
    """Routes by router and address; each holds while its port has the address."""

    def __init__(self, known: KnownPorts) -> None:
        self._known = known
        self._routes: dict[AddressKey, Route] = {}
        self.unsaved = False

    def __len__(self) -> int:
        return len(self._routes)

    def __iter__(self) -> Iterator[Route]:
        return iter(tuple(self._routes.values()))

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
        """It was found so."""
        key = (route.router, route.key[1])
        before = self._routes.get(key)
        if before is not None and before.confirmed > route.confirmed:
            return
        self._routes[key] = route
        if before is None or (before.key, before.port) != (route.key, route.port):
            self.unsaved = True

    def remove(self, key: AddressKey, asked: float) -> None:
        """It was not so when Neutron was asked then."""
        route = self._routes.get(key)
        if route is not None and route.confirmed <= asked:
            del self._routes[key]
            self.unsaved = True

    def miss(
        self, key: AddressKey, asked: float, patience_s: float, *, steady: float = -math.inf
    ) -> None:
        """An answer had no port at all: believed once another says so that was asked for so much later.

        Args:
            key: The router, and the address behind it.
            asked: When.
            patience_s: How much.
            steady: Since when Neutron has had no outage: what it left out before that does not count.
        """
        route = self._routes.get(key)
        if route is None or route.confirmed > asked:
            return
        if route.unseen is None or route.unseen < steady:
            route.unseen = asked
        elif asked - route.unseen >= patience_s:
            self.remove(key, asked)

    def prune(self) -> None:
        """Forget those whose port has gone, or has the address no more."""
        lost = [key for key in self._routes if self.port_behind(key) is None]
        for key in lost:
            del self._routes[key]
        self.unsaved = self.unsaved or bool(lost)

    def due(self, before: float) -> dict[NetworkId, list[Route]]:
        """By router, those that were confirmed before then."""
        due: dict[NetworkId, list[Route]] = {}
        for route in self._routes.values():
            if route.confirmed <= before:
                due.setdefault(route.router, []).append(route)
        return due

    def restore(self, routes: Iterable[Route]) -> None:
        """Take over what a process before had."""
        self._routes.update(((route.router, route.key[1]), route) for route in routes)
