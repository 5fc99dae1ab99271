"""The source `neutron_namespaces`: a network for each namespace of Neutron's agents, by events of the directory.

It reports no instances: the source `neutron` looks up those behind a router or in a network.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

from imdsproxy.config.sources import NeutronNamespacesSettings
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.namespace_watch import NamespaceWatch
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.entities import Network, NetworkId
from imdsproxy.model.observation import Observation, StrandedPort
from imdsproxy.sources.api import Publish, Reports
from imdsproxy.sources.neutron_namespaces.proxies import DhcpProxies
from imdsproxy.sources.neutron_namespaces.records import router_network, router_of

_AUDIT_S: Final = 60.0
"""Seconds after which the directory is read again without an event."""

_AGAIN_S: Final = 5.0
_PROXIES: Final = "ns-metadata-proxy"


async def _nothing(_: Collection[NamespaceRef]) -> None: ...


@dataclass(slots=True)
class NeutronNamespacesSource:
    """Source of namespaces as networks.

    Attributes:
        prepare: Called with new routers' namespaces before they are reported.
    """

    name: ClassVar = "neutron_namespaces"
    settings: NeutronNamespacesSettings
    directory: NamespaceDirectory
    prepare: Callable[[Collection[NamespaceRef]], Awaitable[None]] = _nothing
    _reports: Reports = field(default_factory=partial(Reports, name))
    _networks: dict[NetworkId, Network] = field(default_factory=dict)

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """Return the plain problem. It never occurs, because the source reports no ports."""
        return port.problem(field="", file=None)

    async def run(self, publish: Publish) -> None:
        while True:
            try:
                await self._follow(publish)
            except* HostRefused as refused:
                problem = Problem("sources.neutron_namespaces", str(refused.exceptions[0]))
                self._report(publish, Observation(), problem)
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self, publish: Publish) -> None:
        proxies = DhcpProxies(self.settings.state_path / _PROXIES, self.directory)
        if self.settings.dhcp:
            await proxies.read()
        with NamespaceWatch(self.directory) as watch:
            await self._settle(publish, watch, proxies, watch.current.values())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._audit(watch))
                if self.settings.dhcp:
                    group.create_task(self._follow_proxies(publish, watch, proxies))
                async for changes in watch.scans():
                    come = [ref for ref, came in changes if came]
                    await self._settle(publish, watch, proxies, come)

    async def _audit(self, watch: NamespaceWatch) -> None:
        while True:
            await asyncio.sleep(_AUDIT_S)
            watch.look_again()

    async def _follow_proxies(
        self, publish: Publish, watch: NamespaceWatch, proxies: DhcpProxies
    ) -> None:
        async for _ in proxies.changes():
            await self._settle(publish, watch, proxies, ())

    async def _settle(
        self,
        publish: Publish,
        watch: NamespaceWatch,
        proxies: DhcpProxies,
        come: Collection[NamespaceRef],
    ) -> None:
        if self.settings.routers:
            await self.prepare([ref for ref in come if router_of(ref.name) is not None])
        found: dict[NetworkId, Network] = {}
        for name in watch.current:
            network = proxies.networks.get(name)
            if network is None and self.settings.routers:
                network = router_network(name)
            if network is not None:
                found[network.id] = network
        changed = {key: one for key, one in found.items() if self._networks.get(key) != one}
        removed = tuple(sorted(self._networks.keys() - found.keys()))
        self._networks = found
        self._report(publish, Observation(networks=changed, networks_removed=removed))

    def _report(
        self, publish: Publish, changes: Observation, problem: Problem | None = None
    ) -> None:
        observation = self._reports.next(
            changes,
            lambda: Observation(networks=dict(self._networks)),
            in_sync=problem is None,
            problems=() if problem is None else (problem,),
        )
        if observation is not None:
            publish(observation)
