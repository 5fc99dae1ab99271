"""A host with genuine agents of Neutron's: neutron-dhcp-agent, neutron-l3-agent, and the metadata agent behind them.

Nova, Neutron and what is in them are those of `support.openstack`; RabbitMQ is between Neutron and its agents. All of
it runs in the lab's host, a network namespace. The integration bridge is Open vSwitch's in user space. What is not
genuine is neutron-openvswitch-agent: the lab itself gives each port of the bridge its network's tag.

All labs of a checkout have the same ids, and agents name namespaces by them, and remove others of their kind: of these
hosts there may be one at a time in a test process, which has a /run/netns of its own (`support.own_netns`).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from imdsproxy.host.namespaces import NamespaceDirectory
from support.guest import Guest
from support.lab import NETNS, Lab, batch, ip, plug, run, until, within
from support.message_broker import URL, open_broker
from support.openstack.lab import OpenStack, open_openstack
from support.openstack.processes import Place
from support.openstack.servers import Server
from support.openstack.table import HOSTS, Port
from support.reaper import reap, reap_at_the_end

AgentName = Literal["dhcp", "l3"]

_SCHEMA: Final = "/usr/share/openvswitch/vswitch.ovsschema"
_DEAD_TAG: Final = 4095
_KINDS: Final[Mapping[AgentName, str]] = {"dhcp": "networks", "l3": "routers"}
_READY_S: Final = 60.0


@dataclass(slots=True)
class NeutronHost:
    """A network node.

    Attributes:
        openstack: Nova, Neutron and the metadata agent; all of them in `lab.host`, or in that of a first node.
        agents: Those that run, by their names.
        name: What Neutron calls it.
        netns: Where its namespaces are.
    """

    lab: Lab
    directory: Path
    openstack: OpenStack = field(repr=False)
    agents: Mapping[AgentName, Server] = field(repr=False)
    name: str = HOSTS[0]
    netns: Path = NETNS
    _tags: dict[str, int] = field(default_factory=dict)
    _made: list[str] = field(default_factory=list)

    def network(self, name: str) -> str:
        """The id of a network of the table."""
        return self.openstack.seed.networks[name]

    def router(self, name: str) -> str:
        """The id of a router of the table."""
        return self.openstack.seed.routers[name]

    def dhcp_namespace(self, name: str) -> str:
        return f"qdhcp-{self.network(name)}"

    @property
    def programs(self) -> Path:
        """The directory in which agents look for programs first."""
        return self.directory / "bin"

    def settings(
        self, namespaces: Mapping[str, object] | None = None
    ) -> dict[str, dict[str, object]]:
        """A daemon's settings: instances of Neutron's, documents of Nova's, and what of the agents' it serves."""
        cloud = {"enabled": True, "cloud": "lab", "clouds_file": str(self.openstack.clouds_yaml)}
        nova = {
            "endpoints": [{"url": self.openstack.nova_url}],
            "secret_file": str(self.openstack.secret_file),
        }
        return {
            "sources": {"neutron": cloud, "neutron_namespaces": dict(namespaces or {})},
            "nova": {"endpoint_sets": {"default": nova}},
            "documents": {"enabled": False, "supervisor": "spawn"},
            # On a busy machine Neutron takes longer to list its ports than a request is held by default.
            "resolver": {"hold_s": 30.0},
        }

    def give(self, agent: AgentName, name: str) -> None:
        """Have an agent look after a network or router of the table, and wait until its guests can be served."""
        self.give_id(agent, self.network(name) if agent == "dhcp" else self.router(name))

    def give_id(self, agent: AgentName, its_id: str) -> None:
        """The same for any network or router."""
        rest, ident = self.openstack.rest, self.agent_id(agent)
        if agent == "dhcp":
            body, namespace = {"network_id": its_id}, f"qdhcp-{its_id}"
        else:
            body, namespace = {"router_id": its_id}, f"qrouter-{its_id}"
        reap_at_the_end(namespaces=namespace)
        self._made.append(namespace)
        rest.send("POST", f"/agents/{ident}/{agent}-{_KINDS[agent]}", body)
        until(
            lambda: self._is_served(namespace),
            within_s=_READY_S,
            what=f"a proxy in {namespace}",
            pause_s=0.2,
        )
        self.wire()

    def agent_id(self, agent: AgentName) -> str:
        """The id that Neutron has for an agent of this node."""
        own = (f"neutron-{agent}-agent", self.name)
        agents = self.openstack.rest.list("agent")
        return next(str(one["id"]) for one in agents if (one["binary"], one["host"]) == own)

    def _is_served(self, namespace: str) -> bool:
        # Its name is there before it is.
        if NamespaceDirectory().identity(namespace) is None:
            return False
        return "haproxy" in run(*within(namespace), "ss", "--listening", "--tcp", "--processes")

    def restart_dhcp_agent(self) -> None:
        """Have the agent begin again, and wait until it has done all that it does at first."""
        agent = self.agents["dhcp"]

        def synchronisations() -> int:
            return agent.log.read_text().count("Synchronizing state complete")

        agent.stop()
        before = synchronisations()
        agent.start()
        until(lambda: synchronisations() > before, within_s=_READY_S, what="a synchronisation")

    def take_away(self) -> None:
        """The namespaces that agents have made, with all that runs in them."""
        reap(namespaces=tuple(self._made))

    def wire(self) -> None:
        """Give ports of the integration bridge their networks' tags; those that agents have just plugged have none."""
        networks = {one["id"]: one["network_id"] for one in self.openstack.rest.list("port")}
        for device, port in self._dead_ports().items():
            if port in networks:
                self._vs(*_tagged(device, self._tag(networks[port])))

    @contextlib.contextmanager
    def joined(self, other: NeutronHost, device: str) -> Iterator[None]:
        """The integration bridges of both have a wire between them for the block, for ports of every network."""
        pair = ("link", "add", device, "type", "veth", "peer", "name", device)
        ip("-n", self.lab.host, *pair, "netns", other.lab.host)
        for one in (self, other):
            ip("-n", one.lab.host, "link", "set", device, "up")
            one._vs("add-port", "br-int", device)
        other._tags = self._tags
        try:
            yield
        finally:
            self._vs("del-port", "br-int", device)
            ip("-n", self.lab.host, "link", "del", device)

    def _dead_ports(self) -> Mapping[str, str]:
        found = self._rows("Port", "name,tag", f"tag={_DEAD_TAG}")
        ids = {name: dict(pairs[1]) for name, pairs in self._rows("Interface", "name,external_ids")}
        return {name: ids[name].get("iface-id", "") for name, _ in found if name in ids}

    def _tag(self, network: str) -> int:
        return self._tags.setdefault(network, len(self._tags) + 1)

    def _rows(self, table: str, columns: str, *where: str) -> list[list[Any]]:
        verb = "find" if where else "list"
        text = self._vs("--format=json", f"--columns={columns}", verb, table, *where)
        return json.loads(text)["data"]  # type: ignore[no-any-return]

    def _vs(self, *words: str) -> str:
        return run("ovs-vsctl", f"--db={_database(self.directory)}", "--timeout=60", *words)

    def guest(self, port: Port, *, via: str | None = None) -> Guest:
        """Plug an instance's guest in.

        Args:
            port: Of the table.
            via: Where its route to 169.254.169.254 leads; none by default.
        """
        return self.plug(port.id, port.network_id, port.plan.mac, port.plan.addresses, via=via)

    def plug(
        self,
        port: str,
        network: str,
        mac: str,
        addresses: tuple[str, ...],
        *,
        via: str | None = None,
    ) -> Guest:
        """Plug a machine in.

        Args:
            port: What its names are made of.
            network: Its network's id.
            via: As for `guest`.
        """
        name = f"vm-{port[:8]}"
        namespace = self.lab.namespace(name)
        device = f"vm{port[:11]}"
        plug(self.lab.host, device, namespace, mac=mac)
        batch(
            namespace,
            [
                "link set eth0 up",
                *(
                    f"address add {one}/64 dev eth0 nodad"
                    if ":" in one
                    else f"address add {one}/24 dev eth0"
                    for one in addresses
                ),
                *([f"route add 169.254.169.254/32 via {via}"] if via else []),
            ],
        )
        # A datapath in user space has no network card that fills in checksums.
        run(*within(namespace), "ethtool", "-K", "eth0", "tx", "off")
        words = _tagged(device, self._tag(network))
        self._vs("add-port", "br-int", device, "--", *words)
        return Guest(name, namespace, network, mac, addresses)

    def port(self, network: str, address: str) -> Port:
        """The port of the table with an address in a network."""
        ident = self.network(network)
        return next(
            one
            for one in self.openstack.seed.ports
            if one.network_id == ident and address in one.plan.addresses
        )

    def dhcp_address(self, network: str) -> str:
        """Where the network's DHCP server is, of IPv4."""
        ident = self.network(network)
        (port,) = (
            one
            for one in self.openstack.rest.list("port")
            if one["network_id"] == ident and one["device_owner"] == "network:dhcp"
        )
        (address,) = (
            one["ip_address"] for one in port["fixed_ips"] if ":" not in one["ip_address"]
        )
        return str(address)


