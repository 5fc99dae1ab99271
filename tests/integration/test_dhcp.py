"""Networks without a router: neutron-dhcp-agent makes their namespaces; its HAProxies or imdsproxy listen there."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.process import command_name
from imdsproxy.model.entities import Scope
from imdsproxy.sources.neutron_namespaces.source import DhcpProxies
from imdsproxy.tools.takeover.steps import EditSettings, StartAgent, Step
from support.daemon import Daemon
from support.dhcp_client import take_lease
from support.guest import IPV4, IPV6, Guest, Load, Reply, uuid_of
from support.lab import NETNS, ip, processes_in, until
from support.neutron_agents import NeutronHost, open_agents
from support.takeovers import run_takeover

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

_WITHIN_S = 60.0


@dataclass(slots=True)
class DhcpWorld:
    """A genuine DHCP agent with an isolated network, and a daemon that serves nothing yet."""

    host: NeutronHost
    daemon: Daemon
    guest: Guest
    instance: str

    def asked_uuid(self, *, to: str = IPV4) -> str:
        """Who the guest is, by what it reads; else the status, or why nothing listens."""
        return uuid_of(self.guest, to=to)

    def networks(self) -> dict[str, str]:
        """The namespaces of imdsproxy's networks, each with why it is not served; empty where it is."""
        return {
            one["record"]["listener"]["namespace"]: one["not_served"]["code"]
            if one["not_served"]
            else ""
            for one in self.daemon.admin.get("/v1/networks")
        }

    def is_wanted(self) -> bool:
        """Whether the agent wants metadata served in the network's namespace."""
        return (self.state / "ns-metadata-proxy" / f"{self._network}.conf").exists()

    def ways(self) -> set[tuple[str, str]]:
        """Where the DHCP server sends guests for metadata: option and next hop."""
        text = (self.state / "dhcp" / self._network / "opts").read_text()
        return set(
            re.findall(r"^tag:[^,]+,([^,]+),169\.254\.169\.254/32,([^,\n]+)", text, re.MULTILINE)
        )

    @contextmanager
    def subnet6(self) -> Iterator[None]:
        """The network has a subnet of IPv6 for the block."""
        rest = self.host.openstack.rest
        six = {"ip_version": 6, "cidr": "fd00:9::/64", "network_id": self._network}
        modes = dict.fromkeys(("ipv6_ra_mode", "ipv6_address_mode"), "dhcpv6-stateful")
        subnet = rest.create("subnet", **six, **modes)["id"]
        try:
            yield
        finally:
            rest.delete("subnet", subnet)

    @contextmanager
    def routed(self) -> Iterator[None]:
        """The network has a router for the block."""
        rest = self.host.openstack.rest
        (subnet,) = (one["id"] for one in rest.list("subnet") if one["network_id"] == self._network)
        router = rest.create("router", name="r-green")["id"]
        join = {"subnet_id": subnet}
        rest.send("PUT", f"/routers/{router}/add_router_interface", join)
        try:
            yield
        finally:
            rest.send("PUT", f"/routers/{router}/remove_router_interface", join)
            rest.delete("router", router)

    @property
    def state(self) -> Path:
        """The agent's files."""
        return self.host.openstack.place.path

    @property
    def _network(self) -> str:
        return self.host.network("net-green")

    def programs(self) -> set[str]:
        """What runs in the network's namespace."""
        found = processes_in(self.host.dhcp_namespace("net-green"))
        return {name for pid in found if (name := command_name(pid))}

    def run(self, *words: str, killed_after: type[Step] | None = None) -> None:
        """Run a command of imdsproxy's, which has agent and controller restarted."""
        agent = self.host.agents["dhcp"]
        run_takeover(self.daemon, agent, *words, killed_after=killed_after)

    def lease(self, directory: Path) -> str:
        """The route to metadata that a lease of now brings the guest."""
        assert take_lease(self.guest.namespace, directory) == "10.0.0.5"
        return ip("-n", self.guest.namespace, "route", "show", "169.254.169.254")

    def dry_run(self, *words: str) -> str:
        """What the command would do."""
        return run_takeover(self.daemon, self.host.agents["dhcp"], *words, "--dry-run").out

    @contextmanager
    def agent_with(self, line: str) -> Iterator[Path]:
        """The agent runs with a line in the place of `enable_isolated_metadata` for the block; its settings file."""
        settings = self.state / "etc" / "dhcp_agent.ini"
        before = settings.read_text()
        settings.write_text(before.replace("enable_isolated_metadata = true\n", line))
        assert settings.read_text() != before
        self.host.restart_dhcp_agent()
        try:
            yield settings
        finally:
            settings.write_text(before)
            self.host.restart_dhcp_agent()
            # As the guest was plugged in.
            way = ("169.254.169.254", "via", self.host.dhcp_address("net-green"))
            ip("-n", self.guest.namespace, "route", "replace", *way)


