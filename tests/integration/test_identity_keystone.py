"""Stock clients of a genuine Keystone in guests that have no secret."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import instance
from support.guest import IPV4, Guest, Reply
from support.hops import Wire
from support.identity.keystone import AUDIENCE, Keystone, open_keystone, run_openstack
from support.identity.requests import claims_of, identity_settings
from support.lab import ip, until
from support.world import World, open_world

pytestmark = pytest.mark.root

_PATH: Final = "/openstack/latest/oauth2/token"
_TOKEN_URL: Final = f"http://169.254.169.254{_PATH}"
_KEYSTONE: Final = "10.0.0.250"
_FORM: Final = "Content-Type: application/x-www-form-urlencoded"
_BODY: Final = b"grant_type=client_credentials&client_id=imds"
_PROJECT: Final = "33333333333333333333333333333333"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Any]]:
    section, issuer = identity_settings(tmp_path_factory.mktemp("issuer"))
    policy = {"host": {"audiences": [AUDIENCE, "vault"], "openstack_tokens": "required"}}
    audit = {"mode": "all", "destination": "{directory}/audit.log"}
    with open_world({"identity": section, "policy": policy, "audit": audit}) as world:
        yield world, issuer


@pytest.fixture(scope="module")
def shared_world(shared: tuple[World, Any]) -> World:
    return shared[0]


def _have(world: World, network: str, project: str, **fields: object) -> Guest:
    record = instance(f"{network}-5", network, fields={"project": project, **fields})
    assert world.daemon.put(instances=[record])["applied"]
    return world.guests[network]


def _ask(
    guest: Guest,
    *headers: str,
    body: bytes = _BODY,
    method: str = "POST",
    form: str = _FORM,
    host: str = IPV4,
) -> Reply:
    return guest.ask(_PATH, method=method, host=host, headers=(form, *headers), body=body)


def _wait(guest: Guest) -> dict[str, Any]:
    until(lambda: _ask(guest).status == 200, what="an access token")
    found: dict[str, Any] = json.loads(_ask(guest).text)
    return found


def test_a_guest_gets_an_access_token_by_its_place_alone(world: World) -> None:
    guest = _have(world, "red", _PROJECT)
    shape = _wait(guest)
    claims = claims_of(shape["access_token"])
    assert (claims["aud"], claims["project_id"]) == (AUDIENCE, _PROJECT)
    assert shape["token_type"] == "Bearer"
    assert 0 < shape["expires_in"] <= 600
    # Stock clients with a secret name themselves by HTTP's Basic authentication.
    basic = _ask(guest, "Authorization: Basic aW1kczpub25l", body=b"grant_type=client_credentials")
    assert json.loads(basic.text)["access_token"] == shape["access_token"]
    assert basic.headers["cache-control"] == "no-store"


def test_what_stock_clients_do_not_send_gets_no_access_token(world: World) -> None:
    guest = _have(world, "red", _PROJECT)
    _wait(guest)
    assert {
        "a read": guest.ask(_PATH).status,
        "a put": _ask(guest, method="PUT").status,
        "a browser": _ask(guest, "Origin: http://evil.example").status,
        "a page": _ask(guest, "Referer: http://evil.example/").status,
        "a proxy": _ask(guest, "X-Forwarded-For: 10.0.0.9").status,
        "a proxy of RFC 7239": _ask(guest, "Forwarded: for=10.0.0.9").status,
        "another host": _ask(guest, host="rebound.example").status,
        "plain text": _ask(guest, form="Content-Type: text/plain").status,
        "json": _ask(guest, form="Content-Type: application/json").status,
        "no client": _ask(guest, body=b"grant_type=client_credentials").status,
        "another grant": _ask(guest, body=b"grant_type=password&client_id=imds").status,
        "nothing": _ask(guest, body=b"").status,
    } == {
        "a read": 405,
        "a put": 405,
        "a browser": 403,
        "a page": 403,
        "a proxy": 403,
        "a proxy of RFC 7239": 403,
        "another host": 403,
        "plain text": 415,
        "json": 415,
        "no client": 400,
        "another grant": 400,
        "nothing": 400,
    }


def test_a_refusal_has_the_code_and_the_challenge_of_oauth(world: World) -> None:
    """RFC 6749 section 5.2: a client that used an `Authorization` header gets 401, and learns the scheme."""
    guest = _have(world, "red", _PROJECT)
    _wait(guest)
    grant = b"grant_type=client_credentials"

    def answer(*headers: str, body: bytes = grant) -> tuple[int, str, str | None]:
        reply = _ask(guest, *headers, body=body)
        return reply.status, json.loads(reply.text)["error"], reply.headers.get("www-authenticate")

    challenge = 'Basic realm="imdsproxy"'
    # In the first, no name is in front of the colon; the second is no base64.
    for credential in ("Basic OnNlY3JldA==", "Basic %%%", "Bearer abc", "Basic"):
        found = answer(f"Authorization: {credential}")
        assert found == (401, "invalid_client", challenge), credential
    # A name in the form does not heal it: a client may use one way only.
    assert answer("Authorization: Bearer abc", body=_BODY)[0] == 401
    assert answer() == (400, "invalid_client", None)
    assert answer(body=b"grant_type=password&client_id=imds") == (
        400,
        "unsupported_grant_type",
        None,
    )
    assert answer(body=b"client_id=imds") == (400, "invalid_request", None)
    assert answer(body=grant + b"&" + _BODY) == (400, "invalid_request", None)
    # Our own header, sent by a guest, names no client.
    assert answer("X-imdsproxy-client: named") == (400, "invalid_client", None)


def test_an_access_token_goes_no_farther_than_the_policy_s_hop_limit(world: World) -> None:
    guest = _have(world, "red", _PROJECT, policy={"hop_limit": 1})
    token = _wait(guest)["access_token"].encode()

    def is_limited() -> bool:
        with Wire(guest) as wire:
            return _ask(guest).status == 200 and wire.seen(token[-64:]).limit == 1

    # The limit of the record comes into force, and tokens are withheld until the kernel has it.
    until(is_limited, what="an answer with one hop")
    with Wire(guest) as wire:
        assert guest.ask("/latest/meta-data/hostname").status == 200
        assert wire.seen(b"200 OK").limit > 1
    guest = _have(world, "red", _PROJECT)
    until(lambda: not is_limited(), what="an answer without a limit")


def test_path_rules_and_the_endpoint_s_word_cover_access_tokens(world: World) -> None:
    guest = _have(world, "red", _PROJECT, policy={"paths": {"/openstack/latest/oauth2": "deny"}})
    until(lambda: _ask(guest).status == 403, what="the path rule")
    assert guest.ask("/openstack/latest/meta_data.json").status != 403
    _wait(_have(world, "red", _PROJECT))
    guest = _have(world, "red", _PROJECT, policy={"endpoint": False})
    until(lambda: _ask(guest).status == 403, what="the endpoint's end")
    assert guest.ask("/openstack/latest/meta_data.json").status == 403
    _wait(_have(world, "red", _PROJECT))


def test_an_instance_gets_no_more_answers_than_its_limit(world: World) -> None:
    guest = _have(world, "red", _PROJECT)
    _wait(guest)
    _have(world, "red", _PROJECT, policy={"requests_per_s": 1, "burst": 30})
    until(lambda: _ask(guest).is_limited, what="the limit")
    other = _have(world, "blue", _PROJECT)
    assert _wait(other)["access_token"]


def test_the_audit_log_has_an_access_token_s_id_and_never_the_token(world: World) -> None:
    guest = _have(world, "red", _PROJECT)
    token = _wait(guest)["access_token"]
    token_id = claims_of(token)["jti"]
    log = world.daemon.directory / "audit.log"
    until(lambda: token_id in log.read_text(), what="the line of the token")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    line = next(one for one in lines if one.get("jti") == token_id)
    assert (line["path"], line["status"], line["instance"]) == (_PATH, 200, "red-5")
    assert token not in log.read_text()


def test_a_policy_without_the_audience_or_without_any_gives_no_access_token(world: World) -> None:
    guest = _have(world, "red", _PROJECT, policy={"audiences": ["vault"]})
    until(lambda: _ask(guest).status == 400, what="the refusal")
    assert json.loads(_ask(guest).text) == {"error": "unauthorized_client"}
    guest = _have(world, "red", _PROJECT, policy={"audiences": []})
    until(lambda: _ask(guest).status == 404, what="no such path")
    assert "oauth2" not in guest.ask("/openstack/latest/").text


@dataclass(frozen=True, slots=True)
class _Cloud:
    """Keystone with two projects, whose guests are at the same address in two networks."""

    keystone: Keystone
    own: str
    other: str


@pytest.fixture(scope="module")
def cloud(shared: tuple[World, Any]) -> Iterator[_Cloud]:
    world, issuer = shared
    ip("-n", world.lab.host, "address", "add", f"{_KEYSTONE}/24", "dev", "blue")
    with open_keystone(world.lab.host, _KEYSTONE, issuer) as keystone:
        yield _Cloud(keystone, *(keystone.add_project(name) for name in ("own", "other")))


def test_openstackclient_gets_a_token_of_its_own_project_without_a_secret_in_the_guest(
    world: World, cloud: _Cloud, tmp_path: Path
) -> None:
    guest = _have(world, "blue", cloud.own)
    _wait(guest)
    clouds = tmp_path / "clouds.yaml"

    def issue(project: str) -> str:
        """Return the project of Keystone's token, or the reason why there is none."""
        cloud.keystone.write_clouds(clouds, project=project, token_url=_TOKEN_URL)
        done = run_openstack(guest.namespace, clouds, "token", "issue", "-f", "json")
        return str(json.loads(done.stdout)["project_id"]) if not done.returncode else done.stderr

    assert issue(cloud.own) == cloud.own
    assert "401" in issue(cloud.other)
