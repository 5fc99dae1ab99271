"""Keys of the issuer, as operators rotate them while guests and verifiers go on."""

import json
import subprocess
from collections.abc import Iterator
from typing import Final

import jwt
import pytest

from support.daemon import instance
from support.guest import Guest, take_token
from support.identity.requests import claims_of, identity_settings, request_token, wait_token
from support.identity.rotation import Verifying, is_good, keys_of, make_due, published
from support.identity.signing import Issuer
from support.lab import until, within
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Issuer]]:
    section, issuer = identity_settings(tmp_path_factory.mktemp("issuer"))
    policy = {"host": {"audiences": ["vault"]}}
    with open_world({"identity": section, "policy": policy}) as world:
        yield world, issuer


@pytest.fixture(scope="module")
def shared_world(shared: tuple[World, Issuer]) -> World:
    return shared[0]


@pytest.fixture
def guest(world: World) -> Guest:
    record = instance("red-5", "red", fields={"project": _PROJECT})
    assert world.daemon.put(instances=[record])["applied"]
    wait_token(world.red)
    return world.red


def test_a_rotation_refuses_no_token_and_goes_on_when_the_signer_ends(
    world: World, guest: Guest, shared: tuple[World, Issuer]
) -> None:
    issuer = shared[1]
    (first,) = keys_of(world)
    verifying = Verifying(world, issuer, guest)
    verifying.start()
    try:
        assert world.daemon.command("identity", "rotate").status == 0
        assert [one["state"] for one in keys_of(world)] == ["signing", "next"]
        until(lambda: len(published(world, issuer)) == 2, what="both keys")
        make_due(world)
        until(lambda: keys_of(world)[0]["id"] != first["id"], within_s=20, what="the other key")
        until(
            lambda: published(world, issuer)[0]["kid"] == keys_of(world)[0]["id"],
            what="the signing key first",
        )
        seen = verifying.good
        until(lambda: verifying.good >= seen + 5, what="tokens of the other key")
        make_due(world)
        until(lambda: len(keys_of(world)) == 1, within_s=20, what="the old key's end")
        until(lambda: len(published(world, issuer)) == 1, what="one key")
    finally:
        verifying.ended.set()
        verifying.join()
    assert verifying.refused == []
    assert verifying.good > 10


def test_after_a_theft_no_key_and_no_token_of_before_is_left(
    world: World, guest: Guest, shared: tuple[World, Issuer]
) -> None:
    issuer = shared[1]
    before, token = keys_of(world), wait_token(guest)
    done = world.daemon.command("identity", "rotate", "--compromised")
    assert (done.status, "OpenBao" in done.out) == (0, True), done
    after = keys_of(world)
    assert not {one["id"] for one in before} & {one["id"] for one in after}
    until(lambda: [one["kid"] for one in published(world, issuer)] == [after[0]["id"]], what="it")
    new = wait_token(guest)
    assert (is_good(new, published(world, issuer)), new != token) == (True, True)
    files = {path.stem for path in (world.daemon.state / "identity/keys").glob("*.pem")}
    assert files == {after[0]["id"]}


def test_a_kill_between_the_new_keys_and_the_end_of_old_tokens_leaves_no_old_token(
    world: World, guest: Guest
) -> None:
    # Another web server has the issuer's documents: HAProxy is not reloaded with them, which would clear its map.
    kept = {"listen": None, "certificate": None}
    identity = {**world.settings["identity"], **kept}
    world.daemon.reconfigure({**world.settings, "identity": identity})
    session, token = take_token(guest), wait_token(guest)
    assert request_token(guest, session=session).text == token
    tokens = world.daemon.runtime / "identity.map"
    tokens.unlink()
    tokens.mkdir()
    before = keys_of(world)
    assert world.daemon.command("identity", "rotate", "--compromised").status != 0
    keys = world.daemon.state / "identity" / "public" / "jwks"
    assert json.loads(keys.read_text())["keys"][0]["kid"] != before[0]["id"]
    world.daemon.kill_controller()
    tokens.rmdir()
    assert request_token(guest, session=session).text == token
    world.daemon.start()
    until(
        lambda: request_token(guest, session=session).text not in {token, ""},
        within_s=20,
        what="a token of the new key",
    )
    new = wait_token(guest)
    assert jwt.get_unverified_header(new)["kid"] == keys_of(world)[0]["id"]


def test_a_token_is_shown_with_its_claims_and_whose_it_is(world: World, guest: Guest) -> None:
    # A held token may be of a key that another test has made old before its time.
    token = request_token(guest, more=("X-imdsproxy-nonce: shown",)).text
    shown = world.daemon.command("identity", "show", stdin=f"{token}\n")
    assert shown.status == 0, shown
    assert "signature: good, of the key that is signing" in shown.out
    assert claims_of(token)["sub"] in shown.out
    assert "life: valid" in shown.out
    forged = token[:-6] + ("AAAAAA" if token[-6:] != "AAAAAA" else "BBBBBB")
    assert "signature: wrong" in world.daemon.command("identity", "show", stdin=forged).out
    assert world.daemon.command("identity", "show", stdin="x").status != 0


def test_the_thumbprint_is_the_certificate_s(world: World, shared: tuple[World, Issuer]) -> None:
    issuer = shared[1]
    curl = f"curl -sf --cacert {issuer.ca_file} {issuer.url}/certificate.pem"
    found = subprocess.run(
        (*within(world.lab.host), "sh", "-c", f"{curl} | openssl x509 -noout -fingerprint -sha1"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    shown = found.strip().rpartition("=")[2].replace(":", "").lower()
    assert shown == keys_of(world)[0]["sha1"]
