"""What operators say of single paths, as guests see it: each word, each scope, live and over every death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any, Final

import pytest

from imdsproxy.dataplane.master import MasterClient
from support.agent_socket import NETWORK, open_agents
from support.daemon import instance
from support.guest import Guest
from support.lab import until
from support.spellings import HAND_WRITTEN
from support.twins import Asker
from support.world import World, own

pytestmark = pytest.mark.root

_USER_DATA: Final = "/latest/user-data"
_HOSTNAME: Final = "/latest/meta-data/hostname"
_META: Final = "/openstack/latest/meta_data.json"
_NOCLOUD: Final = "/nocloud/user-data"
_TOKEN_HEADER: Final = "X-aws-ec2-metadata-token"


def _settings(world: World, policy: Mapping[str, Any]) -> None:
    """Have this policy in force."""
    world.daemon.reconfigure({**world.settings, "policy": policy})


def _instance(world: World, policy: Mapping[str, Any], **fields: object) -> None:
    """Have it said of `red-5` by its record."""
    record = instance("red-5", "red", fields={**fields, "policy": policy})
    assert world.daemon.put(instances=[record])["applied"]


def _token(guest: Guest) -> str:
    asked = (f"{_TOKEN_HEADER}-ttl-seconds: 600",)
    reply = guest.ask("/latest/api/token", method="PUT", headers=asked)
    assert reply.status == 200, reply
    return reply.text


def _status(guest: Guest, target: str, token: str | None = None) -> int:
    headers = () if token is None else (f"{_TOKEN_HEADER}: {token}",)
    reply = guest.ask(target, headers=headers)
    if reply.status == 200 and target == _USER_DATA:
        assert own(guest, reply) is None
    elif reply.status != 200:
        assert reply.body == b""
    return reply.status


def _worker_told(world: World, *commands: str) -> list[str]:
    """What HAProxy's accepting worker answers to each."""
    client = MasterClient(world.daemon.runtime / "master.sock")

    async def tell() -> list[str]:
        worker = (await client.read_processes()).worker
        assert worker is not None
        return [await client.send(worker, command) for command in commands]

    return asyncio.run(tell())


def test_each_word_is_in_force_at_once_beneath_its_path_and_nowhere_else(world: World) -> None:
    pids = world.settled()
    red = world.red
    _instance(world, {"paths": {_USER_DATA: "deny"}})
    assert [_status(red, one) for one in (_USER_DATA, "/latest/user-datas", _HOSTNAME)] == [
        403,
        404,
        200,
    ]
    assert _status(red, _USER_DATA, _token(red)) == 403
    _instance(world, {"paths": {"/latest/meta-data": "required"}})
    for path in ("/latest/meta-data", "/latest/meta-data/", _HOSTNAME):
        assert _status(red, path) == 401
        assert _status(red, path, _token(red)) == 200
    assert _status(red, _USER_DATA) == 200
    _instance(world, {"tokens": "required", "paths": {"/latest/meta-data": "optional"}})
    assert [_status(red, one) for one in (_HOSTNAME, _USER_DATA)] == [200, 401]
    _instance(world, {"paths": {"/": "deny", "/latest/meta-data": "allow"}})
    for path, wanted in ((_HOSTNAME, 200), (_USER_DATA, 403), ("/", 403), (_META, 403)):
        assert _status(red, path) == wanted, path
    for odd in ("*", "http://169.254.169.254"):
        assert red.ask(odd).status in (400, 403), odd
    assert _status(world.guests["green"], _USER_DATA) == 200
    assert world.settled() == pids, "it took a reload"


def test_allowed_is_no_more_than_the_tree_allows(world: World) -> None:
    _instance(world, {"tokens": "required", "paths": {"/": "deny", "/latest": "allow"}})
    assert _status(world.red, _USER_DATA) == 401
    assert _status(world.red, _USER_DATA, _token(world.red)) == 200
    assert _status(world.red, _META, _token(world.red)) == 403


