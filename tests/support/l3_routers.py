"""Routers for the genuine L3 agent: of each kind, with a network and an instance of their own, and what is outside."""

import contextlib
import socket
import sqlite3
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nftables import INET, NetfilterSocket
from support.guest import Guest, inside
from support.lab import NETNS, run, until
from support.neutron_agents import NeutronHost
from support.openstack.table import BLUE, INSTANCES
from support.patience import patience
from support.reaper import reap, reap_at_the_end

GATEWAY: Final = "10.0.0.1"
_GUEST: Final = "10.0.0.9"
_ROUTER_SOLICITATION: Final = struct.pack(">BBHI", 133, 0, 0, 0)
_ALL_ROUTERS: Final = "ff02::2"
# A look asks Neutron, or starts programs.
_PAUSE_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class MadeRouter:
    """A router with a network behind it, 10.0.0.0/24 as everywhere."""

    id: str
    ha: bool
    network: str
    instance: str
    guest: Guest

    @property
    def namespace(self) -> str:
        return f"qrouter-{self.id}"


@contextlib.contextmanager
def made_router(host: NeutronHost, name: str, **kind: object) -> Iterator[MadeRouter]:
    """A router of a kind (`ha`, `distributed`) with a gateway, in no agent's care yet, and its guest."""
    rest = host.openstack.rest
    (instance,) = (one for one in INSTANCES if one.name == "blue-3")
    outside = {"network_id": host.network("net-ext")}
    network = rest.create("network", name=name, project_id=BLUE)["id"]
    subnet = rest.create("subnet", network_id=network, ip_version=4, cidr="10.0.0.0/24")["id"]
    router = rest.create(
        "router", name=name, project_id=BLUE, external_gateway_info=outside, **kind
    )["id"]
    namespaces = tuple(f"{one}-{router}" for one in ("qrouter", "snat"))
    if kind.get("distributed"):
        namespaces = (*namespaces, f"fip-{outside['network_id']}")
    for one in namespaces:
        reap_at_the_end(namespaces=one)
    port = rest.create(
        "port",
        network_id=network,
        project_id=BLUE,
        device_id=instance.uuid,
        device_owner="compute:nova",
        binding__host_id="lab",
        fixed_ips=[{"ip_address": _GUEST}],
    )
    guest = host.plug(port["id"], network, port["mac_address"], (_GUEST,), via=GATEWAY)
    try:
        rest.send("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": subnet})
        yield MadeRouter(router, bool(kind.get("ha")), network, instance.uuid, guest)
    finally:
        rest.send("PUT", f"/routers/{router}/remove_router_interface", {"subnet_id": subnet})
        rest.delete("router", router)
        until(
            lambda: not (NETNS / f"qrouter-{router}").exists(),
            what="the agent has removed it",
            within_s=30,
        )
        reap(namespaces=namespaces)


def entrust(host: NeutronHost, router: MadeRouter) -> None:
    """Give it to this node's agent; the server may have given it to one that was another test's and has ended."""
    rest = host.openstack.rest
    others = _agents_of(host, router) - {host.name}
    for one in rest.list("agent"):
        if one["binary"] == "neutron-l3-agent" and one["host"] in others:
            rest.send("DELETE", f"/agents/{one['id']}/l3-routers/{router.id}")
    if not _agents_of(host, router):
        way = f"/agents/{host.agent_id('l3')}/l3-routers"
        rest.send("POST", way, {"router_id": router.id})


def _agents_of(host: NeutronHost, router: MadeRouter) -> set[str]:
    """The nodes whose agents have it."""
    found = host.openstack.rest.send("GET", f"/routers/{router.id}/l3-agents")
    return {str(one["host"]) for one in found["agents"]}


def wait_scheduled(nodes: Sequence[NeutronHost], router: MadeRouter) -> None:
    """Wait until each node's agent has a router and has plugged its port for keepalived."""
    names = {one.name for one in nodes}
    until(
        lambda: _agents_of(nodes[0], router) == names,
        what="a router on each node",
        pause_s=_PAUSE_S,
    )
    until(
        lambda: all("ha-" in devices(node, router) for node in nodes),
        what="its namespaces",
        within_s=40,
        pause_s=_PAUSE_S,
    )


