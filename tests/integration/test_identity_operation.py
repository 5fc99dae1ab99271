"""What operators see of identity tokens, beside what guests are answered."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.model.identity_paths import METHODS
from imdsproxy.model.wire import DOCUMENT_PATHS, IDENTITY_PATH, OPENSTACK_TOKEN_PATH
from support.daemon import instance
from support.guest import Guest, Reply, take_token, with_token
from support.identity.requests import identity_settings
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_FORM: Final = "Content-Type: application/x-www-form-urlencoded"
_BODY: Final = b"grant_type=client_credentials&client_id=imds"


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    section, _ = identity_settings(tmp_path_factory.mktemp("issuer"))
    with open_world({"resolver": {"hold_s": 1.0}, "identity": section}) as world:
        yield world


def _ask(guest: Guest, path: str, *headers: str, audience: str = "keystone") -> Reply:
    if path == IDENTITY_PATH:
        headers = (*headers, f"X-imdsproxy-audience: {audience}")
    body = b""
    if path == OPENSTACK_TOKEN_PATH:
        headers, body = (*headers, _FORM), _BODY
    return guest.ask(path, method=METHODS[path], headers=headers, body=body)


def _explain(world: World, path: str) -> Mapping[str, Any]:
    query = {"network": "red", "address": "10.0.0.5", "path": path}
    shape: Mapping[str, Any] = world.daemon.admin.get("/v1/explain", query)
    decision: Mapping[str, Any] = shape["decision"]
    return decision


_AUDIENCES: Final = {"audiences": ["keystone", "vault"]}
_PATHS: Final = (IDENTITY_PATH, OPENSTACK_TOKEN_PATH, DOCUMENT_PATHS[0])
_TABLE: Final[Mapping[str, tuple[Mapping[str, object], tuple[str, ...]]]] = {
    # Policy, and `STATUS-WITHOUT STATUS-WITH` a session token for each of `_PATHS`.
    "nothing allowed": ({}, ("404 404", "404 404", "404 404")),
    "audiences": (_AUDIENCES, ("401 200", "200 200", "404 404")),
    "another audience": ({"audiences": ["vault"]}, ("401 200", "400 400", "404 404")),
    "a document alone": ({"identity_document": True}, ("401 404", "400 400", "401 200")),
    "tokens off": ({**_AUDIENCES, "tokens": "off"}, ("401 200", "200 200", "404 404")),
    "tokens required": (
        {**_AUDIENCES, "tokens": "required", "openstack_tokens": "required"},
        ("401 200", "200 200", "401 404"),
    ),
    "a path denied": (
        {**_AUDIENCES, "identity_document": True, "paths": {"/latest": "deny"}},
        ("403 403", "200 200", "403 403"),
    ),
    "a path that needs a token": (
        {**_AUDIENCES, "paths": {"/openstack": "required"}},
        ("401 200", "401 200", "404 404"),
    ),
    "endpoint off": ({**_AUDIENCES, "endpoint": False}, ("403 403", "403 403", "403 403")),
    "few hops": ({**_AUDIENCES, "hop_limit": 2}, ("401 200", "200 200", "404 404")),
}


@pytest.mark.parametrize("name", _TABLE)
def test_what_explain_says_of_a_path_of_identity_is_what_a_guest_is_answered(
    world: World, name: str
) -> None:
    policy, expected = _TABLE[name]
    # The boot is over, so that a rule for OpenStack's tree counts.
    world.daemon.put(instances=[instance("red-5", "red", fields={"created_at": 1})])
    world.have_policy({"instances": {"red-5": policy}})
    audience = "vault" if name == "another audience" else "keystone"

    def decided() -> tuple[str, ...]:
        shapes = [_explain(world, path) for path in _PATHS]
        assert [one["method"] for one in shapes] == ["PUT", "POST", "GET"]
        pairs = [(one["without_token"]["status"], one["with_token"]["status"]) for one in shapes]
        return tuple(f"{without or 200} {given or 200}" for without, given in pairs)

    def answered() -> tuple[str, ...]:
        session = () if name == "endpoint off" else _session(world.red)
        asked = [
            [_ask(world.red, path, *headers, audience=audience).status for headers in ((), session)]
            for path in _PATHS
        ]
        return tuple(f"{without} {given}" for without, given in asked)

    until(lambda: answered() == expected, within_s=10, what=f"{expected} for the guest")
    assert decided() == expected


def _session(guest: Guest) -> tuple[str, ...]:
    reply = guest.ask(
        "/latest/api/token", method="PUT", headers=("X-aws-ec2-metadata-token-ttl-seconds: 60",)
    )
    return with_token(reply.text) if reply.status == 200 else ()


def test_explain_names_the_guards_of_identity_and_guests_meet_each(world: World) -> None:
    policy = {**_AUDIENCES, "identity_document": True, "hop_limit": 2}
    world.have_policy({"instances": {"red-5": policy}})
    until(lambda: _ask(world.red, OPENSTACK_TOKEN_PATH).status == 200, what="an access token")
    relayed = "a request through a proxy or a browser, or with another Host, gets 403"
    guards = {path: set(_explain(world, path)["guards"]) for path in _PATHS}
    assert guards == {
        IDENTITY_PATH: {
            relayed,
            "audiences: keystone, vault; another gets 403",
            "the session token goes 2 hops far",
        },
        OPENSTACK_TOKEN_PATH: {
            relayed,
            "it takes client credentials in a form only: another content type gets 415",
            "the answer goes 2 hops far",
        },
        DOCUMENT_PATHS[0]: {relayed, "the session token goes 2 hops far"},
    }
    session = with_token(take_token(world.red))
    for path in _PATHS:
        assert _ask(world.red, path, *session, "X-Forwarded-For: 10.9.9.9").status == 403
    assert _ask(world.red, IDENTITY_PATH, *session, audience="other").status == 403
    assert world.red.ask(OPENSTACK_TOKEN_PATH, method="POST", body=_BODY).status == 415
    shown = world.daemon.command("explain", "red-5", "--path", IDENTITY_PATH).out
    assert f"to PUT {IDENTITY_PATH}:" in shown
    assert "without a token: 401, identity needs a session token" in " ".join(shown.split())
    assert "another gets 403" in " ".join(shown.split())


def test_the_signer_has_the_library_that_no_process_has_while_identity_is_off(
    world: World,
) -> None:
    signer = int((world.daemon.runtime / "signer.pid").read_text().split()[0])
    assert "/cryptography/" in Path(f"/proc/{signer}/maps").read_text()
    assert "issuer" in world.daemon.processes()[signer]
