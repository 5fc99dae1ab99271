"""OVN's databases without OVN: real servers, with rows as northd and ovn-controller write them.

A metadata service sees no difference, and 20,000 ports take seconds. Tests use this module too.

Sources: RFC 7047 for the protocol, ovn-sb(5) for the rows, and Neutron's driver for `external_ids`
(neutron/plugins/ml2/drivers/ovn/mech_driver/ovsdb/ovn_client.py).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from bench.place import BenchError

__all__ = [
    "CHASSIS",
    "HOST",
    "OvnCloud",
    "OvsdbClient",
    "OvsdbServer",
    "SbNetwork",
    "SbPort",
    "Southbound",
    "add_chassis_to_vswitch",
    "plan_cloud",
]

CHASSIS: Final = "imdst-chassis"
HOST: Final = "imdst-host"
"""Name of this host in Nova and Neutron."""

MTU: Final = 1442
_SCHEMAS: Final[Mapping[str, str]] = {
    "Open_vSwitch": "/usr/share/openvswitch/vswitch.ovsschema",
    "OVN_Southbound": "/usr/share/ovn/ovn-sb.ovsschema",
}
_SOUTHBOUND: Final = "OVN_Southbound"
_SPACE: Final = uuid.UUID("1b1c3a39-8d1c-4b53-9a3e-5d3b1f1d0c11")
_AT_ONCE: Final = 1000
_PER_CHASSIS: Final = 50
_START_S: Final = 30.0

Operation = Mapping[str, Any]
_T = TypeVar("_T")


class OvsdbClient:
    """Connection to a server's unix socket, for one request at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._text, self._number = "", 0
        self._decoder = json.JSONDecoder()

    def close(self) -> None:
        self._socket.close()

    def transact(self, database: str, *operations: Operation) -> list[Mapping[str, Any]]:
        """Run one transaction; return the result of each operation.

        Raises:
            BenchError: The server refuses, or the connection ends.
        """
        self._number += 1
        params: list[object] = [database, *operations]
        request = {"method": "transact", "params": params, "id": self._number}
        self._socket.sendall(json.dumps(request).encode())
        while True:
            message = self._read()
            if message.get("method") == "echo":
                answer = {"id": message["id"], "result": message["params"], "error": None}
                self._socket.sendall(json.dumps(answer).encode())
            elif message.get("id") == self._number:
                break
        results: list[Mapping[str, Any]] = message.get("result") or []
        refused = [one for one in results if one and one.get("error")]
        if message.get("error") or refused:
            raise BenchError(f"ovsdb-server refuses: {message.get('error') or refused}")
        return results

    def _read(self) -> dict[str, Any]:
        while True:
            with contextlib.suppress(ValueError):
                message, end = self._decoder.raw_decode(self._text)
                self._text = self._text[end:].lstrip()
                found: dict[str, Any] = message
                return found
            # Decode a long answer only when its end may have come.
            while more := self._socket.recv(1 << 20):
                self._text += more.decode()
                if self._text.endswith("}"):
                    break
            else:
                raise BenchError("ovsdb-server has closed the connection")


