"""Policies and tokens from settings, records and operators to guests, over every change and death; the report.

Which request is answered how is in `support.access_table` and test_access_rules.py, which need no daemon; what is
counted in test_request_lines.py.
"""

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import pytest

from support.access_table import META, USER_DATA
from support.daemon import instance
from support.guest import IPV4, IPV6, Asker, Guest, take_token, with_token
from support.health import ask_operator
from support.lab import until
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_HOSTNAME: Final = "/latest/meta-data/hostname"
_SETTINGS: Final[dict[str, Any]] = {
    "resolver": {"hold_s": 1.0},
    "tokens": {"count_reads": "all"},
    "metrics": {"listen": "127.0.0.1:9465"},
}


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    """One of its own: that an instance was reopened or its tokens revoked stays, whatever its record is."""
    with open_world(_SETTINGS) as world:
        yield world


def _network_says(world: World, name: str, policy: Mapping[str, Any]) -> None:
    record = next(one for one in world.networks if one["id"] == name)
    assert world.daemon.put([{**record, "policy": policy}])["applied"]


def _instance_says(world: World, guest: Guest, policy: Mapping[str, Any], **fields: object) -> None:
    record = instance(f"{guest.network}-5", guest.network, fields={**fields, "policy": policy})
    assert world.daemon.put(instances=[record])["applied"]


def _by_mac(world: World, number: int) -> Guest:
    """Another guest of red's that is known by its MAC alone: HAProxy's maps know nothing of it before it asks."""
    ports = {"ports": [{"network": "red", "mac": f"fa:16:3e:00:00:{number:02x}"}]}
    world.daemon.put(instances=[instance(f"red-{number}", "red", number, fields=ports)])
    return world.lab.guest("red", number)


def _read(guest: Guest, target: str, token: str = "", to: str = IPV4) -> int:
    reply = guest.ask(target, headers=with_token(token) if token else (), to=to)
    if reply.status == 200 and target == USER_DATA:
        assert own(guest, reply) is None
    return reply.status


def _do(world: World, *words: str) -> str:
    done = world.daemon.command(*words)
    assert (done.status, done.out.startswith("done: ")) == (0, True), done
    return done.out


# Policies


def test_records_are_in_force_by_scope_at_once_and_settings_over_those_of_the_same_scope(
    world: World,
) -> None:
    pids = world.settled()
    second = world.lab.guest("red", 6)
    world.daemon.put(instances=[instance("red-6", "red", 6)])

    def statuses() -> list[int]:
        return [_read(one, USER_DATA) for one in (world.red, second, world.guests["green"])]

    _network_says(world, "red", {"tokens": "required"})
    assert statuses() == [401, 401, 200]
    _instance_says(world, world.red, {"tokens": "optional"})
    assert statuses() == [200, 401, 200]
    world.have_policy({"networks": {"red": {"tokens": "optional"}}})
    assert statuses() == [200, 200, 200]
    # What the instance's record does not set is the network's.
    _network_says(world, "red", {"endpoint": False})
    assert statuses() == [403, 403, 200]
    world.have_policy({"instances": {"red-5": {"endpoint": True}}})
    assert statuses() == [200, 403, 200]
    assert world.settled() == pids


def test_rules_and_tokens_outlive_reloads_and_every_death(world: World) -> None:
    token = take_token(world.red)

    def in_force() -> None:
        assert [_read(world.red, one) for one in (USER_DATA, _HOSTNAME)] == [403, 401]
        assert _read(world.red, _HOSTNAME, token) == 200
        assert _read(world.guests["green"], USER_DATA) == 200

    with world.red.connect() as kept:
        assert kept.request(USER_DATA).status == 200
        world.reload()
        paths = {USER_DATA: "deny", "/latest/meta-data": "required"}
        _instance_says(world, world.red, {"paths": paths})
        # A worker that drains has them too.
        assert kept.request(USER_DATA).status == 403
    in_force()
    world.reload()
    in_force()
    world.daemon.kill_controller()
    in_force()
    world.daemon.start()
    in_force()
    before = world.pids()
    os.kill(before.master, signal.SIGKILL)
    until(lambda: world.has_other_master(before.master), within_s=5)
    world.daemon.wait_ready()
    in_force()
    world.daemon.kill_controller()
    world.daemon.command("stop", "--data-plane")
    world.daemon.start()
    in_force()


