"""How much one instance may ask for, and what its neighbours and the daemon notice when it asks for more.

First by HAProxy's real rules and no daemon: limits of settings and of policies.
"""

import contextlib
import itertools
import select
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from imdsproxy.config.policy import LimitsSettings
from imdsproxy.haproxy.rules.limits import COUNTERS, POLICY_COUNTERS
from imdsproxy.haproxy.rules.model import Limits
from imdsproxy.model.policy import Policy, TokenMode
from support.access_table import META, USER_DATA
from support.daemon import instance
from support.guest import IPV4, IPV6, Connection, Guest, Lost
from support.haproxy_alone import WAYS, Alone, Document, open_alone
from support.lab import until
from support.patience import patience
from support.world import World, open_world

pytestmark = pytest.mark.root

_LIMITS = Limits(
    maxconn=400, cache_mb=1, fair=True, requests_per_s=1, burst=30, connections=10, body_bytes=2048
)


@pytest.fixture(scope="module", params=["documents", "nova"])
def opened(request: pytest.FixtureRequest) -> Iterator[Alone]:
    with open_alone(nova=request.param == "nova", limits=_LIMITS) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    # Connections of the test before are counted until they are closed.
    opened.close()
    opened.renew()
    for table in (COUNTERS, POLICY_COUNTERS):
        opened.command(f"clear table {table}")
    return opened


def _statuses(alone: Alone, count: int, network: str = "red") -> set[int]:
    """Of requests by each way in turn."""
    ways = itertools.islice(itertools.cycle(WAYS), count)
    return {alone.ask(USER_DATA, network, way).status for way in ways}


@pytest.mark.parametrize(
    ("policy", "burst"),
    [
        (Policy(), 30),
        # Beside a rate or a burst of its own both of the settings' are ignored.
        (Policy(burst=20), 20),
        (Policy(requests_per_s=2), 2 * 30),
        (Policy(requests_per_s=5000, burst=5000), None),
    ],
)
def test_beyond_its_burst_an_instance_gets_503_by_every_way_and_its_neighbour_nothing(
    alone: Alone, policy: Policy, burst: int | None
) -> None:
    alone.have(policy)
    assert _statuses(alone, burst or 100) == {200}
    assert _statuses(alone, 20, "green") == {200}
    if burst is None:
        return
    until(lambda: alone.ask(USER_DATA).is_limited, what="a refusal")
    began = time.monotonic()
    with ThreadPoolExecutor(len(WAYS)) as pool:
        assert all(pool.map(lambda way: alone.ask(USER_DATA, way=way).is_limited, WAYS))
    # Held for a second: a client that asks again at once costs little.
    assert 0.8 < time.monotonic() - began < 3 * patience()
    # Each guest of a connection of Neutron's proxies counts by itself.
    with alone.connect(way="agents") as connection:
        for network, limited in (("green", False), ("red", True), ("green", False)):
            reply = connection.request(USER_DATA, headers=alone.lines(network, "agents"))
            assert reply.is_limited == limited
    # A new limit is in force at once.
    alone.have(Policy(requests_per_s=5000, burst=5000))
    assert _statuses(alone, 3) == {200}


@pytest.mark.parametrize("policy", [Policy(), Policy(tokens=TokenMode.REQUIRED)])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_that_no_document_has_the_length_of_never_reaches_the_document_server(
    alone: Alone, policy: Policy, method: str
) -> None:
    alone.have(policy)
    for path, way in zip(("/latest/" + "%61" * 4000, "/%61" * 3000), WAYS, strict=False):
        alone.documents.heads = []
        began = time.monotonic()
        status = alone.ask(path, way=way, method=method).status
        if not alone.nova:
            # As late as what is refused over a limit.
            assert (status, time.monotonic() - began > 0.8) == (404, True)
            assert alone.documents.heads == []
        elif policy == Policy():
            # Nova has paths of its own.
            assert status == 200


def test_an_instance_s_misses_have_a_share_and_its_neighbour_notices_nothing(alone: Alone) -> None:
    if alone.nova:
        # It is Nova that is asked, and counts for itself.
        return
    alone.documents.document = Document(status="404 Not Found", lifetime=False)
    alone.have(Policy(requests_per_s=5000, burst=5000))
    found = [alone.ask(f"/latest/{number}") for number in range(25)]
    assert [one.status for one in found[:20]] == [404] * 20
    assert all(one.is_limited for one in found[20:])
    alone.documents.heads = []
    assert alone.ask("/latest/more").is_limited
    assert alone.documents.heads == []
    assert alone.ask("/latest/more", "green").status == 404
    alone.documents.document = Document()


