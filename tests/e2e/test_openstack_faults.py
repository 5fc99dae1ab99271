"""Genuine Nova and Neutron end, come back and change while guests ask; and Nova has another secret.

A guest that is known notices nothing of Neutron's absence, and of Nova's only that it is asked to come again. Never is
a guest answered 404 because a server could not be asked, and never, after a change, with anything of another's.

The Nova of these tests keeps what it knows of an instance for long: genuine Nova asks Neutron for security groups,
and without Neutron its answer would be 500 for whatever it does not have in its cache.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from imdsproxy.sources.neutron.cache import open_cache
from imdsproxy.sources.neutron.ports import NeutronPort
from support.guest import Guest, Load, Reply
from support.lab import until
from support.openstack.lab import Nova, OpenStack
from support.openstack.neutron_rest import ask
from support.openstack.ways import Way, Ways, open_ways

pytestmark = [pytest.mark.root, pytest.mark.slow]

HOSTNAME: Final = "/latest/meta-data/hostname"
REFRESH_S: Final = 1.0
BACK_S: Final = 3.0
"""How soon after Nova is back guests get their documents again."""
RIGHT_S: Final = REFRESH_S + 2.0
"""How soon guests see what has changed in Neutron."""
FORGOTTEN_S: Final = 35.0
"""How soon Neutron is asked again when it is back, after the longest back-off."""

KNOWN: Final[tuple[tuple[Way, str, str, str], ...]] = (
    ("listener", "net-blue", "10.0.0.5", "blue-1"),
    ("listener", "net-red", "10.0.0.5", "red-1"),
    ("listener", "r-blue", "10.0.1.7", "blue-3"),
    ("agent-proxy", "net-green", "10.0.0.5", "green-1"),
    ("agent-proxy", "r-red", "10.0.0.6", "red-2"),
)
EVERYWHERE: Final[tuple[tuple[Way, str], ...]] = (
    ("listener", "net-blue"),
    ("listener", "r-blue"),
    ("agent-proxy", "net-blue"),
    ("agent-proxy", "r-blue"),
)
FREE: Final = tuple(f"10.0.0.{number}" for number in range(100, 110))
"""Addresses of net-blue for ports that tests make; each is used once."""


@pytest.fixture(scope="module")
def nova(openstack: OpenStack) -> Iterator[Nova]:
    with openstack.another_nova(cache_s=600) as nova:
        yield nova


@pytest.fixture(scope="module")
def shared(openstack: OpenStack, nova: Nova) -> Iterator[Ways]:
    with open_ways(
        openstack,
        ways=("agent-proxy",),
        neutron={"refresh_s": REFRESH_S, "negative_ttl_s": 1.0, "timeout_s": 2.0},
        nova={"endpoints": [{"url": nova.url}]},
        more={"net-blue": FREE, "r-blue": FREE},
    ) as opened:
        yield opened


@pytest.fixture
def ways(shared: Ways, nova: Nova) -> Iterator[Ways]:
    """Everything runs, the daemon has seen that, and the guests of `KNOWN` are known and stored."""
    until(lambda: neutron_answers(shared), within_s=FORGOTTEN_S, what="Neutron's being asked again")
    until(lambda: all_right(shared), what="known guests' documents")
    until(lambda: known_are_stored(shared), what="known guests' ports in the state directory")
    yield shared
    nova.server.start()


def neutron_answers(ways: Ways) -> bool:
    (source,) = (one for one in ways.daemon.status()["sources"] if one["name"] == "neutron")
    return not source["problems"]


def known_are_stored(ways: Ways) -> bool:
    kept = (value for _, value in open_cache(ways.daemon.state / "neutron.sqlite").load())
    ports = [one for one in kept if isinstance(one, NeutronPort)]
    stored = {(port.device, str(address)) for port in ports for address in port.addresses}
    instances = ways.openstack.instances
    return all((instances[name].uuid, address) in stored for _, _, address, name in KNOWN)


def known(ways: Ways) -> list[tuple[Guest, str]]:
    """The guests, each with the name of its instance."""
    return [(ways.guest(way, scope, address), name) for way, scope, address, name in KNOWN]


def all_right(ways: Ways) -> bool:
    return all(is_told(guest, name) for guest, name in known(ways))


def is_told(guest: Guest, name: str) -> bool:
    reply = guest.ask(HOSTNAME)
    return (reply.status, reply.text) == (200, f"{name}.novalocal")


class Asking(Load):
    """Known guests that ask all the time: each gets its own, or is asked to come again."""

    def __init__(self, ways: Ways) -> None:
        self.statuses: Counter[int] = Counter()
        own = {guest.name: f"{name}.novalocal" for guest, name in known(ways)}

        def wrong(guest: Guest, reply: Reply) -> str | None:
            self.statuses[reply.status] += 1
            right = reply.text == own[guest.name] if reply.status == 200 else reply.is_to_come_again
            return None if right else f"{guest.name} got {reply.status} {reply.body[:80]!r}"

        guests = [guest for guest, _ in known(ways)]
        super().__init__(guests, HOSTNAME, wrong, keep_alive=False, pause_s=0.02)

    def wait(self, status: int) -> None:
        """Until 40 more had that status."""
        wanted = self.statuses[status] + 40
        until(lambda: self.statuses[status] >= wanted, what=f"answers {status}")


# Nova


def test_a_nova_that_is_killed_under_load_is_503_and_right_again_once_it_is_back(
    ways: Ways, nova: Nova
) -> None:
    with Asking(ways) as asking:
        asking.wait(200)
        nova.server.kill()
        asking.wait(503)
        nova.server.start()
        until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")
        asking.wait(200)

    assert not asking.report.lost
    assert set(asking.statuses) == {200, 503}


def test_a_wrong_secret_is_novas_403_and_one_warning_until_the_right_one_is_read(
    ways: Ways, nova: Nova
) -> None:
    def refused() -> float:
        text = ask(f"http://{ways.metrics}", "GET", "/metrics").body.decode()
        name = "imdsproxy_nova_refused_total{"
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def is_a_problem() -> bool:
        fields = {one["field"] for one in ways.daemon.status()["problems"]}
        return "nova.endpoint_sets.default.secret_file" in fields

    wrong = ways.daemon.directory / "wrong-secret"
    wrong.write_text("another one")
    wrong.chmod(0o600)
    said = ways.openstack.ask_nova("x", "y", HOSTNAME, secret="another one", url=nova.url)
    before = refused()
    ways.daemon.reconfigure(ways.settings(nova={"secret_file": str(wrong)}))
    try:
        replies = [guest.ask(HOSTNAME) for guest, _ in known(ways) for _ in range(4)]
        assert {(reply.status, reply.body) for reply in replies} == {(403, said.body)}
        until(is_a_problem, what="the problem's report")
        assert refused() - before == len(replies)
    finally:
        ways.daemon.reconfigure(ways.settings())
    until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")
    until(lambda: not is_a_problem(), what="the problem's end")
    logged = [one["message"] for one in ways.daemon.log_entries()]
    assert logged.count("nova refuses our signature") == 1
    assert logged.count("nova takes our signature again") == 1


# Neutron


def test_known_guests_notice_nothing_of_a_neutron_that_is_killed_and_new_ones_wait_for_it(
    ways: Ways,
) -> None:
    openstack = ways.openstack
    blue = openstack.instances["blue-1"]
    openstack.create_port("net-blue", FREE[0], device_id=blue.uuid, project_id=blue.project_id)
    new = [ways.guest(way, scope, FREE[0]) for way, scope in EVERYWHERE]
    with Asking(ways) as asking:
        asking.wait(200)
        openstack.neutron.kill()
        for guest in new:
            assert guest.ask(HOSTNAME).is_to_come_again, guest.name
        # Longer than what is known is believed without asking again.
        stays_so(lambda: all(guest.ask(HOSTNAME).is_to_come_again for guest in new))
        got = ways.daemon.command(
            "get", "--include", "--network", ways.ids["net-blue"], "--from", FREE[0], "/"
        )
        assert got.out.partition("\n")[0] == "HTTP/1.1 503 Service Unavailable"
        openstack.neutron.start()
        until(
            lambda: all(is_told(guest, "blue-1") for guest in new),
            within_s=FORGOTTEN_S,
            what="the new guest's documents",
        )
        asking.wait(200)

    assert not asking.report.lost
    assert set(asking.statuses) == {200}


def test_who_is_known_is_served_by_a_daemon_that_starts_while_neutron_is_down(ways: Ways) -> None:
    ways.openstack.neutron.kill()
    with Asking(ways) as asking:
        ways.daemon.kill_controller()
        ways.daemon.start()
        asking.wait(200)
    assert not asking.report.lost
    assert set(asking.statuses) == {200}

    ways.daemon.stop()
    ways.daemon.start()
    until(lambda: all_right(ways), what="known guests' documents after a start of everything")
    never_seen = ways.guest("listener", "net-blue", FREE[2])
    assert never_seen.ask(HOSTNAME).is_to_come_again


# Changes in Neutron


def test_an_address_that_moves_is_the_new_ones_and_never_again_the_old_ones(ways: Ways) -> None:
    openstack = ways.openstack
    first, second = (openstack.instances[name] for name in ("blue-1", "blue-2"))
    moved, left, free = FREE[3:6]
    guests = [ways.guest(way, scope, moved) for way, scope in EVERYWHERE]
    # While Neutron is not asked, because a test before had ended it, no guest is answered that there is no port.
    until(lambda: all(is_nobody(guest) for guest in guests), within_s=RIGHT_S)
    one, other = (
        openstack.create_port(
            "net-blue", address, device_id=instance.uuid, project_id=instance.project_id
        )
        for address, instance in ((moved, first), (free, second))
    )
    until(lambda: all(is_told(guest, "blue-1") for guest in guests), within_s=RIGHT_S)

    openstack.rest.update("port", one["id"], fixed_ips=[{"ip_address": left}])
    openstack.rest.update("port", other["id"], fixed_ips=[{"ip_address": moved}])
    stays_so(lambda: all(is_told(guest, "blue-2") for guest in guests))
    assert all(is_told(ways.guest(way, scope, left), "blue-1") for way, scope in EVERYWHERE)
    until(
        lambda: all(is_nobody(ways.guest(way, scope, free)) for way, scope in EVERYWHERE),
        within_s=RIGHT_S,
    )
    openstack.delete_port(other["id"])
    stays_so(lambda: all(is_nobody(guest) for guest in guests))


def test_an_address_that_two_ports_behind_a_router_have_is_nobodys_there_until_one_has_it(
    ways: Ways,
) -> None:
    openstack = ways.openstack
    rest, address = openstack.rest, FREE[8]
    first, second = (openstack.instances[name] for name in ("blue-1", "blue-3"))
    behind = [ways.guest(way, scope, address) for way, scope in EVERYWHERE if scope == "r-blue"]
    within = [ways.guest(way, scope, address) for way, scope in EVERYWHERE if scope == "net-blue"]
    # The router does not join this range of net-blue2, but it does join the network.
    subnet = rest.create(
        "subnet",
        network_id=openstack.seed.networks["net-blue2"],
        ip_version=4,
        cidr="10.0.0.0/24",
        project_id=first.project_id,
    )
    try:
        for one, network in ((first, "net-blue"), (second, "net-blue2")):
            openstack.create_port(network, address, device_id=one.uuid, project_id=one.project_id)
        other = openstack.created[-1]
        headers = (("X-Neutron-Router-ID", ways.ids["r-blue"]), ("X-Forwarded-For", address))
        assert openstack.ask_agent(HOSTNAME, headers=headers).status == 404
        assert all(is_nobody(guest) for guest in behind)
        assert all(is_told(guest, "blue-1") for guest in within)

        openstack.delete_port(other)
        stays_so(lambda: all(is_told(guest, "blue-1") for guest in (*behind, *within)))
    finally:
        for ident in tuple(openstack.created):
            openstack.delete_port(ident)
        rest.delete("subnet", subnet["id"])


def is_nobody(guest: Guest) -> bool:
    return guest.ask(HOSTNAME).status == 404


def stays_so(holds: Callable[[], bool]) -> None:
    """It becomes so in time, and then it is so whenever it is looked at, for longer than any refresh takes."""
    until(holds, within_s=RIGHT_S)
    end = time.monotonic() + 2 * REFRESH_S
    while time.monotonic() < end:
        assert holds()
        time.sleep(0.02)


# The command line


@pytest.mark.parametrize(
    ("scope", "address", "declared"),
    [
        ("net-blue", FREE[1], True),
        ("r-blue", FREE[6], True),
        ("net-blue", FREE[7], False),
        ("r-blue", FREE[9], False),
    ],
)
def test_get_says_what_a_guest_that_never_asked_would_be_answered(
    ways: Ways, scope: str, address: str, *, declared: bool
) -> None:
    blue, network = ways.openstack.instances["blue-2"], ways.ids[scope]
    ways.openstack.create_port("net-blue", address, device_id=blue.uuid, project_id=blue.project_id)
    if not declared:
        ways.daemon.remove_network(network)
    try:
        place = ("--network", network, "--from")
        read = ways.daemon.command("get", *place, address, HOSTNAME)
        stranger = ("get", "--include", *place, "10.0.0.251", HOSTNAME)
        # After a test that has ended Neutron, its negative answers are not believed for a while.
        until(lambda: " 503 " not in ways.daemon.command(*stranger).out, within_s=FORGOTTEN_S)
        nothing = ways.daemon.command(*stranger)
        explained = ways.daemon.command("explain", "--probe", *place, address)
    finally:
        if not declared:
            ways.daemon.put(ways.networks())

    assert (read.status, read.out) == (0, "blue-2.novalocal")
    assert (nothing.status, nothing.out.partition("\n")[0]) == (1, "HTTP/1.1 404 Not Found")
    assert blue.uuid in explained.out
    assert "its requests are sent to Nova" in explained.out
    assert (explained.status, "GET /latest/meta-data/: 200 OK" in explained.out) == (0, True)