def test_a_guest_that_haproxy_does_not_know_yet_is_held_to_the_same(world: World) -> None:
    """Its first request goes through the resolver, and so by another way."""
    host = {"tokens": "required", "paths": {_HOSTNAME: "deny"}}
    world.have_policy({"host": host})
    fresh = map(partial(_by_mac, world), itertools.count(80))
    assert [_read(next(fresh), one) for one in (USER_DATA, _HOSTNAME, META)] == [401, 403, 200]
    forwarded = ("X-Forwarded-For: 1.2.3.4", "X-aws-ec2-metadata-token-ttl-seconds: 300")
    assert next(fresh).ask("/latest/api/token", method="PUT", headers=forwarded).status == 403
    world.have_policy({"host": {**host, "refuse_forwarded": True}})
    assert next(fresh).ask(META, headers=("Via: 1.1 x",)).status == 403
    guest = next(fresh)
    token = take_token(guest)
    assert _read(guest, USER_DATA, token) == 200
    assert _read(next(fresh), USER_DATA, token) == 401


# Tokens and boots


def test_a_revoked_token_is_bad_at_once_and_for_ever_and_a_fresh_one_is_good(world: World) -> None:
    green, by_mac = world.guests["green"], _by_mac(world, 70)
    others = take_token(green)
    # Each is asked for over one family and used over both.
    ipv6 = Asker(partial(world.red.connect, to=IPV6))
    old = [take_token(world.red), take_token(ipv6)]
    ipv6.close()
    pids = world.settled()
    for _ in range(2):
        printed = _do(world, "token", "revoke", "red-5")
        assert printed == "done: all tokens of instance red-5 revoked\n"
        for to in (IPV4, IPV6):
            assert {_read(world.red, USER_DATA, token, to) for token in old} == {401}
        fresh = take_token(world.red)
        assert [_read(world.red, USER_DATA, fresh, to) for to in (IPV4, IPV6)] == [200, 200]
        assert _read(green, USER_DATA, others) == 200
        assert _read(world.red, USER_DATA) == 200, "none is needed"
        old.append(fresh)
    learned = take_token(by_mac)
    assert _read(by_mac, USER_DATA, learned) == 200
    _do(world, "token", "revoke", "red-70")
    assert _read(by_mac, USER_DATA, learned) == 401
    assert world.settled() == pids, "it took a reload"
    *old, fresh = old
    for end in ((), ("stop", "--data-plane")):
        world.daemon.kill_controller()
        if end:
            world.daemon.command(*end)
            world.daemon.start()
        assert {_read(world.red, USER_DATA, token) for token in old} == {401}
        assert _read(world.red, USER_DATA, fresh) == 200
    # An instance that comes again has none of its old ones.
    world.daemon.remove_instance("red-5")
    _do(world, "token", "revoke", "red-5")
    world.daemon.put(instances=world.instances)
    assert _read(world.red, USER_DATA, fresh) == 401
    assert _read(world.red, USER_DATA, take_token(world.red)) == 200


