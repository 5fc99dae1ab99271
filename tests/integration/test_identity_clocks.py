"""Identity tokens while the clock of a host or hub is wrong: a refusal and a problem, and no token that is refused."""

from collections.abc import Iterator
from typing import Final

import pytest

from imdsproxy.fleet import layout
from support.daemon import instance
from support.fleet_operator import Operator
from support.fleet_world import FleetHost, FleetWorld, HubProcess, fleet_world
from support.guest import Guest
from support.identity.fleet import Signers
from support.identity.requests import request_token, wait_token
from support.lab import until

pytestmark = pytest.mark.root

_NONCE: Final = ("X-imdsproxy-nonce: anew",)
_MINUTE_S: Final = 60
_DAY_S: Final = 86_400


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetWorld]:
    signers = Signers(tmp_path_factory.mktemp("issuer"))
    identity = {"enabled": True, "user": "daemon"}
    with fleet_world(2, clocks=True, beside_hub=signers, identity=identity) as made:
        made.store_network("blue")
        made.write({f"{layout.POLICIES}fleet": b'{"audiences":["vault"]}'})
        yield made


@pytest.fixture(scope="module")
def host(world: FleetWorld) -> FleetHost:
    made = world.add_host("a")
    world.place(instance("web", "blue"), made.name)
    return made


@pytest.fixture(scope="module")
def guest(host: FleetHost) -> Guest:
    return host.lab.guest("blue")


@pytest.fixture(scope="module")
def operator(world: FleetWorld) -> Operator:
    return Operator.new(world, "rota")


@pytest.fixture(autouse=True)
def _right(world: FleetWorld, guest: Guest) -> Iterator[None]:
    """Set all clocks right after the test."""
    wait_token(guest)
    yield
    for hub in world.hubs:
        _step(hub, 0)
    until(lambda: request_token(guest, more=_NONCE).status == 200, within_s=30, what="a token")


def _step(hub: HubProcess, seconds: float) -> None:
    assert hub.clock is not None
    hub.clock.step(seconds)


@pytest.mark.parametrize("step_s", [_MINUTE_S, -_MINUTE_S, _DAY_S])
def test_a_guest_of_a_host_with_a_wrong_clock_gets_no_token_and_the_status_says_why(
    world: FleetWorld, host: FleetHost, guest: Guest, step_s: int
) -> None:
    # The host's clock is wrong where those of all hubs agree.
    for hub in world.hubs:
        _step(hub, step_s)

    def is_refused_and_explained() -> bool:
        # Alone, 503 may mean that the instance has no signature left this second.
        refused = request_token(guest, more=_NONCE).status == 503
        return refused and "from this host's" in host.daemon.command("status").out

    until(is_refused_and_explained, within_s=30, what="the refusal, and the problem in the status")


@pytest.mark.parametrize("step_s", [-_MINUTE_S, _DAY_S])
def test_a_hub_with_a_wrong_clock_gives_no_token_and_the_status_of_the_fleet_names_the_hub(
    world: FleetWorld, operator: Operator, guest: Guest, step_s: int
) -> None:
    _step(world.hubs[0], step_s)
    until(
        lambda: "its clock is" in operator.at(world.hubs[1]).run("fleet", "status").out,
        within_s=20,
        what="the problem in the fleet's status",
    )
    # The other hub gives tokens, and no step of a rotation is made by a clock that may be wrong.
    until(lambda: request_token(guest, more=_NONCE).status == 200, within_s=20, what="a token")


def test_no_key_begins_to_sign_while_the_hubs_clocks_differ(
    world: FleetWorld, operator: Operator
) -> None:
    first = operator.do("identity", "rotate", "--json").json["keys"][0]["id"]
    _step(world.hubs[0], _DAY_S)
    until(
        lambda: "the rotation waits" in operator.at(world.hubs[0]).run("fleet", "status").out,
        within_s=20,
        what="the problem in the fleet's status",
    )
    assert operator.do("identity", "keys", "--json").json["keys"][0]["id"] == first