def test_the_most_specific_scope_that_says_something_of_a_path_decides(world: World) -> None:
    red = world.red
    _instance(world, {}, project="acme")
    scopes: dict[str, dict[str, Any]] = {}

    def say(scope: str, name: str | None, paths: Mapping[str, str]) -> None:
        scopes[scope] = {"paths": paths} if name is None else {name: {"paths": paths}}
        _settings(world, scopes)

    say("host", None, {"/": "deny", _USER_DATA: "required"})
    assert [_status(red, one) for one in (_USER_DATA, _HOSTNAME, _META)] == [401, 403, 403]
    assert _status(world.guests["green"], _HOSTNAME) == 403
    say("networks", "red", {"/latest": "allow"})
    # It says something of all beneath, so the host's rule for user-data is none any more.
    assert [_status(red, one) for one in (_USER_DATA, _HOSTNAME, _META)] == [200, 200, 403]
    assert _status(world.guests["green"], _HOSTNAME) == 403
    say("projects", "acme", {_HOSTNAME: "deny"})
    assert [_status(red, one) for one in (_USER_DATA, _HOSTNAME, _META)] == [200, 403, 403]
    say("instances", "red-5", {"/": "optional", _USER_DATA: "deny"})
    assert [_status(red, one) for one in (_USER_DATA, _HOSTNAME, _META)] == [403, 200, 200]
    told = world.daemon.admin.get(
        "/v1/explain", {"network": "red", "address": "10.0.0.5", "path": _USER_DATA}
    )
    shown = json.dumps(told)
    assert '{"name": "paths./latest/user-data", "value": "deny", "origin": "instance"}' in shown
    assert '"rule": "paths./latest/user-data"' in shown
    said = world.daemon.command(
        "explain", "--network", "red", "--from", "10.0.0.5", "--path", "/1.0//user-data"
    ).out
    assert "/latest/user-data and what is beneath it is denied" in " ".join(said.split())
    assert "(paths./latest/user-data, instance)" in " ".join(said.split())


def test_a_change_is_seen_by_a_connection_that_is_open(world: World) -> None:
    token = _token(world.red)
    headers = (f"{_TOKEN_HEADER}: {token}",)
    pids = world.settled()
    with world.red.connect() as connection:

        def status(target: str = _USER_DATA) -> int:
            return connection.request(target, headers=headers).status

        # A token that was good on the connection opens nothing that is denied.
        assert [status(), status()] == [200, 200]
        for _ in range(3):
            _instance(world, {"paths": {_USER_DATA: "deny"}})
            assert [status(), status(_HOSTNAME), status()] == [403, 200, 403]
            _instance(world, {"paths": {_HOSTNAME: "deny"}})
            assert [status(), status(_HOSTNAME)] == [200, 403]
        _instance(world, {})
        assert [status(), status(_HOSTNAME)] == [200, 200]
    assert world.settled() == pids


def test_rules_outlive_reloads_and_every_death(world: World) -> None:
    def in_force() -> None:
        assert [_status(world.red, one) for one in (_USER_DATA, _HOSTNAME)] == [403, 401]
        assert _status(world.guests["green"], _USER_DATA) == 200

    _instance(world, {"paths": {_USER_DATA: "deny", "/latest/meta-data": "required"}})
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
        assert connection.request(_USER_DATA).status == 200
        world.reload()
        _instance(world, {"paths": {_USER_DATA: "deny"}})
        reply = connection.request(_USER_DATA)
        assert reply.status == 403
    assert _status(world.red, _USER_DATA) == 403


def test_where_the_rules_are_not_there_nothing_is_served(world: World) -> None:
    _instance(world, {"paths": {"/latest/meta-data": "optional"}})
    path = world.daemon.runtime / "path-rules.map"
    assert path.stat().st_mode & 0o777 == 0o640
    assert _status(world.red, _USER_DATA) == 200
    kept = [line.split() for line in path.read_text().splitlines()]
    _worker_told(world, f"clear map {path}")
    reply = world.red.ask(_USER_DATA)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert _status(world.guests["green"], _USER_DATA) == 200
    _worker_told(world, *(f"add map {path} {key} {value}" for key, value in kept))
    assert _status(world.red, _USER_DATA) == 200


