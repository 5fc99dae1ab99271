"""A genuine OVN: its two databases, northd, a hypervisor with Open vSwitch in user space, and ovn-controller.

The northbound database is written as Neutron's driver writes it (neutron/plugins/ml2/drivers/ovn/mech_driver). The
hypervisor is the lab's host; guests are namespaces, plugged into the integration bridge.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

from support.guest import Guest
from support.lab import NETNS, Lab, batch, ip, plug, run, until, within
from support.patience import patience
from support.reaper import reap, reap_at_the_end

_SCHEMAS: Final[Mapping[str, str]] = {
    "vswitch": "/usr/share/openvswitch/vswitch.ovsschema",
    "nb": "/usr/share/ovn/ovn-nb.ovsschema",
    "sb": "/usr/share/ovn/ovn-sb.ovsschema",
}
CHASSIS: Final = "imdst-chassis"
OTHER: Final = "imdst-other"
"""A chassis that is a row only."""

_MTU: Final = 1442
_GONE_S: Final = 20.0
_BACK_S: Final = 60.0
_SYNC_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class OvnNetwork:
    """A network with a metadata port at 10.0.0.2 and fd00:10::2."""

    id: str
    project: str
    metadata_port: str
    metadata_mac: str
    cidrs: tuple[str, ...] = ("10.0.0.2/24", "fd00:10::2/64")

    @property
    def namespace(self) -> str:
        return f"ovnmeta-{self.id}"

    @property
    def switch(self) -> str:
        return f"neutron-{self.id}"

    @property
    def devices(self) -> tuple[str, str]:
        """On the integration bridge, and in the namespace."""
        return f"tap{self.id[:10]}0", f"tap{self.id[:10]}1"


@dataclass(frozen=True, slots=True)
class OvnPort:
    """An instance's port."""

    id: str
    name: str
    network: OvnNetwork
    mac: str
    cidrs: tuple[str, ...]
    instance: str
    project: str
    owner: str = "compute:nova"

    @property
    def device(self) -> str:
        """Of the guest on the integration bridge."""
        return f"vm{self.name}"[:15]


