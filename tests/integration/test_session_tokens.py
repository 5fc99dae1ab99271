"""Session tokens as guests see them: how one is had, what it opens, and what nothing else opens."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pytest

from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.tokens import TOKEN_PATTERN, mint_token, parse_token_keys
from support.daemon import Daemon, instance
from support.guest import IPV4, IPV6, Connection, Guest, Reply
from support.lab import Lab, until
from support.patience import patience
from support.world import World, own

pytestmark = pytest.mark.root

_TOKEN: Final = "/latest/api/token"
_USER_DATA: Final = "/latest/user-data"
_META: Final = "/openstack/latest/meta_data.json"
_NOCLOUD: Final = "/nocloud/user-data"


def _say(world: World, policy: Mapping[str, Any]) -> None:
    """Have this policy in force."""
    world.daemon.reconfigure({**world.settings, "policy": policy})


def _ask_token(
    guest: Guest,
    ttl: object = 60,
    *,
    target: str = _TOKEN,
    headers: Sequence[str] = (),
    to: str = IPV4,
    body: bytes = b"",
) -> Reply:
    lines = (f"X-aws-ec2-metadata-token-ttl-seconds: {ttl}", *headers)
    return guest.ask(target, method="PUT", headers=lines, to=to, body=body)


def _token(guest: Guest, ttl: int = 60) -> str:
    reply = _ask_token(guest, ttl)
    assert reply.status == 200, reply
    return reply.text


def _with(token: str) -> tuple[str, ...]:
    return (f"X-aws-ec2-metadata-token: {token}",)


def _minted(world: World, expiry: int) -> str:
    """A token of red's guest that nothing but the clock can make bad."""
    key, *_ = parse_token_keys((world.daemon.state / "token-keys").read_text())
    return mint_token(key, NetworkId("red"), InstanceId("red-5"), 0, expiry)


def test_a_token_is_had_by_put_and_says_how_long_it_lives(world: World) -> None:
    for guest in world.everybody:
        reply = _ask_token(guest, 300)
        assert (reply.status, reply.headers["content-type"]) == (200, "text/plain")
        assert reply.headers["x-aws-ec2-metadata-token-ttl-seconds"] == "300"
        assert re.fullmatch(TOKEN_PATTERN.strip("^$"), reply.text)
        assert re.fullmatch(TOKEN_PATTERN.strip("^$"), _ask_token(guest, to=IPV6).text)


def test_it_is_the_token_that_python_makes_of_the_same_key(world: World) -> None:
    before = int(time.time())
    token = _token(world.red, 100)
    expiry = int(token.split(".")[1])
    assert before + 100 <= expiry <= time.time() + 101
    assert token == _minted(world, expiry)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_reading_with_it_tells_what_is_left_of_it(world: World, method: str) -> None:
    began = time.monotonic()
    token = _token(world.red, 100)
    for _ in range(2):  # the second comes from the cache
        reply = world.red.ask(_USER_DATA, method=method, headers=_with(token))
        assert reply.status == 200
        left = int(reply.headers["x-aws-ec2-metadata-token-ttl-seconds"])
        assert 0 < 100 - (time.monotonic() - began) - 2 <= left <= 100
    assert "x-aws-ec2-metadata-token-ttl-seconds" not in world.red.ask(_USER_DATA).headers


@pytest.mark.parametrize(
    "ttl", ["", "0", "21601", "-1", "+60", "6e1", "1.5", "60 60", "0x10", "99999999999999999999"]
)
def test_a_lifetime_that_is_none_is_400(world: World, ttl: str) -> None:
    reply = _ask_token(world.red, ttl)
    assert (reply.status, reply.body) == (400, b"")


@pytest.mark.parametrize("ttl", [1, 21_600])
def test_the_shortest_and_the_longest_lifetime_are_given(world: World, ttl: int) -> None:
    assert _ask_token(world.red, ttl).status == 200


