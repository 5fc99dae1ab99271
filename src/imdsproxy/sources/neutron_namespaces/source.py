"""The source `neutron_namespaces`: a network for each namespace of Neutron's agents, by events of the directory.

It reports no instances: those behind a router or in a network are looked up by the source `neutron`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import Network, NetworkId
from imdsproxy.core.observation import Observation, StrandedPort
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.namespace_watch import NamespaceWatch
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.sources.api import Publish, Reports
from imdsproxy.sources.neutron_namespaces.records import network_of
from imdsproxy.sources.settings import NeutronNamespacesSettings

_AUDIT_S: Final = 60.0
"""How often the directory is read without an event."""

_AGAIN_S: Final = 5.0


async def _nothing(_: Collection[NamespaceRef]) -> None:
    """Nothing is to be prepared."""


@dataclass(slots=True)
class NeutronNamespacesSource:
    """Namespaces as networks.

    Args:
        settings: Which namespaces.
        directory: Where they are.

    Attributes:
        prepare: Called with namespaces that have come, before their networks are reported.
    """

    name: ClassVar = "neutron_namespaces"
    settings: NeutronNamespacesSettings
    directory: NamespaceDirectory
    prepare: Callable[[Collection[NamespaceRef]], Awaitable[None]] = _nothing
    _reports: Reports = field(default_factory=partial(Reports, name))
    _networks: dict[NetworkId, Network] = field(default_factory=dict)

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """Never needed: no port is reported."""
        return port.problem(field="", file=None)

    async def run(self, publish: Publish) -> None:
        """Report until cancelled."""
        while True:
            try:
                await self._follow(publish)
            except HostRefused as error:
                problem = Problem("sources.neutron_namespaces", error.message, error.hint)
                self._report(publish, Observation(), problem)
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self, publish: Publish) -> None:
        with NamespaceWatch(self.directory) as watch:
            # After a failure some may have gone unnoticed.
            await self._take(publish, tuple(watch.current.values()), None)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._audit(watch))
                async for changes in watch.scans():
                    come = [ref for ref, came in changes if came]
                    await self._take(publish, come, [ref for ref, came in changes if not came])

    async def _audit(self, watch: NamespaceWatch) -> None:
        while True:
            await asyncio.sleep(_AUDIT_S)
            watch.look_again()

    async def _take(
        self, publish: Publish, come: Iterable[NamespaceRef], gone: Iterable[NamespaceRef] | None
    ) -> None:
        """Report what has come, and what is gone: all the rest where that is not known."""
        found = {ref: self._network_of(ref) for ref in come}
        await self.prepare([ref for ref, network in found.items() if network is not None])
        networks = {network.id: network for network in found.values() if network is not None}
        lost = self._networks.values() if gone is None else map(self._network_of, gone)
        removed = {network.id for network in lost if network is not None} - networks.keys()
        changed = {key: one for key, one in networks.items() if self._networks.get(key) != one}
        self._networks |= changed
        for network_id in removed:
            self._networks.pop(network_id, None)
        self._report(
            publish, Observation(networks=changed, networks_removed=tuple(sorted(removed)))
        )

    def _network_of(self, ref: NamespaceRef) -> Network | None:
        return network_of(ref.name, routers=self.settings.routers)

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
