"""Real namespaces, links and servers for tests, all of them gone afterwards.

Everything is named with a token of its own, so that tests may run beside each other and beside a
daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NetworkId
from imdsproxy.host.namespaces import (
    DEFAULT_DIRECTORY,
    NamespaceDirectory,
    NamespaceThread,
)
from support.patience import patience

__all__ = ["DEADLINE_S", "HostLab", "Server", "create_namespace", "eventually", "host_lab"]

DEADLINE_S: Final = 10.0
"""How long a test waits for what must come; what must come *soon* is measured."""

_IP: Final = "/usr/sbin/ip"

_SERVER: Final = """
import os, socket, sys
family, address, device, reuse, uid, word = sys.argv[1:7]
v6 = family == "6"
listener = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if reuse == "1":
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
if device:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
scope = socket.if_nametoindex(device) if v6 and device else 0
target = (address, 80, 0, scope) if v6 else (address, 80)
if int(uid):
    # A socket belongs to the user that makes it; ports below 1024 are opened for the namespace.
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w") as file:
        file.write("0")
    listener.close()
    os.setuid(int(uid))
    listener = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(target)
listener.listen()
print("ready", flush=True)
while True:
    connection, peer = listener.accept()
    connection.sendall(f"{word} {peer[0]}".encode())
    connection.close()
"""

_CLIENT: Final = """
import socket, sys
family, address, device = sys.argv[1:4]
v6 = family == "6"
client = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
client.settimeout(5)
scope = socket.if_nametoindex(device) if v6 else 0
client.connect((address, 80, 0, scope) if v6 else (address, 80))
print(client.recv(1000).decode())
"""


async def create_namespace(thread: NamespaceThread, name: str) -> NamespaceRef:
    return await thread.run(lambda: thread.create_now(name))


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass(slots=True)
class HostLab:
    """Makes things on the host and takes them away again.

    Attributes:
        token: In the name of each of them.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(2))
    _servers: list[Server] = field(default_factory=list)
    _namespaces: list[str] = field(default_factory=list)
    _links: list[str] = field(default_factory=list)

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

    def namespace(self, what: str, *, loopback: bool = True) -> str:
        """Make a namespace as `ip netns add` does, `lo` up."""
        name = self.name(what)
        self._namespaces.append(name)
        self.ip("netns", "add", name)
        if loopback:
            self.ip("-n", name, "link", "set", "lo", "up")
        return name

    def delete_namespace(self, name: str) -> None:
        """Remove a namespace as `ip netns del` does."""
        self.ip("netns", "del", name)

    def device(self, what: str, *, namespace: str | None = None, up: bool = True) -> str:
        """Make a device: a veth whose other end, `NAMEp`, lies beside it."""
        name = self.link_name(what)
        where = ("-n", namespace) if namespace else ()
        if namespace is None:
            self._links.append(name)
        self.ip(*where, "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
        self.ip(*where, "link", "set", f"{name}p", "up")
        if up:
            self.ip(*where, "link", "set", name, "up")
        return name

    def bridge(self, what: str, *, mtu: int = 1500) -> str:
        """Make a bridge, up."""
        name = self.link_name(what)
        self._links.append(name)
        self.ip("link", "add", name, "mtu", str(mtu), "type", "bridge")
        self.ip("link", "set", name, "up")
        return name

    def guest(self, what: str, bridge: str, address: str) -> str:
        """Make a namespace with a device `eth0` on a bridge, as a guest would be."""
        name = self.namespace(what)
        outer = self.link_name(f"{what}o")
        self._links.append(outer)
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
        family = "6" if ":" in address else "4"
        reuse = "1" if reuse_port else "0"
        arguments = (sys.executable, "-c", _SERVER, family, address, device, reuse, str(uid), word)
        process = subprocess.Popen((*self._inside(namespace), *arguments), stdout=subprocess.PIPE)
        server = Server(process)
        self._servers.append(server)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return server

    def ask(self, namespace: str, address: str, device: str = "eth0") -> str:
        """What a server answers to a client in a namespace."""
        family = "6" if ":" in address else "4"
        arguments = (sys.executable, "-c", _CLIENT, family, address, device)
        return self.run(*self._inside(namespace), *arguments).strip()

    def fetch(self, namespace: str) -> str:
        """The body of what a web server at 169.254.169.254 answers within a namespace."""
        curl = ("/usr/bin/curl", "-sS", "--max-time", "5", "http://169.254.169.254/")
        return self.run(*self._inside(namespace), *curl)

    def _inside(self, namespace: str | None) -> Sequence[str]:
        if namespace is None:
            return ()
        # Not `ip netns exec`: it would keep a copy of every mount of /run/netns alive.
        return ("/usr/bin/nsenter", f"--net={DEFAULT_DIRECTORY / namespace}", "--")

    def ip(self, *arguments: str) -> str:
        """Run ip(8)."""
        return self.run(_IP, *arguments)

    def run(self, *arguments: str) -> str:
        """Run a command to its end and give back what it printed."""
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Take everything away, what the code under test made under our `naming` included."""
        for server in self._servers:
            server.stop()
        directory = NamespaceDirectory()
        for name in directory.names():
            if name in self._namespaces or self.naming.is_namespace(name):
                directory.delete(name)
        links = {path.name for path in Path("/sys/class/net").iterdir()}
        for name in links & {*self._links} | {one for one in links if self.naming.is_link(one)}:
            # A veth may go by itself while its namespace does.
            with contextlib.suppress(AssertionError):
                self.ip("link", "del", name)


@contextlib.contextmanager
def host_lab() -> Iterator[HostLab]:
    """A lab that is gone at the end."""
    lab = HostLab()
    try:
        yield lab
    finally:
        lab.close()


async def eventually(
    holds: Callable[[], bool] | Callable[[], Awaitable[bool]], *, within_s: float = DEADLINE_S
) -> float:
    """Poll until something holds; how many seconds that took. Fails when it takes too long (see `patience`)."""
    start = time.monotonic()
    while True:
        answer = holds()
        if (await answer) if isinstance(answer, Awaitable) else answer:
            return time.monotonic() - start
        passed = time.monotonic() - start
        assert passed < within_s * patience(), f"not so after {passed:.2f} s"
        await asyncio.sleep(0.01)