def test_no_lifetime_or_two_are_400(world: World) -> None:
    assert world.red.ask(_TOKEN, method="PUT").status == 400
    twice = ("X-aws-ec2-metadata-token-ttl-seconds: 60",)
    assert _ask_token(world.red, 60, headers=twice).status == 400


def test_a_put_without_a_length_and_one_with_a_body_work(world: World) -> None:
    assert _ask_token(world.red).status == 200
    assert _ask_token(world.red, headers=("Content-Length: 0",)).status == 200
    assert _ask_token(world.red, body=b"ignored").status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_on_its_path_are_405(world: World, method: str) -> None:
    reply = world.red.ask(_TOKEN, method=method)
    assert (reply.status, reply.headers["allow"], reply.body) == (405, "PUT", b"")


def test_there_is_none_for_what_came_through_a_proxy(world: World) -> None:
    for header in ("X-Forwarded-For: 10.0.0.9", "x-forwarded-for:", "X-FORWARDED-FOR: a, b"):
        reply = _ask_token(world.red, headers=(header,))
        assert (reply.status, reply.body) == (403, b""), header


def test_there_is_none_under_a_dated_version(world: World) -> None:
    assert _ask_token(world.red, target="/2021-01-03/api/token").status == 403
    assert _ask_token(world.red, target="/latest/api/tokens").status in (404, 405)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token + "x",
        lambda token: token + ".x",
        lambda token: token[:-1],
        lambda token: token[:-1] + ("A" if token[-1] != "A" else "B"),
        lambda token: token.replace(".", ".9", 1)[: len(token)],
        lambda token: f"00000000{token[8:]}",
        lambda token: f"@current{token[8:]}",
        lambda token: token.rpartition(".")[0] + ".",
        lambda token: token.rpartition(".")[0],
        lambda token: f"{token},{token}",
        lambda token: f" {token.upper()}",
        lambda _: "",
        lambda _: "x",
    ],
)
def test_a_spoilt_token_is_401_though_none_is_needed(
    world: World, spoil: Callable[[str], str]
) -> None:
    reply = world.red.ask(_USER_DATA, headers=_with(spoil(_token(world.red))))
    assert (reply.status, reply.body) == (401, b"")
    assert "x-aws-ec2-metadata-token-ttl-seconds" not in reply.headers


def test_two_tokens_are_401_although_both_are_good(world: World) -> None:
    token = _token(world.red)
    assert world.red.ask(_USER_DATA, headers=_with(token) * 2).status == 401


def test_an_expired_token_is_401(world: World) -> None:
    now = int(time.time())
    for expiry, status in ((now - 1, 401), (now + 60, 200)):
        headers = _with(_minted(world, expiry))
        assert world.red.ask(_USER_DATA, headers=headers).status == status
    given = _with(_token(world.red, 1))
    until(lambda: world.red.ask(_USER_DATA, headers=given).status == 401, within_s=3)


def test_anybody_elses_token_is_401(world: World) -> None:
    tokens = {guest.network: _token(guest) for guest in world.everybody}
    for guest in world.everybody:
        for network, token in tokens.items():
            expected = 200 if network == guest.network else 401
            assert guest.ask(_USER_DATA, headers=_with(token)).status == expected


def test_it_outlives_haproxys_reload_and_death_and_the_controllers(world: World) -> None:
    token = _token(world.red, 600)
    world.reload()
    assert world.red.ask(_USER_DATA, headers=_with(token)).status == 200
    world.daemon.kill_controller()
    assert world.red.ask(_USER_DATA, headers=_with(token)).status == 200
    world.daemon.command("stop", "--data-plane")
    world.daemon.start()
    assert world.red.ask(_USER_DATA, headers=_with(token)).status == 200


