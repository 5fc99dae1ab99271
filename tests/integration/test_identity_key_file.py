"""A signing key of the operator's own, in a file, while guests and verifiers go on."""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from imdsproxy.issuer.keys import Algorithm, SigningKey, make_key
from support.daemon import instance
from support.guest import Guest
from support.identity.requests import identity_settings, request_token, wait_token
from support.identity.rotation import (
    Verifying,
    is_good,
    keys_of,
    make_due,
    published,
    restart_signer,
    signer_pid,
)
from support.identity.signing import Issuer
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_NEW: Final = ("X-imdsproxy-nonce: new",)


def _key(algorithm: Algorithm = "RS256") -> SigningKey:
    return make_key(algorithm, "https://elsewhere.example", datetime.now(UTC))


def _pem(key: SigningKey) -> str:
    """Return the private key alone, as `openssl genpkey` makes it."""
    return key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _write(path: Path, *keys: SigningKey) -> None:
    path.touch(0o600)
    path.write_text("".join(map(_pem, keys)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("issuer")


@pytest.fixture(scope="module")
def first() -> SigningKey:
    return _key()


@pytest.fixture(scope="module")
def shared(place: Path, first: SigningKey) -> Iterator[tuple[World, Issuer]]:
    section, issuer = identity_settings(place)
    section["key_file"] = str(place / "signing.pem")
    _write(place / "signing.pem", first)
    policy = {"host": {"audiences": ["vault"]}}
    with open_world({"identity": section, "policy": policy}) as world:
        yield world, issuer


@pytest.fixture(scope="module")
def shared_world(shared: tuple[World, Issuer]) -> World:
    return shared[0]


@pytest.fixture
def file(world: World, place: Path, first: SigningKey) -> Iterator[Path]:
    """The key's file; after the test it has the first key again."""
    yield place / "signing.pem"
    with contextlib.suppress(FileNotFoundError):
        (place / "signing.pem").unlink()
    _write(place / "signing.pem", first)
    restart_signer(world)


@pytest.fixture
def guest(world: World, first: SigningKey, shared: tuple[World, Issuer]) -> Guest:
    """A guest whose tokens verifiers accept: the keys of the test before may still be published."""
    record = instance("red-5", "red", fields={"project": _PROJECT})
    assert world.daemon.put(instances=[record])["applied"]
    until(
        lambda: [one["kid"] for one in published(world, shared[1])] == [first.id],
        within_s=20,
        what="the first key alone",
    )
    wait_token(world.red)
    return world.red


def _signs(guest: Guest, key: SigningKey) -> bool:
    reply = request_token(guest, more=_NEW)
    return reply.status == 200 and jwt.get_unverified_header(reply.text)["kid"] == key.id


def test_tokens_are_signed_by_the_operator_s_key_and_no_other_is_made(
    world: World, guest: Guest, first: SigningKey, shared: tuple[World, Issuer]
) -> None:
    assert [one["id"] for one in keys_of(world)] == [first.id]
    assert _signs(guest, first)
    assert is_good(wait_token(guest), published(world, shared[1]))
    assert not list((world.daemon.state / "identity/keys").glob("*.pem"))
    sha1 = keys_of(world)[0]["sha1"]
    restart_signer(world)
    assert keys_of(world)[0]["sha1"] == sha1


def test_a_new_key_in_front_of_the_old_one_refuses_no_token(
    world: World, guest: Guest, file: Path, first: SigningKey, shared: tuple[World, Issuer]
) -> None:
    second, verifying = _key("ES256"), Verifying(world, shared[1], guest)
    verifying.start()
    try:
        _write(file, second, first)
        restart_signer(world)
        assert [(one["id"], one["state"]) for one in keys_of(world)] == [
            (first.id, "signing"),
            (second.id, "next"),
        ]
        assert _signs(guest, first)
        until(lambda: len(published(world, shared[1])) == 2, what="both keys")
        make_due(world)
        until(lambda: _signs(guest, second), within_s=20, what="the second key")
        make_due(world)
        until(lambda: len(keys_of(world)) == 1, within_s=20, what="the first key's end")
        _write(file, second)
        restart_signer(world)
        seen = verifying.good
        until(lambda: verifying.good >= seen + 5, what="tokens of the second key")
    finally:
        verifying.ended.set()
        verifying.join()
    assert verifying.refused == []


def test_a_file_with_only_a_new_key_ends_all_tokens_of_the_stolen_one(
    world: World, guest: Guest, file: Path, shared: tuple[World, Issuer]
) -> None:
    stolen, other = wait_token(guest), _key()
    _write(file, other)
    restart_signer(world)
    until(
        lambda: [one["kid"] for one in published(world, shared[1])] == [other.id],
        within_s=20,
        what="the other key alone",
    )
    until(lambda: wait_token(guest) != stolen, within_s=20, what="another token")
    assert is_good(wait_token(guest), published(world, shared[1]))
    assert not is_good(stolen, published(world, shared[1]))


@pytest.mark.parametrize("words", [(), ("--compromised",)])
def test_rotate_says_that_the_file_is_the_operator_s_and_what_to_do(
    world: World, guest: Guest, first: SigningKey, file: Path, words: tuple[str, ...]
) -> None:
    done = world.daemon.command("identity", "rotate", *words)
    assert done.status != 0
    assert f"{'only a new key' if words else 'a new key'} in {file}" in done.err
    assert "systemctl restart imdsproxy-signer" in done.err
    assert ("OpenBao" in done.out) is bool(words)
    assert [one["id"] for one in keys_of(world)] == [first.id]
    assert _signs(guest, first)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (0o640, "has mode 0640: its group can use it"),
        (0o600, "holds no private key in PEM"),
    ],
)
def test_a_file_that_is_open_or_no_key_is_refused_and_named_until_it_is_mended(
    world: World, guest: Guest, file: Path, mode: int, reason: str
) -> None:
    before = file.read_text()
    file.write_text("no key\n")
    file.chmod(mode)
    os.kill(signer_pid(world), signal.SIGTERM)
    problems: list[dict[str, str]] = []

    def is_named() -> bool:
        found = world.daemon.status()["problems"]
        problems[:] = [one for one in found if one["field"] == "identity.key_file"]
        return any(reason in one["reason"] and one["hint"] for one in problems)

    until(is_named, within_s=25, what=reason)
    status = world.daemon.status()
    assert not status["readiness"]["ready"]
    assert "PRIVATE" not in str(status)
    checked = world.daemon.command("check")
    assert checked.status != 0
    assert f"identity.key_file: {problems[0]['reason']}" in checked.out
    assert guest.ask("/latest/meta-data/hostname").status == 200
    file.write_text(before)
    file.chmod(0o600)
    until(lambda: world.daemon.status()["readiness"]["ready"], within_s=30, what="readiness")
    until(lambda: request_token(guest, more=_NEW).status == 200, what="a token")