def _tagged(device: str, tag: int) -> Sequence[str]:
    return (
        *("set", "Port", device, f"tag={tag}", "--"),
        *("clear", "Port", device, "vlan_mode", "--", "clear", "Port", device, "trunks"),
    )


def _database(directory: Path) -> str:
    return f"unix:{directory / 'vswitch.sock'}"


@contextlib.contextmanager
def open_agents(*names: AgentName, **options: str) -> Iterator[NeutronHost]:
    """A host with these agents, which have nothing to do yet.

    Args:
        options: Of their section `DEFAULT`.
    """
    with contextlib.ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        directory = Path(tempfile.mkdtemp(prefix="imdst-agents-"))
        reap_at_the_end(directory=directory)
        stack.callback(reap, (directory,))
        # dnsmasq reads its files as another user.
        directory.chmod(0o755)
        stack.enter_context(open_broker(lab.host, directory / "broker"))
        (directory / "bin").mkdir()
        start_open_vswitch(directory, lab.host)
        place = directory / "openstack"
        place.mkdir()
        openstack = stack.enter_context(open_openstack(place, namespace=lab.host, broker=URL))
        # With threads that wait for messages it takes its time.
        stack.callback(openstack.neutron.kill)
        openstack.agent.launch()
        agents = {name: agent_of(openstack, directory, name, options) for name in names}
        host = NeutronHost(lab, directory, openstack, agents)
        stack.callback(host.take_away)
        for agent in agents.values():
            stack.callback(agent.kill)
            agent.launch()
        for server in (openstack.agent, *agents.values()):
            server.wait_up()
        yield host


