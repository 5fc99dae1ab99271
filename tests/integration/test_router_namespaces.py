"""Routers of Neutron's are served in their own namespaces, and no request for metadata leaves them.

The namespaces are made by hand here; `test_neutron_l3_agent.py` has those of the genuine agent.
"""

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import pytest

from imdsproxy.model.wire import REDIRECTED_PORT
from support.daemon import Daemon
from support.guest import IPV4, IPV6, Guest, Load, Lost, Reply
from support.lab import run, serve, until, within
from support.routers import OUTSIDE, RouterLab, sniffing

pytestmark = pytest.mark.root


@dataclass(slots=True)
class RouterWorld:
    """Two routers with two networks each, all of the same addresses."""

    routers: RouterLab
    daemon: Daemon
    guests: dict[str, Guest]

    def asks_as(self, name: str, *, to: str = IPV4) -> str:
        """The instance that a guest is; what happens where it is none."""
        return self.guests[name].reads("/latest/meta-data/hostname", to=to, timeout_s=2)

    def wait(self, name: str, *, to: str = IPV4) -> None:
        """Wait until a guest is itself."""
        until(lambda: self.asks_as(name, to=to) == name, what=f"{name} is itself")


def record(guest: Guest) -> dict[str, object]:
    ports = [{"network": guest.network, "mac": guest.mac, "addresses": list(guest.addresses)}]
    return {"id": guest.name, "name": guest.name, "ports": ports}


def settings(
    routers: RouterLab, daemon: Daemon, *, served: bool = True
) -> dict[str, dict[str, object]]:
    return {
        "sources": {"neutron_namespaces": {"routers": served}},
        "paths": {
            "runtime_dir": str(daemon.runtime),
            "state_dir": str(daemon.state),
            "netns_dir": str(routers.directory),
        },
    }


@pytest.fixture(scope="module")
def world() -> Iterator[RouterWorld]:
    with closing(RouterLab()) as routers, closing(Daemon(routers.lab)) as daemon:
        guests: dict[str, Guest] = {}
        daemon.configure(settings(routers, daemon))
        daemon.start()
        for what in ("r1", "r2"):
            routers.add(what)
            for subnet in (1, 2):
                name = f"{what}-g{subnet}"
                guests[name] = routers.guest(what, name, subnet, 5)
        world = RouterWorld(routers, daemon, guests)
        daemon.put(instances=[record(one) for one in guests.values()])
        for name in guests:
            world.wait(name)
        yield world


@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_guests_of_several_networks_behind_routers_with_equal_addresses_are_themselves(
    world: RouterWorld, to: str
) -> None:
    for name in world.guests:
        assert world.asks_as(name, to=to) == name


def test_no_request_leaves_a_router_however_early_its_guest_asks(world: RouterWorld) -> None:
    routers = world.routers
    routers.add("r3")
    until(lambda: "-drop" in routers.tables("r3"), what="the first table")
    outside = routers.gateway("r3")
    with sniffing(outside) as seen:
        guest = routers.guest("r3", "r3-g1", 1, 5)
        world.guests["r3-g1"] = guest
        for to in (IPV4, IPV6):
            # Where HAProxy does not listen yet nothing answers; no other machine may.
            with pytest.raises(Lost), guest.connect(to=to, timeout_s=0.01) as connection:
                connection.request("/")
        world.daemon.put(instances=[record(guest)])
        world.wait("r3-g1")
        with pytest.raises(Lost, match="refused"):
            guest.connect(to=OUTSIDE)
        assert seen == []
        # The same without our tables is seen.
        assert world.daemon.process is not None
        world.daemon.process.send_signal(signal.SIGSTOP)
        remove_tables(routers, "r3")
        with pytest.raises(Lost):
            guest.connect(timeout_s=0.2)
        assert seen
        world.daemon.process.send_signal(signal.SIGCONT)
        until(lambda: has_both(routers, "r3"), what="both tables again")
    world.wait("r3-g1")


def has_both(routers: RouterLab, what: str) -> bool:
    tables = routers.tables(what)
    return "-drop" in tables and "-redirect" in tables


def remove_tables(routers: RouterLab, what: str) -> None:
    for table in routers.tables(what).splitlines():
        run(*within(routers.namespace(what)), "nft", "delete", *table.split())


def test_a_router_that_goes_is_forgotten_and_one_made_again_is_served(world: RouterWorld) -> None:
    routers = world.routers
    routers.add("r4")
    world.guests["r4-g1"] = routers.guest("r4", "r4-g1", 1, 5)
    world.daemon.put(instances=[record(world.guests["r4-g1"])])
    world.wait("r4-g1")
    for _ in range(2):
        routers.remove("r4")
        routers.lab.remove_guest(world.guests["r4-g1"])
        routers.add("r4")
        routers.guest("r4", "r4-g1", 1, 5)
        world.wait("r4-g1")
    routers.remove("r4")
    routers.lab.remove_guest(world.guests.pop("r4-g1"))
    until(lambda: world.daemon.status()["networks"] == len(routers.routers) - 1, what="no record")


