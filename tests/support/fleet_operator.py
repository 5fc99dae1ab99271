"""Operators of a whole fleet, on a machine of the hubs' network: by the API, and by the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imdsproxy.api.client import FleetClient
from imdsproxy.fleet.members import Role, parse_invitation
from support.cli import Ran, run_main
from support.fleet_member import Member
from support.fleet_world import FleetHost, FleetWorld, HubProcess, fleet_world
from support.guest import Guest
from support.lab import until


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator.

    Attributes:
        certificate: What `imdsproxy fleet operator` makes.
        urls: Of the hubs that are asked, in this order.
    """

    world: FleetWorld
    certificate: Path
    urls: tuple[str, ...]

    @classmethod
    def new(
        cls, world: FleetWorld, name: str, role: Role = Role.OPERATOR, scope: str | None = None
    ) -> Operator:
        """An operator who asks all hubs."""
        return cls(world, world.operator(name, role, scope), tuple(world.urls))

    @property
    def client(self) -> FleetClient:
        """For use in `EtcdLab.entered`."""
        return FleetClient(self.certificate, timeout_s=30, urls=self.urls)

    def at(self, *hubs: HubProcess) -> Operator:
        """The same one, who asks only these hubs."""
        return replace(self, urls=tuple(hub.url for hub in hubs))

    def ask(self, method: str, path: str, body: object = None) -> Any:
        with self.world.etcd.entered():
            return self.client.request(method, path, body=body)

    def run(self, *words: str, stdin: str | None = None) -> Ran:
        """Run a command of the fleet."""
        hubs = (word for url in self.urls for word in ("--fleet", url))
        options = ("--fleet-certificate", str(self.certificate))
        with self.world.etcd.entered():
            return run_main(*hubs, *options, *words, stdin=stdin)

    def do(self, *words: str) -> Ran:
        """Run a command, which must succeed."""
        ran = self.run(*words)
        assert ran.status == 0, ran
        return ran

    def invite(self, host: str) -> str:
        """The invitation of a host."""
        return str(self.ask("POST", "/fleet/invitations", {"host": host})["invitation"])

    def join(self, host: str, place: str = "") -> Member:
        """A host that joins, with files of its own in the world's directory."""
        return Member.joined(self.world, parse_invitation(self.invite(host)), place)

    def connected(self) -> set[str]:
        """Hosts that a hub has a stream of."""
        return {one["host"] for one in self.ask("GET", "/fleet/hosts") if one["hub"] is not None}


@dataclass(frozen=True)
class ServedFleet:
    """A fleet of two hubs and a host `a`, and commands of its operator `anna`.

    Attributes:
        guest: It is the instance `web`, in network `blue`.
        stranger: A guest on `a` that no record has.
    """

    world: FleetWorld
    host: FleetHost
    guest: Guest
    stranger: Guest

    def __call__(
        self, *words: str, hub: int = 0, hubs: tuple[HubProcess, ...] = (), name: str = "anna"
    ) -> Ran:
        return self.operator(name).at(*hubs or (self.world.hubs[hub],)).run(*words)

    def operator(self, name: str = "anna") -> Operator:
        """An operator that there is."""
        pem = self.world.directory / f"{name}.pem"
        return Operator(self.world, pem, tuple(self.world.urls))

    @property
    def port(self) -> tuple[str, ...]:
        """The port of `web`, as options of a command."""
        return "-n", "blue", "--mac", self.guest.mac, "--address", self.guest.addresses[0]

    def have_web(self) -> None:
        """Have the instance, and wait until both hubs know it and the host follows one."""
        until(lambda: self.host.source["in_sync"], within_s=30, what="a hub that the host follows")
        if self("instance", "show", "web").status != 0:
            self.operator().do("network", "add", "blue", "--bridge", "blue")
            self.operator().do("instance", "add", "web", *self.port, "--host", "a")
        for hub in (0, 1):
            until(lambda: self("instance", "show", "web", hub=hub).status == 0, what="web")  # noqa: B023


@contextlib.contextmanager
def served_fleet(strangers_network: str = "blue") -> Iterator[ServedFleet]:
    """A fleet that is gone at the end; `have_web` adds its records."""
    with fleet_world() as world:
        world.operator("anna")
        host = world.add_host("a", networks=tuple({"blue", strangers_network}))
        stranger = host.lab.guest(strangers_network, 9)
        yield ServedFleet(world, host, host.lab.guest("blue"), stranger)
