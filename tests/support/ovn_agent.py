"""A hypervisor with systemd, a genuine OVN, Neutron's own OVN agent from PyPI as a unit, and imdsproxy beside it."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from imdsproxy.model.entities import METADATA_IPV4
from support.guest import Guest, Reply
from support.lab import Lab, ip, run, until
from support.nova_world import SECRET
from support.openstack.install import environments
from support.ovn_lab import OvnLab
from support.reaper import reap_at_the_end
from support.recorder import Recorder, say_whose
from support.systemd_daemon import UnitDaemon, installed

AGENT: Final = "neutron-ovn-metadata-agent"
NEW_AGENT: Final = "neutron-ovn-agent"
"""The one that replaces it, with its extension `metadata`."""

TARGET: Final = "/openstack/latest/meta_data.json"
_INI: Final = "/etc/neutron/neutron_ovn_metadata_agent.ini"
_MADE: Final = (
    "/etc/imdsproxy/conf.d/ovn.yaml",
    "/etc/imdsproxy/conf.d/openstack.yaml",
    "/etc/imdsproxy/nova.secret",
)
_CONTEXTS: Final = ("", "_dhcp_release", "_ovs_vsctl", "_namespace", "_conntrack", "_link")
_AGENT_START_S: Final = 40.0

_UNIT: Final = """\
[Unit]
Description=Neutron's metadata agent for OVN
[Service]
Type=simple
Environment=PATH={bin}:/usr/sbin:/usr/bin
ExecStart={bin}/{agent} --config-file=/etc/neutron/neutron.conf --config-file={ini}
Restart=on-failure
TimeoutStopSec=15
[Install]
WantedBy=multi-user.target
"""
"""As Debian's unit: `KillMode` is the default, so that a stop ends the HAProxies too."""


def render_agent(ovn: OvnLab, nova_port: int, privsep: Path) -> str:
    """Its settings file: root needs no helper to become root."""
    helper = f"helper_command = {privsep} --config-file {_INI}"
    lines = [
        "[DEFAULT]",
        "state_path = /var/lib/neutron",
        "nova_metadata_host = 127.0.0.1",
        f"nova_metadata_port = {nova_port}",
        f"metadata_proxy_shared_secret = {SECRET.replace(' ', '-')}",
        "metadata_workers = 4",
        "[agent]",
        "root_helper =",
        "extensions = metadata",
        "[ovs]",
        f"ovsdb_connection = {ovn.open_vswitch}",
        "[ovn]",
        f"ovn_sb_connection = {ovn.southbound}",
        *(line for name in _CONTEXTS for line in (f"[privsep{name}]", helper)),
    ]
    return "\n".join([*lines, ""])


def own_instance(instances: dict[str, str], guest: Guest, answer: Reply) -> str | None:
    """What is wrong with an answer: Nova was asked for another instance, or not at all."""
    if answer.status == 200 and answer.text == instances[guest.name]:
        return None
    return f"{guest.name}: {answer.status} {answer.body[:80]!r}"


@dataclass(slots=True)
class AgentWorld:
    """The hypervisor. Its guests are served by the agent, and imdsproxy is installed and knows no network."""

    daemon: UnitDaemon
    ovn: OvnLab
    nova: Recorder
    guests: dict[str, Guest]

    def wrong(self, guest: Guest, answer: Reply) -> str | None:
        """What is wrong with a guest's answer."""
        instances = {name: port.instance for name, port in self.ovn.ports.items()}
        return own_instance(instances, guest, answer)

    def served(self, guest: Guest, to: str = str(METADATA_IPV4)) -> bool:
        return guest.is_served(TARGET, self.wrong, to=to, timeout_s=2)

    def wait_served(self) -> None:
        for guest in self.guests.values():
            until(partial(self.served, guest), what=guest.name, within_s=_AGENT_START_S)

    def fresh(self, agent: str) -> None:
        """Have this agent serve, started as at a boot, and imdsproxy as after its installation."""
        machine = self.daemon.machine
        machine.run("systemctl", "disable", "--now", AGENT, NEW_AGENT)
        if machine.run("rm", "--force", "--verbose", *_MADE):
            machine.run("systemctl", "restart", "imdsproxy")
        machine.run("systemctl", "enable", "--now", agent)
        networks = {port.network for port in self.ovn.ports.values()}
        started = lambda: len(self.proxies()) == len(networks)  # noqa: E731 - twice as long otherwise
        until(started, what="the agent's HAProxies", within_s=_AGENT_START_S)
        for network in networks:
            # The agent's rule that fills in checksums for a datapath in user space is for IPv4 only.
            checksums = ("ethtool", "-K", network.devices[1], "tx", "off")
            self.daemon.inside(network.namespace, *checksums)
        self.wait_served()

    def proxies(self) -> list[int]:
        """Pids of the agent's HAProxies, as the machine counts."""
        _, said = self.daemon.machine.attempt("pgrep", "--full", "ovn-metadata-proxy/")
        return [int(word) for word in said.split()]


@contextlib.contextmanager
def open_agent_world(work: Path, *, networks: int = 2) -> Iterator[AgentWorld]:
    """Boot it; two guests in each network, the same addresses in all of them."""
    neutron = environments().python("neutron").parent
    # The machine cannot write what Python compiles: each start would compile all of Neutron again.
    run(str(neutron / "python"), "-W", "ignore", "-c", "import neutron.cmd.agents.ovn_metadata")
    with installed(work) as daemon, contextlib.ExitStack() as stack:
        machine = daemon.machine
        lab = Lab(host_of=machine.init)
        # One path for the machine and for this host: sockets are named by it in databases.
        directory = Path(tempfile.mktemp(prefix="imdst-ovn-"))  # noqa: S306 - of a link
        machine.run("mkdir", str(directory))
        directory.symlink_to(machine.root / directory.relative_to("/"))
        stack.callback(directory.unlink)
        reap_at_the_end(directory=directory)
        ovn = OvnLab(lab, directory)
        stack.callback(ovn.close)
        # The name alone: its processes are the machine's.
        stack.callback(ip, "netns", "del", lab.host)
        nova = stack.enter_context(Recorder(namespace=lab.host, default=say_whose))
        for number in range(networks):
            name = "abcdefgh"[number]
            ovn.add_network(name)
            for port in (11, 12):
                ovn.add_port(f"{name}{port - 10}", name, port)
        guests = {name: ovn.guest(name) for name in ovn.ports}
        machine.write("/etc/neutron/neutron.conf", "[DEFAULT]\ntransport_url = fake://\n")
        machine.write(_INI, render_agent(ovn, nova.port, neutron / "privsep-helper"))
        machine.run("systemd-sysusers", "-", text="u neutron - - /var/lib/neutron\n")
        machine.run("mkdir", "-p", "/var/lib/neutron")
        for agent in (AGENT, NEW_AGENT):
            unit = _UNIT.format(bin=neutron, agent=agent, ini=_INI)
            machine.write(f"/etc/systemd/system/{agent}.service", unit)
        machine.run("systemctl", "daemon-reload")
        daemon.raise_limits()
        machine.run("systemctl", "start", "imdsproxy")
        yield AgentWorld(daemon, ovn, nova, guests)