@pytest.mark.slow
def test_being_refused_does_not_lengthen_it() -> None:
    def ask(connection: Connection) -> int:
        return connection.request(USER_DATA).status

    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(open_alone(limits=_LIMITS))
        alone.have(Policy(burst=20))
        until(lambda: alone.ask(USER_DATA).is_limited, what="a refusal")
        began = time.monotonic()
        # Eight at a time, each asked again as soon as it is refused.
        pool = stack.enter_context(ThreadPoolExecutor(8))
        held = [stack.enter_context(alone.connect()) for _ in range(8)]
        until(lambda: 200 in pool.map(ask, held), within_s=14, what="the end of the refusal")
        assert time.monotonic() - began < 13 * patience()


@pytest.mark.parametrize(("policy", "most"), [(Policy(), 10), (Policy(connections=4), 4)])
def test_more_connections_than_allowed_are_answered_503_and_far_more_are_closed(
    alone: Alone, policy: Policy, most: int
) -> None:
    alone.have(policy)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(alone.connect()) for _ in range(most)]
        assert {one.request(USER_DATA).status for one in held} == {200}
        with alone.connect() as another:
            assert another.request(USER_DATA).is_limited
        for _ in range(60):
            with contextlib.suppress(OSError):
                stack.enter_context(alone.connect())
        with pytest.raises((Lost, OSError)), alone.connect() as last:
            last.request(USER_DATA)
        assert {one.request(USER_DATA).status for one in held} == {200}
        assert _statuses(alone, 1, "green") == {200}
    until(alone.is_up, what="the connections' end")


def test_a_body_that_is_too_long_for_nova_is_413() -> None:
    with open_alone(nova=True, limits=_LIMITS) as alone, alone.connect() as connection:
        alone.renew()
        for length, status in ((2049, 413), (2048, 200)):
            body = b"a" * length
            assert connection.request(META, method="POST", body=body).status == status
        assert len(alone.documents.heads) == 1


def test_a_network_over_its_misses_waits_a_second_for_each_503(alone: Alone) -> None:
    alone.forget()
    # As many as a flood leaves there.
    assert not alone.command("set table resolver key red data.gpc0_rate 100000").strip()
    began = time.monotonic()
    reply = alone.ask(USER_DATA)
    assert (reply.is_limited, reply.body) == (True, b"")
    assert time.monotonic() - began > 0.8
    assert _statuses(alone, 1, "green") == {200}


def test_networks_that_drag_out_their_requests_together_leave_room_for_another() -> None:
    """Of 100 none may have more than 40, and three could have all: beyond three quarters each may have 5."""
    limits = Limits(maxconn=400, maxconn_per_network=40, cache_mb=1)
    with open_alone(limits=limits) as alone, contextlib.ExitStack() as stack:
        alone.renew()
        held: list[Connection] = []
        for network in ("red", "two", "three"):
            head = "\r\n".join(
                (f"POST {META} HTTP/1.1", "Host: x", *alone.lines(network, "agents"))
            )
            for _ in range(60):
                held.append(stack.enter_context(alone.connect(way="agents")))
                held[-1].send(f"{head}\r\nContent-Length: 1000\r\n\r\n".encode())
            held = _without_answered(held)
            if network == "red":
                assert len(held) == 40
                assert alone.ask(USER_DATA, way="agents").is_limited
                assert alone.ask(USER_DATA, "green", "agents").status == 200
        assert alone.ask(USER_DATA, "green", "agents").status == 200
        assert 70 < len(held) < 90
        stack.close()
        until(
            lambda: alone.ask(USER_DATA, way="agents").status == 200,
            what="the end of those who left",
        )


def _without_answered(connections: list[Connection]) -> list[Connection]:
    """Close those that were answered, as a proxy does that has no further request."""
    left = {one.socket: one for one in connections}
    while readable := select.select(list(left), (), (), 0.3)[0]:
        for one in readable:
            left.pop(one).close()
    return list(left.values())


# What a guest that drags its requests out takes from others


_HEAD = f"GET {USER_DATA} HTTP/1.1\r\nHost: x\r\n".encode()
_POST = b"POST /openstack/latest/password HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def unlimited() -> Iterator[Alone]:
    with open_alone() as alone:
        yield alone


@pytest.mark.slow
def test_what_takes_too_long_to_send_is_408_head_or_body(unlimited: Alone) -> None:
    started = (
        b"",
        _HEAD,
        _POST + b"Content-Length: 100\r\n\r\nabc",
        _POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    )
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(unlimited.connect()) for _ in started]
        for one, data in zip(slow, started, strict=True):
            # Ten seconds for a head, and as many for a body.
            one.socket.settimeout(14 * patience())
            one.send(data)
        assert [one.read().status for one in slow] == [408] * len(started)


def test_a_guest_that_sends_a_byte_now_and_then_on_64_connections_starves_nobody(
    unlimited: Alone,
) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(unlimited.connect()) for _ in range(64)]
        for byte in _HEAD[:20]:
            for one in slow:
                one.send(bytes([byte]))
            # Itself neither, on one that it has left.
            assert max(_took(unlimited, "green"), _took(unlimited, "red")) < 1 * patience()