@dataclass(slots=True)
class OvsdbServer:
    """An ovsdb-server with one database in a file.

    Args:
        directory: Directory of its files.
        database: The schema's name.
        name: Name of its files, without suffix.
        remotes: Further addresses beside the unix socket, as `ptcp:6642:127.0.0.1`.
        options: Further options.
        within: Words before the command, for another namespace.
    """

    directory: Path
    database: str
    name: str
    remotes: Sequence[str] = ()
    options: Sequence[str] = ()
    within: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        """Path of the unix socket."""
        return self.directory / f"{self.name}.sock"

    @property
    def remote(self) -> str:
        """Name of the unix socket for clients."""
        return f"unix:{self.path}"

    @property
    def file(self) -> Path:
        """File of the database."""
        return self.directory / f"{self.name}.db"

    def create(self) -> OvsdbServer:
        """Create a database without rows; replace an existing one."""
        self.file.unlink(missing_ok=True)
        subprocess.run(
            ["/usr/bin/ovsdb-tool", "create", str(self.file), _SCHEMAS[self.database]], check=True
        )
        return self

    def create_member(self, address: str, *, of: str | None = None) -> OvsdbServer:
        """Create a member of a cluster instead: the first member, or one that joins `of`."""
        how: tuple[str, ...] = ("create-cluster", str(self.file), _SCHEMAS[self.database], address)
        if of is not None:
            how = ("join-cluster", str(self.file), self.database, address, of)
        subprocess.run(["/usr/bin/ovsdb-tool", *how], check=True)
        return self

    def start(self) -> OvsdbServer:
        """Start the server, and wait until it listens.

        Raises:
            BenchError: The server does not start.
        """
        self.path.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                *(*self.within, "/usr/sbin/ovsdb-server", "-vconsole:off", "-vsyslog:off"),
                str(self.file),
                f"--remote=p{self.remote}",
                *(f"--remote={one}" for one in self.remotes),
                f"--unixctl={self.directory / self.name}.ctl",
                f"--log-file={self.directory / self.name}.log",
                *self.options,
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_S
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"ovsdb-server {self.name} does not start")
            time.sleep(0.005)
        return self

    def _listens(self) -> bool:
        try:
            self.client().close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def kill(self) -> None:
        """Kill the server."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> OvsdbClient:
        """Open a connection."""
        return OvsdbClient(self.path)


@dataclass(frozen=True, slots=True)
class SbNetwork:
    """A network, with a metadata port at 10.0.0.2.

    Attributes:
        token: Four characters at the beginning of the id, and so of names on this machine.
    """

    number: int
    token: str

    @property
    def id(self) -> str:
        """Id in Neutron."""
        return f"{self.token}{self.number:04x}-0000-4000-8000-000000000002"

    @property
    def namespace(self) -> str:
        """Namespace of the network's metadata service."""
        return f"ovnmeta-{self.id}"

    @property
    def devices(self) -> tuple[str, str]:
        """Devices of the metadata port: on the integration bridge, and in the namespace."""
        return f"tap{self.id[:10]}0", f"tap{self.id[:10]}1"

    @property
    def project(self) -> str:
        """Id of the network's project."""
        return f"{self.number + 1:032x}"

    @property
    def metadata_port(self) -> str:
        """Logical port of the metadata service."""
        return str(uuid.uuid5(_SPACE, f"{self.id}-metadata"))

    @property
    def metadata_mac(self) -> str:
        """MAC of the metadata port."""
        return f"fa:16:3f:00:{self.number >> 8:02x}:{self.number & 255:02x}"


@dataclass(frozen=True, slots=True)
class SbPort:
    """A port of an instance, port `number` of its network."""

    network: SbNetwork
    number: int

    @property
    def id(self) -> str:
        """Logical port."""
        return str(uuid.uuid5(_SPACE, f"{self.network.id}-{self.number}"))

    @property
    def instance(self) -> str:
        """Id of the port's instance."""
        return str(uuid.uuid5(_SPACE, f"{self.network.id}-{self.number}-instance"))

    @property
    def mac(self) -> str:
        """MAC; other networks repeat it."""
        return f"fa:16:3e:00:{self.number >> 8:02x}:{self.number & 255:02x}"

    @property
    def address(self) -> str:
        """Address; other networks repeat it."""
        number = self.number + 10
        return f"10.0.{number >> 8}.{number & 255}"


@dataclass(frozen=True, slots=True)
class OvnCloud:
    """Ports of a cloud, on this host and elsewhere."""

    networks: Sequence[SbNetwork]
    local: Sequence[SbPort]
    foreign: Sequence[SbPort]