def test_in_other_trees_a_token_is_required_when_the_boot_is_over(world: World) -> None:
    paths = {"/openstack": "required", "/nocloud/user-data": "required"}
    _instance(world, {"paths": paths, "boot_grace_s": 3600}, created_at=int(time.time()))
    assert [_status(world.red, one) for one in (_META, _NOCLOUD)] == [200, 200]
    _instance(world, {"paths": paths}, created_at=1)
    assert [_status(world.red, one) for one in (_META, _NOCLOUD)] == [401, 401]
    assert _status(world.red, _META, _token(world.red)) == 200
    assert [_status(world.red, one) for one in (_USER_DATA, "/nocloud/meta-data")] == [200, 200]
    # A rule for everything is one for them, too.
    _instance(world, {"paths": {"/": "required"}}, created_at=int(time.time()))
    assert [_status(world.red, one) for one in (_META, _USER_DATA)] == [200, 401]
    _instance(world, {"paths": {"/": "required"}}, created_at=1)
    assert [_status(world.red, one) for one in (_META, _USER_DATA)] == [401, 401]
    locked = {"openstack_tokens": "required", "paths": {_META: "optional"}}
    _instance(world, locked, created_at=1)
    assert [_status(world.red, one) for one in (_META, "/openstack")] == [200, 401]


def test_sealed_user_data_stays_sealed_whatever_is_said_of_its_path(world: World) -> None:
    for word in ("allow", "optional"):
        sealed = {"seal_user_data": True, "paths": {"/": word, _USER_DATA: word}}
        _instance(world, sealed, created_at=1)
        assert _status(world.red, _USER_DATA) == 403
        assert _status(world.red, _HOSTNAME) == 200


def test_no_rule_is_for_where_tokens_are_given(world: World) -> None:
    _instance(world, {"paths": {"/": "deny", "/latest/api": "deny"}})
    _token(world.red)
    # Where one is required one can be had.
    _instance(world, {"tokens": "off", "paths": {_HOSTNAME: "required"}})
    assert _status(world.red, _HOSTNAME) == 401
    assert _status(world.red, _HOSTNAME, _token(world.red)) == 200


def test_a_guest_that_haproxy_does_not_know_yet_is_held_to_the_same(world: World) -> None:
    """Its first request goes through the resolver, and so by another way."""
    _settings(world, {"networks": {"red": {"paths": {_USER_DATA: "deny", _HOSTNAME: "required"}}}})
    fresh = iter(range(80, 120))

    def newcomer() -> Guest:
        number = next(fresh)
        guest = world.lab.guest("red", number)
        # By its MAC alone: HAProxy's maps know nothing of it before it asks.
        ports = {"ports": [{"network": "red", "mac": f"fa:16:3e:00:00:{number:02x}"}]}
        world.daemon.put(instances=[instance(f"red-{number}", "red", number, fields=ports)])
        return guest

    assert newcomer().ask(_USER_DATA).status == 403
    assert newcomer().ask(_HOSTNAME).status == 401
    assert newcomer().ask(_META).status == 200


def test_guests_of_every_kind_of_listener_are_held_to_the_same(world: World) -> None:
    _settings(world, {"host": {"paths": {_USER_DATA: "deny"}}})
    for guest in world.everybody:
        assert [_status(guest, one) for one in (_USER_DATA, _HOSTNAME)] == [403, 200]


def test_behind_neutrons_proxies_guests_of_nova_and_ours_are_held_to_the_same() -> None:
    with open_agents() as agents:

        def say(paths: Mapping[str, str]) -> None:
            agents.daemon.reconfigure({**agents.settings, "policy": {"host": {"paths": paths}}})

        say({_USER_DATA: "deny", _HOSTNAME: "required"})
        for address in ("10.0.0.5", "10.0.0.6"):
            for target, wanted in (
                (_USER_DATA, 403),
                ("//ec2/1.0/./user-data", 403),
                ("/nonsense/user%2ddata/x", 403),
                (_HOSTNAME, 401),
                (_META, 200),
            ):
                assert agents.socket.ask(target, address=address).status == wanted, target
        assert [one.target for one in agents.nova.requests] == [_META.encode()]
        agents.nova.forget()
        say({"/": "deny"})
        asker = Asker(agents.socket.connect)
        headers = (f"{NETWORK}: red", "X-Forwarded-For: 10.0.0.5")
        for target in HAND_WRITTEN:
            assert asker.ask(target, headers=headers).status in (400, 403), target
        asker.close()
        assert not agents.nova.requests