def test_a_fresh_key_signs_and_the_two_before_it_are_believed(world: World) -> None:
    pids = world.settled()
    tokens = [take_token(world.red)]
    for _ in range(2):
        printed = _do(world, "token", "rotate")
        tokens.append(take_token(world.red))
        assert f"key {tokens[-1].split('.')[0]} in " in printed
        assert "signs tokens" in printed
        assert {_read(world.red, USER_DATA, token) for token in tokens} == {200}
    assert len({token.split(".")[0] for token in tokens}) == 3
    _do(world, "token", "rotate")
    assert [_read(world.red, USER_DATA, token) for token in tokens] == [401, 200, 200]
    assert world.settled() == pids
    # Keys that come while no controller runs are in force once one does.
    path = world.daemon.state / "token-keys"
    world.daemon.kill_controller()
    path.write_text(f"{'B' * 43}=\n{path.read_text()}")
    world.daemon.start()
    kids = {token.split(".")[0] for token in tokens}
    until(lambda: take_token(world.red).split(".")[0] not in kids, within_s=5)
    assert [_read(world.red, USER_DATA, token) for token in tokens] == [401, 200, 200]


def test_reopen_unseals_and_opens_what_is_locked_after_the_boot(world: World) -> None:
    host = {"seal_user_data": True, "openstack_tokens": "required", "boot_grace_s": 600}
    born = {"created_at": int(time.time()) - 3600}
    both = [instance(f"{name}-5", name, fields=born) for name in ("red", "green")]
    world.daemon.put(instances=both)
    world.have_policy({"host": host})
    green = world.guests["green"]
    for guest in (world.red, green):
        assert [_read(guest, path) for path in (USER_DATA, META)] == [403, 401]
    assert (
        _do(world, "instance", "reopen", "red-5")
        == "done: boot grace of instance red-5 restarted\n"
    )
    for to in (IPV4, IPV6):
        assert [_read(world.red, path, to=to) for path in (USER_DATA, META)] == [200, 200]
    world.daemon.kill_controller()
    world.daemon.start()
    assert (_read(world.red, USER_DATA), _read(green, USER_DATA)) == (200, 403)


def test_no_token_is_good_any_more_once_its_instance_was_removed_though_the_id_comes_again(
    world: World,
) -> None:
    record = next(one for one in world.instances if one["id"] == "red-5")
    token = take_token(world.red)
    with world.red.connect() as kept:
        assert kept.request(_HOSTNAME, headers=with_token(token)).status == 200
        world.daemon.remove_instance("red-5")
        world.daemon.put(instances=[record])
        assert kept.request(_HOSTNAME, headers=with_token(token)).status == 401
    assert _read(world.red, _HOSTNAME, token) == 401
    second = take_token(world.red)
    # A change is no removal.
    _instance_says(world, world.red, {"tokens": "required"})
    assert _read(world.red, _HOSTNAME, second) == 200
    world.daemon.remove_instance("red-5")
    world.daemon.kill_controller()
    world.daemon.start()
    world.daemon.put(instances=[record])
    assert [_read(world.red, _HOSTNAME, one) for one in (token, second)] == [401, 401]
    assert _read(world.red, _HOSTNAME, take_token(world.red)) == 200


def test_a_damaged_override_file_stops_the_start_and_guests_are_served_on(world: World) -> None:
    old = take_token(world.red)
    _do(world, "token", "revoke", "red-5")
    path = world.daemon.state / "overrides.json"
    assert path.stat().st_mode & 0o777 == 0o600
    world.daemon.kill_controller()
    try:
        path.write_text(path.read_text()[:-20])
        ended = world.daemon.command("run")
        assert (ended.status, f"{path} is damaged" in ended.err) == (71, True)
        assert "remove it together with the token keys" in ended.err
        assert [_read(world.red, USER_DATA, one) for one in (old, "")] == [401, 200]
    finally:
        # As the hint has it: whose tokens were revoked is unknown, so none is good.
        path.unlink()
        (world.daemon.state / "token-keys").unlink()
        world.daemon.start()
    until(lambda: _read(world.red, USER_DATA, take_token(world.red)) == 200, within_s=5)
    assert _read(world.red, USER_DATA, old) == 401


# The report


