"""The source `neutron_namespaces`: a network for each namespace of Neutron's agents, by events of the directory.

It reports no instances: the source `neutron` looks up those behind a router or in a network.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from imdsproxy.config.sources import NeutronNamespacesSettings
from imdsproxy.errors import HostRefused, Problem, refusing
from imdsproxy.host.inotify import Watch, place_of
from imdsproxy.host.namespace_watch import NamespaceWatch
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.process import PROC
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.entities import Network, NetworkId
from imdsproxy.model.observation import Observation, StrandedPort
from imdsproxy.sources.api import Publish, Reports
from imdsproxy.sources.neutron_namespaces.records import (
    DhcpProxy,
    parse_proxy,
    router_network,
    router_of,
)

_AUDIT_S: Final = 60.0
"""Seconds after which a directory is read again without an event."""

_AGAIN_S: Final = 5.0
_PROXIES: Final = "ns-metadata-proxy"
_GRACE_S: Final = 60.0
_UNPLACED_S: Final = 0.5
_WHAT: Final = "read the configurations of Neutron's proxies"


@dataclass(slots=True)
class DhcpProxies:
    """Networks for which the DHCP agent wants metadata, by the HAProxy configurations that it writes.

    So the agent decides by its settings and by the network's routers and subnets, whether or not its HAProxies run. An
    agent that starts rewrites each file, so a deleted file still counts for a while.

    Args:
        directory: Directory of the configurations: `ns-metadata-proxy` in the agent's state path. It may be missing.
    """

    directory: Path
    namespaces: NamespaceDirectory
    monotonic: Callable[[], float] = time.monotonic
    networks: dict[str, Network] = field(default_factory=dict)
    _gone: dict[str, float] = field(default_factory=dict)
    _unplaced: bool = False

    async def read(self) -> bool:
        """Read the files. Return whether `networks` changed. Raises `HostRefused`: the files cannot be read."""
        with refusing(_WHAT):
            found = await asyncio.to_thread(self._read)
        before, self.networks = self.networks, self._with_gone(found)
        return self.networks != before

    async def changes(self) -> AsyncIterator[None]:
        """Yield after each change of `networks`, until cancelled.

        Raises:
            HostRefused: The files cannot be read or watched.
        """
        while True:
            place = place_of(self.directory)
            with refusing(_WHAT), contextlib.closing(Watch([place])) as watch:
                while place_of(self.directory) == place:
                    if await self.read():
                        yield
                    await watch.changes(_UNPLACED_S if self._unplaced or self._gone else _AUDIT_S)

    def _with_gone(self, found: Mapping[str, Network]) -> dict[str, Network]:
        now, gone = self.monotonic(), self.networks.keys() - found.keys()
        until = {name: self._gone.get(name, now + _GRACE_S) for name in gone}
        self._gone = {name: end for name, end in until.items() if end > now}
        return {**{name: self.networks[name] for name in self._gone}, **found}

    def _read(self) -> dict[str, Network]:
        found: dict[str, Network] = {}
        unplaced: list[DhcpProxy] = []
        for path in sorted(self.directory.glob("*.conf")):
            with contextlib.suppress(FileNotFoundError):
                proxy = parse_proxy(path.read_text(errors="replace"))
                if proxy is None:
                    continue
                if proxy.namespace is None:
                    unplaced.append(proxy)
                else:
                    found[proxy.namespace] = proxy.network_in(proxy.namespace)
        self._unplaced = False
        names = (
            {ref.inode: name for name, ref in self.namespaces.namespaces().items()}
            if unplaced
            else {}
        )
        for proxy in unplaced:
            name = names.get(_namespace_of(proxy))
            self._unplaced = self._unplaced or name is None
            if name is not None:
                found[name] = proxy.network_in(name)
        return found


def _namespace_of(proxy: DhcpProxy) -> int:
    """Return the inode of the namespace of a proxy's process; 0 if it does not run."""
    try:
        pid = int(Path(proxy.pid_file).read_text())
        return (PROC / str(pid) / "ns" / "net").stat().st_ino
    except (OSError, ValueError):
        return 0


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
