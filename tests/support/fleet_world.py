"""A whole fleet: etcd of three members, hubs, and hosts with their networks, each in a namespace as on a machine.

Records are written as hubs write them, unless a test has an operator write them through a hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    StoredHost,
    StoredInstance,
    StoredNetwork,
    host_key,
    render_host,
)
from imdsproxy.fleet.members import Role, spell_serial
from imdsproxy.host.certificates import make_key, render_certificate, render_key
from imdsproxy.hub.pki.files import (
    FleetFiles,
    HubNames,
    add_hub,
    init_fleet,
    make_operator_pem,
    write_secret,
)
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed
from imdsproxy.model.entities import InstanceId, NetworkId
from support.daemon import Daemon
from support.etcd_lab import EtcdLab
from support.lab import Lab, RecordMapping, until, within
from support.wall_clock import WallClock

PORT: Final = 8469
METRICS_PORT: Final = 9467
_PROGRAM: Final = (sys.executable, "-m", "imdsproxy")
_DAY_S: Final = 86_400

_T = TypeVar("_T")


def _host_address(number: int) -> str:
    return f"10.250.0.{30 + number}"


@dataclass(slots=True)
class HubProcess:
    """`imdsproxy hub`."""

    name: str
    namespace: str
    address: str
    directory: Path
    clock: WallClock | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://{self.address}:{PORT}"

    @property
    def config(self) -> Path:
        return self.directory / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def start(self, *, ready: bool = True) -> None:
        """Start it, and wait until it serves."""
        before = self._starts()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                (*within(self.namespace), *_PROGRAM, "--config", str(self.config), "hub"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "LANG": "C.UTF-8",
                    **({} if self.clock is None else self.clock.environment),
                },
            )
        if ready:
            until(lambda: self._starts() > before, within_s=30, what=f"{self.name} is ready")

    def _starts(self) -> int:
        return self.log.read_text().count('"message": "ready"') if self.log.exists() else 0

    def end(self, signal: int = 15) -> int:
        """Have it end; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal)
        return self.process.wait(timeout=30)


@dataclass(slots=True)
class FleetHost:
    """A host of the fleet: its lab, its daemon, and its certificate."""

    name: HostId
    lab: Lab
    daemon: Daemon
    serial: str
    clock: WallClock | None = None

    @property
    def source(self) -> Mapping[str, Any]:
        """What its daemon says of the fleet."""
        (found,) = (one for one in self.daemon.status()["sources"] if one["name"] == "fleet")
        return dict(found)

    @property
    def certificate(self) -> Path:
        return self.daemon.directory / "host.crt"

    @property
    def key(self) -> Path:
        return self.daemon.directory / "host.key"


@dataclass(slots=True)
class BesideHub:
    """What else is on each hub's machine: nothing, unless a test has something there."""

    def settings(self, hub: HubProcess) -> Mapping[str, Mapping[str, object]]:
        """Further sections of the hub's settings."""
        del hub
        return {}

    def start(self, hub: HubProcess) -> None:
        """Called before the hub starts."""

    def close(self) -> None:
        """Called at the end."""