def test_a_token_of_one_host_is_good_on_another_that_has_the_same_key(world: World) -> None:
    keys = {"key_file": str(world.daemon.state / "token-keys")}
    lab = Lab()
    other = Daemon(lab, {"tokens": keys})
    try:
        network, red = lab.namespace_network("red"), lab.guest("red")
        other.start().put([network], [instance("red-5", "red")])
        until(lambda: other.status()["serving"] == 1, what="the other host's service")
        for giver, reader in ((world.red, red), (red, world.red)):
            token = _token(giver)
            assert own(reader, reader.ask(_USER_DATA, headers=_with(token))) is None
            assert reader.ask(_USER_DATA, headers=_with(token[:-1])).status == 401
        foreign = _token(world.guests["green"])
        assert red.ask(_USER_DATA, headers=_with(foreign)).status == 401
    finally:
        other.close()
        lab.close()


def test_required_means_ec2s_tree(world: World) -> None:
    _say(world, {"host": {"tokens": "required"}})
    for guest in world.everybody:
        for target in (
            "/",
            "/latest/meta-data/hostname",
            _USER_DATA,
            "/2009-04-04/user-data",
            "/nonsense",
        ):
            reply = guest.ask(target)
            assert (reply.status, reply.body) == (401, b""), target
        token = _token(guest)
        assert own(guest, guest.ask(_USER_DATA, headers=_with(token))) is None
        assert guest.ask(_META).status == 200
        assert guest.ask(_NOCLOUD).status == 200


def test_the_most_specific_word_wins_and_is_in_force_without_a_reload(world: World) -> None:
    pids = world.settled()
    _say(world, {"host": {"tokens": "required"}, "networks": {"red": {"tokens": "optional"}}})
    assert world.red.ask(_USER_DATA).status == 200
    assert world.guests["green"].ask(_USER_DATA).status == 401
    _say(world, {"host": {"tokens": "off"}, "instances": {"red-5": {"tokens": "required"}}})
    assert world.red.ask(_USER_DATA).status == 401
    assert world.guests["green"].ask(_USER_DATA).status == 200
    _say(world, {})
    assert world.red.ask(_USER_DATA).status == 200
    assert world.settled() == pids


def test_while_tokens_are_off_there_is_no_token_and_one_is_not_looked_at(world: World) -> None:
    _say(world, {"host": {"tokens": "off"}})
    for method in ("PUT", "GET"):
        reply = world.red.ask(_TOKEN, method=method)
        assert (reply.status, reply.body) == (404, b"")
    assert own(world.red, world.red.ask(_USER_DATA, headers=_with("nonsense"))) is None


def test_a_tree_that_was_asked_for_by_name_is_locked_when_the_boot_is_over(world: World) -> None:
    host = {"openstack_tokens": "required", "nocloud_tokens": "required", "boot_grace_s": 3600}
    born = {"created_at": int(time.time())}
    world.daemon.put(instances=[instance("red-5", "red", fields=born)])
    _say(world, {"host": host})
    assert world.red.ask(_META).status == 200
    assert world.red.ask(_NOCLOUD).status == 200
    world.daemon.put(instances=[instance("green-5", "green", fields={"created_at": 1})])
    green = world.guests["green"]
    assert green.ask(_META).status == 401
    assert green.ask(_NOCLOUD).status == 401
    assert green.ask(_META, headers=_with(_token(green))).status == 200
    assert green.ask(_USER_DATA).status == 200


def test_an_instance_that_was_made_long_after_now_has_booted(world: World) -> None:
    """Its clock was wrong, or this host's is: to be unlocked for years is what somebody would set a clock for."""
    host = {"openstack_tokens": "required", "seal_user_data": True}
    for born, status in ((int(time.time()), 200), (int(time.time()) + 8 * 86_400, 401)):
        world.daemon.put(instances=[instance("red-5", "red", fields={"created_at": born})])
        _say(world, {"host": host})
        assert world.red.ask(_META).status == status
        assert world.red.ask(_USER_DATA).status == {200: 200, 401: 403}[status]


