"""Settings of identity tokens that change over a restart of the controller, which the tokens' processes outlive."""

from collections.abc import Iterator
from typing import Any, Final

import pytest

from support.daemon import instance
from support.guest import Guest, take_token
from support.identity.requests import claims_of, identity_settings, request_token, wait_token
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_POLICY: Final = {"host": {"audiences": ["vault"]}}


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    section, _ = identity_settings(tmp_path_factory.mktemp("issuer"))
    # Another web server has the issuer's documents: HAProxy is not reloaded with them, which would clear its map.
    kept = {"listen": None, "certificate": None}
    settings = {"identity": {**section, **kept}, "policy": _POLICY}
    with open_world(settings) as world:
        yield world


@pytest.fixture
def guest(world: World) -> Guest:
    record = instance("red-5", "red", fields={"project": _PROJECT})
    assert world.daemon.put(instances=[record])["applied"]
    wait_token(world.red)
    return world.red


def _restart(world: World, **identity: object) -> None:
    """Start another controller with these settings; all other processes run on."""
    world.daemon.kill_controller()
    section: dict[str, Any] = {**world.settings["identity"], **identity}
    world.daemon.configure({**world.settings, "identity": section})
    world.daemon.start()


def _pids(world: World) -> tuple[str, ...]:
    return tuple(
        (world.daemon.runtime / f"{name}.pid").read_text() for name in ("identity", "signer")
    )


def test_no_token_of_other_settings_is_given_after_a_restart(world: World, guest: Guest) -> None:
    session, before = take_token(guest), claims_of(wait_token(guest))
    audiences = {"vault": {"subject": "project:{project}", "lifetime_s": 300}}
    _restart(world, issuer="https://id.example", audiences=audiences)
    found: list[str] = []

    def is_new() -> bool:
        reply = request_token(guest, session=session)
        found.append(reply.text)
        return reply.status == 200 and claims_of(reply.text)["iss"] != before["iss"]

    until(is_new, within_s=20, what="a token of the new settings")
    claims = claims_of(found[-1])
    assert (claims["iss"], claims["sub"]) == ("https://id.example", f"project:{_PROJECT}")
    assert claims["exp"] - claims["iat"] == 330
    assert claims_of(request_token(guest, session=session).text)["sub"] == claims["sub"]


def test_a_restart_with_the_same_settings_keeps_processes_and_tokens(
    world: World, guest: Guest
) -> None:
    # Another test may have left other settings.
    _restart(world)
    until(lambda: claims_of(wait_token(guest))["iss"] == world.settings["identity"]["issuer"])
    token, pids = wait_token(guest), _pids(world)
    _restart(world)
    assert wait_token(guest) == token
    assert _pids(world) == pids