def test_explain_says_of_a_guest_behind_a_router_what_the_guest_gets(world: RouterWorld) -> None:
    guest = world.guests["r1-g1"]

    def outcome() -> str:
        words = ("--network", guest.network, "--from", guest.addresses[0])
        done = world.daemon.command("explain", *words)
        assert done.status == 0, done
        return done.out

    assert "its requests for documents get 200\n" in outcome()
    world.daemon.put(instances=[{**record(guest), "policy": {"tokens": "required"}}])
    try:
        assert world.asks_as("r1-g1") == "401"
        said = " ".join(outcome().split())
        assert "its requests for documents get 200; without a session token " in said
        assert "/latest/meta-data/" in said.partition(" are 401")[0]
    finally:
        world.daemon.put(instances=[record(guest)])
    world.wait("r1-g1")


def test_only_redirected_requests_come_to_our_port(world: RouterWorld) -> None:
    routers, guest = world.routers, world.guests["r1-g1"]
    outside = replace(guest, namespace=routers.gateway("r1"), port=REDIRECTED_PORT)
    for address in ("10.0.1.1", "10.0.2.1", "198.51.100.2"):
        assert not outside.reaches(to=address)
        assert not replace(guest, port=REDIRECTED_PORT).reaches(to=address)
        # A port that no rule is about is refused.
        with pytest.raises(Lost, match="refused"):
            replace(guest, port=REDIRECTED_PORT + 1).connect(to=address)
    assert not replace(outside, port=80).reaches()


def test_neutrons_own_proxy_gets_no_requests_and_is_shown(world: RouterWorld) -> None:
    namespace = world.routers.namespace("r2")
    # What the agent's rules redirect comes to its proxy unless ours redirect it first.
    rule = "-i qr-+ -d 169.254.169.254/32 -p tcp --dport 80 -j REDIRECT --to-ports 9697"
    run(*within(namespace), "iptables", "-t", "nat", "-A", "PREROUTING", *rule.split())
    proxy = serve(within(namespace), "0.0.0.0", port=9697, reuse_port=True)
    try:
        until(lambda: shown(world), what="the other program in status")
        world.wait("r2-g1")
        assert world.daemon.status()["readiness"]["ready"]
    finally:
        proxy.stop()
    until(lambda: not shown(world), what="no other program")


def shown(world: RouterWorld) -> list[str]:
    return [str(one) for one in world.daemon.status()["foreign"]]


def test_the_answer_with_a_token_goes_no_further_than_its_hop_limit(world: RouterWorld) -> None:
    guest = world.guests["r1-g2"]
    limited = {**record(guest), "policy": {"hop_limit": 3}}
    world.daemon.put(instances=[limited])
    try:
        for to in (IPV4, IPV6):
            until(partial(has_limit, guest, to, 3), what=f"the limit of {to}")
    finally:
        world.daemon.put(instances=[record(guest)])


def has_limit(guest: Guest, to: str, limit: int) -> bool:
    with sniffing(guest.namespace) as seen:
        ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60"
        reply = guest.ask("/latest/api/token", to=to, method="PUT", headers=(ttl,))
        if reply.status != 200:
            return False
        until(lambda: any(reply.body in frame for frame in seen), what="the answer's packet")
    (frame,) = (one for one in seen if reply.body in one)
    return frame[21 if to == IPV6 else 22] == limit


def test_guests_are_served_while_the_controller_is_killed_and_after_its_restart(
    world: RouterWorld,
) -> None:
    def expect(guest: Guest, reply: Reply) -> str | None:
        return None if reply.text == guest.name else f"{guest.name}: {reply.status} {reply.text}"

    with Load(list(world.guests.values()), "/latest/meta-data/hostname", expect) as load:
        load.wait_answers(50)
        world.daemon.kill_controller()
        load.wait_answers(50)
        world.daemon.start()
        load.wait_answers(50)
    assert load.report.lost == []


def test_nothing_is_left_in_a_router_that_is_not_served_any_more(world: RouterWorld) -> None:
    routers, daemon = world.routers, world.daemon
    assert has_both(routers, "r1")
    daemon.kill_controller(signal.SIGTERM)
    daemon.configure(settings(routers, daemon, served=False))
    daemon.start()
    assert routers.tables("r1") == ""
    assert not world.guests["r1-g1"].reaches()
    daemon.kill_controller(signal.SIGTERM)
    daemon.configure(settings(routers, daemon))
    daemon.start()
    world.wait("r1-g1")
    daemon.stop()
    assert routers.tables("r1") == ""
    daemon.start()
    world.wait("r1-g1")