@dataclass(slots=True)
class FleetWorld:
    """The fleet.

    Args:
        hubs_wanted: How many hubs.
        host_settings: Laid over those of each host; `log` over those of hubs too.
        beside_hub: What else is on a hub's machine.
    """

    hubs_wanted: int = 2
    host_settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    etcd: EtcdLab = field(default_factory=EtcdLab)
    clocks: bool = False
    beside_hub: BesideHub = field(default_factory=BesideHub)
    hubs: list[HubProcess] = field(default_factory=list)
    hosts: dict[str, FleetHost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        self.directory.chmod(0o755)
        for number in range(1, self.hubs_wanted + 1):
            self._make_hub(number, now)
        for hub in self.hubs:
            self.beside_hub.start(hub)
            hub.start(ready=False)
        for hub in self.hubs:
            until(lambda: hub._starts() > 0, within_s=30, what=f"{hub.name} is ready")  # noqa: B023

    @property
    def directory(self) -> Path:
        return self.etcd.directory

    @property
    def files(self) -> FleetFiles:
        """Of the first hub."""
        return FleetFiles(self.directory / "hub1.fleet")

    @property
    def urls(self) -> list[str]:
        return [hub.url for hub in self.hubs]

    def _make_hub(self, number: int, now: datetime) -> None:
        name, address = f"hub{number}", f"10.250.0.{20 + number}"
        names, place = HubNames(name, (address,)), self.directory / f"{name}.fleet"
        if number == 1:
            init_fleet(FleetFiles(place), None, names, now)
        else:
            add_hub(self.files, place, names, now)
        namespace = self.etcd.lab.namespace(name)
        self.etcd.plug(namespace, address)
        clock = WallClock(self.directory / f"{name}.clock") if self.clocks else None
        hub = HubProcess(name, namespace, address, self.directory, clock)
        etcd: dict[str, object] = {"endpoints": self.etcd.endpoints}
        if self.etcd.tls:
            etcd |= {
                "ca_file": str(self.directory / "etcd-ca.crt"),
                "certificate_file": str(self.directory / "hub.crt"),
                "key_file": str(self.directory / "hub.key"),
            }
        settings = {
            "hub": {
                "directory": str(place),
                "user": None,
                "haproxy_user": None,
                "runtime_dir": str(self.directory / f"{name}.run"),
                "state_dir": str(self.directory / f"{name}.state"),
                "listen": [f"{address}:{PORT}"],
                "metrics_listen": f"{address}:{METRICS_PORT}",
                "etcd": etcd,
            },
            "log": {"format": "json", **self.host_settings.get("log", {})},
        }
        hub.config.write_text(yaml.safe_dump({**settings, **self.beside_hub.settings(hub)}))
        self.hubs.append(hub)

    def add_host(
        self, name: str, *, networks: Sequence[str] = ("blue",), start: bool = True
    ) -> FleetHost:
        """Enrol a host, and start its daemon; its bridges of these networks are called as on every other host."""
        lab = Lab()
        self.etcd.plug(lab.host, _host_address(len(self.hosts) + 1))
        for network in networks:
            lab.bridge_network(network)
        daemon, clock = Daemon(lab), None
        if self.clocks:
            # In its jail the worker of HAProxy finds it too.
            clock = WallClock(daemon.runtime / "jail/clock")
            daemon.environment = clock.environment
        key = make_key()
        signed = self.files.load_authority().certify_host(key.public_key(), name, datetime.now(UTC))
        serial = spell_serial(signed.serial_number)
        host = FleetHost(HostId(name), lab, daemon, serial, clock)
        host.certificate.write_bytes(render_certificate(signed))
        host.key.write_bytes(render_key(key))
        host.key.chmod(0o600)
        stored = StoredHost(HostState.ENROLLED, (serial,))
        self.write({host_key(host.name): render_host(stored)})
        fleet = {
            "enabled": True,
            "hubs": self.urls,
            "certificate_file": str(host.certificate),
            "private_key_file": str(host.key),
            "ca_file": str(self.files.ca_certificate),
            "retry_s": 0.5,
        }
        daemon.configure(
            {
                "sources": {"fleet": fleet, "sqlite": {"enabled": False}},
                "resolver": {"hold_s": 0.5},
                "haproxy": {}
                if clock is None
                else {"binary": str(clock.haproxy(daemon.directory))},
                **self.host_settings,
            }
        )
        self.hosts[name] = host
        if start:
            daemon.start()
        return host

    def operator(self, name: str, role: Role = Role.OPERATOR, scope: str | None = None) -> Path:
        """A new operator's certificate, as `imdsproxy fleet operator` makes it."""
        path = self.directory / f"{name}.pem"
        authority = self.files.load_authority()
        write_secret(path, make_operator_pem(authority, name, role, scope, datetime.now(UTC)))
        return path

    # What is stored

    def ask(self, question: Callable[[Etcd], Awaitable[_T]]) -> _T:
        """Ask etcd."""

        async def run() -> _T:
            client = self.etcd.client()
            try:
                return await question(client)
            finally:
                await client.close()

        with self.etcd.entered():
            return asyncio.run(run())

    def write(self, values: Mapping[str, bytes]) -> int:
        """Write keys, as a hub would; the revision."""
        done = self.ask(lambda etcd: etcd.commit((), values))
        assert isinstance(done, Committed)
        return done.revision

    def place(self, record: RecordMapping, *hosts: str) -> int:
        """Store an instance on hosts, or on none: then it is removed."""
        fields = {key: value for key, value in record.items() if key != "user_data"}
        stored = StoredInstance(
            tuple(map(HostId, hosts)), dict(fields), removed_at=None if hosts else int(time.time())
        )
        key = layout.instance_key(InstanceId(str(record["id"])))
        return self.write({key: layout.render_instance(stored)})

    def store_network(self, name: str) -> int:
        """Store a network whose bridge has its name."""
        subnets = [{"cidr": "10.0.0.0/24"}, {"cidr": "2001:db8::/64"}]
        record = {"id": name, "listener": {"bridge": name}, "subnets": subnets}
        key = layout.network_key(NetworkId(name))
        return self.write({key: layout.render_network(StoredNetwork(record))})

    def close(self) -> None:
        """End it all."""
        for host in self.hosts.values():
            host.daemon.close()
            host.lab.close()
        for hub in self.hubs:
            if hub.process is not None and hub.process.poll() is None:
                hub.end(9)
        self.beside_hub.close()
        self.etcd.close()


@contextlib.contextmanager
def fleet_world(
    hubs: int = 2,
    *,
    etcd_flags: Sequence[str] = (),
    clocks: bool = False,
    beside_hub: BesideHub | None = None,
    **settings: Mapping[str, object],
) -> Iterator[FleetWorld]:
    """A fleet that is gone at the end."""
    beside = BesideHub() if beside_hub is None else beside_hub
    made = FleetWorld(hubs, settings, EtcdLab(flags=etcd_flags), clocks, beside)
    try:
        yield made
    finally:
        made.close()