def test_a_guest_that_does_not_read_its_answers_starves_nobody(unlimited: Alone) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            deaf = stack.enter_context(unlimited.connect()).socket
            deaf.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    deaf.send((_HEAD + b"\r\n") * 200)
        assert max(_took(unlimited, "green") for _ in range(20)) < 1 * patience()
    until(unlimited.is_up, what="its own service")


def _took(alone: Alone, network: str) -> float:
    began = time.monotonic()
    assert alone.ask(USER_DATA, network, kept=False).status == 200
    return time.monotonic() - began


# With a daemon, and limits as they are by default


_DEFAULT: Final = LimitsSettings().model_dump(include={"requests_per_s", "burst", "connections"})


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world({"limits": _DEFAULT, "resolver": {"hold_s": 1.0}}) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    # A worker that ends may tell the next one once more what the test before has asked for.
    until(lambda: _forgotten(shared_world), what="a guest of which nothing is counted")
    yield shared_world
    shared_world.heal()


def _answered(guest: Guest) -> bool:
    try:
        return guest.ask(USER_DATA).status == 200
    except Lost:
        return False


def _forgotten(world: World) -> bool:
    world.daemon.forget_floods()
    return _answered(world.red)


def test_a_hundred_and_fifty_requests_at_once_and_twenty_crawls_in_a_row_pass(world: World) -> None:
    with ThreadPoolExecutor(150) as pool:
        replies = list(pool.map(lambda _: world.red.ask(USER_DATA), range(150)))
    assert {reply.status for reply in replies} == {200}
    # A dual-stack guest crawls over either family.
    for to in (IPV4, IPV6):
        with world.red.connect(to=to) as connection:
            assert {connection.request(USER_DATA).status for _ in range(10 * 150)} == {200}
    busiest = world.daemon.status()["busiest"][0]
    assert (busiest["instance"], busiest["limited"]) == ("red-5", False)
    assert busiest["requests"] > 3000
    usage = world.daemon.admin.get("/v1/instances/red-5/usage")
    assert usage["most_requests"] >= usage["requests"] > 3000
    assert world.daemon.admin.get("/v1/instances/green-5/usage")["requests"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{}, {"burst": 30}], ids=["default", "of its own"])
def test_who_asks_for_more_is_refused_named_and_still_refused_after_reloads(
    world: World, policy: dict[str, object]
) -> None:
    world.have_policy({"instances": {"red-5": policy}})
    with world.red.connect() as connection:
        assert any(connection.request(USER_DATA).is_limited for _ in range(20_000))
    until(lambda: world.red.ask(USER_DATA, to=IPV6).is_limited, what="a refusal")
    assert world.guests["green"].ask(USER_DATA).status == 200
    first = world.daemon.status()["busiest"][0]
    assert (first["instance"], first["limited"]) == ("red-5", True)
    assert "limited" in world.daemon.command("status").out
    # What the metric of its network is made of.
    rows = world.daemon.haproxy_rows()
    denied = {row["svname"]: int(row["dreq"] or 0) for row in rows if row["pxname"] == "guests"}
    assert (denied["red"] > 0, denied["green"]) == (True, 0)
    for _ in range(3):
        world.reload()
    assert world.red.ask(USER_DATA).is_limited


def test_a_thousand_idle_connections_starve_neither_neighbours_nor_the_daemon(world: World) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            # Some are closed at once.
            with contextlib.suppress(Lost):
                stack.enter_context(world.red.connect())
        _starves_nothing(world)
    until(lambda: _answered(world.red), what="the connections' end")


def test_64_connections_that_ask_without_end_starve_neither_neighbours_nor_the_daemon(
    world: World,
) -> None:
    flood = subprocess.Popen(
        ["/usr/bin/nsenter", f"--net=/run/netns/{world.red.namespace}", "--",
         "/usr/bin/wrk", "-t1", "-c64", "-d60s", f"http://{IPV4}{USER_DATA}"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: world.red.ask(USER_DATA).is_limited, what="a refusal")
        _starves_nothing(world)
    finally:
        flood.kill()
        flood.wait()


def _starves_nothing(world: World) -> None:
    """A neighbour's documents, cached and new, its unknown neighbour's answer, the admin API and HAProxy's sockets."""
    green, stranger = world.guests["green"], world.lab.guest("green", 78)
    began = time.monotonic()
    assert green.ask(USER_DATA).status == 200
    assert green.ask("/openstack/latest/meta_data.json").status == 200
    assert world.daemon.status()["haproxy"]["worker"] == world.pids().worker
    until(world.daemon.resolver_up, what="the resolver up")
    assert world.daemon.put(instances=[instance("green-77", "green", 77)])
    assert time.monotonic() - began < 5 * patience()
    # Held for a second, as settings say, and no longer.
    assert stranger.ask(USER_DATA).status == 404
    assert time.monotonic() - began < 8 * patience()
