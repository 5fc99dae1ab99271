"""A second network node of a cloud in a lab: the other one of a highly available router's two."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from support.lab import Lab, batch, ip, run, until, within
from support.message_broker import URL
from support.neutron_agents import AgentName, NeutronHost, agent_of, start_open_vswitch
from support.openstack.lab import OpenStack
from support.openstack.processes import Place
from support.openstack.servers import ends_with_us
from support.openstack.table import HOSTS
from support.reaper import reap, reap_at_the_end

_FIRST: Final = "198.18.0.1"
_SECOND: Final = "198.18.0.2"
_TO_FIRST: Final = """\
table ip {device} {{
    chain out {{
        type nat hook output priority -100
        ip daddr 127.0.0.1 tcp dport {{ {ports} }} dnat to {first}
    }}
    chain after {{
        type nat hook postrouting priority 100
        oifname {device} masquerade
    }}
}}
"""
_FROM_SECOND: Final = """\
table ip {device} {{
    chain in {{
        type nat hook prerouting priority -100
        iifname {device} tcp dport {{ {ports} }} dnat to 127.0.0.1
    }}
}}
"""


@contextlib.contextmanager
def open_second_node(first: NeutronHost, agent: AgentName, **options: str) -> Iterator[NeutronHost]:
    """A node with this agent, an integration bridge that is joined with the first one's, and namespaces of its own.

    Namespaces of both nodes have the same names. So this one's are mounts in a mount namespace of its own, and the
    agent runs there.

    Args:
        options: Of the agent's section `DEFAULT`.
    """
    openstack, name = first.openstack, HOSTS[1]
    with contextlib.ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        directory = Path(tempfile.mkdtemp(prefix="imdst-node-"))
        reap_at_the_end(directory=directory)
        stack.callback(reap, (directory,))
        directory.chmod(0o755)
        (directory / "bin").mkdir()
        ports = [urlsplit(url).port for url in (URL, openstack.neutron_url, openstack.nova_url)]
        stack.enter_context(_reachable(first.lab.host, lab.host, ports, f"sv{lab.token}"))
        start_open_vswitch(directory, lab.host)
        mounts = stack.enter_context(_mounts_of_its_own())
        place = Place(directory / "openstack", openstack.place.environments, lab.host, URL)
        place.prepare()
        server = agent_of(
            openstack,
            directory,
            agent,
            {"host": name, **options},
            place=place,
            prefix=("nsenter", f"--mount={mounts}/ns/mnt", "env", f"--chdir={place.path}"),
        )
        netns = mounts / "root/run/netns"
        node = NeutronHost(lab, directory, openstack, {agent: server}, name, netns)
        stack.enter_context(first.joined(node, f"br{lab.token}"))
        stack.callback(_forget_agents, openstack)
        stack.callback(server.kill)
        server.start()
        yield node


def _forget_agents(openstack: OpenStack) -> None:
    """Have Neutron give nothing to the second node's agents any more."""
    for one in openstack.rest.list("agent"):
        if one["host"] == HOSTS[1] and one["binary"] != "neutron-openvswitch-agent":
            openstack.rest.delete("agent", one["id"])


@contextlib.contextmanager
def _mounts_of_its_own() -> Iterator[Path]:
    """A process in /proc whose mount namespace has a /run/netns of its own."""
    words = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs netns /run/netns && exec sleep infinity",
    )
    process = subprocess.Popen((*ends_with_us(), *words), stdin=subprocess.DEVNULL)
    proc = Path(f"/proc/{process.pid}")
    try:
        until(lambda: (proc / "comm").read_text() == "sleep\n", what="a /run/netns of its own")
        yield proc
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _reachable(first: str, second: str, ports: Sequence[int | None], device: str) -> Iterator[None]:
    """Ports of the first node's loopback answer on the second one's, by a device between them."""
    named = ", ".join(map(str, ports))
    pair = ("link", "add", device, "type", "veth", "peer", "name", device)
    ip("-n", first, *pair, "netns", second)
    for host, address, rules in ((first, _FIRST, _FROM_SECOND), (second, _SECOND, _TO_FIRST)):
        batch(host, [f"address add {address}/30 dev {device}", f"link set {device} up"])
        run(*within(host), "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
        text = rules.format(ports=named, first=_FIRST, device=device)
        run(*within(host), "nft", "-f", "-", stdin=text)
    try:
        yield
    finally:
        ip("-n", first, "link", "del", device)
        run(*within(first), "nft", "delete", "table", "ip", device)
