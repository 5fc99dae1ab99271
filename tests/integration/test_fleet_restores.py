"""What a fleet makes of an etcd that was restored or emptied, and of hosts that claim it: etcd and hubs are genuine."""

from collections.abc import Iterator
from typing import Any

import pytest

from imdsproxy.admin_client import FleetClient
from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.identity import parse_invitation
from imdsproxy.core.fleet.stream import Batch, Bye, Hello
from imdsproxy.errors import AlreadyExists, RestoreSuspected
from support.fleet_member import Member
from support.fleet_world import FleetWorld, fleet_world
from support.lab import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


class Operator:
    """An operator on a machine of the hubs' network; asks the first hub, unless another one is named."""

    def __init__(self, world: FleetWorld, name: str = "op") -> None:
        self.world, self.certificate = world, world.operator(name)

    def __call__(
        self, method: str, path: str, body: object = None, *, hub: int = 0
    ) -> dict[str, Any]:
        client = FleetClient(self.certificate, timeout_s=30, urls=(self.world.urls[hub],))
        with self.world.etcd.entered():
            return dict(client.request(method, path, body=body))

    def join(self, name: str) -> Member:
        """A host that joins."""
        word = self("POST", "/fleet/invitations", {"host": name})["invitation"]
        return Member.joined(self.world, parse_invitation(word))

    def suspicion(self, hub: int = 0) -> str | None:
        """What the status of the fleet says of a restore."""
        found = self("GET", "/fleet/status", hub=hub)["suspect"]
        return None if found is None else str(found)

    def writes(self) -> bool:
        """Whether a change is taken."""
        try:
            self("PATCH", "/v1/policies/fleet", {"tokens": "required"})
            self("PATCH", "/v1/policies/fleet", {"tokens": None})
        except RestoreSuspected:
            return False
        return True


@pytest.fixture(scope="module")
def operator(world: FleetWorld) -> Operator:
    return Operator(world)


# Claims of hosts


def test_what_one_host_claims_is_shown_stops_no_write_and_ends_with_its_revocation(
    world: FleetWorld, operator: Operator
) -> None:
    with pytest.raises(AlreadyExists, match="hub2 is the name of a hub"):
        operator.join("hub2")
    with pytest.raises(AlreadyExists, match="op is the name of an operator"):
        operator.join("op")
    liar, fleet = operator.join("liar"), operator("GET", "/fleet/status")
    hello = Hello(fleet["fleet"], fleet["incarnation"], 10**9, {})
    answer = liar.say(world.urls[0], hello)
    assert isinstance(answer, Bye)
    until(lambda: operator.suspicion() is not None, what="the claim in the status")
    assert "host liar alone claims that: changes go on" in str(operator.suspicion())
    assert operator.writes()
    operator("POST", "/fleet/revoked-hosts", {"name": "liar"})
    until(lambda: operator.suspicion() is None, what="the end of the claim")


def test_a_host_that_was_given_a_hubs_name_is_not_believed_as_a_hub(
    world: FleetWorld, operator: Operator
) -> None:
    named, fleet = Member.written(world, "hub1"), operator("GET", "/fleet/status")
    until(lambda: named.is_admitted(world.urls[0]), what="its membership")
    hello = Hello(fleet["fleet"], fleet["incarnation"], 1, {"instance/x": 1})
    assert isinstance(named.say(world.urls[0], hello), Batch)
    until(lambda: operator.suspicion() is not None, what="the claim in the status")
    assert operator.writes()
    operator("POST", "/fleet/revoked-hosts", {"name": "hub1"})


# Prefixes that are deleted


def test_a_running_hub_founds_no_fleet_in_an_etcd_that_was_emptied_and_a_fresh_one_neither(
    world: FleetWorld, operator: Operator
) -> None:
    before = operator("GET", "/fleet/status")
    operator.join("survivor")
    world.etcd.ctl("del", "--prefix", "/imds/")
    until(lambda: operator.suspicion() is not None, what="a suspicion")
    assert "nothing is written" in str(operator.suspicion())
    assert not operator.writes()
    world.hubs[1].end()
    world.hubs[1].start(ready=False)
    assert world.hubs[1].process is not None
    assert world.hubs[1].process.wait(60) != 0
    assert "its key was deleted" in world.hubs[1].log.read_text()
    keys = world.ask(lambda etcd: etcd.read(layout.META)).kvs
    assert not keys, "a new fleet"
    accepted = operator("POST", "/fleet/accept-restore")
    assert accepted["revision"]
    after = operator("GET", "/fleet/status")
    assert (after["fleet"], after["incarnation"]) == (before["fleet"], before["incarnation"] + 1)
    world.hubs[1].start()
