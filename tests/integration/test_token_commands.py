"""What operators do about tokens and boots, as guests see it: revoked, rotated, opened again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, Guest
from support.lab import until
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_HEADER: Final = "X-aws-ec2-metadata-token"
_USER_DATA: Final = "/latest/user-data"
_META: Final = "/openstack/latest/meta_data.json"


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    """One of its own: that an instance was reopened or its tokens revoked stays, whatever its record is."""
    with open_world({"resolver": {"hold_s": 1.0}}) as world:
        yield world


def _do(world: World, *words: str) -> str:
    done = world.daemon.command(*words)
    assert done.status == 0, done
    assert done.out.startswith("done: "), done
    return done.out


def _token(guest: Guest, to: str = IPV4) -> str:
    asked = ("X-aws-ec2-metadata-token-ttl-seconds: 600",)
    reply = guest.ask("/latest/api/token", method="PUT", headers=asked, to=to)
    assert reply.status == 200, reply
    return reply.text


def _status(guest: Guest, token: str, to: str = IPV4) -> int:
    reply = guest.ask(_USER_DATA, headers=(f"{_HEADER}: {token}",), to=to)
    if reply.status == 200:
        assert own(guest, reply) is None
    return reply.status


def test_a_revoked_token_is_bad_at_once_and_for_ever_and_a_fresh_one_is_good(world: World) -> None:
    green = world.guests["green"]
    others = _token(green)
    # Each is asked for over one family and used over both.
    old = [_token(world.red), _token(world.red, IPV6)]
    pids = world.settled()
    for _ in range(2):
        printed = _do(world, "token", "revoke", "red-5")
        assert printed == "done: all tokens of instance red-5 revoked\n"
        for to in (IPV4, IPV6):
            assert {_status(world.red, token, to) for token in old} == {401}
        fresh = _token(world.red)
        assert [_status(world.red, fresh, to) for to in (IPV4, IPV6)] == [200, 200]
        assert _status(green, others) == 200
        assert world.red.ask(_USER_DATA).status == 200, "none is needed"
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
    assert guest.ask(_USER_DATA).status == 200
    token = _token(guest)
    assert _status(guest, token) == 200
    _do(world, "token", "revoke", "red-80")
    assert _status(guest, token) == 401
    assert _status(guest, _token(guest)) == 200


def test_an_instance_that_comes_again_has_none_of_its_old_tokens(world: World) -> None:
    record = next(one for one in world.instances if one["id"] == "red-5")
    old = _token(world.red)
    _do(world, "token", "revoke", "red-5")
    world.daemon.remove_instance("red-5")
    _do(world, "token", "revoke", "red-5")
    world.daemon.put(instances=[record])
    assert _status(world.red, old) == 401
    assert _status(world.red, _token(world.red)) == 200


def test_a_fresh_key_signs_and_the_two_before_it_are_believed(world: World) -> None:
    pids = world.settled()
    tokens = [_token(world.red)]
    for _ in range(2):
        printed = _do(world, "token", "rotate")
        tokens.append(_token(world.red))
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
    before = _token(world.red)
    path = world.daemon.state / "token-keys"
    world.daemon.kill_controller()
    path.write_text(f"{'B' * 43}=\n{path.read_text()}")
    world.daemon.start()
    until(lambda: _token(world.red).split(".")[0] != before.split(".")[0], within_s=5)
    assert _status(world.red, before) == 200


def test_reopen_unseals_and_opens_what_is_locked_after_the_boot(world: World) -> None:
    host = {"seal_user_data": True, "openstack_tokens": "required", "boot_grace_s": 600}
    born = {"created_at": int(time.time()) - 3600}
    both = [instance(f"{name}-5", name, fields=born) for name in ("red", "green")]
    world.daemon.put(instances=both)
    world.daemon.configure({"resolver": {"hold_s": 1.0}, "policy": {"host": host}})
    try:
        assert world.daemon.command("reload", "--allow-dropped").status == 0
        green = world.guests["green"]
        for guest in (world.red, green):
            assert [guest.ask(path).status for path in (_USER_DATA, _META)] == [403, 401]
        assert _do(world, "instance", "reopen", "red-5") == "done: instance red-5 boots anew\n"
        for to in (IPV4, IPV6):
            assert own(world.red, world.red.ask(_USER_DATA, to=to)) is None
        assert world.red.ask(_META).status == 200
        world.daemon.kill_controller()
        world.daemon.start()
        assert own(world.red, world.red.ask(_USER_DATA)) is None
        assert green.ask(_USER_DATA).status == 403
    finally:
        world.daemon.reconfigure({"resolver": {"hold_s": 1.0}})


def test_a_damaged_guard_file_stops_the_start_and_guests_are_served_on(world: World) -> None:
    old = _token(world.red)
    _do(world, "token", "revoke", "red-5")
    fresh = _token(world.red)
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
        assert world.red.ask(_USER_DATA).status == 200
    finally:
        # As the hint has it: whose tokens were revoked is unknown, so none is good.
        path.unlink()
        (world.daemon.state / "token-keys").unlink()
        world.daemon.start()
    until(lambda: _status(world.red, fresh) == 401, within_s=5)
    assert _status(world.red, old) == 401
    assert _status(world.red, _token(world.red)) == 200
