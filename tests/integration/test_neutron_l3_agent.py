"""Routers of the genuine neutron-l3-agent, which neither redirects nor starts a proxy, are served by imdsproxy."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from imdsproxy.tools.takeover.l3 import PROXIES
from imdsproxy.tools.takeover.observe import find_proxies
from imdsproxy.tools.takeover.steps import (
    EditSettings,
    Restart,
    StartAgent,
    Step,
    WaitServed,
    WriteSettings,
)
from support.daemon import Daemon
from support.guest import IPV4, IPV6, Guest, Load, Reply, uuid_of
from support.l3_routers import (
    MadeRouter,
    enter,
    entrust,
    made_router,
    plug_outside,
    set_ha_device,
    solicit,
    wait_primary,
    wait_scheduled,
    watch_making,
)
from support.lab import ip, run, until
from support.neutron_agents import NeutronHost, open_agents
from support.routers import sniffing
from support.second_node import open_second_node
from support.takeovers import run_takeover

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

# This mode is for routers of every kind.
_OPTIONS = {"enable_metadata_proxy": "false", "agent_mode": "dvr_snat"}
_ROUTERS = ("r-blue", "r-red")
# A look asks Neutron for all ports, which the agent waits for meanwhile.
_PAUSE_S = 0.3
_GUESTS = {
    "blue": ("net-blue", "10.0.0.5", "10.0.0.1"),
    "blue2": ("net-blue2", "10.0.1.6", "10.0.1.1"),
    "red": ("net-red", "10.0.0.5", "10.0.0.1"),
}


@dataclass(slots=True)
class L3World:
    """Two routers with equal addresses behind them, and a guest in each of their networks.

    Attributes:
        outside: The namespace of a machine on the external network.
    """

    host: NeutronHost
    daemon: Daemon
    outside: str
    guests: dict[str, Guest] = field(default_factory=dict)
    instances: dict[str, str] = field(default_factory=dict)

    def wait_own(self, name: str, *, to: str = IPV4) -> None:
        """Wait until a guest is asked for as itself; ports that the agent plugs meanwhile get their tags."""
        own = self.instances[name]
        until(
            lambda: self._asks_as(name, to) == own,
            what=f"{name} is itself",
            within_s=30,
            pause_s=_PAUSE_S,
        )

    def command(self, *words: str, killed_after: type[Step] | None = None) -> None:
        """Run a command of imdsproxy's, which has agent and controller restarted."""
        run_takeover(self.daemon, self.host.agents["l3"], *words, killed_after=killed_after)

    def _asks_as(self, name: str, to: str) -> str:
        self.host.wire()
        return uuid_of(self.guests[name], to=to, timeout_s=2)


@pytest.fixture(scope="module")
def world() -> Iterator[L3World]:
    with ExitStack() as stack:
        host = stack.enter_context(open_agents("l3", **_OPTIONS))
        daemon = Daemon(host.lab)
        stack.callback(daemon.close)
        daemon.configure(host.settings())
        # What `takeover l3` writes.
        drop_in = daemon.config.parent / "conf.d" / "l3.yaml"
        drop_in.parent.mkdir()
        drop_in.write_text("sources: {neutron_namespaces: {routers: true}}\n")
        daemon.start()
        world = L3World(host, daemon, plug_outside(host))
        for router in _ROUTERS:
            host.give("l3", router)
        for name, (network, address, gateway) in _GUESTS.items():
            port = host.port(network, address)
            world.guests[name] = host.guest(port, via=gateway)
            world.instances[name] = port.device_id
        for name in _GUESTS:
            world.wait_own(name)
        yield world


@pytest.mark.parametrize("name", _GUESTS)
def test_guests_behind_routers_of_the_agent_are_themselves(world: L3World, name: str) -> None:
    assert uuid_of(world.guests[name], timeout_s=2) == world.instances[name]


def test_a_guest_is_served_over_ipv6_by_the_route_that_the_router_announces(
    world: L3World,
) -> None:
    rest, network = world.host.openstack.rest, world.host.network("net-blue")
    (subnet,) = (
        one["id"]
        for one in rest.list("subnet")
        if (one["network_id"], one["ip_version"]) == (network, 6)
    )
    way = f"/routers/{world.host.router('r-blue')}"
    rest.send("PUT", f"{way}/add_router_interface", {"subnet_id": subnet})
    guest, own = world.guests["blue"], world.instances["blue"]

    def is_itself() -> bool:
        world.host.wire()
        solicit(guest)
        return uuid_of(guest, to=IPV6, timeout_s=2) == own

    try:
        until(is_itself, what="the guest is itself", within_s=40, pause_s=_PAUSE_S)
        assert "fe80::a9fe:a9fe via fe80::" in ip("-n", guest.namespace, "-6", "route")
    finally:
        rest.send("PUT", f"{way}/remove_router_interface", {"subnet_id": subnet})


