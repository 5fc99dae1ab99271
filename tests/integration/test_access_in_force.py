"""Tokens, and who may read what, from settings and records to the guests of a daemon, over every change and death.

Which request is answered how is in `support.access_table` and test_access_rules.py, which need no daemon.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest

from imdsproxy.core.tokens import TOKEN_PATTERN
from support.access_table import META, TOKEN, USER_DATA
from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, Reply, take_token, with_token
from support.lab import until
from support.world import World, own

pytestmark = pytest.mark.root

_HOSTNAME: Final = "/latest/meta-data/hostname"
_HEADER: Final = "X-aws-ec2-metadata-token"


def _settings(world: World, policy: Mapping[str, Any]) -> None:
    world.daemon.reconfigure({**world.settings, "policy": policy})


def _record(world: World, policy: Mapping[str, Any], **fields: object) -> None:
    record = instance("red-5", "red", fields={**fields, "policy": policy})
    assert world.daemon.put(instances=[record])["applied"]


def _ask_token(guest: Guest, *, headers: Sequence[str] = (), to: str = IPV4) -> Reply:
    lines = (f"{_HEADER}-ttl-seconds: 300", *headers)
    return guest.ask(TOKEN, method="PUT", headers=lines, to=to)


def _status(guest: Guest, target: str, token: str = "") -> int:
    reply = guest.ask(target, headers=with_token(token) if token else ())
    if reply.status == 200 and target == USER_DATA:
        assert own(guest, reply) is None
    return reply.status


def test_every_guest_gets_a_token_over_both_families_and_reads_its_own_with_it(
    world: World,
) -> None:
    _settings(world, {"host": {"tokens": "required", "paths": {_HOSTNAME: "deny"}}})
    for guest in world.everybody:
        tokens = [_ask_token(guest, to=to) for to in (IPV4, IPV6)]
        for reply in tokens:
            assert (reply.status, reply.headers["content-type"]) == (200, "text/plain")
            assert reply.headers[f"{_HEADER.lower()}-ttl-seconds"] == "300"
            assert re.fullmatch(TOKEN_PATTERN.strip("^$"), reply.text)
        assert [_status(guest, USER_DATA, one) for one in ("", tokens[1].text)] == [401, 200]
        assert [_status(guest, one) for one in (_HOSTNAME, META)] == [403, 200]


def test_rules_and_tokens_outlive_reloads_and_every_death(world: World) -> None:
    token = take_token(world.red)

    def in_force() -> None:
        assert [_status(world.red, one) for one in (USER_DATA, _HOSTNAME)] == [403, 401]
        assert _status(world.red, _HOSTNAME, token) == 200
        assert _status(world.guests["green"], USER_DATA) == 200

    _record(world, {"paths": {USER_DATA: "deny", "/latest/meta-data": "required"}})
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
        _record(world, {"paths": {USER_DATA: "deny"}})
        assert connection.request(USER_DATA).status == 403
    assert _status(world.red, USER_DATA) == 403


def test_a_guest_that_haproxy_does_not_know_yet_is_held_to_the_same(world: World) -> None:
    """Its first request goes through the resolver, and so by another way."""
    host = {"tokens": "required", "refuse_forwarded": True, "paths": {_HOSTNAME: "deny"}}
    _settings(world, {"host": host})
    fresh = itertools.count(80)

    def newcomer() -> Guest:
        number = next(fresh)
        guest = world.lab.guest("red", number)
        # By its MAC alone: HAProxy's maps know nothing of it before it asks.
        ports = {"ports": [{"network": "red", "mac": f"fa:16:3e:00:00:{number:02x}"}]}
        world.daemon.put(instances=[instance(f"red-{number}", "red", number, fields=ports)])
        return guest

    assert [_status(newcomer(), one) for one in (USER_DATA, _HOSTNAME, META)] == [401, 403, 200]
    assert newcomer().ask(META, headers=("Via: 1.1 x",)).status == 403
    for line in ("X-Forwarded-For: 1.2.3.4", "Via: 1.1 x"):
        assert _ask_token(newcomer(), headers=(line,)).status == 403
    guest = newcomer()
    token = take_token(guest)
    assert _status(guest, USER_DATA, token) == 200
    assert _status(newcomer(), USER_DATA, token) == 401
