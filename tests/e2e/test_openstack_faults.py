"""Genuine Nova and Neutron die, hang, come back and change while guests ask; and Nova has another secret.

A guest that is known notices nothing of Neutron's absence, and of Nova's only that it is told to come again. Never is
a guest told 404 because somebody could not be asked, and never, after a change, anything of another's.

The Nova of these tests keeps what it knows of an instance for long: genuine Nova asks Neutron for security groups,
and without Neutron its answer would be 500 for whatever it does not have in its cache.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

import pytest

from imdsproxy.sources.neutron.cache import open_cache
from imdsproxy.sources.neutron.ports import NeutronPort
from support.guest import Guest, Load, Reply
from support.lab import until
from support.openstack.lab import Nova, OpenStack
from support.openstack.neutron_rest import ask
from support.openstack.ways import RESPONSE_TIMEOUT_S, Way, Ways, open_ways
from support.patience import patience

pytestmark = [pytest.mark.root, pytest.mark.slow]

HOSTNAME: Final = "/latest/meta-data/hostname"
REFRESH_S: Final = 1.0
BACK_S: Final = 3.0
"""How soon after Nova is back guests get their documents again."""
RIGHT_S: Final = REFRESH_S + 2.0
"""How soon what Neutron was told is so for guests."""
NOTHING_S: Final = 0.5
"""For how long a genuine Neutron that starts was seen to show nothing, and more."""
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
    nova.server.resume()
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


def known(ways: Ways) -> dict[str, tuple[Guest, str]]:
    """The guests by their names, with what they must read."""
    guests = [
        (ways.guest(way, scope, address), f"{name}.novalocal")
        for way, scope, address, name in KNOWN
    ]
    return {guest.name: (guest, hostname) for guest, hostname in guests}


def all_right(ways: Ways) -> bool:
    return all(
        (reply := guest.ask(HOSTNAME)).status == 200 and reply.text == hostname
        for guest, hostname in known(ways).values()
    )


class Watched:
    """Who asks must get its own; if it is said so, it may be told to come again."""

    def __init__(self, ways: Ways, *, patient: bool) -> None:
        self.statuses: Counter[int] = Counter()
        self._known = known(ways)
        self._patient = patient
        guests = [guest for guest, _ in self._known.values()]
        self.load = Load(guests, HOSTNAME, self._wrong, keep_alive=False, pause_s=0.02)

    def _wrong(self, guest: Guest, reply: Reply) -> str | None:
        self.statuses[reply.status] += 1
        if reply.status == 200 and reply.text == self._known[guest.name][1]:
            return None
        if self._patient and reply.is_to_come_again:
            return None
        return f"{guest.name} got {reply.status} {reply.body[:80]!r}"

    def wait(self, status: int, number: int) -> None:
        """Until so many more had that status."""
        wanted = self.statuses[status] + number
        until(lambda: self.statuses[status] >= wanted, what=f"{number} answers {status}")


# Nova


def test_a_nova_that_is_killed_under_load_is_503_and_right_again_once_it_is_back(
    ways: Ways, nova: Nova
) -> None:
    watched = Watched(ways, patient=True)
    with watched.load as load:
        load.wait_answers(40)
        nova.server.kill()
        watched.wait(503, 40)
        nova.server.start()
        until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")
        watched.wait(200, 40)

    assert not load.report.lost
    assert set(watched.statuses) == {200, 503}


def test_a_nova_that_is_restarted_under_load_is_never_404_for_anybody(
    ways: Ways, nova: Nova
) -> None:
    watched = Watched(ways, patient=True)
    with watched.load as load:
        load.wait_answers(20)
        nova.server.restart()
        until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")

    assert not load.report.lost


def test_a_nova_that_hangs_is_503_within_the_deadline_and_right_again_when_it_goes_on(
    ways: Ways, nova: Nova
) -> None:
    nova.server.pause()
    for way in ("listener", "agent-proxy"):
        began = time.monotonic()
        reply = next(guest for guest, _ in of(ways, way)).ask(HOSTNAME)
        took = time.monotonic() - began
        assert reply.is_to_come_again
        assert RESPONSE_TIMEOUT_S * 0.9 < took < (RESPONSE_TIMEOUT_S + 0.7) * patience()
    nova.server.resume()

    until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")


def of(ways: Ways, way: str) -> Iterable[tuple[Guest, str]]:
    return [one for (each, *_), one in zip(KNOWN, known(ways).values(), strict=True) if each == way]


def test_a_wrong_secret_is_novas_403_and_one_warning_until_the_right_one_is_read(
    ways: Ways, nova: Nova
) -> None:
    wrong = ways.daemon.directory / "wrong-secret"
    wrong.write_text("another one")
    wrong.chmod(0o600)
    said = ways.openstack.ask_nova("x", "y", HOSTNAME, secret="another one", url=nova.url)
    before = refused(ways)
    ways.take_over(ways.settings(nova={"secret_file": str(wrong)}))
    try:
        replies = [guest.ask(HOSTNAME) for guest, _ in known(ways).values() for _ in range(4)]
        problem = "nova.endpoint_sets.default.secret_file"
        assert {(reply.status, reply.body) for reply in replies} == {(403, said.body)}
        until(lambda: problem in problems(ways), what="the problem's being told")
        assert refused(ways) - before == len(replies)
    finally:
        ways.take_over(ways.settings())
    until(lambda: all_right(ways), within_s=BACK_S, what="known guests' documents")
    until(lambda: problem not in problems(ways), what="the problem's end")
    told = [one["message"] for one in ways.daemon.log_entries()]
    assert told.count("nova refuses our signature") == 1
    assert told.count("nova takes our signature again") == 1


def refused(ways: Ways) -> float:
    """How many answers of Nova's were 403, as the daemon's figures have it."""
    text = ask(f"http://{ways.metrics}", "GET", "/metrics").body.decode()
    name = "imdsproxy_nova_refused_total{"
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def problems(ways: Ways) -> set[str]:
    """Which settings the daemon complains of."""
    return {one["field"] for one in ways.daemon.status()["problems"]}


# Neutron


def test_known_guests_notice_nothing_of_a_neutron_that_is_killed_and_new_ones_wait_for_it(
    ways: Ways,
) -> None:
    openstack = ways.openstack
    blue = openstack.instances["blue-1"]
    openstack.create_port("net-blue", FREE[0], device_id=blue.uuid, project_id=blue.project_id)
    new = [ways.guest(way, scope, FREE[0]) for way, scope in EVERYWHERE]
    watched = Watched(ways, patient=False)
    with watched.load as load:
        load.wait_answers(40)
        openstack.neutron.kill()
        for guest in new:
            assert guest.ask(HOSTNAME).is_to_come_again, guest.name
        # Longer than what is known is believed without asking again.
        began = time.monotonic()
        until(lambda: time.monotonic() > began + 2 * REFRESH_S)
        for guest in new:
            assert guest.ask(HOSTNAME).is_to_come_again, guest.name
        openstack.neutron.start()
        for guest in new:
            until(
                lambda guest=guest: is_told(guest, "blue-1"),  # type: ignore[misc]
                within_s=FORGOTTEN_S,
                what=guest.name,
            )
        load.wait_answers(40)

    assert not load.report.lost
    assert set(watched.statuses) == {200}


def test_a_neutron_that_hangs_is_503_for_new_guests_and_nothing_to_known_ones(ways: Ways) -> None:
    openstack = ways.openstack
    blue = openstack.instances["blue-1"]
    openstack.create_port("net-blue", FREE[1], device_id=blue.uuid, project_id=blue.project_id)
    openstack.neutron.pause()
    watched = Watched(ways, patient=False)
    with watched.load as load:
        for way, scope in EVERYWHERE:
            assert ways.guest(way, scope, FREE[1]).ask(HOSTNAME).is_to_come_again
    openstack.neutron.resume()

    assert not load.report.lost
    for way, scope in EVERYWHERE:
        guest = ways.guest(way, scope, FREE[1])
        until(
            lambda guest=guest: is_told(guest, "blue-1"),  # type: ignore[misc]
            within_s=FORGOTTEN_S,
            what=guest.name,
        )


def test_who_is_known_is_served_by_a_daemon_that_starts_while_neutron_is_down(ways: Ways) -> None:
    openstack = ways.openstack
    watched = Watched(ways, patient=False)
    openstack.neutron.kill()
    with watched.load as load:
        ways.daemon.kill_controller()
        ways.daemon.start()
        load.wait_answers(40)
    assert not load.report.lost

    ways.daemon.stop()
    ways.daemon.start()
    until(lambda: all_right(ways), what="known guests' documents after a start of everything")
    never_seen = ways.guest("listener", "net-blue", FREE[2])
    assert never_seen.ask(HOSTNAME).is_to_come_again


def test_a_neutron_that_shows_nothing_while_it_starts_takes_nothing_from_anybody(
    ways: Ways,
) -> None:
    """One of its threads reads the policy's rules; meanwhile the others leave every port out, and say 200."""
    openstack = ways.openstack
    watched = Watched(ways, patient=False)
    with watched.load as load:
        openstack.neutron.kill()
        way, scope = EVERYWHERE[0]
        # Nobody can know of an end that nobody has seen.
        until(
            lambda: ways.guest(way, scope, FREE[9]).ask(HOSTNAME).is_to_come_again, within_s=RIGHT_S
        )
        with shows_nothing(openstack.neutron_url) as asked:
            until(lambda: asked, within_s=FORGOTTEN_S, what="a question")
            began = time.monotonic()
            while time.monotonic() < began + NOTHING_S:
                for way, scope in EVERYWHERE:
                    assert ways.guest(way, scope, FREE[9]).ask(HOSTNAME).is_to_come_again
        openstack.neutron.start()
        load.wait_answers(40)

    assert not load.report.lost
    assert set(watched.statuses) == {200}