@pytest.fixture(scope="module")
def world() -> Iterator[DhcpWorld]:
    options = {"enable_isolated_metadata": "true", "enable_metadata_network": "true"}
    with open_agents("dhcp", **options) as host, closing(Daemon(host.lab)) as daemon:
        host.give("dhcp", "net-green")
        port = host.port("net-green", "10.0.0.5")
        guest = host.guest(port, via=host.dhcp_address("net-green"))
        until(guest.reaches, within_s=_WITHIN_S)
        daemon.configure(host.settings())
        daemon.start()
        yield DhcpWorld(host, daemon, guest, port.device_id)


def test_a_guest_of_an_isolated_network_is_answered_by_neutrons_own_agents(
    world: DhcpWorld,
) -> None:
    # The test before may have handed back: the agent starts its HAProxies when it misses them.
    until(lambda: world.asked_uuid() == world.instance, within_s=_WITHIN_S, what="its own answer")


def test_takeover_and_handback_lose_no_request_and_the_agent_runs_on(world: DhcpWorld) -> None:
    namespace = world.host.dhcp_namespace("net-green")
    # The agent's proxy listens before what is behind it answers.
    until(lambda: world.asked_uuid() == world.instance, within_s=_WITHIN_S, what="its own answer")
    target = "/openstack/latest/meta_data.json"
    # A HAProxy that ends closes a connection whose request does not come at once.
    with Load([world.guest], target, partial(_wrong, world.instance), at_once=True) as load:
        load.wait_answers(20)
        world.run("takeover", "dhcp")
        until(lambda: world.programs() == {"dnsmasq", "sleep"}, within_s=_WITHIN_S)
        until(lambda: world.networks() == {namespace: ""}, within_s=_WITHIN_S)
        load.wait_answers(50)
        # An agent that starts ends each of its proxies, writes its configuration anew, and starts it again.
        world.host.restart_dhcp_agent()
        until(lambda: world.programs() == {"dnsmasq", "sleep"}, within_s=_WITHIN_S)
        until(lambda: world.networks() == {namespace: ""}, within_s=_WITHIN_S)
        load.wait_answers(50)
        world.run("handback", "dhcp")
        until(lambda: world.programs() == {"dnsmasq", "haproxy"}, within_s=_WITHIN_S)
        load.wait_answers(50)
    assert load.report.lost == []
    assert not list(world.host.programs.iterdir())


