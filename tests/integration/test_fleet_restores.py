"""What a fleet makes of an etcd that was restored or emptied, and of hosts that claim it: etcd and hubs are genuine."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.errors import AccessDenied, AlreadyExists, RestoreSuspected
from imdsproxy.fleet import layout
from imdsproxy.fleet.stream import Batch, Bye, ByeCode, FromHub, Hello
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride
from support.fleet_member import Member
from support.fleet_operator import Operator
from support.fleet_world import FleetWorld, fleet_world
from support.lab import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


def _suspicion(operator: Operator) -> str | None:
    """What the status of the fleet says of a restore."""
    found = operator.ask("GET", "/fleet/status")["suspect"]
    return None if found is None else str(found)


def _writes(operator: Operator) -> bool:
    """Whether a change is taken."""
    try:
        operator.ask("PATCH", "/v1/policies/fleet", {"tokens": "required"})
        operator.ask("PATCH", "/v1/policies/fleet", {"tokens": None})
    except RestoreSuspected:
        return False
    return True


@pytest.fixture(scope="module")
def operator(world: FleetWorld) -> Operator:
    return Operator.new(world, "op").at(world.hubs[0])


# Claims of hosts


def test_what_one_host_claims_is_shown_stops_no_write_and_ends_with_its_revocation(
    world: FleetWorld, operator: Operator
) -> None:
    with pytest.raises(AlreadyExists, match="hub2 is the name of a hub"):
        operator.join("hub2")
    with pytest.raises(AlreadyExists, match="op is the name of an operator"):
        operator.join("op")
    liar, fleet = operator.join("liar"), operator.ask("GET", "/fleet/status")
    hello = Hello(fleet["fleet"], fleet["incarnation"], 2**60, {})
    answer = liar.say(world.urls[0], hello)
    assert isinstance(answer, Bye)
    until(lambda: _suspicion(operator) is not None, what="the claim in the status")
    assert "host liar alone claims that: changes go on" in str(_suspicion(operator))
    assert _writes(operator)
    operator.ask("POST", "/fleet/revoked-hosts", {"name": "liar"})
    until(lambda: _suspicion(operator) is None, what="the end of the claim")


def test_a_host_that_was_given_a_hubs_name_is_not_believed_as_a_hub(
    world: FleetWorld, operator: Operator
) -> None:
    named, fleet = Member.written(world, "hub1"), operator.ask("GET", "/fleet/status")
    until(lambda: named.is_admitted(world.urls[0]), what="its membership")
    hello = Hello(fleet["fleet"], fleet["incarnation"], 1, {"instance/x": 1})
    assert isinstance(named.say(world.urls[0], hello), Batch)
    until(lambda: _suspicion(operator) is not None, what="the claim in the status")
    assert _writes(operator)
    operator.ask("POST", "/fleet/revoked-hosts", {"name": "hub1"})


# Prefixes that are deleted


def test_a_hub_founds_no_fleet_in_an_etcd_that_was_emptied_and_puts_its_members_back(
    world: FleetWorld, operator: Operator
) -> None:
    before = operator.ask("GET", "/fleet/status")
    survivor, gone = operator.join("survivor"), operator.join("gone")
    operator.ask("POST", "/fleet/revoked-hosts", {"name": "gone"})
    world.etcd.ctl("del", "--prefix", "/imds/")
    until(lambda: _suspicion(operator) is not None, what="a suspicion")
    assert "nothing is written" in str(_suspicion(operator))
    assert not _writes(operator)
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
    accepted = operator.ask("POST", "/fleet/accept-restore")
    assert "host gone stays revoked" in accepted["warnings"]
    assert any(one.startswith("host survivor stays a member") for one in accepted["warnings"])
    after = operator.ask("GET", "/fleet/status")
    assert (after["fleet"], after["incarnation"]) == (before["fleet"], before["incarnation"] + 1)
    # What was put back a hub without a journal has of etcd.
    world.hubs[1].start()
    assert [one.is_admitted(world.urls[1]) for one in (survivor, gone)] == [True, False]
    assert _writes(operator)


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


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--bump-revision=1000000000", "--mark-compacted"), marks=pytest.mark.slow),
    ],
)
def test_nothing_that_was_revoked_comes_back_from_a_backup_and_who_renewed_is_not_locked_out(
    world: FleetWorld, operator: Operator, options: tuple[str, ...]
) -> None:
    tag = "bumped" if options else "plain"
    out, stays = operator.join(f"out-{tag}"), operator.join(f"stays-{tag}")
    left = Operator.new(world, f"left-{tag}")
    second = operator.at(world.hubs[1])
    assert left.ask("GET", "/fleet/status")
    operator.ask("PUT", f"/v1/instances/{tag}", _instance(tag, stays.name))
    backup = _save(world, f"backup-{tag}")
    late = operator.join(f"late-{tag}")
    # Twice: then the number of the certificate in the backup is neither.
    stays.renew(world.urls[0])
    stays.renew(world.urls[1])
    operator.ask("POST", "/fleet/revoked-hosts", {"name": out.name})
    operator.ask("POST", "/fleet/revoked-operators", {"name": f"left-{tag}"})
    epoch = operator.ask("POST", f"/v1/instances/{tag}/revoke-tokens")["epoch"]
    with _restored_while_hubs_are_down(world, backup, *options):
        world.hubs[1].start()
        # Before anything is accepted, and as soon as the hub serves at all.
        members = [one.is_admitted(world.urls[1]) for one in (out, stays, late)]
        assert members == [False, True, True]
        with pytest.raises(AccessDenied):
            left.at(world.hubs[1]).ask("GET", "/fleet/status")
        until(lambda: _suspicion(second) is not None, what="a suspicion")
        assert "nothing is written" in str(_suspicion(second))
        # What the journal has, a hub has also that lost its own.
        shutil.rmtree(world.directory / "hub1.state")
        until(lambda: len(second.ask("GET", "/fleet/status")["regained"]) >= 5)
    regained = operator.ask("GET", "/fleet/status")["regained"]
    assert regained[f"host {out.name}"] == "stays revoked"
    assert regained[f"host {stays.name}"] == "keeps the certificate that it got after the backup"
    assert regained[f"host {late.name}"] == "stays a member, though it joined after the backup"
    assert regained[f"operator left-{tag}"] == "stays revoked"
    assert f"instance {tag}" in regained
    until(lambda: out.is_admitted(world.urls[0]) is False, what="the revocation at the other hub")
    accepted = operator.ask("POST", "/fleet/accept-restore")
    assert set(accepted["warnings"]) >= {f"{one} {what}" for one, what in regained.items()}
    assert _writes(operator)
    for hub in world.hubs:
        assert [one.is_admitted(hub.url) for one in (out, stays, late)] == [False, True, True]
        with pytest.raises(AccessDenied):
            left.at(hub).ask("GET", "/fleet/status")
    assert operator.ask("POST", f"/v1/instances/{tag}/revoke-tokens")["epoch"] > epoch


def _instance(name: str, host: str) -> dict[str, object]:
    return {"id": name, "name": name, "ports": [], "hosts": [host]}


@pytest.mark.slow
def test_after_three_accepted_restores_of_one_backup_every_host_is_served_again(
    world: FleetWorld, operator: Operator
) -> None:
    host = operator.join("series")
    backup = _save(world, "series")
    first = incarnation = operator.ask("GET", "/fleet/status")["incarnation"]
    for _ in range(3):
        # Where nothing is lost, nothing is suspected.
        assert _writes(operator)
        with _restored_while_hubs_are_down(world, backup):
            world.hubs[0].start()
        until(lambda: _suspicion(operator) is not None, what="a suspicion")
        operator.ask("POST", "/fleet/accept-restore")
        status = operator.ask("GET", "/fleet/status")
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
    status = operator.ask("GET", "/fleet/status")
    ahead = {**status, "incarnation": status["incarnation"] + 2}
    bye = _hello(hosts[0], world.urls[0], ahead)
    assert isinstance(bye, Bye)
    assert (bye.code, "has seen" in bye.reason) == (ByeCode.AHEAD, True)
    until(lambda: _suspicion(operator) is not None, what="the claim in the status")
    assert _writes(operator), "one host alone"
    _hello(hosts[1], world.urls[1], ahead)
    until(lambda: not _writes(operator), what="two hosts that agree")
    operator.ask("POST", "/fleet/accept-restore")
    after = operator.ask("GET", "/fleet/status")
    assert after["incarnation"] == ahead["incarnation"] + 1
    for host, url in zip(hosts, world.urls, strict=True):
        assert isinstance(_hello(host, url, ahead), Batch)


# What hosts remember


def test_an_override_that_only_its_host_remembers_is_put_back_and_no_host_has_a_say_about_others(
    world: FleetWorld, operator: Operator
) -> None:
    here, other = operator.join("remembers"), operator.join("other")
    operator.ask("PUT", "/v1/instances/guarded", _instance("guarded", "remembers"))
    status = operator.ask("GET", "/fleet/status")
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
    assert _writes(operator), "one host alone"
    assert "instance guarded" in operator.ask("GET", "/fleet/status")["regained"]
    assert operator.ask("POST", "/v1/instances/guarded/revoke-tokens")["epoch"] > 7
    operator.ask("POST", "/fleet/accept-restore")
