"""A host whose OVN is databases alone, with guests and a daemon: rows are written, and guests ask.

The metadata port's device and the guests of a network are on a bridge of the host, in Open vSwitch's place.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.southbound import (
    OvsdbServer,
    SbNetwork,
    SbPort,
    Southbound,
    add_chassis_to_vswitch,
)
from support.daemon import Daemon
from support.guest import IPV4, Guest
from support.lab import Lab, batch, ip, until, within
from support.nova_world import SECRET
from support.ovn_world import ovn_settings
from support.reaper import reap, reap_at_the_end
from support.recorder import Recorder, say_whose


@dataclass(slots=True)
class SouthboundWorld:
    """The databases, a daemon, and Nova."""

    lab: Lab = field(default_factory=Lab)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="imdst-sb-")))
    servers: list[OvsdbServer] = field(default_factory=list)
    guests: dict[SbPort, Guest] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    nova: Recorder = field(init=False)
    daemon: Daemon = field(init=False)
    vswitch: OvsdbServer = field(init=False)
    sb: OvsdbServer = field(init=False)
    rows: Southbound = field(init=False)

    def open(self) -> None:
        """Start all but the daemon."""
        reap_at_the_end(directory=self.directory)
        reap_at_the_end(namespaces=self._namespaces)
        nova = Recorder(namespace=self.lab.host, secret=SECRET, default=say_whose)
        self.nova = self._stack.enter_context(nova)
        self.daemon = Daemon(self.lab)
        self._stack.callback(self.daemon.close)
        self.vswitch = self.server("Open_vSwitch", "vswitch").create().start()
        self.sb = self.server("OVN_Southbound", "sb").create().start()
        self.rows = self.rows_of(self.sb)
        self.rows.begin()
        with contextlib.closing(self.vswitch.client()) as client:
            add_chassis_to_vswitch(client, self.sb.remote)

    @property
    def _namespaces(self) -> str:
        return f"ovnmeta-{self.lab.token}"

    def server(
        self, database: str, name: str, *remotes: str, options: Sequence[str] = ()
    ) -> OvsdbServer:
        """A server on the host, not started yet."""
        place = within(self.lab.host)
        made = OvsdbServer(self.directory, database, name, remotes, options, place)
        self.servers.append(made)
        return made

    def rows_of(self, server: OvsdbServer) -> Southbound:
        """Who writes into a server that runs."""
        return Southbound(self._stack.enter_context(contextlib.closing(server.client())))

    def reopen(self, server: OvsdbServer) -> None:
        """Write on into a server that was started again with its rows."""
        self.rows.client = self._stack.enter_context(contextlib.closing(server.client()))

    def name_southbound(self, remote: str) -> None:
        """Have Open vSwitch's database name another Southbound database, as `ovs-vsctl set` does."""
        mutations = [
            ["external_ids", "delete", ["set", ["ovn-remote"]]],
            ["external_ids", "insert", ["map", [["ovn-remote", remote]]]],
        ]
        change = {"op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": mutations}
        with contextlib.closing(self.vswitch.client()) as client:
            client.transact("Open_vSwitch", change)

    def spare_address(self, port: SbPort) -> str:
        """Have a port's guest own an address that no port has."""
        address = f"10.0.99.{port.number}"
        ip("-n", self.guests[port].namespace, "address", "replace", f"{address}/16", "dev", "eth0")
        return address

    def network(self, number: int) -> SbNetwork:
        return SbNetwork(number, self.lab.token)

    def add_network(self, number: int, ports: int = 1) -> list[SbPort]:
        """Write a network with so many ports that are bound here."""
        network = self.network(number)
        self.rows.add_networks([network])
        made = [SbPort(network, one) for one in range(ports)]
        for port in made:
            self.rows.add_port(port)
        return made

    def start_daemon(self, *, ready: bool = True, **ovn: object) -> None:
        """Start it, with these settings of the source."""
        secret = self.daemon.write_secret("secret", SECRET)
        settings = ovn_settings(self.vswitch.remote, nova=self.nova.url, secret=secret, **ovn)
        # Whom no record claims gets its 404 or 503 at once.
        self.daemon.configure({**settings, "resolver": {"hold_s": 0.2}})
        self.daemon.start(ready=ready)

    def plug(self, port: SbPort) -> Guest:
        """Plug a port's guest in; its network's namespace is waited for."""
        outer = port.network.devices[0]
        bridge = f"br{port.network.number}"
        until(lambda: outer in self.lab.host_links(), what=f"device {outer}")
        links = self.lab.host_links()
        lines = [f"link set {outer} master {bridge}"]
        if bridge not in links:
            kind = "type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
            lines = [f"link add {bridge} {kind}", f"link set {bridge} up", *lines]
        name = f"vm-{port.network.number}-{port.number}"
        namespace = self.lab.namespace(name)
        device = f"vm{port.network.number}x{port.number}"
        peer = f"peer name eth0 address {port.mac} netns {namespace}"
        lines += [
            f"link add {device} master {bridge} type veth {peer}",
            f"link set {device} up",
        ]
        batch(self.lab.host, lines)
        batch(
            namespace,
            [
                "link set eth0 up",
                f"address add {port.address}/16 dev eth0",
                "route add 169.254.169.254/32 via 10.0.0.2",
            ],
        )
        guest = Guest(name, namespace, port.network.id, port.mac, (port.address,))
        self.guests[port] = guest
        return guest

    def asks_as(self, port: SbPort, *, to: str = IPV4, source: str | None = None) -> str:
        """The instance that Nova is asked for when a port's guest asks; the status where it is not asked."""
        return self.guests[port].reads("/openstack", to=to, source=source, timeout_s=5)

    def wait_asks_as(self, port: SbPort, expected: str) -> None:
        until(lambda: self.asks_as(port) == expected, what=f"{port.id} is {expected}")

    def source(self) -> Mapping[str, object]:
        """What the daemon's status says of the source."""
        found: Mapping[str, object] = self.daemon.status()["sources"][0]
        return found

    def close(self) -> None:
        self._stack.close()
        for server in self.servers:
            server.kill()
        reap((self.directory,), (self._namespaces,))
        self.lab.close()


@contextlib.contextmanager
def open_southbound() -> Iterator[SouthboundWorld]:
    """Running databases and a daemon that is not started; all of it is gone at the end."""
    world = SouthboundWorld()
    try:
        world.open()
        yield world
    finally:
        world.close()