@dataclass(slots=True)
class OvnLab:
    """Starts the programs, and makes networks, ports and guests."""

    lab: Lab = field(default_factory=Lab)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="imdst-ovn-")))
    networks: dict[str, OvnNetwork] = field(default_factory=dict)
    ports: dict[str, OvnPort] = field(default_factory=dict)
    bridge: str = "br-int"
    chassis: str = CHASSIS
    _made: int = 0
    _together: list[str] | None = None

    def __post_init__(self) -> None:
        reap_at_the_end(directory=self.directory)
        reap_at_the_end(namespaces=self.namespaces)
        for name, schema in _SCHEMAS.items():
            run("ovsdb-tool", "create", str(self.directory / f"{name}.db"), schema)
        self.start_database("vswitch")
        self.start_database("nb")
        self.start_database("sb")
        self._nb("init")
        self._sb("init")
        self._start(
            "ovn-northd", f"--ovnnb-db={self.remote('nb')}", f"--ovnsb-db={self.southbound}"
        )
        self._vs("--no-wait", "init")
        ids = {
            "system-id": CHASSIS,
            "hostname": CHASSIS,
            "ovn-remote": self.southbound,
            "ovn-encap-type": "geneve",
            "ovn-encap-ip": "127.0.0.1",
            "ovn-bridge-datapath-type": "netdev",
            "ovn-bridge": "br-int",
        }
        values = [f'external-ids:{key}="{value}"' for key, value in ids.items()]
        self._vs("--no-wait", "set", "Open_vSwitch", ".", *values)
        self._start("ovs-vswitchd", self.open_vswitch, "--disable-system", in_host=True)
        self.add_bridge(self.bridge)
        self.start_controller()
        self._add_other()

    def add_bridge(self, name: str) -> None:
        """Make a bridge as an integration bridge is."""
        self._vs(
            *("--may-exist", "add-br", name, "--"),
            *("set", "Bridge", name, "datapath_type=netdev", "fail-mode=secure"),
        )

    def set_up(self, key: str, value: str) -> None:
        """Set up ovn-controller, and all that reads this of Open vSwitch's database."""
        self._vs("--no-wait", "set", "Open_vSwitch", ".", f'external-ids:{key}="{value}"')

    @property
    def namespaces(self) -> str:
        """What the names of its metadata namespaces begin with."""
        return f"ovnmeta-{self.lab.token}"

    def remote(self, database: str) -> str:
        return f"unix:{self.directory / database}.sock"

    @property
    def southbound(self) -> str:
        return self.remote("sb")

    @property
    def open_vswitch(self) -> str:
        return self.remote("vswitch")

    # Programs

    def start_database(self, name: str) -> None:
        """Start a database server; it goes on with what its file has."""
        words = [str(self.directory / f"{name}.db"), f"--remote=p{self.remote(name)}"]
        self._start("ovsdb-server", *words, name=name)

    def start_controller(self) -> None:
        """Start ovn-controller, unless it runs."""
        if self._pid("ovn-controller") is not None:
            return
        self._start("ovn-controller", self.open_vswitch, in_host=True)

    def stop_controller(self) -> None:
        """As Debian's unit does it: this chassis's row goes, and with it every binding."""
        socket = self.directory / "ovn-controller.ctl"
        run("ovn-appctl", "-t", str(socket), "exit")
        until(lambda: self._pid("ovn-controller") is None, within_s=_GONE_S)

    @contextlib.contextmanager
    def without_southbound(self, *, empty: bool) -> Iterator[None]:
        """Have the Southbound database killed until the end of the block; then it runs again.

        Args:
            empty: Without its rows. Who writes this chassis's row is started by `sync`.
        """
        self.kill("sb")
        try:
            yield
        finally:
            if empty:
                self.kill("ovn-controller")
                self.empty_southbound()
            self.start_database("sb")

    def kill(self, name: str) -> None:
        """End a program at once."""
        if (pid := self._pid(name)) is not None:
            os.kill(pid, signal.SIGKILL)
        until(lambda: self._pid(name) is None, within_s=_GONE_S)

    def empty_southbound(self) -> None:
        """Have a database without rows in the place of one that was ended."""
        path = self.directory / "sb.db"
        path.unlink()
        run("ovsdb-tool", "create", str(path), _SCHEMAS["sb"])

    def _pid(self, name: str) -> int | None:
        """Of a program that runs: a pid may be another process's by now."""
        try:
            pid = int((self.directory / f"{name}.pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return None
        return pid if str(self.directory) in words else None

    def _start(self, program: str, *words: str, name: str = "", in_host: bool = False) -> None:
        name = name or program
        options = [
            f"--pidfile={self.directory / name}.pid",
            f"--unixctl={self.directory / name}.ctl",
            f"--log-file={self.directory / name}.log",
            *("-vconsole:off", "-vsyslog:off", "--detach", "--no-chdir"),
        ]
        place = within(self.lab.host) if in_host else ()
        run(*place, program, *words, *options, environment=self._environment)

    @property
    def _environment(self) -> Mapping[str, str]:
        names = ("RUNDIR", "DBDIR", "LOGDIR", "SYSCONFDIR")
        return {f"{who}_{name}": str(self.directory) for who in ("OVS", "OVN") for name in names}

    def _nb(self, *words: str) -> str:
        if self._together is not None:
            self._together += ["--", *words]
            return ""
        return run("ovn-nbctl", f"--db={self.remote('nb')}", "--timeout=60", *words)

    def _sb(self, *words: str) -> str:
        return run("ovn-sbctl", f"--db={self.southbound}", "--timeout=60", *words)

    def _vs(self, *words: str) -> str:
        return run("ovs-vsctl", f"--db={self.open_vswitch}", "--timeout=60", *words)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write all that the block writes into the northbound database at its end, in one transaction."""
        self._together = []
        yield
        words, self._together = self._together[1:], None
        self._nb(*words)

    def bind_without_guests(self, *names: str) -> None:
        """Plug in devices for ports that have no guests."""
        words: list[str] = []
        for port in (self.ports[name] for name in names):
            words += ["--", "add-port", self.bridge, port.device]
            ids = f"external_ids:iface-id={port.id}"
            words += ["--", "set", "Interface", port.device, "type=internal", ids]
        self._vs(*words[1:])

    def sync(self) -> None:
        """Wait until the hypervisor has what the northbound database has, with ovn-controller as its unit has it."""
        until(self._has_all, within_s=_BACK_S, what="the hypervisor's state")

    def _has_all(self) -> bool:
        # Version 25.03 of ovn-controller aborts now and then when its chassis's row is replaced.
        self.start_controller()
        row = ("find", "Chassis_Private", f"name={self.chassis}")
        # Where this chassis has no row, OVN waits for no hypervisor.
        if not self._sb("--bare", "--columns=_uuid", *row).strip():
            return False
        words = (f"--timeout={round(_SYNC_S * patience())}", "--wait=hv", "sync")
        asked = ("ovn-nbctl", f"--db={self.remote('nb')}", *words)
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0

    # Networks and ports

    def add_network(
        self, name: str, *, cidrs: Sequence[str] = ("10.0.0.2/24", "fd00:10::2/64")
    ) -> OvnNetwork:
        """Make a network and its metadata port, which has these addresses."""
        number = len(self.networks)
        network = OvnNetwork(
            id=f"{self.lab.token}{number:04x}-0000-4000-8000-000000000001",
            project=f"{number:032x}",
            metadata_port=str(uuid.uuid4()),
            metadata_mac=f"fa:16:3e:00:{number:02x}:fe",
            cidrs=tuple(cidrs),
        )
        self.put_network(name, network)
        return network

    def put_network(self, name: str, network: OvnNetwork) -> None:
        """Make a network with ids that are known."""
        reap_at_the_end(namespaces=network.namespace)
        self.networks[name] = network
        self._nb("ls-add", network.switch)
        self.add_metadata_port(network)

    def add_metadata_port(self, network: OvnNetwork) -> None:
        """Make a network's metadata port."""
        addresses = [one.partition("/")[0] for one in network.cidrs]
        self._nb(
            *("lsp-add", network.switch, network.metadata_port),
            *("--", "lsp-set-type", network.metadata_port, "localport"),
            *("--", "lsp-set-addresses", network.metadata_port),
            " ".join((network.metadata_mac, *addresses)),
            *_ids(
                network.metadata_port,
                {
                    "device_id": network.namespace,
                    "device_owner": "network:distributed",
                    "cidrs": " ".join(network.cidrs),
                    "network_name": network.switch,
                    "project_id": network.project,
                    "mtu": str(_MTU),
                },
            ),
        )

    def remove_metadata_port(self, network: OvnNetwork) -> None:
        self._nb("--wait=sb", "lsp-del", network.metadata_port)

    def renew_metadata_port(self, name: str) -> OvnNetwork:
        """Make a network's metadata port again, with another id and MAC."""
        before = self.networks[name]
        self.networks[name] = network = replace(
            before,
            metadata_port=str(uuid.uuid4()),
            metadata_mac=before.metadata_mac.replace("fa:16:3e:00", "fa:16:3e:0a"),
        )
        self.add_metadata_port(network)
        return network

    def change_metadata_port(self, network: OvnNetwork, **values: str) -> None:
        """Write other `neutron:` values of a network's metadata port."""
        self._nb("--wait=sb", "set", *_ids(network.metadata_port, values)[2:])

    def remove_networks(self, *names: str) -> None:
        """Have networks gone, and their ports and guests with them."""
        ids = {self.networks[name].id for name in names}
        ports = [one for one in self.ports.values() if one.network.id in ids]
        self._unplug(*ports)
        for port in ports:
            del self.ports[port.name]
        with self.together():
            for name in names:
                self._nb("ls-del", self.networks[name].switch)

    def add_port(
        self,
        name: str,
        network: str,
        number: int = 11,
        *,
        mac: str = "",
        cidrs: Sequence[str] = (),
        chassis: str = CHASSIS,
    ) -> OvnPort:
        """Make a port of an instance, 10.0.0.`number` and fd00:10::`number`; it is bound once it is plugged in.

        Args:
            cidrs: Its addresses, where they are others.
            chassis: Which it is meant for, with commas between them.
        """
        place = self.networks[network]
        self._made += 1
        port = OvnPort(
            id=str(uuid.uuid4()),
            name=name,
            network=place,
            mac=mac or f"fa:16:3e:01:{self._made >> 8:02x}:{self._made & 255:02x}",
            cidrs=tuple(cidrs) or (f"10.0.0.{number}/24", f"fd00:10::{number:x}/64"),
            instance=str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.lab.token}-{name}")),
            project=place.project,
        )
        self.put_port(port, chassis=chassis)
        return port

    def put_port(self, port: OvnPort, *, chassis: str = CHASSIS) -> None:
        """Make a port with ids that are known; see `add_port`."""
        self.ports[port.name] = port
        addresses = " ".join((port.mac, *(one.partition("/")[0] for one in port.cidrs)))
        self._nb(
            *("lsp-add", port.network.switch, port.id),
            *("--", "set", "Logical_Switch_Port", port.id),
            # Not `lsp-set-addresses`, which refuses an address that another port has: Neutron does not ask.
            *(f'addresses="{addresses}"', f'options:requested-chassis="{chassis}"'),
            *_ids(
                port.id,
                {
                    "device_id": port.instance,
                    "device_owner": port.owner,
                    "cidrs": " ".join(port.cidrs),
                    "network_name": port.network.switch,
                    "project_id": port.project,
                },
            ),
        )

    def change(self, name: str, **values: str) -> None:
        """Write other `neutron:` values of a port."""
        self._nb("--wait=sb", "set", *_ids(self.ports[name].id, values)[2:])

    def request(self, name: str, *chassis: str) -> None:
        """Mean a port for other chassis: for two while its instance moves from the first to the second."""
        port, wanted = self.ports[name].id, ",".join(chassis)
        self._nb("--wait=sb", "lsp-set-options", port, f"requested-chassis={wanted}")

    def claim(self, name: str) -> None:
        """Bind a port to the other chassis."""
        self._nb("--wait=sb", "sync")
        self._add_other()
        self._sb("lsp-bind", self.ports[name].id, OTHER)

    def _add_other(self) -> None:
        # A renamed ovn-controller removes the chassis.
        self._sb("--may-exist", "chassis-add", OTHER, "geneve", "127.0.0.2")

    def is_claimed(self, name: str) -> bool:
        """Whether a port is bound to the other chassis."""
        found = self._sb("--bare", "--columns=_uuid", "find", "Chassis", f"name={OTHER}")
        port = f"logical_port={self.ports[name].id}"
        return self._sb("--bare", "--columns=chassis", "find", "Port_Binding", port) == found

    def delete_chassis(self) -> None:
        """Have this chassis's rows deleted; ovn-controller makes them again."""
        self._sb("chassis-del", self.chassis)
        self._sb("--if-exists", "destroy", "Chassis_Private", self.chassis)
        self.sync()

    def rename_chassis(self, name: str) -> None:
        """Give this chassis another name, while ovn-controller does not run; its host name stays."""
        self.chassis = name
        self.set_up("system-id", name)

    def use_bridge(self, name: str) -> None:
        """Have a bridge, and the guests on it in place of the integration bridge before."""
        self.add_bridge(name)
        before, self.bridge = self.bridge, name
        for port in self.ports.values():
            if port.device in self.ports_of_bridge(before):
                self._vs("del-port", port.device)
                self.bind(port.name)

    def ports_of_bridge(self, name: str) -> Sequence[str]:
        return self._vs("list-ports", name).split()

    @contextlib.contextmanager
    def interface_in_another_port(self, device: str) -> Iterator[None]:
        """Have Open vSwitch refuse a port for a device: its interface belongs to another port."""
        self._vs(
            *("--id=@i", "create", "Interface", f"name={device}", "--"),
            *("--id=@p", "create", "Port", "name=imdst-bond", "interfaces=@i", "--"),
            *("add", "Bridge", self.bridge, "ports", "@p"),
        )
        try:
            yield
        finally:
            self._vs("del-port", "imdst-bond")

    def be_external(self, name: str) -> None:
        """Have a port be one that Open vSwitch does not see, as an SR-IOV port: its guest is behind a bridge `br-phys`.

        This chassis is the only one of the port's HA chassis group.
        """
        port, group = self.ports[name], f"group-{name}"
        self._vs(
            *("--may-exist", "add-br", "br-phys", "--"),
            *("set", "Bridge", "br-phys", "datapath_type=netdev", "fail-mode=standalone"),
            *("--", "set", "Open_vSwitch", ".", "external-ids:ovn-bridge-mappings=phys:br-phys"),
        )
        localnet = f"localnet-{name}"
        self._nb(
            *("ha-chassis-group-add", group),
            *("--", "ha-chassis-group-add-chassis", group, CHASSIS, "10"),
            *("--", "lsp-add", port.network.switch, localnet),
            *("--", "lsp-set-type", localnet, "localnet"),
            *("--", "lsp-set-addresses", localnet, "unknown"),
            *("--", "lsp-set-options", localnet, "network_name=phys"),
        )
        found = self._nb("--bare", "--columns=_uuid", "find", "HA_Chassis_Group", f"name={group}")
        self._nb(
            *("lsp-set-type", port.id, "external", "--", "lsp-set-options", port.id),
            *("--", "set", "Logical_Switch_Port", port.id, f"ha_chassis_group={found.strip()}"),
        )

    def remove_port(self, name: str) -> None:
        """Have a port gone, and its guest with it."""
        port = self.ports.pop(name)
        self._nb("--wait=sb", "lsp-del", port.id)
        self._unplug(port)

    def _unplug(self, *ports: OvnPort) -> None:
        words = [word for one in ports for word in ("--", "--if-exists", "del-port", one.device)]
        if words:
            self._vs(*words[1:])
        for name in (self.lab.name(f"vm-{one.name}") for one in ports):
            if (NETNS / name).exists():
                ip("netns", "del", name)

    def guest(self, name: str, *, bridge: str = "") -> Guest:
        """Plug a port's guest in.

        Args:
            bridge: Where a guest is that Open vSwitch does not know as the port; else it is on the integration bridge.
        """
        port = self.ports[name]
        namespace = self.lab.namespace(f"vm-{name}")
        plug(self.lab.host, port.device, namespace, mac=port.mac, mtu=_MTU)
        lines = [
            "link set eth0 up",
            *(f"address add {one} dev eth0 {_nodad(one)}" for one in port.cidrs),
        ]
        # A subnet's address of the metadata port is its second one.
        ways = [IPv4Interface(one).network[2] for one in port.cidrs if ":" not in one]
        batch(namespace, lines + [f"route add 169.254.169.254/32 via {way}" for way in ways[:1]])
        # A datapath in user space has no network card that fills in checksums.
        run(*within(namespace), "ethtool", "-K", "eth0", "tx", "off")
        if bridge:
            self._vs("add-port", bridge, port.device)
        else:
            self.bind(name)
        addresses = tuple(one.partition("/")[0] for one in port.cidrs)
        return Guest(name, namespace, port.network.id, port.mac, addresses)

    def bind(self, name: str) -> None:
        """Plug a guest's device into the integration bridge."""
        port = self.ports[name]
        self._vs(
            *("--may-exist", "add-port", self.bridge, port.device, "--"),
            *("set", "Interface", port.device, f"external_ids:iface-id={port.id}"),
        )

    def unbind(self, name: str) -> None:
        """Unplug it again: the guest has no network."""
        self._vs("remove", "Interface", self.ports[name].device, "external_ids", "iface-id")

    def plugged(self) -> Mapping[str, str]:
        """The devices on the integration bridge, each with the logical port that it stands for."""
        lines = self._vs("--bare", "--columns=name,external_ids", "list", "Interface").split("\n\n")
        found: dict[str, str] = {}
        for block in lines:
            name, _, ids = block.strip().partition("\n")
            found[name] = ids.partition("iface-id=")[2].split(" ")[0]
        return found

    def interface_ids(self, device: str) -> str:
        """The `external_ids` of an interface."""
        return self._vs("get", "Interface", device, "external_ids")

    def provision_as_agent(self, network: OvnNetwork) -> None:
        """Make what Neutron's agent makes, in its order (neutron/agent/ovn/metadata/agent.py, `provision_datapath`)."""
        outer, inner = network.devices
        host, namespace = self.lab.host, network.namespace
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        ip(
            *("-n", host, "link", "add", outer, "type", "veth"),
            *("peer", "name", inner, "netns", namespace),
        )
        batch(
            namespace,
            [
                f"link set {inner} address {network.metadata_mac}",
                f"link set {inner} mtu {_MTU}",
                f"link set {inner} up",
                *(f"address add {one} dev {inner}" for one in network.cidrs if ":" not in one),
                f"address add 169.254.169.254/32 dev {inner}",
                f"address add fe80::a9fe:a9fe/128 dev {inner} nodad",
            ],
        )
        ip("-n", host, "link", "set", outer, "mtu", str(_MTU), "up")
        self._vs("add-port", self.bridge, outer)
        self._vs("set", "Interface", outer, f"external_ids:iface-id={network.metadata_port}")
        # Neutron's agent has a rule of iptables that fills in checksums.
        run(*within(namespace), "ethtool", "-K", inner, "tx", "off")

    def agent_ids(self) -> str:
        """What agents have written of this chassis."""
        return self._sb(
            *("--bare", "--columns=external_ids", "find", "Chassis_Private", f"name={self.chassis}")
        )

    def left_over(self) -> Sequence[str]:
        """Metadata namespaces that are there."""
        return sorted(one.name for one in NETNS.iterdir() if one.name.startswith(self.namespaces))

    def close(self) -> None:
        for name in ("ovn-controller", "ovs-vswitchd", "ovn-northd", "nb", "sb", "vswitch"):
            if (pid := self._pid(name)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        reap(
            (self.directory,), (self.namespaces, *(one.namespace for one in self.networks.values()))
        )
        self.lab.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _nodad(address: str) -> str:
    return "nodad" if ":" in address else ""


def _ids(port: str, values: Mapping[str, str]) -> list[str]:
    pairs = [f'external_ids:neutron\\:{key}="{value}"' for key, value in values.items()]
    return ["--", "set", "Logical_Switch_Port", port, *pairs]


@contextlib.contextmanager
def open_ovn() -> Iterator[OvnLab]:
    """A running OVN; all of it is gone at the end."""
    lab = OvnLab()
    try:
        yield lab
    finally:
        lab.close()