def test_sealed_user_data_is_403_once_the_boot_is_over_with_a_token_too(world: World) -> None:
    fields = {"created_at": int(time.time())}
    world.daemon.put(instances=[instance("red-5", "red", fields=fields)])
    # Long enough that the command which puts it in force is over before, however busy the machine is.
    _say(world, {"host": {"seal_user_data": True, "boot_grace_s": 10}})
    assert world.red.ask(_USER_DATA).status == 200
    until(lambda: world.red.ask(_USER_DATA).status == 403, within_s=15)
    paths = ("/openstack/latest/user_data", _NOCLOUD, "/2009-04-04/user-data", "/latest/user-data/")
    for path in paths:
        assert world.red.ask(path, headers=_with(_token(world.red))).status == 403, path
    assert world.red.ask("/latest/meta-data/hostname").status == 200
    assert world.red.ask(_META).status == 200


def test_an_endpoint_that_is_off_is_403_for_everything(world: World) -> None:
    _say(world, {"instances": {"red-5": {"endpoint": False}}})
    for target in ("/", _USER_DATA, _META, "/nonsense"):
        reply = world.red.ask(target)
        assert (reply.status, reply.body) == (403, b""), target
    assert _ask_token(world.red).status == 403
    assert world.guests["green"].ask(_USER_DATA).status == 200


_FORWARDED: Final = (
    "Forwarded: for=1.2.3.4",
    "Via: 1.1 proxy",
    "X-Forwarded-For: 1.2.3.4",
    "x-forwarded-for:",
    "X-Forwarded-Host: x",
    "X-FORWARDED: x",
    "X-Forwarded-For-Ip4: x",
    "Origin: http://x",
    "Origin: null",
    "Referer:",
    "SEC-Fetch-Site: cross-site",
    "sec-fetch-mode: cors",
)


def test_what_a_guest_was_made_to_ask_is_refused_without_a_token(world: World) -> None:
    _say(world, {"host": {"refuse_forwarded": True}})
    token = _token(world.red)
    for line in _FORWARDED:
        reply = world.red.ask(_USER_DATA, headers=(line,))
        assert (reply.status, reply.body) == (403, b""), line
        reply = world.red.ask(_USER_DATA, headers=(line, *_with(token)))
        assert own(world.red, reply) is None, line
        reply = _ask_token(world.red, headers=(line,))
        assert (reply.status, reply.body) == (403, b""), line
    for line in ("X-For: x", "Viable: x", "Accept: Via: x"):
        assert world.red.ask(_USER_DATA, headers=(line,)).status == 200, line


def test_another_host_is_refused_and_its_own_names_are_not(world: World) -> None:
    _say(world, {"host": {"refuse_forwarded": True}})
    for host in ("evil.example", "169.254.169.254.nip.io", "127.0.0.1", "169.254.169.254:81"):
        assert world.red.ask(_USER_DATA, host=host).status == 403, host
        # A name that somebody has lead here makes a page of his one of ours: it may send what it likes.
        lines = ("X-aws-ec2-metadata-token-ttl-seconds: 60",)
        assert world.red.ask(_TOKEN, method="PUT", headers=lines, host=host).status == 403, host
    for host in (
        "169.254.169.254",
        "169.254.169.254:80",
        "[fe80::a9fe:a9fe]",
        "[FE80::A9FE:A9FE]",
        "[fe80::a9fe:a9fe%25eth0]:80",
    ):
        assert world.red.ask(_USER_DATA, host=host).status == 200, host


def test_a_guest_that_haproxy_does_not_know_yet_is_held_to_the_same(world: World) -> None:
    """Its first request goes through the resolver, and so by another way."""
    _say(
        world,
        {"host": {"tokens": "required", "refuse_forwarded": True, "openstack_tokens": "optional"}},
    )
    fresh = iter(range(80, 120))

    def newcomer() -> Guest:
        number = next(fresh)
        guest = world.lab.guest("red", number)
        # By its MAC alone: HAProxy's maps know nothing of it before it asks.
        ports = {"ports": [{"network": "red", "mac": f"fa:16:3e:00:00:{number:02x}"}]}
        world.daemon.put(instances=[instance(f"red-{number}", "red", number, fields=ports)])
        return guest

    assert newcomer().ask(_USER_DATA).status == 401
    assert newcomer().ask(_META).status == 200
    assert newcomer().ask(_META, headers=("Via: 1.1 x",)).status == 403
    assert _ask_token(newcomer(), headers=("X-Forwarded-For: 1.2.3.4",)).status == 403
    assert _ask_token(newcomer(), headers=("Via: 1.1 x",)).status == 403
    guest = newcomer()
    token = _token(guest)
    assert own(guest, guest.ask(_USER_DATA, headers=_with(token))) is None
    assert newcomer().ask(_USER_DATA, headers=_with(token)).status == 401