@pytest.mark.slow
def test_takeover_has_leases_name_the_route_where_the_agent_named_none_and_handback_takes_it_back(
    world: DhcpWorld, tmp_path: Path
) -> None:
    def routes() -> str:
        return world.lease(tmp_path)

    own = world.host.dhcp_address("net-green")
    with world.agent_with("") as settings:
        before = settings.read_text()
        assert (world.ways(), routes(), world.is_wanted()) == (set(), "", False)
        dry = world.dry_run("takeover", "dhcp")
        assert f"set enable_isolated_metadata = True in {settings}" in dry
        assert settings.read_text() == before
        for action in (EditSettings, StartAgent):
            world.run("takeover", "dhcp", killed_after=action)
        # The agent does its part alone; while it starts its DHCP servers anew there is nothing to see of it.
        until(world.is_wanted, within_s=_WITHIN_S)
        world.run("takeover", "dhcp")
        assert f"via {own} " in routes()
        # Nothing was left to do, so nothing was waited for.
        until(lambda: world.asked_uuid() == world.instance, within_s=_WITHIN_S)
        with world.subnet6():
            until(lambda: world.asked_uuid(to=IPV6) == world.instance, within_s=_WITHIN_S)
        until(lambda: world.programs() == {"dnsmasq", "sleep"}, within_s=_WITHIN_S)
        assert "nothing is left to do" in world.dry_run("takeover", "dhcp")
        world.run("handback", "dhcp")
        assert settings.read_text() == before
        until(lambda: world.ways() == set(), within_s=_WITHIN_S)
        assert routes() == ""
        until(lambda: world.programs() == {"dnsmasq"}, within_s=_WITHIN_S)
        assert not list(world.host.programs.iterdir())


@pytest.mark.slow
def test_where_metadata_is_forced_guests_with_a_router_are_served_too(
    world: DhcpWorld, tmp_path: Path
) -> None:
    own = world.host.dhcp_address("net-green")
    with world.agent_with("force_metadata = true\n") as settings, world.routed():
        before = settings.read_text()
        until(lambda: {way for _, way in world.ways()} == {own}, within_s=_WITHIN_S)
        world.run("takeover", "dhcp")
        assert settings.read_text() == before
        assert f"via {own} " in world.lease(tmp_path)
        assert world.asked_uuid() == world.instance
        until(lambda: world.programs() == {"dnsmasq", "sleep"}, within_s=_WITHIN_S)
        world.run("handback", "dhcp")
        until(lambda: world.asked_uuid() == world.instance, within_s=_WITHIN_S)


def _wrong(instance: str, _: Guest, reply: Reply) -> str | None:
    ours = reply.status == 200 and json.loads(reply.body)["uuid"] == instance
    return None if ours else f"{reply.status} {reply.body[:80]!r}"


def test_a_lease_names_the_way_to_metadata_and_a_network_with_a_router_has_another(
    world: DhcpWorld,
) -> None:
    own = world.host.dhcp_address("net-green")
    assert world.ways() == {("option:classless-static-route", own), ("249", own)}
    assert world.is_wanted()
    with world.routed():
        # The router answers for metadata: the agent ends its proxy, and imdsproxy's listener follows a minute later.
        until(lambda: not world.is_wanted(), within_s=_WITHIN_S)
        assert {way for _, way in world.ways()} == {"10.0.0.1"}
    until(world.is_wanted, within_s=_WITHIN_S)
    until(lambda: {way for _, way in world.ways()} == {own}, within_s=_WITHIN_S)


def test_a_network_that_leads_from_a_router_to_metadata_is_served_for_the_routers_guests(
    world: DhcpWorld,
) -> None:
    rest = world.host.openstack.rest
    network = rest.create("network", name="metadata")["id"]
    range4 = {"ip_version": 4, "cidr": "169.254.169.252/30"}
    subnet = rest.create("subnet", network_id=network, **range4)["id"]
    router = rest.create("router", name="of another driver")["id"]
    rest.send("PUT", f"/routers/{router}/add_router_interface", {"subnet_id": subnet})
    world.host.give_id("dhcp", network)
    proxies = DhcpProxies(world.state / "ns-metadata-proxy", NamespaceDirectory())
    asyncio.run(proxies.read())
    served = proxies.networks[f"qdhcp-{network}"]
    assert (served.id, served.scope) == (router, Scope.ROUTER)
    rest.send("PUT", f"/routers/{router}/remove_router_interface", {"subnet_id": subnet})
    rest.delete("router", router)
    rest.delete("network", network)
    until(lambda: not (NETNS / f"qdhcp-{network}").exists(), within_s=_WITHIN_S)
