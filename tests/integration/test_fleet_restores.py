"""What a fleet makes of an etcd that was restored or emptied, and of hosts that claim it: etcd and hubs are genuine."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.api.client import FleetClient
from imdsproxy.errors import AccessDenied, AlreadyExists, RestoreSuspected
from imdsproxy.fleet import layout
from imdsproxy.fleet.members import parse_invitation
from imdsproxy.fleet.stream import Batch, Bye, ByeCode, FromHub, Hello
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride
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
    hello = Hello(fleet["fleet"], fleet["incarnation"], 2**60, {})
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


def test_a_hub_founds_no_fleet_in_an_etcd_that_was_emptied_and_puts_its_members_back(
    world: FleetWorld, operator: Operator
) -> None:
    before = operator("GET", "/fleet/status")
    survivor, gone = operator.join("survivor"), operator.join("gone")
    operator("POST", "/fleet/revoked-hosts", {"name": "gone"})
    world.etcd.ctl("del", "--prefix", "/imds/")
    until(lambda: operator.suspicion() is not None, what="a suspicion")
    assert "nothing is written" in str(operator.suspicion())
    assert not operator.writes()
    # With its journal a hub that starts goes on, and one without refuses to found another fleet.
    for hub in world.hubs:
        hub.end()
    world.hubs[0].start()
    journal = world.directory / "hub2.state"
    journal.rename(world.directory / "hub2.aside")
    world.hubs[1].start(ready=False)
    assert world.hubs[1].process is not None
    assert world.hubs[1].process.wait(60) != 0
    assert "own key was deleted" in world.hubs[1].log.read_text()
    assert not world.ask(lambda etcd: etcd.read(layout.META)).kvs, "a new fleet"
    assert [one.is_admitted(world.urls[0]) for one in (survivor, gone)] == [True, False]
    accepted = operator("POST", "/fleet/accept-restore")
    assert "host gone stays revoked" in accepted["warnings"]
    assert any(one.startswith("host survivor stays a member") for one in accepted["warnings"])
    after = operator("GET", "/fleet/status")
    assert (after["fleet"], after["incarnation"]) == (before["fleet"], before["incarnation"] + 1)
    # What was put back a hub without a journal has of etcd.
    world.hubs[1].start()
    assert [one.is_admitted(world.urls[1]) for one in (survivor, gone)] == [True, False]
    assert operator.writes()


# Restores


@contextlib.contextmanager
def _restored_while_hubs_are_down(world: FleetWorld, backup: Path, *options: str) -> Iterator[None]:
    """All hubs are stopped, etcd is restored, and then the block starts hubs."""
    for hub in world.hubs:
        if hub.process is not None and hub.process.poll() is None:
            hub.end()
    world.etcd.restore(backup, *options)
    yield
    for hub in world.hubs:
        if hub.process is None or hub.process.poll() is not None:
            hub.start()


def _save(world: FleetWorld, name: str) -> Path:
    path = world.directory / name
    world.etcd.ctl("snapshot", "save", str(path))
    return path


@pytest.mark.parametrize("options", [(), ("--bump-revision=1000000000", "--mark-compacted")])
def test_nothing_that_was_revoked_comes_back_from_a_backup_and_who_renewed_is_not_locked_out(
    world: FleetWorld, operator: Operator, options: tuple[str, ...]
) -> None:
    tag = "bumped" if options else "plain"
    out, stays = operator.join(f"out-{tag}"), operator.join(f"stays-{tag}")
    left = Operator(world, f"left-{tag}")
    assert left("GET", "/fleet/status")
    operator("PUT", f"/v1/instances/{tag}", _instance(tag, stays.name))
    backup = _save(world, f"backup-{tag}")
    late = operator.join(f"late-{tag}")
    # Twice: then the number of the certificate in the backup is neither.
    stays.renew(world.urls[0])
    stays.renew(world.urls[1])
    operator("POST", "/fleet/revoked-hosts", {"name": out.name})
    operator("POST", "/fleet/revoked-operators", {"name": f"left-{tag}"})
    epoch = operator("POST", f"/v1/instances/{tag}/revoke-tokens")["epoch"]
    with _restored_while_hubs_are_down(world, backup, *options):
        world.hubs[1].start()
        # Before anything is accepted, and as soon as the hub serves at all.
        members = [one.is_admitted(world.urls[1]) for one in (out, stays, late)]
        assert members == [False, True, True]
        with pytest.raises(AccessDenied):
            left("GET", "/fleet/status", hub=1)
        until(lambda: operator.suspicion(hub=1) is not None, what="a suspicion")
        assert "nothing is written" in str(operator.suspicion(hub=1))
        # What the journal has, a hub has also that lost its own.
        shutil.rmtree(world.directory / "hub1.state")
        until(lambda: len(operator("GET", "/fleet/status", hub=1)["regained"]) >= 5)
    regained = operator("GET", "/fleet/status")["regained"]
    assert regained[f"host {out.name}"] == "stays revoked"
    assert regained[f"host {stays.name}"] == "keeps the certificate that it got after the backup"
    assert regained[f"host {late.name}"] == "stays a member, though it joined after the backup"
    assert regained[f"operator left-{tag}"] == "stays revoked"
    assert f"instance {tag}" in regained
    until(lambda: out.is_admitted(world.urls[0]) is False, what="the revocation at the other hub")
    accepted = operator("POST", "/fleet/accept-restore")
    assert set(accepted["warnings"]) >= {f"{one} {what}" for one, what in regained.items()}
    assert operator.writes()
    for number, url in enumerate(world.urls):
        assert [one.is_admitted(url) for one in (out, stays, late)] == [False, True, True]
        with pytest.raises(AccessDenied):
            left("GET", "/fleet/status", hub=number)
    assert operator("POST", f"/v1/instances/{tag}/revoke-tokens")["epoch"] > epoch


def _instance(name: str, host: str) -> dict[str, object]:
    return {"id": name, "name": name, "ports": [], "hosts": [host]}


@pytest.mark.slow
def test_after_three_accepted_restores_of_one_backup_every_host_is_served_again(
    world: FleetWorld, operator: Operator
) -> None:
    host = operator.join("series")
    backup = _save(world, "series")
    first = incarnation = operator("GET", "/fleet/status")["incarnation"]
    for _ in range(3):
        # Where nothing is lost, nothing is suspected.
        assert operator.writes()
        with _restored_while_hubs_are_down(world, backup):
            world.hubs[0].start()
        until(lambda: operator.suspicion() is not None, what="a suspicion")
        operator("POST", "/fleet/accept-restore")
        status = operator("GET", "/fleet/status")
        assert status["incarnation"] > incarnation
        incarnation = status["incarnation"]
        for url in world.urls:
            until(lambda: isinstance(_hello(host, url, status), Batch), what="its items")  # noqa: B023
    assert incarnation == first + 3


def _hello(host: Member, url: str, status: dict[str, Any]) -> FromHub:
    return host.say(url, Hello(status["fleet"], status["incarnation"], status["revision"], {}))


def test_hosts_that_have_seen_a_later_incarnation_are_told_so_and_an_acceptance_serves_them_again(
    world: FleetWorld, operator: Operator
) -> None:
    """As after two restores of which no hub has a journal any more."""
    hosts = [operator.join(f"ahead-{number}") for number in range(2)]
    status = operator("GET", "/fleet/status")
    ahead = {**status, "incarnation": status["incarnation"] + 2}
    bye = _hello(hosts[0], world.urls[0], ahead)
    assert isinstance(bye, Bye)
    assert (bye.code, "has seen" in bye.reason) == (ByeCode.AHEAD, True)
    until(lambda: operator.suspicion() is not None, what="the claim in the status")
    assert operator.writes(), "one host alone"
    _hello(hosts[1], world.urls[1], ahead)
    until(lambda: not operator.writes(), what="two hosts that agree")
    operator("POST", "/fleet/accept-restore")
    after = operator("GET", "/fleet/status")
    assert after["incarnation"] == ahead["incarnation"] + 1
    for host, url in zip(hosts, world.urls, strict=True):
        assert isinstance(_hello(host, url, ahead), Batch)


# What hosts remember


def test_an_override_that_only_its_host_remembers_is_put_back_and_no_host_has_a_say_about_others(
    world: FleetWorld, operator: Operator
) -> None:
    here, other = operator.join("remembers"), operator.join("other")
    operator("PUT", "/v1/instances/guarded", _instance("guarded", "remembers"))
    status = operator("GET", "/fleet/status")
    overrides = {InstanceId("guarded"): OperatorOverride(7, 5)}
    hello = Hello(status["fleet"], status["incarnation"], 0, {}, overrides=overrides)
    other.say(world.urls[0], hello)
    liar = {InstanceId("guarded"): OperatorOverride(2**62, 5)}
    here.say(world.urls[0], replace(hello, overrides=liar))
    here.say(world.urls[1], hello)
    key = layout.override_key(InstanceId("guarded"))
    until(lambda: len(world.ask(lambda etcd: etcd.read(key)).kvs) == 1, what="the override in etcd")
    (stored,) = world.ask(lambda etcd: etcd.read(key)).kvs
    assert layout.parse_override(stored.value) == OperatorOverride(7, 5)
    assert operator.writes(), "one host alone"
    assert "instance guarded" in operator("GET", "/fleet/status")["regained"]
    assert operator("POST", "/v1/instances/guarded/revoke-tokens")["epoch"] > 7
    operator("POST", "/fleet/accept-restore")