def test_keys_can_be_replaced_and_old_tokens_go_on(world: World) -> None:
    before = _token(world.red)
    path = world.daemon.state / "token-keys"
    old = path.read_text()
    path.write_text(f"{'A' * 43}=\n{old}")
    _say(world, {})
    after = _token(world.red)
    assert before.split(".")[0] != after.split(".")[0]
    for token in (before, after):
        assert world.red.ask(_USER_DATA, headers=_with(token)).status == 200
    path.write_text(f"{'A' * 43}=\n")
    _say(world, {})
    assert world.red.ask(_USER_DATA, headers=_with(before)).status == 401
    assert world.red.ask(_USER_DATA, headers=_with(after)).status == 200
    world.daemon.kill_controller()
    world.daemon.start()
    assert world.red.ask(_USER_DATA, headers=_with(after)).status == 200


def test_keys_that_cannot_be_used_change_nothing(world: World) -> None:
    token = _token(world.red)
    path = world.daemon.state / "token-keys"
    kept = path.read_text()
    try:
        path.write_text("nonsense\n")
        refused = world.daemon.command("reload")
        assert refused.status != 0
        assert "line 1" in refused.err
        assert "nonsense" not in refused.err
        assert world.red.ask(_USER_DATA, headers=_with(token)).status == 200
    finally:
        path.write_text(kept)


def test_no_token_and_no_key_is_written_down(world: World) -> None:
    token = _token(world.red)
    world.red.ask(_USER_DATA, headers=_with(token))
    world.red.ask(_USER_DATA, headers=_with(token + "x"))
    secrets = [token.encode(), (world.daemon.state / "token-keys").read_bytes().splitlines()[-1]]
    allowed = {world.daemon.state / "token-keys", world.daemon.runtime / "token-keys.map"}
    for path in world.daemon.directory.rglob("*"):
        if path.is_file() and not path.is_symlink() and path not in allowed:
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
    for path in allowed:
        assert path.stat().st_mode & 0o777 == 0o600
    assert token not in json.dumps(world.daemon.status())


def test_a_kept_connection_does_not_keep_what_was_good_before(world: World) -> None:
    shortly = 3 * math.ceil(patience())
    short, longer = _token(world.red, shortly), _token(world.red, 600)
    path = world.daemon.state / "token-keys"
    kept = path.read_text()

    def status(connection: Connection, token: str, target: str = _USER_DATA) -> int:
        return connection.request(target, headers=_with(token)).status

    with world.red.connect() as connection:
        assert [status(connection, short) for _ in range(2)] == [200, 200]
        until(lambda: status(connection, short) == 401, within_s=shortly + 2)
        assert [status(connection, longer) for _ in range(2)] == [200, 200]
        assert status(connection, f"{longer[:-1]}~") == 401
        assert status(connection, longer) == 200
        with world.guests["green"].connect() as other:
            assert status(other, longer) == 401
        assert connection.request(_TOKEN, headers=_with(longer)).status == 405
        _say(world, {"host": {"seal_user_data": True, "boot_grace_s": 0}})
        assert status(connection, longer) == 403
        _say(world, {"host": {"endpoint": False}})
        assert status(connection, longer) == 403
        _say(world, {})
        assert status(connection, longer) == 200
        try:
            path.write_text(f"{'B' * 42}A=\n")
            _say(world, {})
            assert status(connection, longer) == 401
        finally:
            path.write_text(kept)
            _say(world, {})
