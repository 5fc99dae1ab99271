"""Keys of the issuer, as operators rotate them while guests and verifiers go on."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import jwt
import pytest

from support.daemon import instance
from support.guest import Guest, take_token
from support.identity.requests import claims_of, identity_settings, request_token, wait_token
from support.identity.signing import Issuer
from support.lab import run, until, within
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


def _keys(world: World) -> list[dict[str, Any]]:
    """Return the keys, once the signer answers."""
    done = world.daemon.command("identity", "keys", "--json")
    if done.status:
        # The signer is being started again.
        until(
            lambda: world.daemon.command("identity", "keys").status == 0,
            within_s=20,
            what=f"the signer; {(world.daemon.runtime / 'signer.log').read_text()[-3000:]}",
        )
        done = world.daemon.command("identity", "keys", "--json")
    found: list[dict[str, Any]] = json.loads(done.out)["keys"]
    return found


def _published(world: World, issuer: Issuer) -> list[dict[str, Any]]:
    """Return the keys as a verifier reads them."""
    curl = ("curl", "-sf", "--cacert", str(issuer.ca_file), issuer.jwks_url)
    found: list[dict[str, Any]] = json.loads(run(*within(world.lab.host), *curl))["keys"]
    return found


def _is_good(token: str, keys: list[dict[str, Any]]) -> bool:
    kid = jwt.get_unverified_header(token)["kid"]
    own = [one for one in keys if one["kid"] == kid]
    if not own:
        return False
    jwt.decode(token, jwt.PyJWK(own[0]).key, algorithms=["RS256"], audience="vault")
    return True


@dataclass(eq=False)
class _Verifying(threading.Thread):
    """A guest that takes new tokens all the time, each verified with the keys of that moment."""

    world: World
    issuer: Issuer
    guest: Guest
    refused: list[str] = field(default_factory=list)
    good: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self) -> None:
        session = take_token(self.guest)
        while not self.ended.wait(0.2):
            nonce = (f"X-imdsproxy-nonce: n{self.good}",)
            reply = request_token(self.guest, session=session, more=nonce)
            if reply.status == 503:
                continue
            if _is_good(reply.text, _published(self.world, self.issuer)):
                self.good += 1
            else:
                self.refused.append(reply.text)


def _make_due(world: World) -> None:
    """Have the time of the next step come, over an end of the signer."""
    pid = int((world.daemon.runtime / "signer.pid").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)
    path = world.daemon.state / "identity" / "keys" / "ring.json"
    ring = json.loads(path.read_text())
    for one in ring["keys"]:
        one["since"] = 0
    path.write_text(json.dumps(ring))
    os.kill(pid, signal.SIGKILL)


def test_a_rotation_refuses_no_token_and_goes_on_when_the_signer_ends(
    world: World, guest: Guest, shared: tuple[World, Issuer]
) -> None:
    issuer = shared[1]
    (first,) = _keys(world)
    verifying = _Verifying(world, issuer, guest)
    verifying.start()
    try:
        assert world.daemon.command("identity", "rotate").status == 0
        assert [one["state"] for one in _keys(world)] == ["signing", "next"]
        until(lambda: len(_published(world, issuer)) == 2, what="both keys")
        _make_due(world)
        until(lambda: _keys(world)[0]["id"] != first["id"], within_s=20, what="the other key")
        until(
            lambda: _published(world, issuer)[0]["kid"] == _keys(world)[0]["id"],
            what="the signing key first",
        )
        seen = verifying.good
        until(lambda: verifying.good >= seen + 5, what="tokens of the other key")
        _make_due(world)
        until(lambda: len(_keys(world)) == 1, within_s=20, what="the old key's end")
        until(lambda: len(_published(world, issuer)) == 1, what="one key")
    finally:
        verifying.ended.set()
        verifying.join()
    assert verifying.refused == []
    assert verifying.good > 10


def test_after_a_theft_no_key_and_no_token_of_before_is_left(
    world: World, guest: Guest, shared: tuple[World, Issuer]
) -> None:
    issuer = shared[1]
    before, token = _keys(world), wait_token(guest)
    done = world.daemon.command("identity", "rotate", "--compromised")
    assert (done.status, "OpenBao" in done.out) == (0, True), done
    after = _keys(world)
    assert not {one["id"] for one in before} & {one["id"] for one in after}
    until(lambda: [one["kid"] for one in _published(world, issuer)] == [after[0]["id"]], what="it")
    new = wait_token(guest)
    assert (_is_good(new, _published(world, issuer)), new != token) == (True, True)
    files = {path.stem for path in (world.daemon.state / "identity/keys").glob("*.pem")}
    assert files == {after[0]["id"]}


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
    assert shown == _keys(world)[0]["sha1"]