def _wire_ha(nodes: Sequence[NeutronHost], router: MadeRouter) -> None:
    """Plug ports in, and report those for keepalived as plugged, as neutron-openvswitch-agent does.

    Each time: Neutron takes a port for unplugged again when it binds it to its node.
    """
    for node in nodes:
        node.wire()
    openstack = nodes[0].openstack
    database = openstack.place.path / "db" / "neutron.sqlite"
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        changed = connection.execute(
            "UPDATE ports SET status='ACTIVE' "
            "WHERE device_owner='network:router_ha_interface' AND status!='ACTIVE'"
        ).rowcount
    if changed:
        openstack.rest.update("router", router.id, description=f"plugged at {time.monotonic()}")


def devices(node: NeutronHost, router: MadeRouter) -> str:
    """The router's devices on a node with their addresses; nothing where it is not there."""
    if NamespaceDirectory(node.netns).identity(router.namespace) is None:
        return ""
    return run(*enter(node, router), "ip", "-br", "address")


def enter(node: NeutronHost, router: MadeRouter) -> Sequence[str]:
    """The words before a command that is to run in the router's namespace on a node."""
    return ("nsenter", f"--net={node.netns / router.namespace}", "--")


def wait_primary(
    nodes: Sequence[NeutronHost], router: MadeRouter, *, but: NeutronHost | None = None
) -> NeutronHost:
    """Wait until one node alone has the router's addresses, and not the node `but`; it."""
    found: list[NeutronHost] = []

    def is_one() -> bool:
        _wire_ha(nodes, router)
        found[:] = [node for node in nodes if GATEWAY in devices(node, router)]
        return len(found) == 1 and found[0] is not but

    until(is_one, what="one primary", within_s=40, pause_s=_PAUSE_S)
    return found[0]


def set_ha_device(node: NeutronHost, router: MadeRouter, state: str) -> None:
    """Have the device over which keepalived hears the other nodes up or down; down, it gives up all addresses."""
    names = (line.split()[0] for line in devices(node, router).splitlines())
    device = next(name for name in names if name.startswith("ha-"))
    run(*enter(node, router), "ip", "link", "set", device, state)


def solicit(guest: Guest) -> None:
    """Ask for a router advertisement, and take what it has of routes."""

    def ask() -> None:
        for name, value in (("accept_ra", "2"), ("accept_ra_rt_info_max_plen", "128")):
            Path(f"/proc/sys/net/ipv6/conf/{guest.device}/{name}").write_text(value)
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sender:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            scope = socket.if_nametoindex(guest.device)
            sender.sendto(_ROUTER_SOLICITATION, (_ALL_ROUTERS, 0, 0, scope))

    inside(guest.namespace, ask)


def plug_outside(host: NeutronHost) -> str:
    """Plug a machine into the external network that has its gateway's address; the namespace."""
    address = "203.0.113.1"
    network = host.network("net-ext")
    return host.plug("outside", network, "fa:16:3e:ff:ff:01", (address,)).namespace


@dataclass(slots=True)
class Moments:
    """When a namespace had what, in seconds after its name."""

    closed: float = 0.0
    device: float = 0.0


def watch_making(namespace: str, table: str, *, within_s: float = 60.0) -> Moments:
    """Look at a namespace that is about to be made, a thousand times a second, until it has a guest's device."""
    deadline = time.monotonic() + within_s * patience()
    directory = NamespaceDirectory()
    while directory.identity(namespace) is None:
        assert time.monotonic() < deadline, f"no {namespace}"
        time.sleep(0.001)
    began, found = time.monotonic(), Moments()

    def look() -> None:
        with NetfilterSocket() as channel:
            while not found.device:
                assert time.monotonic() < deadline, f"no device in {namespace}: {found}"
                now = time.monotonic() - began
                if not found.closed and channel.comment(table, INET) is not None:
                    found.closed = now
                if "qr-" in Path("/proc/thread-self/net/dev").read_text():
                    found.device = now
                time.sleep(0.001)

    with contextlib.closing(NamespaceThread(directory)) as thread, thread.inside(namespace):
        look()
    return found
