"""Operators' view of an instance's identity tokens: what it may request, and the last answer for each audience."""

import itertools
import os
import signal
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from imdsproxy.model.wire import OPENSTACK_TOKEN_PATH
from support.daemon import instance
from support.identity.requests import claims_of, identity_settings, request_token, wait_token
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_POLICY: Final = {"projects": {_PROJECT: {"audiences": ["keystone", "vault"]}}}
_created: Final = itertools.count(1_790_000_000)
_NONCE: Final = "n0nce-of-the-guest"
_FORM: Final = "Content-Type: application/x-www-form-urlencoded"
_BODY: Final = b"grant_type=client_credentials&client_id=imds"


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    section, _ = identity_settings(tmp_path_factory.mktemp("issuer"))
    settings = {"resolver": {"hold_s": 1.0}, "identity": section, "policy": _POLICY}
    with open_world(settings) as world:
        yield world


def _have(world: World, **fields: object) -> int:
    """Have the guest of red, and return its time of creation, which no earlier guest has."""
    created = next(_created)
    record = instance("red-5", "red", fields={"project": _PROJECT, "created_at": created, **fields})
    assert world.daemon.put(instances=[record])["applied"]
    return created


def _use(world: World, name: str = "red-5") -> Mapping[str, Any]:
    shape = world.daemon.admin.get(f"/v1/instances/{name}/identity")
    assert shape["enabled"]
    (use,) = shape["networks"]
    found: Mapping[str, Any] = use
    return found


def _audiences(world: World) -> dict[str, Mapping[str, Any]]:
    return {one["audience"]: one for one in _use(world)["audiences"]}


def test_an_audience_has_the_id_and_the_end_of_the_token_that_the_guest_got(world: World) -> None:
    created = _have(world)
    claims = claims_of(wait_token(world.red, instance_created=created))
    use = _audiences(world)["vault"]
    assert use["allowed"]
    assert (use["last"]["token_id"], use["last"]["expires_at"]) == (claims["jti"], claims["exp"])
    assert use["last"]["outcome"] == "given"
    assert claims["iat"] <= use["last"]["at"] < claims["exp"]
    assert use["last"]["ready_until"] == claims["exp"]


def test_a_token_with_a_nonce_is_shown_beside_the_one_that_is_ready(world: World) -> None:
    created = _have(world)
    held = claims_of(wait_token(world.red, instance_created=created))
    reply = request_token(world.red, more=(f"X-imdsproxy-nonce: {_NONCE}",))
    last = _audiences(world)["vault"]["last"]
    assert last["token_id"] == claims_of(reply.text)["jti"] != held["jti"]
    assert (last["ready_id"], last["ready_until"]) == (held["jti"], held["exp"])


def test_clients_of_keystone_are_shown_with_their_audience(world: World) -> None:
    created = _have(world)
    wait_token(world.red, instance_created=created)
    before = _audiences(world)["keystone"]
    assert before["keystone"]
    until(
        lambda: _audiences(world)["keystone"]["reason"].startswith("the guest has not requested"),
        what="a token fetched ahead",
    )
    reply = world.red.ask(OPENSTACK_TOKEN_PATH, method="POST", headers=(_FORM,), body=_BODY)
    assert reply.status == 200
    assert _audiences(world)["keystone"]["last"]["outcome"] == "given"


def test_an_audience_that_the_policy_does_not_allow_is_shown_as_refused(world: World) -> None:
    created = _have(world, policy={"audiences": ["vault"]})
    wait_token(world.red, instance_created=created)
    for audience in ("mail", "https://other.example/path"):
        assert request_token(world.red, audience).status == 403
    reply = world.red.ask(OPENSTACK_TOKEN_PATH, method="POST", headers=(_FORM,), body=_BODY)
    assert reply.status == 400
    found = _audiences(world)
    assert set(found) == {"vault", "keystone"}
    assert not found["keystone"]["allowed"]
    assert found["keystone"]["reason"] == "the policy does not allow the audience"
    assert request_token(world.red, "mail").status == 403
    assert set(_audiences(world)) == {"vault", "keystone", "mail"}


