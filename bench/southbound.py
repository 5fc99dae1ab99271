"""OVN's databases without OVN: real servers, and rows written into them as northd and ovn-controller write them.

What a metadata service sees is the same, and 20,000 ports are there in seconds. Tests use it too.

Sources: RFC 7047 for the protocol, ovn-sb(5) for the rows, and for what is in `external_ids` Neutron's driver
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
"""This host as Nova and Neutron call it."""

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
    """A connection to a server's unix socket, one request after the other."""

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
        """Close it."""
        self._socket.close()

    def transact(self, database: str, *operations: Operation) -> list[Mapping[str, Any]]:
        """One transaction; the result of each operation.

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
            # A part of a long answer is not looked at before its end may have come.
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
        directory: Where its files are.
        database: The schema's name.
        name: Of its files, without suffix.
        remotes: Where it listens beside its unix socket, as `ptcp:6642:127.0.0.1`.
        options: Further ones.
        within: The words before the command, for another namespace.
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
        """Its unix socket."""
        return self.directory / f"{self.name}.sock"

    @property
    def remote(self) -> str:
        """As clients name it."""
        return f"unix:{self.path}"

    @property
    def file(self) -> Path:
        """The database."""
        return self.directory / f"{self.name}.db"

    def create(self) -> OvsdbServer:
        """Have a database without rows; one that was there is gone."""
        self.file.unlink(missing_ok=True)
        subprocess.run(
            ["/usr/bin/ovsdb-tool", "create", str(self.file), _SCHEMAS[self.database]], check=True
        )
        return self

    def create_member(self, address: str, *, of: str | None = None) -> OvsdbServer:
        """Have a member of a cluster instead: the first one, or one that joins `of`."""
        how: tuple[str, ...] = ("create-cluster", str(self.file), _SCHEMAS[self.database], address)
        if of is not None:
            how = ("join-cluster", str(self.file), self.database, address, of)
        subprocess.run(["/usr/bin/ovsdb-tool", *how], check=True)
        return self

    def start(self) -> OvsdbServer:
        """Start it, and wait until it listens.

        Raises:
            BenchError: It does not.
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
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> OvsdbClient:
        """A new connection."""
        return OvsdbClient(self.path)


@dataclass(frozen=True, slots=True)
class SbNetwork:
    """A network, with a metadata port at 10.0.0.2.

    Attributes:
        token: Four characters that names on this machine begin with.
    """

    number: int
    token: str

    @property
    def id(self) -> str:
        """In Neutron."""
        return f"{self.token}{self.number:04x}-0000-4000-8000-000000000002"

    @property
    def namespace(self) -> str:
        """Where its metadata service is."""
        return f"ovnmeta-{self.id}"

    @property
    def devices(self) -> tuple[str, str]:
        """Of the metadata port: on the integration bridge, and in the namespace."""
        return f"tap{self.id[:10]}0", f"tap{self.id[:10]}1"

    @property
    def project(self) -> str:
        """Whose it is."""
        return f"{self.number + 1:032x}"

    @property
    def metadata_port(self) -> str:
        """The logical port."""
        return str(uuid.uuid5(_SPACE, f"{self.id}-metadata"))

    @property
    def metadata_mac(self) -> str:
        """Its MAC."""
        return f"fa:16:3f:00:{self.number >> 8:02x}:{self.number & 255:02x}"


@dataclass(frozen=True, slots=True)
class SbPort:
    """A port of an instance, the `number`th of its network."""

    network: SbNetwork
    number: int

    @property
    def id(self) -> str:
        """The logical port."""
        return str(uuid.uuid5(_SPACE, f"{self.network.id}-{self.number}"))

    @property
    def instance(self) -> str:
        """Whose it is."""
        return str(uuid.uuid5(_SPACE, f"{self.network.id}-{self.number}-instance"))

    @property
    def mac(self) -> str:
        """The MAC; other networks have the same ones."""
        return f"fa:16:3e:00:{self.number >> 8:02x}:{self.number & 255:02x}"

    @property
    def address(self) -> str:
        """The address; other networks have the same ones."""
        number = self.number + 10
        return f"10.0.{number >> 8}.{number & 255}"


@dataclass(frozen=True, slots=True)
class OvnCloud:
    """Which ports there are, and which of them are on this host."""

    networks: Sequence[SbNetwork]
    local: Sequence[SbPort]
    foreign: Sequence[SbPort]


def plan_cloud(
    token: str, ports: int, *, local: int, networks: int, per_network: int = 50
) -> OvnCloud:
    """So many ports, of which `local` are spread over the first `networks` networks."""
    made = [SbNetwork(number, token) for number in range(max(networks, -(-ports // per_network)))]
    own = [SbPort(made[number % networks], number // networks) for number in range(local)]
    first = -(-local // networks)
    others = (
        SbPort(network, number) for number in range(first, per_network + first) for network in made
    )
    return OvnCloud(made, own, tuple(islice(others, max(0, ports - local))))


@dataclass(slots=True)
class Southbound:
    """Writes rows; each call is a transaction or more."""

    client: OvsdbClient
    chassis: dict[str, str] = field(default_factory=dict)
    datapaths: dict[str, str] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=dict)
    encaps: int = 0

    def begin(self) -> None:
        """The row that every database has, and this host's chassis."""
        self._do({"op": "insert", "table": "SB_Global", "row": {}})
        self.add_chassis(CHASSIS, HOST)

    def add_chassis(self, name: str, host: str) -> None:
        """What ovn-controller writes when it starts."""
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
        """What ovn-controller does when Debian's unit stops it: every binding goes with the row."""
        where = [["name", "==", name]]
        self._do(
            {"op": "delete", "table": "Chassis", "where": where},
            {"op": "delete", "table": "Chassis_Private", "where": where},
        )
        del self.chassis[name]

    def fill(self, cloud: OvnCloud) -> None:
        """All of a cloud: this host's ports bound here, every 50 others to a chassis of their own."""
        self.add_networks(cloud.networks)
        self.add_ports((port, CHASSIS, HOST) for port in cloud.local)
        hosts = range(-(-len(cloud.foreign) // _PER_CHASSIS))
        for number in hosts:
            self.add_chassis(f"other-{number}", f"host-{number}")
        names = ((f"other-{n // _PER_CHASSIS}", f"host-{n // _PER_CHASSIS}") for n in range(10**9))
        self.add_ports((port, *name) for port, name in zip(cloud.foreign, names, strict=False))

    def add_networks(self, networks: Iterable[SbNetwork]) -> None:
        """Datapaths, and their metadata ports."""
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
        """Ports, each with the chassis that has bound it (empty for none), and the host that it is meant for."""
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
        """One of them."""
        self.add_ports([(port, chassis, host)])

    def remove_port(self, port: SbPort) -> None:
        """Have its row gone."""
        self._do({"op": "delete", "table": "Port_Binding", "where": self._is(port)})

    def bind(self, port: SbPort, chassis: str, *, additional: Sequence[str] = ()) -> None:
        """Have a port bound to a chassis, or to none."""
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
        # As ovn-controller does it: the server looks at all rows for any other condition.
        return [["_uuid", "==", ["uuid", self.ports[port.id]]]]

    def _reference(self, chassis: str) -> Sequence[object]:
        return ["uuid", self.chassis[chassis]] if chassis else ["set", []]

    def _do(self, *operations: Operation) -> list[Mapping[str, Any]]:
        return self.client.transact(_SOUTHBOUND, *operations)


def add_chassis_to_vswitch(client: OvsdbClient, southbound: str) -> None:
    """Have Open vSwitch's database as on a hypervisor where ovn-controller runs."""
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
