"""The listener `unix` as Neutron's proxies see it: requests on the socket, byte for byte."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.guest import Connection, Lost, Reply, connect_unix
from support.health import METRICS, ask_operator
from support.lab import Server, record, until, within
from support.nova_world import INSTANCES, NovaWorld, nova_instance, prepare_nova_world

NETWORK: Final = "X-Neutron-Network-ID"
ROUTER: Final = "X-Neutron-Router-ID"
OVN: Final = "X-OVN-Network-ID"

_TIMEOUT_S: Final = 10.0
SQUATTER: Final = """
import os, socket, sys
path = sys.argv[1]
os.umask(0)
if os.path.lexists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(16)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    if connection.recv(65536):
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 7\\r\\nConnection: close\\r\\n\\r\\nforeign")
    connection.close()
"""


@dataclass(frozen=True, slots=True)
class AgentSocket:
    """Who connects to the socket; in front of which network or router is said in each request."""

    path: Path

    def connect(self) -> Connection:
        return connect_unix(self.path, _TIMEOUT_S)

    def ask(self, address: str = "10.0.0.5") -> Reply:
        """One request as a proxy of the network `red` forwards it."""
        with self.connect() as connection:
            lines = (f"{NETWORK}: red", f"X-Forwarded-For: {address}")
            return connection.request("/openstack", headers=lines)

    def serves(self) -> bool:
        """Whether HAProxy answers here."""
        with contextlib.suppress(Lost), self.connect() as connection:
            # Nobody else says it like this.
            return b"exactly one of X-Neutron" in connection.request("/openstack").body
        return False


@contextlib.contextmanager
def squat(path: Path, *, namespace: str | None = None) -> Iterator[Server]:
    """Have a program listen at the path as neutron-metadata-agent does, after removing what is there.

    When it ends, its socket stays behind.

    Args:
        namespace: In which network namespace it runs; this process's own if not given.
    """
    before = () if namespace is None else within(namespace)
    process = subprocess.Popen(
        (*before, sys.executable, "-c", SQUATTER, str(path)),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    squatter = Server(process)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield squatter
    finally:
        squatter.stop()


@dataclass(slots=True)
class AgentWorld(NovaWorld):
    """A daemon with the listener `unix` in front of a recorder, and two networks whose addresses are the same.

    10.0.0.5 and 2001:db8::5 are instances whose documents Nova has.
    """

    path: Path
    first: Mapping[str, Mapping[str, object]]

    @property
    def socket(self) -> AgentSocket:
        return AgentSocket(self.path)

    def choose(self, **fields: object) -> Mapping[str, Mapping[str, object]]:
        """The settings of the beginning with others of the unix listener."""
        return {**self.first, "unix_listener": {**self.first["unix_listener"], **fields}}

    def take_over(self, **fields: object) -> None:
        """Change settings of the unix listener while the daemon runs."""
        self.daemon.reconfigure(self.choose(**fields))

    def report(self) -> Mapping[str, object]:
        """What `status` says of the unix listener."""
        found: Mapping[str, object] = self.daemon.status()["unix_listener"]
        return found

    def problem(self) -> str:
        """Why it is left out; empty while it is not."""
        return str(self.report()["problem"])

    def wait_serving(self) -> None:
        until(lambda: self.report()["serving"], within_s=5, what="the unix listener's service")
        assert self.socket.serves()

    def metric(self, name: str) -> int | None:
        """A figure of the controller's, if it tells of it."""
        lines = ask_operator(self.lab, "/metrics").text.splitlines()
        found = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
        return int(float(found[0])) if found else None

    def heal(self) -> None:
        """Have the settings of the beginning again, and service."""
        self.nova.forget()
        if self.daemon.settings is not self.first:
            self.daemon.reconfigure(self.first)
        self.wait_serving()
        self.daemon.wait_ready()


@contextlib.contextmanager
def open_agents() -> Iterator[AgentWorld]:
    """Such a daemon; all of it is gone at the end."""
    with prepare_nova_world() as made:
        lab, daemon = made.lab, made.daemon
        path = daemon.directory / "agents" / "metadata_proxy"
        settings: Mapping[str, Mapping[str, object]] = {
            **made.settings([{"url": made.nova.url}]),
            "resolver": {"hold_s": 0.2},
            "metrics": {**METRICS, "haproxy_listen": None},
            "unix_listener": {"enabled": True, "path": str(path)},
        }
        daemon.configure(settings)
        daemon.start(ready=False)
        networks = [record(name, {"namespace": lab.name(f"nowhere-{name}")}) for name in INSTANCES]
        daemon.put(networks, [nova_instance(name) for name in INSTANCES])
        yield AgentWorld({}, made.novas, lab, daemon, path, settings)