@pytest.mark.parametrize("kind", ["plain", pytest.param("distributed", marks=pytest.mark.slow)])
def test_no_request_leaves_a_router_from_its_first_moment_on(world: L3World, kind: str) -> None:
    table = f"{world.host.lab.prefix}-drop"
    options = {"distributed": True} if kind == "distributed" else {}
    with (
        made_router(world.host, kind, **options) as router,
        sniffing(world.outside) as seen,
        _asking(router.guest),
    ):
        entrust(world.host, router)
        moments = watch_making(router.namespace, table)
        assert 0 < moments.closed < moments.device, moments
        _wait_served(world, router)
        assert seen == []


@pytest.mark.slow
def test_guests_of_a_router_on_two_nodes_get_nothing_wrong_while_its_primary_changes(
    world: L3World,
) -> None:
    with ExitStack() as stack:
        second = stack.enter_context(open_second_node(world.host, "l3", **_OPTIONS))
        nodes = (world.host, second)
        other = Daemon(second.lab)
        stack.callback(other.close)
        own = {"paths": {"netns_dir": str(second.netns)}}
        namespaces = {"neutron_namespaces": {"routers": True}}
        settings = world.host.settings()
        settings["sources"].update(namespaces)
        other.configure({**settings, **own})
        other.start()
        seen = stack.enter_context(sniffing(world.outside))
        router = stack.enter_context(made_router(world.host, "ha", ha=True))
        stack.enter_context(_asking(router.guest))
        wait_scheduled(nodes, router)
        primary = wait_primary(nodes, router)
        # The backup is as ready as the primary is: it redirects, and lets nothing out.
        for node, daemon in zip(nodes, (world.daemon, other), strict=True):
            ours = {f"{daemon.lab.prefix}-{table}" for table in ("drop", "redirect")}
            list_tables = (*enter(node, router), "nft", "list", "tables")
            until(
                lambda ours=ours, command=list_tables: ours <= set(run(*command).split()),  # type: ignore[misc] # mypy cannot see the defaults' types
                what=f"the tables of {daemon.lab.prefix} in the router's namespace",
            )
        until(
            lambda: uuid_of(router.guest, timeout_s=2) == router.instance,
            what="an answer",
            within_s=40,
        )

        def wrong(_: Guest, reply: Reply) -> str | None:
            return None if router.instance.encode() in reply.body else f"wrong: {reply.status}"

        target = "/openstack/latest/meta_data.json"
        with Load([router.guest], target, wrong, keep_alive=False, pause_s=0.02) as load:
            for _ in nodes:
                load.wait_answers(20)
                before = primary
                set_ha_device(before, router, "down")
                primary = wait_primary(nodes, router, but=before)
                load.wait_answers(20, within_s=30)
                set_ha_device(before, router, "up")
        assert not [one for one in load.report.lost if "wrong" in one]
        assert len(load.report.lost) <= len(nodes), load.report.lost
        assert seen == []


@pytest.mark.slow
def test_a_node_goes_back_to_the_agents_proxies_and_over_again_killed_after_each_step_and_loses_no_request(
    world: L3World,
) -> None:
    settings = world.host.openstack.place.etc / "l3_agent.ini"
    plain = settings.read_text().replace("enable_metadata_proxy = false", "metadata_port = 9797")
    settings.write_text(PROXIES.set_in(plain))
    guests = [world.guests[name] for name in _GUESTS]
    own = {world.guests[name].name: world.instances[name].encode() for name in _GUESTS}

    def wrong(guest: Guest, reply: Reply) -> str | None:
        return None if own[guest.name] in reply.body else f"{guest.name}: {reply.status}"

    target = "/openstack/latest/meta_data.json"
    with Load(guests, target, wrong, keep_alive=False, pause_s=0.02) as load:
        load.wait_answers(20)
        world.command("handback", "l3")
        assert settings.read_text() == plain
        assert len(find_proxies("qrouter-")) == len(_ROUTERS)
        load.wait_answers(50, within_s=30)
        for action in (WriteSettings, Restart, WaitServed, EditSettings, StartAgent):
            world.command("takeover", "l3", killed_after=action)
        world.command("takeover", "l3")
        assert find_proxies("qrouter-") == ()
        load.wait_answers(50, within_s=30)
    assert load.report.lost == []


def _wait_served(world: L3World, router: MadeRouter) -> None:
    def is_served() -> bool:
        world.host.wire()
        return uuid_of(router.guest, timeout_s=2) == router.instance

    until(is_served, what=f"{router.namespace} is served", within_s=40, pause_s=_PAUSE_S)


class _asking:  # noqa: N801 - a block that is read as a word
    """Asks all the time, on a new connection each time, from before there is a router."""

    def __init__(self, guest: Guest) -> None:
        self._guest, self._done = guest, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._done.is_set():
            self._guest.reaches(timeout_s=0.02)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