def _report(world: World, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All of it, and what it has of one guest; zeros where that is nothing."""
    done = world.daemon.command("token", "report", "--json")
    assert done.status == 0, done
    report: dict[str, Any] = json.loads(done.out)
    found = [one for one in report["guests"] if one["instance"] == f"{name}-5"]
    assert len(found) <= 1
    return report, found[0] if found else {"reads": 0, "refused": 0, "readers": []}


def test_who_reads_without_a_token_is_named_and_trees_that_stay_open_too(world: World) -> None:
    guest = world.guests["blue"]
    _, before = _report(world, "blue")
    guest.ask(
        "/latest/meta-data/placement/availability-zone",
        headers=("User-Agent: Boto3/1.34 md/Botocore",),
    )
    world.have_policy({"host": {"tokens": "required"}})
    for _ in range(3):
        assert _read(guest, USER_DATA) == 401
    report, found = _report(world, "blue")
    assert found["reads"] == before["reads"] + 1
    assert found["refused"] == before["refused"] + 3
    readers = {one["path"]: one["client"] for one in found["readers"]}
    assert readers["latest/meta-data/placement"] == "Boto3/1.34_md/Botocore"
    assert {"network": "blue", "instance": "blue-5", "tree": "/openstack"} in report["open_trees"]
    shown = world.daemon.command("token", "report").out
    row = r"^blue +blue-5 .* /latest/meta-data/placement +Boto3/1\.34_md/Botocore$"
    assert re.search(row, shown, re.MULTILINE)
    assert "warning: /nocloud gives instance blue-5 in blue user-data" in shown
    world.have_policy({})
    assert _report(world, "blue")[0]["open_trees"] == []


def test_counts_outlive_the_controller_and_the_verdict_goes_by_them(world: World) -> None:
    guest = world.guests["blue"]
    # Counts of workers that have ended are on disk after an orderly end, and else within two minutes.
    world.daemon.kill_controller(signal.SIGTERM)
    world.daemon.start()
    for _ in range(3):
        assert _read(guest, USER_DATA) == 200
    _, before = _report(world, "blue")
    assert before["reads"] >= 3
    # HAProxy's tables are read on.
    world.daemon.kill_controller()
    guest.ask(USER_DATA)
    world.daemon.start()
    assert _report(world, "blue")[1]["reads"] == before["reads"] + 1
    # After an orderly end and another HAProxy, what is on disk.
    world.daemon.stop()
    world.daemon.start()
    report, found = _report(world, "blue")
    assert found["reads"] == before["reads"] + 1
    assert [one["client"] for one in found["readers"]] == [
        one["client"] for one in before["readers"]
    ]
    assert (report["verdicts"][0]["scope"], report["verdicts"][0]["ready"]) == ("host", "no")
    shown = world.daemon.command("token", "report", "--network", "blue", "--check")
    assert (shown.status, "ready for required tokens: no, because 1 guest reads" in shown.out) == (
        1,
        True,
    )
    # A policy of its own, so that none is refused; but only a sample, or less than a week, is not enough.
    world.have_policy({"instances": {"blue-5": {"tokens": "optional"}}})
    shown = world.daemon.command("token", "report", "--network", "blue", "--check", "--days", "1")
    assert shown.status == 75
    assert (
        "ready for required tokens: unknown, because no guest has read without a token" in shown.out
    )


def test_sums_grow_over_reloads_and_a_worker_that_drains_is_asked_too(world: World) -> None:
    guest = world.guests["grey"]

    def metric(name: str) -> int:
        text = ask_operator(world.lab, "/metrics").text
        found = re.search(rf'^imdsproxy_{name}_total{{network="grey"}} (\S+)$', text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    before = metric("metadata_no_token")
    with guest.connect() as kept:
        kept.request(USER_DATA)
        guest.ask(USER_DATA)
        world.reload()
        guest.ask(USER_DATA)
        _, found = _report(world, "grey")
        assert found["reads"] >= before + 3
        assert metric("metadata_no_token") == before + 3
    world.reload()
    _, found = _report(world, "grey")
    assert metric("metadata_no_token") == before + 3
    assert metric("metadata_no_token_rejected") == found["refused"]
