"""Real namespaces, links and servers for tests, all of them gone afterwards.

Everything is named with a token of its own, so that tests may run beside each other and beside a
daemon.
"""

import contextlib
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.state import NamespaceRef
from imdsproxy.model.entities import NetworkId
from support.guest import inside
from support.lab import Server, ip, run, serve, within


async def create_namespace(thread: NamespaceThread, name: str) -> NamespaceRef:
    return await thread.run(lambda: thread.create_now(name))


@dataclass(slots=True)
class HostLab:
    """Makes things on the host and takes them away again.

    Attributes:
        token: In the name of each of them.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(2))
    _servers: list[Server] = field(default_factory=list)
    _namespaces: list[str] = field(default_factory=list)

    @property
    def naming(self) -> Naming:
        """Names for what the code under test makes, apart from everybody else's."""
        return Naming(f"imdst{self.token[:2]}")

    def name(self, what: str) -> str:
        """The name of a namespace of this lab."""
        return f"imdst-{self.token}-{what}"

    def own_namespace(self, network: str) -> str:
        """The name under which the code under test makes a network's namespace."""
        return self.naming.namespace(NetworkId(network))

    def link_name(self, what: str) -> str:
        """The name of a link of this lab."""
        return f"imdst{self.token}{what}"

    def namespace(self, what: str) -> str:
        """Make a namespace as `ip netns add` does, `lo` up."""
        name = self.name(what)
        self._namespaces.append(name)
        self.ip("netns", "add", name)
        self.ip("-n", name, "link", "set", "lo", "up")
        return name

    def delete_namespace(self, name: str) -> None:
        """Remove a namespace as `ip netns del` does."""
        self.ip("netns", "del", name)

    def device(self, what: str, *, namespace: str | None = None) -> str:
        """Make a device: a veth whose other end, `NAMEp`, lies beside it."""
        name = self.link_name(what)
        where = ("-n", namespace) if namespace else ()
        self.ip(*where, "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
        self.ip(*where, "link", "set", f"{name}p", "up")
        self.ip(*where, "link", "set", name, "up")
        return name

    def bridge(self, what: str, *, mtu: int = 1500) -> str:
        """Make a bridge, up."""
        name = self.link_name(what)
        self.ip("link", "add", name, "mtu", str(mtu), "type", "bridge")
        self.ip("link", "set", name, "up")
        return name

    def guest(self, what: str, bridge: str, address: str) -> str:
        """Make a namespace with a device `eth0` on a bridge, as a guest would be."""
        name = self.namespace(what)
        outer = self.link_name(f"{what}o")
        self.ip(
            *("link", "add", outer, "master", bridge, "up", "type", "veth"),
            *("peer", "name", "eth0", "netns", name),
        )
        self.ip("-n", name, "link", "set", "eth0", "up")
        self.ip("-n", name, "addr", "add", address, "dev", "eth0")
        self.ip("-n", name, "route", "add", "169.254.169.254/32", "dev", "eth0")
        return name

    def address(self, namespace: str | None, address: str, device: str, *options: str) -> None:
        """Add an address."""
        where = ("-n", namespace) if namespace else ()
        self.ip(*where, "addr", "add", address, "dev", device, *options)

    def serve(
        self,
        namespace: str | None,
        address: str,
        *,
        device: str = "",
        reuse_port: bool = False,
        uid: int = 0,
        word: str = "foreign",
    ) -> Server:
        """Start a server on port 80 that answers its word and the client's address."""
        words = f"{word} PEER"
        place = () if namespace is None else within(namespace)
        server = serve(place, address, device, reuse_port=reuse_port, uid=uid, answer=words)
        self._servers.append(server)
        return server

    def ask(self, namespace: str, address: str, device: str = "eth0") -> str:
        """What a server answers to a client in a namespace."""

        def read() -> str:
            v6 = ":" in address
            with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET) as client:
                client.settimeout(5)
                client.connect(
                    (address, 80, 0, socket.if_nametoindex(device)) if v6 else (address, 80)
                )
                return client.recv(1000).decode().strip()

        return inside(namespace, read)

    def ip(self, *arguments: str) -> str:
        """Run ip(8)."""
        return ip(*arguments)

    def run(self, *arguments: str) -> str:
        """Run a command to its end and give back what it printed."""
        return run(*arguments)

    def close(self) -> None:
        """Take everything away, what the code under test made under our `naming` included."""
        for server in self._servers:
            server.stop()
        directory = NamespaceDirectory()
        for name in directory.names():
            if name in self._namespaces or self.naming.is_namespace(name):
                directory.delete(name)
        links = {path.name for path in Path("/sys/class/net").iterdir()}
        for name in links:
            # A veth may go by itself while its namespace does, or its other end.
            with contextlib.suppress(AssertionError):
                if name.startswith(self.link_name("")) or self.naming.is_link(name):
                    self.ip("link", "del", name)


@contextlib.contextmanager
def host_lab() -> Iterator[HostLab]:
    """A lab that is gone at the end."""
    lab = HostLab()
    try:
        yield lab
    finally:
        lab.close()