def agent_of(
    openstack: OpenStack,
    directory: Path,
    name: AgentName,
    options: Mapping[str, str],
    *,
    place: Place | None = None,
    prefix: Sequence[str] = (),
) -> Server:
    """An agent, not started yet.

    Args:
        directory: Where Open vSwitch is, and a `bin`.
        options: Of its section `DEFAULT`.
        place: Where it lives; where Neutron does by default.
        prefix: The words before its own.
    """
    place = place or openstack.place
    host = options.get("host", HOSTS[0])
    settings = place.etc / f"{name}_agent.ini"
    own = "".join(f"{key} = {value}\n" for key, value in options.items())
    settings.write_text(f"""\
[DEFAULT]
interface_driver = openvswitch
state_path = {place.path}
graceful_shutdown_timeout = 2
{own}[AGENT]
root_helper = env
report_interval = 5
check_child_processes_interval = 1
[OVS]
ovsdb_connection = {_database(directory)}
datapath_type = netdev
""")
    tools = place.environments.python("neutron").parent
    program = f"neutron-{name}-agent"
    files = (place.etc / "neutron.conf", settings)
    words = [word for file in files for word in ("--config-file", str(file))]

    def is_up() -> bool:
        agents = openstack.rest.list("agent")
        return any((one["binary"], one["host"]) == (program, host) for one in agents)

    return Server(
        name=program,
        argv=[*place.prefix, *prefix, str(tools / program), *words],
        cwd=place.path,
        # The first one stands for /usr/local/sbin.
        environment={"PATH": f"{directory}/bin:{tools}:/usr/sbin:/usr/bin:/sbin:/bin"},
        log=place.log / f"{program}.log",
        is_up=is_up,
    )


def start_open_vswitch(directory: Path, namespace: str) -> None:
    run("ovsdb-tool", "create", str(directory / "vswitch.db"), _SCHEMA)
    environment = {f"OVS_{name}DIR": str(directory) for name in ("RUN", "DB", "LOG", "SYSCONF")}
    database = _database(directory)
    for program, *words in (
        ("ovsdb-server", str(directory / "vswitch.db"), f"--remote=p{database}"),
        ("ovs-vswitchd", database, "--disable-system"),
    ):
        run(
            *(*within(namespace), program, *words),
            f"--pidfile={directory / program}.pid",
            f"--unixctl={directory / program}.ctl",
            f"--log-file={directory / program}.log",
            *("-vconsole:off", "-vsyslog:off", "--detach", "--no-chdir"),
            environment=environment,
        )
    run(
        *("ovs-vsctl", f"--db={database}", "--timeout=60", "add-br", "br-int", "--"),
        *("set", "Bridge", "br-int", "datapath_type=netdev"),
    )
