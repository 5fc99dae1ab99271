"""Watcher of the HAProxy configurations that Neutron's DHCP agent writes for networks with metadata.

So the agent decides by its settings and by the network's routers and subnets, whether or not its HAProxies run. An
agent that starts rewrites each file, so a deleted file still counts for a while.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imdsproxy.errors import refusing
from imdsproxy.host.inotify import Watch, place_of
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.process import PROC
from imdsproxy.model.entities import Network
from imdsproxy.sources.neutron_namespaces.records import DhcpProxy, parse_proxy

_AUDIT_S: Final = 60.0
_GRACE_S: Final = 60.0
_AGAIN_S: Final = 0.5
_WHAT: Final = "read the configurations of Neutron's proxies"


@dataclass(slots=True)
class DhcpProxies:
    """Networks for which the DHCP agent wants metadata.

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
                    await watch.changes(_AGAIN_S if self._unplaced or self._gone else _AUDIT_S)

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