@pytest.mark.parametrize(
    ("policy", "refused", "origin"),
    [
        ({}, {}, "project"),
        (
            {"audiences": []},
            {"PUT": "the policy allows no audience", "POST": "the policy allows no audience"},
            "instance",
        ),
        (
            {"audiences": ["vault"]},
            {"POST": "the policy does not allow the audience keystone"},
            "instance",
        ),
        ({"audiences": ["*"]}, {}, "instance"),
    ],
)
def test_requests_are_allowed_or_refused_with_the_policy_s_reason(
    world: World, policy: Mapping[str, object], refused: Mapping[str, str], origin: str
) -> None:
    _have(world, policy=policy)
    use = _use(world)
    by_method = {one["method"]: one for one in use["requests"]}
    assert by_method["GET"]["why"] == "the policy allows no signed document"
    why = {name: one["why"] for name, one in by_method.items() if name != "GET"}
    assert why == {"PUT": "", "POST": "", **refused}
    assert use["origin"] == origin
    assert use["addresses"] == ["10.0.0.5", "2001:db8::5"]
    names = [one["audience"] for one in use["audiences"] if one["allowed"]]
    wanted = {"project": ["keystone", "vault"], "[]": [], "['vault']": ["vault"]}
    assert names == wanted.get(
        "project" if not policy else str(policy["audiences"]), ["keystone", "*"]
    )


def test_a_signed_document_is_shown_as_allowed(world: World) -> None:
    _have(world, policy={"audiences": [], "identity_document": True})
    allowed = {one["path"]: one["allowed"] for one in _use(world)["requests"]}
    assert allowed.pop("/latest/dynamic/instance-identity/document")
    assert not any(allowed.values())


def test_answers_outlast_a_change_of_the_policy_and_not_the_instance(world: World) -> None:
    created = _have(world)
    given = claims_of(wait_token(world.red, instance_created=created))["jti"]
    _have(world, created_at=created, policy={"audiences": ["mail"]})
    use = _audiences(world)["vault"]
    assert (use["allowed"], use["last"]["token_id"]) == (False, given)
    world.daemon.remove_instance("red-5")
    _have(world, created_at=created)
    found = _audiences(world)["vault"]["last"]
    assert found is None or found["token_id"] is None


def test_no_token_and_no_nonce_is_in_an_answer_a_command_a_bundle_or_the_log(
    world: World,
) -> None:
    created = _have(world)
    nonce = (f"X-imdsproxy-nonce: {_NONCE}",)
    held = wait_token(world.red, instance_created=created)
    texts = [held, request_token(world.red, more=nonce).text]
    secrets = [part for one in texts for part in (one, *one.split(".")[1:])]
    path = world.daemon.directory / "support.tar.gz"
    ran = [
        world.daemon.command("identity", "tokens", "red-5"),
        world.daemon.command("identity", "tokens", "red-5", "--json"),
        world.daemon.command("bundle", "--output", str(path)),
    ]
    assert [one.status for one in ran] == [0, 0, 0]
    with tarfile.open(path) as archive:
        files = [archive.extractfile(one) for one in archive]
        bundled = "".join(one.read().decode() for one in files if one is not None)
    log = "".join(one.read_text() for one in world.daemon.runtime.glob("*.log"))
    shown = "".join(one.out + one.err for one in ran)
    assert claims_of(texts[1])["jti"] in shown
    for secret in (*secrets, _NONCE):
        assert secret not in shown + bundled + log + world.daemon.log.read_text()


def test_a_command_prints_what_an_instance_may_request(world: World) -> None:
    created = _have(world)
    claims = claims_of(wait_token(world.red, instance_created=created))
    shown = world.daemon.command("identity", "tokens", "red-5").out
    assert "network red: 10.0.0.5, 2001:db8::5" in shown
    words = " ".join(shown.split())
    assert "PUT /latest/api/identity allowed" in words
    assert "document not allowed: the policy allows no signed document" in words
    assert claims["jti"] in shown


def test_an_unknown_instance_is_refused(world: World) -> None:
    assert world.daemon.command("identity", "tokens", "nobody").status == 66


def test_a_process_that_does_not_answer_is_reported_and_the_policy_is_shown(world: World) -> None:
    created = _have(world)
    wait_token(world.red, instance_created=created)
    pid = int((world.daemon.runtime / "identity.pid").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        use = _use(world)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert use["problem"].startswith("the process that answers guests does not answer")
    assert [one["allowed"] for one in use["audiences"]] == [True, True]
