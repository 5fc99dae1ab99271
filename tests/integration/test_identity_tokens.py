"""Identity tokens of guests on a host alone, and genuine verifiers that take them."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
from base64 import b64decode
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import jwt
import pytest

from support.daemon import instance
from support.guest import Asker, Guest, Reply, take_token, with_token
from support.identity.openbao import OpenBao, Refused, open_openbao
from support.identity.requests import (
    claims_of,
    identity_settings,
    request_token,
    wait_token,
)
from support.identity.signing import Issuer
from support.identity.verifiers import verify
from support.lab import run, until, within
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_OTHER: Final = "22222222222222222222222222222222"
_TAGS: Final = {"role": "db", "name": "x"}
_created: Final = itertools.count(1_790_000_000)
_FORWARDED: Final = "X-Forwarded-For: 10.0.0.9"
_POLICY: Final = {
    "projects": {
        _PROJECT: {"audiences": ["keystone", "vault"], "identity_tags": ["role"]},
        _OTHER: {"audiences": ["vault"]},
    }
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Issuer]]:
    section, issuer = identity_settings(tmp_path_factory.mktemp("issuer"))
    audit = {"mode": "all", "destination": "{directory}/audit.log"}
    settings = {
        "resolver": {"hold_s": 1.0},
        "identity": section,
        "policy": _POLICY,
        "audit": audit,
    }
    with open_world(settings) as world:
        yield world, issuer


@pytest.fixture(scope="module")
def shared_world(shared: tuple[World, Issuer]) -> World:
    return shared[0]


@pytest.fixture(scope="module")
def issuer(shared: tuple[World, Issuer]) -> Issuer:
    return shared[1]


def _have(world: World, network: str, project: str, **fields: object) -> Guest:
    """Return the guest of a network, as an instance of a project."""
    record = instance(f"{network}-5", network, fields={"project": project, **fields})
    assert world.daemon.put(instances=[record])["applied"]
    return world.guests[network]


@pytest.fixture
def guest(world: World) -> Guest:
    """The guest of red, of `_PROJECT`; each test has another subject, of which no token is held."""
    return _have(world, "red", _PROJECT, created_at=next(_created), tags=_TAGS)


@pytest.fixture(scope="module")
def bao(
    shared: tuple[World, Issuer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenBao]:
    world, issuer = shared
    with open_openbao(world.lab.host, tmp_path_factory.mktemp("openbao")) as made:
        made.trust(issuer)
        made.admit("vm", audience="vault", projects=[_PROJECT, _OTHER])
        for project in (_PROJECT, _OTHER):
            made.write(f"secret/data/{project}/db", data={"password": f"of {project}"})
        yield made


def test_guests_with_one_address_get_their_own_project_s_secret_from_openbao_and_no_other(
    world: World, bao: OpenBao
) -> None:
    places = {_PROJECT: "red", _OTHER: "blue"}
    for project, other in ((_PROJECT, _OTHER), (_OTHER, _PROJECT)):
        guest = _have(world, places[project], project)
        login = bao.login("vm", wait_token(guest))
        assert login.metadata["instance_id"] == f"{places[project]}-5"
        secret = bao.read(f"secret/data/{project}/db", token=login.token)
        assert secret["data"]["data"] == {"password": f"of {project}"}
        with pytest.raises(Refused, match="permission denied"):
            bao.read(f"secret/data/{other}/db", token=login.token)
    with pytest.raises(Refused, match="audience"):
        bao.login("vm", wait_token(_have(world, "red", _PROJECT), "keystone"))


def test_every_library_takes_a_token_and_none_takes_it_at_another_audience(
    world: World, guest: Guest, issuer: Issuer
) -> None:
    token = wait_token(guest)
    subject = f"spiffe://cloud.example/project/{_PROJECT}/instance/red-5"
    place = world.lab.host
    good = verify(token, audience="vault", issuer=issuer, namespace=place)
    assert set(good.values()) == {subject}
    bad = verify(token, audience="keystone", issuer=issuer, namespace=place)
    assert subject not in bad.values()


def test_a_token_states_the_record_and_the_tags_that_the_policy_names(guest: Guest) -> None:
    begun = datetime.now(UTC).timestamp()
    token = wait_token(guest)
    claims = dict(claims_of(token))
    assert claims.pop("iat") == claims.pop("nbf") <= begun
    assert begun < claims.pop("exp") <= datetime.now(UTC).timestamp() + 600
    assert claims.pop("jti")
    assert claims == {
        "iss": "https://127.0.0.1:8443",
        "sub": f"spiffe://cloud.example/project/{_PROJECT}/instance/red-5",
        "aud": "vault",
        "instance_id": "red-5",
        "project_id": _PROJECT,
        "network_id": "red",
        "instance_created": next(_created) - 1,
        "placement": "local",
        "tags": {"role": "db"},
    }
    assert jwt.get_unverified_header(token).keys() == {"alg", "kid", "typ"}


def test_a_guest_gets_the_same_token_again_and_another_one_for_a_nonce(guest: Guest) -> None:
    first = wait_token(guest)
    again = request_token(guest)
    assert (again.text, again.headers["cache-control"]) == (first, "no-store")
    # In another form the same token, though HAProxy keeps only the plain form.
    assert json.loads(request_token(guest, query="?format=json").text)["token"] == first
    with_nonce = request_token(guest, more=("X-imdsproxy-nonce: abc123",)).text
    assert claims_of(with_nonce)["nonce"] == "abc123"
    assert request_token(guest).text == first


def test_each_form_holds_the_token_and_its_end(guest: Guest) -> None:
    token = wait_token(guest)
    ends = f"{datetime.fromtimestamp(claims_of(token)['exp'], UTC):%Y-%m-%dT%H:%M:%SZ}"
    credential = json.loads(request_token(guest, query="?format=execcredential").text)
    assert credential["apiVersion"] == "client.authentication.k8s.io/v1"
    assert credential["kind"] == "ExecCredential"
    assert credential["status"] == {"token": token, "expirationTimestamp": ends}
    shell = request_token(guest, query="?format=env").text
    assert f"export IMDSPROXY_TOKEN={token}\n" in shell
    assert ends in shell


def _refusals(guest: Guest | Asker) -> Mapping[str, int]:
    session = take_token(guest)

    def ask(
        audience: str | None = "vault",
        *,
        shown: str = session,
        query: str = "",
        method: str = "PUT",
        more: tuple[str, ...] = (),
    ) -> Reply:
        # Before it, on a connection that is kept: a proper one.
        assert request_token(guest, session=session).status == 200
        return request_token(guest, audience, session=shown, query=query, method=method, more=more)

    replies = {
        "no session token": ask(shown=""),
        "a wrong session token": ask(shown=session[:-1] + "x"),
        "an audience of others": ask("kubernetes"),
        "an audience for roles": ask("sts:rgw"),
        "no audience": ask(None),
        "two audiences": ask(more=("X-imdsproxy-audience: keystone",)),
        "a long audience": ask("a" * 129),
        "an audience with a quote": ask('va"ult'),
        "a long nonce": ask(more=(f"X-imdsproxy-nonce: {'n' * 257}",)),
        "two nonces": ask(more=("X-imdsproxy-nonce: a", "X-imdsproxy-nonce: b")),
        "an unknown form": ask(query="?format=xml"),
        "a read": ask(method="GET"),
        "a proxy": ask(more=(_FORWARDED,)),
        "a browser": ask(more=("Origin: http://evil.example",)),
    }
    return {name: reply.status for name, reply in replies.items()}


@pytest.mark.parametrize("kept", [False, True], ids=["new-connections", "kept-connection"])
def test_what_is_no_proper_request_of_the_guest_itself_gets_no_token(
    guest: Guest, *, kept: bool
) -> None:
    wait_token(guest)
    asker = Asker(guest.connect)
    with contextlib.closing(asker):
        found = _refusals(asker if kept else guest)
    assert (asker.kept > len(found)) is kept
    assert found == {
        "no session token": 401,
        "a wrong session token": 401,
        "an audience of others": 403,
        "an audience for roles": 403,
        "no audience": 400,
        "two audiences": 400,
        "a long audience": 400,
        "an audience with a quote": 400,
        "a long nonce": 400,
        "two nonces": 400,
        "an unknown form": 400,
        "a read": 405,
        "a proxy": 403,
        "a browser": 403,
    }


def test_an_instance_without_audiences_has_no_such_path(world: World) -> None:
    assert request_token(world.guests["green"]).status == 404
    assert "identity" not in world.guests["green"].ask("/latest/api/").text


def test_no_earlier_token_is_given_once_the_policy_or_the_record_has_changed(
    world: World, guest: Guest
) -> None:
    first = wait_token(guest)
    _have(world, "red", _PROJECT, availability_zone="az2")
    second = wait_token(guest)
    assert (first != second, claims_of(second)["availability_zone"]) == (True, "az2")
    # Nor on a connection whose session token was good before.
    with contextlib.closing(Asker(guest.connect)) as asker:
        session = take_token(asker)
        assert request_token(asker, session=session).text == second
        assert request_token(asker, session=session).text == second
        world.have_policy({"projects": {_PROJECT: {"audiences": ["keystone"]}}})
        until(lambda: request_token(guest).status == 403, what="the refusal")
        assert request_token(asker, session=session).status == 403
        world.have_policy({})
        until(lambda: request_token(guest).status == 404, what="no identity")
        assert request_token(asker, session=session).status == 404


def test_an_instance_that_is_made_again_under_its_id_gets_another_token(
    world: World, guest: Guest
) -> None:
    first = wait_token(guest)
    session, created = take_token(guest), claims_of(first)["instance_created"]
    world.daemon.remove_instance("red-5")
    _have(world, "red", _PROJECT, created_at=created, tags=_TAGS)
    assert request_token(guest, session=session).status == 401
    assert claims_of(wait_token(guest))["jti"] != claims_of(first)["jti"]


def _has_changed(file: Path, before: str) -> bool:
    return file.read_text() not in ("", before)


def test_the_processes_of_tokens_are_started_again_and_the_key_stays(
    world: World, guest: Guest
) -> None:
    key = jwt.get_unverified_header(wait_token(guest))["kid"]
    for name in ("identity.pid", "signer.pid"):
        file = world.daemon.runtime / name
        before = file.read_text()
        os.kill(int(before.split()[0]), signal.SIGKILL)
        until(partial(_has_changed, file, before), what=f"another process of {name}")
    nonce = ("X-imdsproxy-nonce: anew",)
    until(lambda: request_token(guest, more=nonce).status == 200, what="a token signed anew")
    assert jwt.get_unverified_header(request_token(guest, more=nonce).text)["kid"] == key


def test_neither_token_nor_key_nor_nonce_is_in_a_log_or_a_readable_file(
    world: World, guest: Guest
) -> None:
    token, nonce = wait_token(guest), "secret-nonce-of-the-guest"
    request_token(guest, more=(f"X-imdsproxy-nonce: {nonce}",))
    keys = world.daemon.state / "identity" / "keys"
    assert keys.stat().st_mode & 0o777 == 0o700
    for path in (*world.daemon.runtime.rglob("*"), *world.daemon.state.rglob("*")):
        if not path.is_file() or {keys, world.daemon.runtime / "netns"} & {*path.parents}:
            continue
        content = path.read_bytes()
        for secret in (token.encode(), nonce.encode(), b"PRIVATE KEY"):
            assert secret not in content, path


_DOCUMENTS: Final = "/latest/dynamic/instance-identity"


def _read(guest: Guest, name: str, *, session: str | None = None) -> Reply:
    headers = with_token(take_token(guest) if session is None else session)
    return guest.ask(f"{_DOCUMENTS}/{name}", headers=headers if session != "" else ())


@pytest.fixture
def documented(world: World) -> Guest:
    """The guest of red, with a signed document."""
    policy = {"policy": {"identity_document": True}, "created_at": 1_790_000_000}
    fields = {"availability_zone": "eu-west-1a", "instance_type": "m1", **policy}
    guest = _have(world, "red", _PROJECT, **fields)
    until(lambda: _read(guest, "document").status == 200, what="the document")
    return guest


def test_openssl_verifies_the_document_about_an_instance_and_no_other_text(
    documented: Guest, issuer: Issuer, world: World, tmp_path: Path
) -> None:
    found = {name: _read(documented, name).body for name in _NAMES}
    document = json.loads(found["document"])
    assert (document["accountId"], document["privateIp"]) == (_PROJECT, "10.0.0.5")
    assert (document["region"], document["instanceType"]) == ("eu-west-1", "m1")
    assert document["pendingTime"] == "2026-09-21T14:13:20Z"
    get = f"{issuer.url}/certificate.pem"
    curl = ("curl", "-sf", "--cacert", str(issuer.ca_file), get)
    (tmp_path / "certificate").write_text(run(*within(world.lab.host), *curl))
    (tmp_path / "document").write_bytes(found["document"])
    (tmp_path / "forged").write_bytes(found["document"].replace(b"red-5", b"red-6") + b" ")
    for name in ("rsa2048", "pkcs7"):
        pem = b"-----BEGIN PKCS7-----\n%b\n-----END PKCS7-----\n" % found[name]
        (tmp_path / name).write_bytes(pem)
        assert _verifies(tmp_path, name, "document")
        assert not _verifies(tmp_path, name, "forged")
    (tmp_path / "signature").write_bytes(b64decode(found["signature"]))
    in_shell = (
        "openssl x509 -in certificate -noout -pubkey > key;"
        "openssl dgst -sha256 -verify key -signature signature document"
    )
    assert "Verified OK" in run("sh", "-c", f"cd {tmp_path}; {in_shell}")


def _verifies(directory: Path, name: str, content: str) -> bool:
    words = (
        *("openssl", "smime", "-verify", "-inform", "PEM", "-noverify", "-in", name),
        *("-content", content, "-certfile", "certificate", "-out", "verified"),
    )
    ran = subprocess.run(words, cwd=directory, capture_output=True, check=False)
    return ran.returncode == 0


_NAMES: Final = ("document", "signature", "pkcs7", "rsa2048")


def test_the_document_has_the_same_bytes_each_time_and_takes_a_session_token(
    world: World, documented: Guest
) -> None:
    before = {name: _read(documented, name).body for name in _NAMES}
    for name in ("identity.pid", "signer.pid"):
        file = world.daemon.runtime / name
        was = file.read_text()
        os.kill(int(was.split()[0]), signal.SIGKILL)
        until(partial(_has_changed, file, was), what=f"another process of {name}")
    until(lambda: _read(documented, "pkcs7").status == 200, what="the document again")
    assert {name: _read(documented, name).body for name in _NAMES} == before
    session = take_token(documented)
    with documented.connect() as kept:
        for _ in range(3):
            path = f"{_DOCUMENTS}/document"
            assert kept.request(path, headers=with_token(session)).body == before["document"]
        assert kept.request(f"{_DOCUMENTS}/document").status == 401
    assert _read(documented, "document", session="").status == 401
    headers = (*with_token(session), _FORWARDED)
    assert documented.ask(f"{_DOCUMENTS}/document", headers=headers).status == 403
    put = documented.ask(f"{_DOCUMENTS}/document", method="PUT", headers=with_token(session))
    assert put.status == 405


def test_a_document_is_listed_nowhere_and_absent_without_the_policy(
    world: World, documented: Guest
) -> None:
    headers = with_token(take_token(documented))
    assert documented.ask(f"{_DOCUMENTS}/", headers=headers).body == b""
    assert {_read(world.guests["green"], name).status for name in _NAMES} == {404}


def _lines_of(world: World, token_id: str) -> list[dict[str, object]]:
    lines = (world.daemon.directory / "audit.log").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line)).get("jti") == token_id]


def test_the_audit_log_has_the_id_of_each_token_that_is_given_and_never_a_token(
    world: World, guest: Guest
) -> None:
    token = wait_token(guest)
    token_id = claims_of(token)["jti"]
    # From HAProxy's memory too, and in another form.
    request_token(guest)
    request_token(guest, query="?format=json")
    until(lambda: len(_lines_of(world, token_id)) >= 3, what="its lines")
    line = _lines_of(world, token_id)[-1]
    assert (line["audience"], line["instance"]) == ("vault", "red-5")
    guest.ask(f"/latest/{token}", headers=(f"User-Agent: {token}",))
    path = world.daemon.directory / "audit.log"
    until(lambda: '"path":"/latest/(token)"' in path.read_text(), what="the line of a leak")
    assert token not in path.read_text()


def test_readiness_is_not_green_while_no_token_can_be_signed(world: World, guest: Guest) -> None:
    wait_token(guest)
    assert world.daemon.status()["readiness"]["ready"]
    ring = world.daemon.state / "identity" / "keys" / "ring.json"
    content = ring.read_bytes()
    pid = int((world.daemon.runtime / "signer.pid").read_text().split()[0])
    ring.write_text("damaged")
    try:
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: not world.daemon.status()["readiness"]["ready"],
            within_s=20,
            what="the refusal of readiness",
        )
        reasons = [one["reason"] for one in world.daemon.status()["problems"]]
        assert any("identity" in one or "sign" in one for one in reasons), reasons
        # Documents are not concerned.
        assert guest.ask("/latest/meta-data/hostname").status == 200
    finally:
        ring.write_bytes(content)
    until(lambda: world.daemon.status()["readiness"]["ready"], within_s=30, what="readiness again")


def test_status_shows_issuer_key_and_counts(world: World, guest: Guest) -> None:
    key = jwt.get_unverified_header(wait_token(guest))["kid"]

    def has_counts() -> bool:
        report = world.daemon.status()["identity"]
        counted = report["held"] > 0 and report["given"].get("new", 0) > 0
        return bool(report["signing_key"] == key and counted)

    until(has_counts, within_s=20, what="the counts")
    shown = world.daemon.command("status").out
    assert f"https://127.0.0.1:8443, key {key}" in shown
    request_token(guest, "kubernetes")