def plan_cloud(
    token: str, ports: int, *, local: int, networks: int, per_network: int = 50
) -> OvnCloud:
    """Plan a cloud of this many ports, with `local` ports on this host, spread over the first `networks` networks."""
    made = [SbNetwork(number, token) for number in range(max(networks, -(-ports // per_network)))]
    own = [SbPort(made[number % networks], number // networks) for number in range(local)]
    first = -(-local // networks)
    others = (
        SbPort(network, number) for number in range(first, per_network + first) for network in made
    )
    return OvnCloud(made, own, tuple(islice(others, max(0, ports - local))))


@dataclass(slots=True)
class Southbound:
    """Writer of rows; each call is one transaction or more."""

    client: OvsdbClient
    chassis: dict[str, str] = field(default_factory=dict)
    datapaths: dict[str, str] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=dict)
    encaps: int = 0

    def begin(self) -> None:
        """Write the row that every database has, and this host's chassis."""
        self._do({"op": "insert", "table": "SB_Global", "row": {}})
        self.add_chassis(CHASSIS, HOST)

    def add_chassis(self, name: str, host: str) -> None:
        """Write the rows that ovn-controller writes when it starts."""
        self.encaps += 1
        address = f"127.1.{self.encaps >> 8}.{self.encaps & 255}"
        encap = {"type": "geneve", "ip": address, "chassis_name": name}
        row = {"name": name, "hostname": host, "encaps": ["named-uuid", "encap"]}
        private = {"name": name, "chassis": ["named-uuid", "chassis"]}
        found = self._do(
            {"op": "insert", "table": "Encap", "uuid-name": "encap", "row": encap},
            {"op": "insert", "table": "Chassis", "uuid-name": "chassis", "row": row},
            {"op": "insert", "table": "Chassis_Private", "row": private},
        )
        self.chassis[name] = found[1]["uuid"][1]

    def remove_chassis(self, name: str) -> None:
        """Delete the rows that ovn-controller deletes when Debian's unit stops it: bindings vanish with the chassis."""
        where = [["name", "==", name]]
        self._do(
            {"op": "delete", "table": "Chassis", "where": where},
            {"op": "delete", "table": "Chassis_Private", "where": where},
        )
        del self.chassis[name]

    def fill(self, cloud: OvnCloud) -> None:
        """Write a whole cloud: this host's ports are bound here, each 50 others to a chassis of their own."""
        self.add_networks(cloud.networks)
        self.add_ports((port, CHASSIS, HOST) for port in cloud.local)
        hosts = range(-(-len(cloud.foreign) // _PER_CHASSIS))
        for number in hosts:
            self.add_chassis(f"other-{number}", f"host-{number}")
        names = ((f"other-{n // _PER_CHASSIS}", f"host-{n // _PER_CHASSIS}") for n in range(10**9))
        self.add_ports((port, *name) for port, name in zip(cloud.foreign, names, strict=False))

    def add_networks(self, networks: Iterable[SbNetwork]) -> None:
        """Write datapaths, and their metadata ports."""
        for some in _pieces(networks):
            found = self._do(
                *(
                    {
                        "op": "insert",
                        "table": "Datapath_Binding",
                        "uuid-name": f"d{one.number}",
                        "row": {
                            "tunnel_key": len(self.datapaths) + number,
                            "external_ids": _map({"name": f"neutron-{one.id}"}),
                        },
                    }
                    for number, one in enumerate(some, 1)
                ),
                *(
                    {
                        "op": "insert",
                        "table": "Port_Binding",
                        "row": {
                            "logical_port": one.metadata_port,
                            "type": "localport",
                            "datapath": ["named-uuid", f"d{one.number}"],
                            "tunnel_key": 1,
                            "mac": f"{one.metadata_mac} 10.0.0.2",
                            "external_ids": _external_ids(one, f"{one.namespace}", "10.0.0.2"),
                        },
                    }
                    for one in some
                ),
            )
            for one, row in zip(some, found, strict=False):
                self.datapaths[one.id] = row["uuid"][1]

    def add_ports(self, ports: Iterable[tuple[SbPort, str, str]]) -> None:
        """Write ports, each with the chassis that has bound it (empty for none) and the requested host."""
        for some in _pieces(ports):
            found = self._do(
                *(
                    {
                        "op": "insert",
                        "table": "Port_Binding",
                        "row": {
                            "logical_port": port.id,
                            "datapath": ["uuid", self.datapaths[port.network.id]],
                            "tunnel_key": port.number + 2,
                            "mac": f"{port.mac} {port.address}",
                            "chassis": self._reference(chassis),
                            "requested_chassis": self._reference(chassis),
                            "options": _map({"requested-chassis": host} if host else {}),
                            "external_ids": _external_ids(
                                port.network, port.instance, port.address
                            ),
                        },
                    }
                    for port, chassis, host in some
                )
            )
            for (port, *_), row in zip(some, found, strict=True):
                self.ports[port.id] = row["uuid"][1]

    def add_port(self, port: SbPort, chassis: str = CHASSIS, host: str = HOST) -> None:
        """Write one port."""
        self.add_ports([(port, chassis, host)])

    def remove_port(self, port: SbPort) -> None:
        """Delete a port's row."""
        self._do({"op": "delete", "table": "Port_Binding", "where": self._is(port)})

    def bind(self, port: SbPort, chassis: str, *, additional: Sequence[str] = ()) -> None:
        """Bind a port to a chassis, or to none."""
        row = {
            "chassis": self._reference(chassis),
            "additional_chassis": ["set", [["uuid", self.chassis[one]] for one in additional]],
        }
        self._do({"op": "update", "table": "Port_Binding", "where": self._is(port), "row": row})

    def change(
        self, port: SbPort, *, row: Mapping[str, object] | None = None, **values: str
    ) -> None:
        """Write other columns of a port, and other `neutron:` values."""
        keys = {f"neutron:{key}": value for key, value in values.items()}
        where = self._is(port)
        mutations = [
            ["external_ids", "delete", ["set", list(keys)]],
            ["external_ids", "insert", _map(keys)],
        ]
        self._do(
            {"op": "mutate", "table": "Port_Binding", "where": where, "mutations": mutations},
            {"op": "update", "table": "Port_Binding", "where": where, "row": dict(row or {})},
        )

    def _is(self, port: SbPort) -> Sequence[object]:
        # ovn-controller selects rows by UUID as well: for any other condition the server scans all rows.
        return [["_uuid", "==", ["uuid", self.ports[port.id]]]]

    def _reference(self, chassis: str) -> Sequence[object]:
        return ["uuid", self.chassis[chassis]] if chassis else ["set", []]

    def _do(self, *operations: Operation) -> list[Mapping[str, Any]]:
        return self.client.transact(_SOUTHBOUND, *operations)


def add_chassis_to_vswitch(client: OvsdbClient, southbound: str) -> None:
    """Fill Open vSwitch's database as on a hypervisor where ovn-controller runs."""
    ids = {"system-id": CHASSIS, "hostname": HOST, "ovn-remote": southbound, "ovn-bridge": "br-int"}
    row = {"external_ids": _map(ids), "bridges": ["named-uuid", "bridge"]}
    client.transact(
        "Open_vSwitch",
        {
            "op": "insert",
            "table": "Bridge",
            "uuid-name": "bridge",
            "row": {"name": "br-int", "datapath_type": "system"},
        },
        {"op": "insert", "table": "Open_vSwitch", "row": row},
    )


def _external_ids(network: SbNetwork, device: str, address: str) -> Sequence[object]:
    is_metadata = device == network.namespace
    return _map(
        {
            "name": device,
            "neutron:cidrs": f"{address}/16",
            "neutron:device_id": device,
            "neutron:device_owner": "network:distributed" if is_metadata else "compute:nova",
            "neutron:mtu": str(MTU) if is_metadata else "",
            "neutron:network_name": f"neutron-{network.id}",
            "neutron:port_capabilities": "",
            "neutron:port_name": "",
            "neutron:project_id": network.project,
            "neutron:revision_number": "4",
            "neutron:security_group_ids": str(uuid.uuid5(_SPACE, network.project)),
            "neutron:subnet_pool_addr_scope4": "",
            "neutron:subnet_pool_addr_scope6": "",
            "neutron:vnic_type": "normal",
        }
    )


def _map(values: Mapping[str, str]) -> Sequence[object]:
    return ["map", [[key, value] for key, value in values.items()]]


def _pieces(items: Iterable[_T]) -> Iterator[Sequence[_T]]:
    rest = iter(items)
    while some := list(islice(rest, _AT_ONCE)):
        yield some
