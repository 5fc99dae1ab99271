"""Tokens that are signed with ES256, at genuine verifiers."""

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import jwt
import pytest

from support.daemon import instance
from support.guest import Guest, take_token, with_token
from support.identity.keystone import AUDIENCE, open_keystone, run_openstack
from support.identity.openbao import Refused, open_openbao
from support.identity.recipes import SERVICE, guarding_haproxy, run_in
from support.identity.requests import identity_settings, wait_token
from support.identity.rotation import keys_of, published
from support.identity.signing import Issuer
from support.identity.verifiers import verify
from support.lab import ip, until
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "0123456789abcdef0123456789abcdef"
_OTHER: Final = "22222222222222222222222222222222"
_SUBJECT: Final = f"spiffe://cloud.example/project/{_PROJECT}/instance/blue-5"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Issuer]]:
    section, issuer = identity_settings(tmp_path_factory.mktemp("issuer"))
    section["algorithm"] = "ES256"
    policy = {"host": {"audiences": ["vault", "internal", AUDIENCE]}}
    with open_world({"identity": section, "policy": policy}) as world:
        ip("-n", world.lab.host, "address", "add", f"{SERVICE}/24", "dev", "blue")
        yield world, issuer


@pytest.fixture(scope="module")
def shared_world(shared: tuple[World, Issuer]) -> World:
    return shared[0]


def _have(world: World, project: str) -> Guest:
    record = instance("blue-5", "blue", fields={"project": project})
    assert world.daemon.put(instances=[record])["applied"]
    guest = world.guests["blue"]
    wait_token(guest, project_id=project)
    return guest


@pytest.fixture
def guest(world: World) -> Guest:
    return _have(world, _PROJECT)


def _forge(token: str, place: int) -> str:
    """Return the token with another character in its signature."""
    content, _, signature = token.rpartition(".")
    other = "A" if signature[place] != "A" else "B"
    return f"{content}.{signature[:place]}{other}{signature[place + 1 :]}"


def _make(algorithm: str, token: str, public: Path) -> str:
    """Return the token in another algorithm, with the public key as its secret (CVE-2016-10555)."""
    header = urlsafe_b64encode(f'{{"alg":"{algorithm}","typ":"JWT"}}'.encode()).decode().rstrip("=")
    content = f"{header}.{token.split('.')[1]}"
    digest = hmac.digest(public.read_bytes(), content.encode(), "sha256")
    signature = "" if algorithm == "none" else urlsafe_b64encode(digest).decode().rstrip("=")
    return f"{content}.{signature}"


def test_libraries_take_a_token_by_the_published_key_and_no_forged_one(
    world: World, guest: Guest, shared: tuple[World, Issuer]
) -> None:
    issuer, token = shared[1], wait_token(guest)
    (key,) = published(world, issuer)
    assert (key["kty"], key["crv"], key["alg"]) == ("EC", "P-256", "ES256")
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "typ": "JWT", "kid": key["kid"]}
    assert keys_of(world)[0]["algorithm"] == "ES256"
    # RFC 7518 section 3.4: two numbers of 32 bytes, and no DER.
    assert len(urlsafe_b64decode(token.rpartition(".")[2] + "==")) == 64
    public = jwt.PyJWK(key).key
    assert jwt.decode(token, public, ["ES256"], audience="vault")["sub"] == _SUBJECT
    found = verify(token, audience="vault", issuer=issuer, namespace=world.lab.host)
    assert found == dict.fromkeys(found, _SUBJECT)
    for place in (0, 50):
        forged = _forge(token, place)
        with pytest.raises(jwt.InvalidSignatureError):
            jwt.decode(forged, public, ["ES256"], audience="vault")
        found = verify(forged, audience="vault", issuer=issuer, namespace=world.lab.host)
        assert _SUBJECT not in found.values()


def test_haproxy_guards_a_service_as_printed(
    world: World, guest: Guest, shared: tuple[World, Issuer], tmp_path: Path
) -> None:
    with guarding_haproxy(world, shared[1], tmp_path) as script:
        until(lambda: run_in(guest.namespace, script).stdout == "200", what="the service")
        forged = script.replace('"$token" |', '"${token%??????}AAAAAA" |')
        assert run_in(guest.namespace, forged).stdout == "401"
        foreign = script.replace("audience: internal", "audience: vault")
        assert run_in(guest.namespace, foreign).stdout == "401"
        # The algorithm comes from the token, so what needs no private key must be refused.
        for algorithm in ("none", "HS256"):
            made = _make(algorithm, wait_token(guest, "internal"), tmp_path / "issuer-1.pem")
            other = script.replace('"$token" |', f"{made} |")
            assert run_in(guest.namespace, other).stdout == "401"
        _have(world, _OTHER)
        assert run_in(guest.namespace, script).stdout == "403"


def test_openbao_gives_a_guest_the_secret_of_its_project_and_takes_no_forged_token(
    world: World, guest: Guest, shared: tuple[World, Issuer], tmp_path: Path
) -> None:
    with open_openbao(world.lab.host, tmp_path) as bao:
        bao.trust(shared[1])
        bao.admit("vm", audience="vault", projects=[_PROJECT])
        bao.write(f"secret/data/{_PROJECT}/db", data={"password": "of the project"})
        token = wait_token(guest)
        login = bao.login("vm", token)
        secret = bao.read(f"secret/data/{_PROJECT}/db", token=login.token)
        assert secret["data"]["data"] == {"password": "of the project"}
        with pytest.raises(Refused, match="signature"):
            bao.login("vm", _forge(token, 50))
        with pytest.raises(Refused, match="project_id"):
            bao.login("vm", wait_token(_have(world, _OTHER)))


def test_there_is_no_document_of_aws_without_an_rsa_key(world: World, guest: Guest) -> None:
    fields = {"project": _PROJECT, "policy": {"identity_document": True}, "created_at": 1}
    record = instance("blue-5", "blue", fields={**fields, "availability_zone": "eu-west-1a"})
    assert world.daemon.put(instances=[record])["applied"]
    wait_token(guest, availability_zone="eu-west-1a")
    for name in ("document", "rsa2048"):
        headers = with_token(take_token(guest))
        reply = guest.ask(f"/latest/dynamic/instance-identity/{name}", headers=headers)
        assert reply.status == 404


@pytest.mark.slow
def test_openstackclient_gets_keystone_s_token_for_its_own_project_alone(
    world: World, shared: tuple[World, Issuer], tmp_path: Path
) -> None:
    clouds = tmp_path / "clouds.yaml"
    with open_keystone(world.lab.host, SERVICE, shared[1]) as keystone:
        own, other = (keystone.add_project(name) for name in ("own", "other"))
        guest = _have(world, own)
        url = "http://169.254.169.254/openstack/latest/oauth2/token"

        def issue(project: str) -> str:
            keystone.write_clouds(clouds, project=project, token_url=url)
            done = run_openstack(guest.namespace, clouds, "token", "issue", "-c", "project_id")
            return done.stdout + done.stderr

        assert own in issue(own)
        assert "401" in issue(other)