@contextlib.contextmanager
def shows_nothing(url: str) -> Iterator[list[str]]:
    """Somebody in Neutron's place who knows no ports; yields what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b'{"ports": []}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            del format, args

    class Server(ThreadingHTTPServer):
        allow_reuse_port = True

    with Server(("127.0.0.1", int(url.rpartition(":")[2])), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield asked
        finally:
            # Also where the test fails: nobody's end waits for a server that nobody ends.
            server.shutdown()
            thread.join()


# What Neutron is told


def test_an_address_that_moves_is_the_new_ones_and_never_again_the_old_ones(ways: Ways) -> None:
    openstack = ways.openstack
    first, second = (openstack.instances[name] for name in ("blue-1", "blue-2"))
    moved, left, free = FREE[3:6]
    one = openstack.create_port(
        "net-blue", moved, device_id=first.uuid, project_id=first.project_id
    )
    other = openstack.create_port(
        "net-blue", free, device_id=second.uuid, project_id=second.project_id
    )
    guests = [ways.guest(way, scope, moved) for way, scope in EVERYWHERE]
    assert all(is_told(guest, "blue-1") for guest in guests)

    openstack.update_port(one["id"], fixed_ips=[{"ip_address": left}])
    openstack.update_port(other["id"], fixed_ips=[{"ip_address": moved}])
    stays_so(lambda: all(is_told(guest, "blue-2") for guest in guests))
    assert all(is_told(ways.guest(way, scope, left), "blue-1") for way, scope in EVERYWHERE)
    until(
        lambda: all(is_nobody(ways.guest(way, scope, free)) for way, scope in EVERYWHERE),
        within_s=RIGHT_S,
    )


def test_a_port_that_is_deleted_gets_nothing_any_more(ways: Ways) -> None:
    openstack = ways.openstack
    blue = openstack.instances["blue-3"]
    address = FREE[6]
    made = openstack.create_port(
        "net-blue", address, device_id=blue.uuid, project_id=blue.project_id
    )
    guests = [ways.guest(way, scope, address) for way, scope in EVERYWHERE]
    assert all(is_told(guest, "blue-3") for guest in guests)

    openstack.delete_port(made["id"])
    stays_so(lambda: all(is_nobody(guest) for guest in guests))


def test_a_new_port_is_found_although_its_guest_was_told_a_moment_ago_that_there_is_none(
    ways: Ways,
) -> None:
    openstack = ways.openstack
    blue = openstack.instances["blue-2"]
    address = FREE[7]
    guests = [ways.guest(way, scope, address) for way, scope in EVERYWHERE]
    # While Neutron is not asked, because a test before had ended it, nobody is told that there is none.
    until(lambda: all(is_nobody(guest) for guest in guests), within_s=RIGHT_S)

    openstack.create_port("net-blue", address, device_id=blue.uuid, project_id=blue.project_id)
    stays_so(lambda: all(is_told(guest, "blue-2") for guest in guests))


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
        headers = (
            ("X-Neutron-Router-ID", ways.ids["r-blue"]),
            ("X-Forwarded-For", address),
        )
        assert openstack.ask_agent(HOSTNAME, headers=headers).status == 404
        assert all(is_nobody(guest) for guest in behind)
        assert all(is_told(guest, "blue-1") for guest in within)

        openstack.delete_port(other)
        stays_so(lambda: all(is_told(guest, "blue-1") for guest in (*behind, *within)))
    finally:
        for ident in tuple(openstack.created):
            openstack.delete_port(ident)
        rest.delete("subnet", subnet["id"])


def is_told(guest: Guest, name: str) -> bool:
    reply = guest.ask(HOSTNAME)
    return (reply.status, reply.text) == (200, f"{name}.novalocal")


def is_nobody(guest: Guest) -> bool:
    return guest.ask(HOSTNAME).status == 404


def stays_so(holds: Callable[[], bool]) -> None:
    """It becomes so in time, and then it is so whenever it is looked at, for longer than any refresh takes."""
    until(holds, within_s=RIGHT_S)
    end = time.monotonic() + 2 * REFRESH_S
    while time.monotonic() < end:
        assert holds()
        time.sleep(0.02)
