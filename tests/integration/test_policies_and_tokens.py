"""Policies and tokens from settings, records and operators to guests, over every change and death; the report.

Which request is answered how is in `support.access_table` and test_access_rules.py, which need no daemon.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import pytest

from imdsproxy.core.tokens import TOKEN_PATTERN
from support.access_table import META, TOKEN, USER_DATA
from support.daemon import instance
from support.guest import (
    IPV4,
    IPV6,
    Asker,
    Connection,
    Guest,
    Reply,
    inside,
    take_token,
    with_token,
)
from support.lab import until
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_HOSTNAME: Final = "/latest/meta-data/hostname"
_HEADER: Final = "X-aws-ec2-metadata-token"
_LISTEN: Final = ("127.0.0.1", 9465)
_SETTINGS: Final[dict[str, Any]] = {
    "resolver": {"hold_s": 1.0},
    "tokens": {"count_reads": "all"},
    "metrics": {"listen": f"{_LISTEN[0]}:{_LISTEN[1]}", "haproxy_listen": None},
}


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    """One of its own: that an instance was reopened or its tokens revoked stays, whatever its record is."""
    with open_world(_SETTINGS) as world:
        yield world


# Policies in records


def _network_says(world: World, name: str, policy: Mapping[str, Any]) -> None:
    record = next(one for one in world.networks if one["id"] == name)
    assert world.daemon.put([{**record, "policy": policy}])["applied"]


def _instance_says(world: World, guest: Guest, policy: Mapping[str, Any], **fields: object) -> None:
    said = {**fields, "policy": policy}
    record = instance(f"{guest.network}-5", guest.network, fields=said)
    assert world.daemon.put(instances=[record])["applied"]


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
    _instance_says(world, world.red, {"tokens": "required"})
    world.have_policy({"host": {"tokens": "optional"}})
    assert statuses() == [401, 401, 200]
    world.have_policy({"instances": {"red-5": {"tokens": "optional"}}})
    # What the instance's record does not set is the network's.
    _network_says(world, "red", {"endpoint": False})
    assert statuses() == [403, 403, 200]
    _network_says(world, "red", {})
    assert statuses() == [200, 200, 200]
    assert world.settled() == pids


def _ask_token(guest: Guest, *, headers: Sequence[str] = (), to: str = IPV4) -> Reply:
    lines = (f"{_HEADER}-ttl-seconds: 300", *headers)
    return guest.ask(TOKEN, method="PUT", headers=lines, to=to)


def _read(guest: Guest, target: str, token: str = "") -> int:
    reply = guest.ask(target, headers=with_token(token) if token else ())
    if reply.status == 200 and target == USER_DATA:
        assert own(guest, reply) is None
    return reply.status


def test_every_guest_gets_a_token_over_both_families_and_reads_its_own_with_it(
    world: World,
) -> None:
    world.have_policy({"host": {"tokens": "required", "paths": {_HOSTNAME: "deny"}}})
    for guest in world.everybody:
        tokens = [_ask_token(guest, to=to) for to in (IPV4, IPV6)]
        for reply in tokens:
            assert (reply.status, reply.headers["content-type"]) == (200, "text/plain")
            assert reply.headers[f"{_HEADER.lower()}-ttl-seconds"] == "300"
            assert re.fullmatch(TOKEN_PATTERN.strip("^$"), reply.text)
        assert [_read(guest, USER_DATA, one) for one in ("", tokens[1].text)] == [401, 200]
        assert [_read(guest, one) for one in (_HOSTNAME, META)] == [403, 200]


def test_rules_and_tokens_outlive_reloads_and_every_death(world: World) -> None:
    token = take_token(world.red)

    def in_force() -> None:
        assert [_read(world.red, one) for one in (USER_DATA, _HOSTNAME)] == [403, 401]
        assert _read(world.red, _HOSTNAME, token) == 200
        assert _read(world.guests["green"], USER_DATA) == 200

    _instance_says(
        world, world.red, {"paths": {USER_DATA: "deny", "/latest/meta-data": "required"}}
    )
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


def test_a_worker_that_drains_has_the_rules_of_a_later_change(world: World) -> None:
    with world.red.connect() as connection:
        assert connection.request(USER_DATA).status == 200
        world.reload()
        _instance_says(world, world.red, {"paths": {USER_DATA: "deny"}})
        assert connection.request(USER_DATA).status == 403
    assert _read(world.red, USER_DATA) == 403


def test_a_guest_that_haproxy_does_not_know_yet_is_held_to_the_same(world: World) -> None:
    """Its first request goes through the resolver, and so by another way."""
    host = {"tokens": "required", "refuse_forwarded": True, "paths": {_HOSTNAME: "deny"}}
    world.have_policy({"host": host})
    fresh = itertools.count(80)

    def newcomer() -> Guest:
        number = next(fresh)
        guest = world.lab.guest("red", number)
        # By its MAC alone: HAProxy's maps know nothing of it before it asks.
        ports = {"ports": [{"network": "red", "mac": f"fa:16:3e:00:00:{number:02x}"}]}
        world.daemon.put(instances=[instance(f"red-{number}", "red", number, fields=ports)])
        return guest

    assert [_read(newcomer(), one) for one in (USER_DATA, _HOSTNAME, META)] == [401, 403, 200]
    assert newcomer().ask(META, headers=("Via: 1.1 x",)).status == 403
    for line in ("X-Forwarded-For: 1.2.3.4", "Via: 1.1 x"):
        assert _ask_token(newcomer(), headers=(line,)).status == 403
    guest = newcomer()
    token = take_token(guest)
    assert _read(guest, USER_DATA, token) == 200
    assert _read(newcomer(), USER_DATA, token) == 401


# Tokens and boots


def _do(world: World, *words: str) -> str:
    done = world.daemon.command(*words)
    assert done.status == 0, done
    assert done.out.startswith("done: "), done
    return done.out


def _status(guest: Guest, token: str, to: str = IPV4) -> int:
    reply = guest.ask(USER_DATA, headers=with_token(token), to=to)
    if reply.status == 200:
        assert own(guest, reply) is None
    return reply.status


def test_a_revoked_token_is_bad_at_once_and_for_ever_and_a_fresh_one_is_good(world: World) -> None:
    green = world.guests["green"]
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
            assert {_status(world.red, token, to) for token in old} == {401}
        fresh = take_token(world.red)
        assert [_status(world.red, fresh, to) for to in (IPV4, IPV6)] == [200, 200]
        assert _status(green, others) == 200
        assert world.red.ask(USER_DATA).status == 200, "none is needed"
        old.append(fresh)
    assert world.settled() == pids, "it took a reload"
    *old, fresh = old
    world.daemon.kill_controller()
    assert ({_status(world.red, token) for token in old}, _status(world.red, fresh)) == ({401}, 200)
    world.daemon.command("stop", "--data-plane")
    world.daemon.start()
    assert ({_status(world.red, token) for token in old}, _status(world.red, fresh)) == ({401}, 200)


def test_it_reaches_an_address_that_is_known_by_its_mac_alone(world: World) -> None:
    guest = world.lab.guest("red", 80)
    ports = {"ports": [{"network": "red", "mac": "fa:16:3e:00:00:50"}]}
    world.daemon.put(instances=[instance("red-80", "red", 80, fields=ports)])
    assert guest.ask(USER_DATA).status == 200
    token = take_token(guest)
    assert _status(guest, token) == 200
    _do(world, "token", "revoke", "red-80")
    assert _status(guest, token) == 401
    assert _status(guest, take_token(guest)) == 200


def test_an_instance_that_comes_again_has_none_of_its_old_tokens(world: World) -> None:
    record = next(one for one in world.instances if one["id"] == "red-5")
    old = take_token(world.red)
    _do(world, "token", "revoke", "red-5")
    world.daemon.remove_instance("red-5")
    _do(world, "token", "revoke", "red-5")
    world.daemon.put(instances=[record])
    assert _status(world.red, old) == 401
    assert _status(world.red, take_token(world.red)) == 200


def test_a_fresh_key_signs_and_the_two_before_it_are_believed(world: World) -> None:
    pids = world.settled()
    tokens = [take_token(world.red)]
    for _ in range(2):
        printed = _do(world, "token", "rotate")
        tokens.append(take_token(world.red))
        assert f"key {tokens[-1].split('.')[0]} signs tokens" in printed
        assert {_status(world.red, token) for token in tokens} == {200}
    assert len({token.split(".")[0] for token in tokens}) == 3
    _do(world, "token", "rotate")
    assert [_status(world.red, token) for token in tokens] == [401, 200, 200]
    assert world.settled() == pids
    world.daemon.kill_controller()
    world.daemon.start()
    assert [_status(world.red, token) for token in tokens] == [401, 200, 200]


def test_keys_that_came_while_no_controller_ran_are_in_force_once_one_does(world: World) -> None:
    before = take_token(world.red)
    path = world.daemon.state / "token-keys"
    world.daemon.kill_controller()
    path.write_text(f"{'B' * 43}=\n{path.read_text()}")
    world.daemon.start()
    until(lambda: take_token(world.red).split(".")[0] != before.split(".")[0], within_s=5)
    assert _status(world.red, before) == 200


def test_reopen_unseals_and_opens_what_is_locked_after_the_boot(world: World) -> None:
    host = {"seal_user_data": True, "openstack_tokens": "required", "boot_grace_s": 600}
    born = {"created_at": int(time.time()) - 3600}
    both = [instance(f"{name}-5", name, fields=born) for name in ("red", "green")]
    world.daemon.put(instances=both)
    world.have_policy({"host": host})
    green = world.guests["green"]
    for guest in (world.red, green):
        assert [guest.ask(path).status for path in (USER_DATA, META)] == [403, 401]
    assert _do(world, "instance", "reopen", "red-5") == "done: instance red-5 boots anew\n"
    for to in (IPV4, IPV6):
        assert own(world.red, world.red.ask(USER_DATA, to=to)) is None
    assert world.red.ask(META).status == 200
    world.daemon.kill_controller()
    world.daemon.start()
    assert own(world.red, world.red.ask(USER_DATA)) is None
    assert green.ask(USER_DATA).status == 403


def test_a_damaged_guard_file_stops_the_start_and_guests_are_served_on(world: World) -> None:
    old = take_token(world.red)
    _do(world, "token", "revoke", "red-5")
    fresh = take_token(world.red)
    path = world.daemon.state / "guards.json"
    kept = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    world.daemon.kill_controller()
    try:
        path.write_text(kept[:-20])
        ended = world.daemon.command("run")
        assert ended.status == 71
        assert f"{path} is damaged" in ended.err
        assert "remove it together with the token keys" in ended.err
        assert "Traceback" not in ended.err
        assert _status(world.red, old) == 401
        assert world.red.ask(USER_DATA).status == 200
    finally:
        # As the hint has it: whose tokens were revoked is unknown, so none is good.
        path.unlink()
        (world.daemon.state / "token-keys").unlink()
        world.daemon.start()
    until(lambda: _status(world.red, fresh) == 401, within_s=5)
    assert _status(world.red, old) == 401
    assert _status(world.red, take_token(world.red)) == 200


# The report; what HAProxy counts is in test_request_lines.py


def _report(world: World) -> dict[str, Any]:
    told = world.daemon.command("token", "report", "--json")
    assert told.status == 0, told
    found: dict[str, Any] = json.loads(told.out)
    return found


def _counted(world: World, network: str) -> dict[str, Any]:
    """What is reported of the first guest there; zeros where nothing is."""
    found = [one for one in _report(world)["guests"] if one["instance"] == f"{network}-5"]
    assert len(found) <= 1
    return found[0] if found else {"reads": 0, "refused": 0, "readers": []}


def _counts(world: World, network: str) -> tuple[int, int]:
    one = _counted(world, network)
    return one["reads"], one["refused"]


def _metric(world: World, name: str, network: str) -> int:
    sock = inside(world.lab.host, lambda: socket.socket(socket.AF_INET))
    sock.settimeout(5)
    sock.connect(_LISTEN)
    with Connection(sock) as connection:
        lines = connection.request("/metrics").text.splitlines()
    wanted = f'imdsproxy_{name}_total{{network="{network}"}} '
    found = [line for line in lines if line.startswith(wanted)]
    return int(float(found[0].rpartition(" ")[2])) if found else 0


def test_who_reads_without_a_token_is_named_with_path_and_client(world: World) -> None:
    guest = world.red
    before = _counts(world, "red")
    path = "/latest/meta-data/placement/availability-zone"
    guest.ask(path, headers=("User-Agent: Boto3/1.34 md/Botocore",))
    found = _counted(world, "red")
    assert (found["instance"], found["reads"], found["refused"]) == (
        "red-5",
        before[0] + 1,
        before[1],
    )
    reader = found["readers"][0]
    assert (reader["path"], reader["client"]) == (
        "latest/meta-data/placement",
        "Boto3/1.34_md/Botocore",
    )
    shown = world.daemon.command("token", "report").out
    assert re.search(
        r"^red +red-5 .* /latest/meta-data/placement +Boto3/1\.34_md/Botocore$", shown, re.MULTILINE
    )


def test_what_is_refused_where_a_token_is_required_is_counted_each_time(world: World) -> None:
    guest = world.guests["blue"]
    before = _counts(world, "blue")
    world.have_policy({"host": {"tokens": "required"}})
    with guest.connect() as connection:
        for _ in range(3):
            assert connection.request(USER_DATA).status == 401
    assert _counts(world, "blue") == (before[0], before[1] + 3)
    found = _report(world)["open_trees"]
    assert {"network": "blue", "instance": "blue-5", "tree": "/openstack"} in found
    shown = world.daemon.command("token", "report").out
    assert "warning: /nocloud gives instance blue-5 in blue the user-data" in shown
    world.have_policy({})
    assert _report(world)["open_trees"] == []


def test_sums_grow_over_reloads_and_a_worker_that_drains_is_asked_too(world: World) -> None:
    guest = world.guests["grey"]

    def read() -> int:
        return _metric(world, "metadata_no_token", "grey")

    before = read()
    with guest.connect() as kept:
        kept.request(USER_DATA)
        guest.ask(USER_DATA)
        world.reload()
        guest.ask(USER_DATA)
        assert _counts(world, "grey")[0] >= before + 3
        assert read() == before + 3
    world.reload()
    _report(world)
    assert read() == before + 3
    assert _metric(world, "metadata_no_token_rejected", "grey") == _counts(world, "grey")[1]
