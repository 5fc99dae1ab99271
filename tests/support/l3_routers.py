"""Routers for the genuine L3 agent: of each kind, with a network and an instance of their own, and what is outside."""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nftables import INET, NetfilterSocket
from support.guest import Guest, inside
from support.lab import NETNS, until
from support.neutron_agents import NeutronHost
from support.openstack.table import BLUE, INSTANCES
from support.patience import patience
from support.reaper import reap, reap_at_the_end

GATEWAY: Final = "10.0.0.1"
_GUEST: Final = "10.0.0.9"
_ROUTER_SOLICITATION: Final = struct.pack(">BBHI", 133, 0, 0, 0)
_ALL_ROUTERS: Final = "ff02::2"


@dataclass(frozen=True, slots=True)
class MadeRouter:
    """A router with a network behind it, 10.0.0.0/24 as everywhere."""

    id: str
    network: str
    instance: str
    guest: Guest

    @property
    def namespace(self) -> str:
        return f"qrouter-{self.id}"


@contextlib.contextmanager
def made_router(host: NeutronHost, name: str, **kind: object) -> Iterator[MadeRouter]:
    """A router of a kind (`distributed`) with a gateway, in no agent's care yet, and its guest."""
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
        yield MadeRouter(router, network, instance.uuid, guest)
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
    """Give it to the agent, unless the server has done that."""
    rest = host.openstack.rest
    if rest.send("GET", f"/routers/{router.id}/l3-agents")["agents"]:
        return
    ident = next(one["id"] for one in rest.list("agent") if one["binary"] == "neutron-l3-agent")
    rest.send("POST", f"/agents/{ident}/l3-routers", {"router_id": router.id})


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
