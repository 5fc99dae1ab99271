"""Genuine Nova and Neutron end, come back and change while guests ask; and Nova has another secret.

A guest that is known notices nothing of Neutron's absence, and of Nova's only that it is asked to come again. Never is
a guest answered 404 because a server could not be asked, and never, after a change, with anything of another's.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from support.guest import Guest, Load, Reply
from support.lab import until
from support.openstack.lab import OpenStack
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
def shared(openstack: OpenStack) -> Iterator[Ways]:
    with open_ways(
        openstack,
        ways=("agent-proxy",),
        neutron={"refresh_s": REFRESH_S, "negative_ttl_s": 1.0, "timeout_s": 2.0},
        more={"net-blue": FREE, "r-blue": FREE},
    ) as opened:
        yield opened


@pytest.fixture
def ways(shared: Ways) -> Ways:
    """Everything runs, the daemon has seen that, and the guests of `KNOWN` are known."""
    until(lambda: neutron_answers(shared), within_s=FORGOTTEN_S, what="Neutron's being asked again")
    until(lambda: all_right(shared), what="known guests' documents")
    return shared


def neutron_answers(ways: Ways) -> bool:
    (source,) = (one for one in ways.daemon.status()["sources"] if one["name"] == "neutron")
    return not source["problems"]


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
    ways: Ways,
) -> None:
    nova = ways.openstack.nova
    with Asking(ways) as asking:
        asking.wait(200)
        nova.kill()
        asking.wait(503)
        nova.start()
        until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")
        asking.wait(200)

    assert not asking.report.lost
    assert set(asking.statuses) == {200, 503}


def test_a_wrong_secret_is_novas_403_and_one_warning_until_the_right_one_is_read(
    ways: Ways,
) -> None:
    def is_a_problem() -> bool:
        fields = {one["field"] for one in ways.daemon.status()["problems"]}
        return "nova.endpoint_sets.default.secret_file" in fields

    wrong = ways.daemon.directory / "wrong-secret"
    wrong.write_text("another one")
    wrong.chmod(0o600)
    said = ways.openstack.ask_nova("x", "y", HOSTNAME, secret="another one")
    ways.daemon.reconfigure(ways.settings(secret_file=str(wrong)))
    try:
        replies = [guest.ask(HOSTNAME) for guest, _ in known(ways) for _ in range(4)]
        assert {(reply.status, reply.body) for reply in replies} == {(403, said.body)}
        until(is_a_problem, what="the problem's report")
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
    openstack.create_port("net-blue", FREE[0], openstack.instances["blue-1"])
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


# Changes in Neutron


def test_an_address_that_moves_is_the_new_ones_and_never_again_the_old_ones(ways: Ways) -> None:
    openstack = ways.openstack
    moved, left, free = FREE[3:6]
    guests = [ways.guest(way, scope, moved) for way, scope in EVERYWHERE]
    # While Neutron is not asked, because a test before had ended it, no guest is answered that there is no port.
    until(lambda: all(is_nobody(guest) for guest in guests), within_s=RIGHT_S)
    one, other = (
        openstack.create_port("net-blue", address, openstack.instances[name])
        for address, name in ((moved, "blue-1"), (free, "blue-2"))
    )
    until(lambda: all(is_told(guest, "blue-1") for guest in guests), within_s=RIGHT_S)

    openstack.rest.update("port", one, fixed_ips=[{"ip_address": left}])
    openstack.rest.update("port", other, fixed_ips=[{"ip_address": moved}])
    stays_so(lambda: all(is_told(guest, "blue-2") for guest in guests))
    assert all(is_told(ways.guest(way, scope, left), "blue-1") for way, scope in EVERYWHERE)
    until(
        lambda: all(is_nobody(ways.guest(way, scope, free)) for way, scope in EVERYWHERE),
        within_s=RIGHT_S,
    )
    openstack.delete_port(other)
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
        openstack.create_port("net-blue", address, first)
        other = openstack.create_port("net-blue2", address, second)
        router = ("X-Neutron-Router-ID", ways.ids["r-blue"])
        assert openstack.ask_agent(HOSTNAME, router, address).status == 404
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
