"""A whole fleet on this machine: etcd, two hubs, very many simulated hosts, and some complete hosts."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from socket import create_connection
from typing import Any, Final, Self
from uuid import uuid4

import yaml

from bench.context import Bench
from bench.daemon import Daemon
from bench.etcd import EtcdMembers, free_port
from bench.hosts import HostsSpec, host_name, instance_name, network_of
from bench.issuer import EVERY, IDENTITY_OF_HOST, HubSigner
from bench.lab import guest, network_name
from bench.place import BenchError, raise_open_files
from bench.procs import cpu_seconds, end_all, find_by_argument, memory, wait_until
from bench.records import instance, network
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    Meta,
    StoredHost,
    StoredInstance,
    StoredNetwork,
    host_key,
    render_host,
)
from imdsproxy.fleet.members import spell_serial
from imdsproxy.host.certificates import make_key, render_certificate, render_key
from imdsproxy.hub.pki.files import FleetFiles, HubNames, add_hub, init_fleet
from imdsproxy.model.entities import InstanceId, NetworkId

__all__ = ["GUESTS", "Cost", "Crowd", "Fleet", "guest_name", "guest_record", "open_fleet"]

_ADDRESS: Final = "127.0.0.1"
_START_S: Final = 120.0
_SYNC_S: Final = 420.0
_RECEIVE_S: Final = 60.0
_PROCESSES: Final = 4
GUESTS: Final = 50
"""Instances on a complete host."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of hubs and their HAProxys: seconds of processor time, and bytes."""

    hub_s: float = 0
    haproxy_s: float = 0
    hub: float = 0
    haproxy: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(one - two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def per(self, number: float) -> Cost:
        """Return the cost divided by a number."""
        return Cost(*(one / number for one in astuple(self)))

    def numbers(self) -> dict[str, float]:
        """Return the numbers for the JSON."""
        return asdict(self)


class HubProcess:
    """A process of `imdsproxy hub`.

    Args:
        directory: The process's directory.
        files: Directory of the fleet's files on this hub.
        endpoints: Endpoints of etcd.
        more: Further sections of the settings.
    """

    def __init__(
        self,
        directory: Path,
        files: Path,
        endpoints: Sequence[str],
        more: Mapping[str, object] | None = None,
    ) -> None:
        directory.mkdir()
        self.port = free_port()
        self._config, self._log = directory / "hub.yaml", directory / "hub.log"
        settings = {
            "hub": {
                "listen": [f"{_ADDRESS}:{self.port}"],
                "url": self.url,
                # Two hubs on one machine cannot share the default port.
                "metrics_listen": None,
                "directory": str(files),
                "user": None,
                "haproxy_user": None,
                "runtime_dir": str(directory / "run"),
                "state_dir": str(directory / "state"),
                "etcd": {"endpoints": list(endpoints)},
            },
            "log": {"level": "warning"},
            **(more or {}),
        }
        self._config.write_text(yaml.safe_dump(settings))
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """File of the hub's settings."""
        return self._config

    @property
    def address(self) -> str:
        """Address and port of the hub."""
        return f"{_ADDRESS}:{self.port}"

    @property
    def url(self) -> str:
        """URL for hosts and operators."""
        return f"https://{self.address}"

    def spawn(self) -> float:
        """Start the hub; return the time, by the monotonic clock."""
        command = [str(Path(sys.executable).parent / "imdsproxy"), "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "hub"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return time.monotonic()

    def wait_ready(self) -> float:
        """Wait until the hub accepts connections, after it has read everything; return the time.

        Raises:
            BenchError: Not in time.
        """
        if not wait_until(self._listens, _START_S):
            raise BenchError(f"the hub does not start: {self._log.read_text()[-500:]}")
        return time.monotonic()

    def _listens(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise BenchError(f"the hub has ended: {self._log.read_text()[-500:]}")
        return self._accepts()

    def _accepts(self) -> bool:
        with contextlib.suppress(OSError), create_connection((_ADDRESS, self.port), timeout=1):
            return True
        return False

    def cost(self) -> Cost:
        """Return the cost of the hub and its HAProxy until now."""
        assert self._process is not None  # noqa: S101 - it was started
        own = self._process.pid
        front = find_by_argument(self._directory) - {own}
        haproxy_s = sum(map(cpu_seconds, front))
        return Cost(cpu_seconds(own), haproxy_s, memory([own]).pss, memory(front).pss)

    def kill(self) -> None:
        """Kill the hub and its HAProxy."""
        if self._process is not None:
            end_all([self._process.pid, *find_by_argument(self._directory)])
            self._process.wait()
            self._process = None
            # A process with threads is a zombie before its last thread has closed thousands of sockets.
            wait_until(lambda: not self._accepts(), _START_S)


class Crowd:
    """Hosts in several processes."""

    def __init__(self, specs: Sequence[HostsSpec]) -> None:
        self.specs = specs
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "bench.hosts", spec.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for spec in specs
        ]

    @property
    def count(self) -> int:
        """Number of hosts."""
        return sum(spec.count for spec in self.specs)

    def report(self) -> dict[str, Any]:
        """Return the number of synchronised hosts, the time of the last one, and all faults."""
        found = [self._ask(one, "report") for one in self._processes]
        return {
            "synced": sum(one["synced"] for one in found),
            "last": max(one["last"] for one in found),
            "connects": sum(one["connects"] for one in found),
            "faults": [fault for one in found for fault in one["faults"]],
        }

    def received(self, revision: int, count: int = 1) -> list[float]:
        """Return the times when hosts received an item of this revision, by the monotonic clock.

        Raises:
            BenchError: Fewer than `count` hosts received one in time.
        """
        found: list[float] = []

        def all_there() -> bool:
            for one in self._processes:
                found.extend(self._ask(one, f"times {revision}"))
            return len(found) >= count

        if not wait_until(all_there, _RECEIVE_S, every_s=0.02):
            raise BenchError(f"{len(found)} of {count} hosts got revision {revision}")
        return found

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], words: str) -> Any:
        assert process.stdin is not None  # noqa: S101 - they are pipes
        assert process.stdout is not None  # noqa: S101 - as above
        process.stdin.write(f"{words}\n".encode())
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise BenchError("a process of hosts has ended")
        return json.loads(line)

    def wait_synced(self) -> dict[str, Any]:
        """Wait until every host has all its items.

        Raises:
            BenchError: Not in time, or a host received a foreign item.
        """
        found: list[dict[str, Any]] = []

        def synced() -> bool:
            found[:] = [self.report()]
            return bool(found[0]["synced"] >= self.count)

        done = wait_until(synced, _SYNC_S, every_s=0.1)
        if faults := found[0]["faults"]:
            raise BenchError(f"{len(faults)} faults of hosts, as {faults[0]}")
        if not done:
            raise BenchError(f"{found[0]['synced']} of {self.count} hosts have everything")
        return found[0]

    def cpu_s(self) -> float:
        """Return the processor time of all hosts."""
        return sum(cpu_seconds(one.pid) for one in self._processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_all(one.pid for one in self._processes)
        for one in self._processes:
            one.communicate()


@dataclass(slots=True)
class Fleet:
    """A running fleet; hosts `0` to `hosts - 1` are simulated, later hosts are complete.

    Attributes:
        instances: Number of instances on each simulated host.
        networks: Number of networks of simulated hosts.
        filled: Simulated hosts whose instances are in etcd.
    """

    bench: Bench
    directory: Path
    files: FleetFiles
    etcd: EtcdMembers
    hubs: list[HubProcess]
    signers: list[HubSigner]
    hosts: int
    real: int
    instances: int
    networks: int
    filled: int = 0

    @property
    def certificates(self) -> Path:
        """Directory of the hosts' certificates."""
        return self.directory / "certificates"

    def certify(self) -> Iterator[tuple[str, bytes]]:
        """Create every host's certificate; yield the hosts' entries for etcd."""
        authority, now = self.files.load_authority(), datetime.now(UTC)
        # All hosts share one key: ten thousand keys take longer, and make no difference for a hub.
        key = make_key()
        self.certificates.mkdir()
        (self.certificates / "ca.crt").write_bytes(self.files.ca_certificate.read_bytes())
        (self.certificates / "host.key").write_bytes(render_key(key))
        for number in range(self.hosts + self.real):
            name = HostId(host_name(number))
            signed = authority.certify_host(key.public_key(), name, now)
            pem = render_certificate(signed) + render_key(key)
            (self.certificates / f"{name}.pem").write_bytes(pem)
            serials = (spell_serial(signed.serial_number),)
            yield host_key(name), render_host(StoredHost(HostState.ENROLLED, serials))

    def records(self, first: int, end: int) -> Iterator[tuple[str, bytes]]:
        """Yield the instances of hosts from `first` to before `end`."""
        for host in range(first, end):
            for number in range(self.instances):
                yield self.record(host, number)

    @property
    def size(self) -> int:
        """Number of instances of simulated hosts."""
        return self.hosts * self.instances

    def grow(self, count: int) -> None:
        """Write instances to etcd until there are `count`; beyond `size` they belong to hosts that do not exist."""
        first, end = self.filled, count // self.instances
        if end > first:
            self.bench.say(f"{count:,} instances into etcd")
            self.etcd.fill(self.records(first, end))
            self.filled = end

    def record(self, host: int, number: int) -> tuple[str, bytes]:
        """Return an instance of a simulated host, as stored in etcd."""
        name = instance_name(host, number)
        address = f"10.{host // 65536}.{host // 256 % 256}.{host % 256}"
        ports = {network_of(host, number, self.networks): [address]}
        record = instance(name, ports, with_user_data=False)
        return _instance(record, HostId(host_name(host)))

    def shared(self) -> Iterator[tuple[str, bytes]]:
        """Yield the networks of simulated hosts, and the network and guests of each complete host."""
        for number in range(self.networks):
            yield _network(
                {
                    "id": f"fleet-{number}",
                    "listener": {"bridge": f"br-{number}"},
                    "subnets": [{"cidr": "10.0.0.0/8"}],
                }
            )
        for number in range(self.real):
            yield _network(network(network_name(number)))
            for one in range(GUESTS):
                yield self.guest(number, one)

    def guest(self, number: int, one: int) -> tuple[str, bytes]:
        """Return a guest of a complete host, as stored in etcd."""
        host = HostId(host_name(self.hosts + number))
        record = guest_record(network_name(number), one)
        return _instance(record, host)

    def start_hubs(self) -> float:
        """Start all hubs; return the seconds until all have read everything."""
        began = min([one.spawn() for one in self.hubs])
        return max([one.wait_ready() for one in self.hubs]) - began

    def cost(self) -> Cost:
        """Return the cost of both hubs until now."""
        return sum((one.cost() for one in self.hubs), Cost())

    def crowd(self, count: int) -> Crowd:
        """Start the first simulated hosts."""
        each = -(-count // _PROCESSES)
        hubs = tuple(one.address for one in self.hubs)
        return Crowd(
            [
                HostsSpec(
                    hubs,
                    first,
                    min(each, count - first),
                    self.instances,
                    self.networks,
                    str(self.certificates),
                )
                for first in range(0, count, each)
            ]
        )

    def daemon(self, number: int) -> Daemon:
        """Start a complete host, whose network is a namespace of the lab; it gives tokens if the hubs sign."""
        name = host_name(self.hosts + number)
        pem = str(self.certificates / f"{name}.pem")
        source: Mapping[str, object] = {
            "enabled": True,
            "hubs": [one.url for one in self.hubs],
            "certificate_file": pem,
            "private_key_file": str(self.certificates / "host.key"),
            "ca_file": str(self.certificates / "ca.crt"),
        }
        more = {"identity": IDENTITY_OF_HOST} if self.signers else {}
        daemon = Daemon(self.directory / name, {"sources": {"fleet": source}, **more})
        daemon.start()
        return daemon


def guest_name(number: int, one: int) -> str:
    """Return the name of a guest of a complete host."""
    return f"guest-{network_name(number)}-{one}"


def guest_record(name: str, number: int) -> dict[str, object]:
    """Return the record of a guest of a complete host's network."""
    ports = {name: [guest(number)]}
    return instance(f"guest-{name}-{number}", ports, with_user_data=False)


def _instance(record: dict[str, object], host: HostId) -> tuple[str, bytes]:
    key = layout.instance_key(InstanceId(str(record["id"])))
    return key, layout.render_instance(StoredInstance((host,), record))


def _network(record: dict[str, object]) -> tuple[str, bytes]:
    key = layout.network_key(NetworkId(str(record["id"])))
    return key, layout.render_network(StoredNetwork(record))


@contextlib.contextmanager
def open_fleet(bench: Bench, *, signs: bool = False) -> Iterator[Fleet]:
    """Open a fleet: two running hubs, and etcd with all records.

    Args:
        signs: Whether the hubs sign identity tokens, for all audiences of all instances.
    """
    raise_open_files()
    hosts, real, instances = (
        bench.scale.fleet_hosts,
        bench.scale.fleet_real,
        bench.scale.fleet_instances,
    )
    networks = max(1, hosts // 10)
    directory = bench.directory / "fleet"
    directory.mkdir()
    files, further = FleetFiles(directory / "hub-1.files"), directory / "hub-2.files"
    now = datetime.now(UTC)
    init_fleet(files, None, HubNames("hub-1", (_ADDRESS,)), now)
    add_hub(files, further, HubNames("hub-2", (_ADDRESS,)), now)
    bench.lab.grow(real)
    etcd = EtcdMembers(directory)
    hubs: list[HubProcess] = []
    signers: list[HubSigner] = []
    try:
        for number, place in enumerate((files.directory, further), 1):
            own = HubSigner(directory / f"signer-{number}") if signs else None
            more = None if own is None else own.settings()
            hubs.append(HubProcess(directory / f"hub-{number}", place, etcd.endpoints, more))
            if own is not None:
                signers.append(own)
                own.start(hubs[-1].config, signers[0])
        fleet = Fleet(
            bench, directory, files, etcd, hubs, signers, hosts, real, instances, networks
        )
        bench.say(f"{hosts + real:,} certificates")
        # The metadata comes first, as when a hub creates a fleet: hubs refuse records without it.
        etcd.fill([(layout.META, layout.render_meta(Meta(str(uuid4()))))])
        etcd.fill(fleet.certify())
        etcd.fill(fleet.shared())
        if signs:
            etcd.fill([(f"{layout.POLICIES}fleet", json.dumps(EVERY).encode())])
        fleet.grow(fleet.size)
        fleet.start_hubs()
        yield fleet
    finally:
        for hub in hubs:
            hub.kill()
        for signer in signers:
            signer.kill()
        etcd.stop()
