"""Identity tokens in a fleet: hubs sign what their records say, for the host where an instance is."""

import asyncio
import itertools
import json
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from jwt import PyJWK, PyJWT
from jwt.algorithms import RSAAlgorithm

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, HostState, StoredHost, host_key, render_host
from imdsproxy.fleet.members import IDENTITY_PATH, Role
from imdsproxy.sources.fleet.client import HubClient
from support.daemon import instance
from support.fleet_member import Member
from support.fleet_operator import Operator
from support.fleet_world import METRICS_PORT, FleetHost, FleetWorld, HubProcess, fleet_world
from support.guest import Guest, take_token, with_token
from support.identity.fleet import Signers
from support.identity.requests import claims_of, request_token, wait_token
from support.identity.verifiers import verify
from support.lab import run, until, within

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_POLICY: Final = (
    b'{"audiences":["keystone","vault"],"identity_tags":["role"],"identity_document":true}'
)
_created: Final = itertools.count(1_790_000_000)
_NONCE: Final = ("X-imdsproxy-nonce: anew",)


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Signers:
    return Signers(tmp_path_factory.mktemp("issuer"))


@pytest.fixture(scope="module")
def world(signers: Signers) -> Iterator[FleetWorld]:
    identity = {"enabled": True, "user": "daemon", "ca_file": str(signers.issuer.ca_file)}
    with fleet_world(beside_hub=signers, identity=identity) as made:
        made.store_network("blue")
        made.write({f"{layout.POLICIES}project/{_PROJECT}": _POLICY})
        yield made


@pytest.fixture(scope="module")
def hosts(world: FleetWorld) -> tuple[FleetHost, FleetHost]:
    return world.add_host("a"), world.add_host("b")


@pytest.fixture(scope="module")
def guests(hosts: tuple[FleetHost, FleetHost]) -> tuple[Guest, Guest]:
    """A guest of each host, with one address."""
    here, there = (host.lab.guest("blue") for host in hosts)
    return here, there


@pytest.fixture(scope="module")
def operator(world: FleetWorld) -> Operator:
    return Operator.new(world, "rota")


def _place(world: FleetWorld, name: str, *hosts: str, **fields: object) -> int:
    """Place an instance, and return the time of its creation, which no other placement has."""
    created = next(_created)
    fields = {"project": _PROJECT, "created_at": created, **fields}
    world.place(instance(name, "blue", fields=fields), *hosts)
    return created


def _as_host(world: FleetWorld, host: FleetHost, **request: object) -> tuple[int, Any]:
    """Request a token as one who has captured a host, of the first hub."""
    return _of(world, Member.of_host(world, host), **{"instance": "web", **request})


def _of(world: FleetWorld, member: Member, **request: object) -> tuple[int, Any]:
    one = {"instance": "of-c", "network": "blue", "audience": "vault", **request}
    return _ask(world, member, [one])


def _ask(
    world: FleetWorld, member: Member, asked: Sequence[Mapping[str, object]]
) -> tuple[int, Any]:
    body = json.dumps({"tokens": asked}).encode()
    with world.etcd.entered():
        status, data = asyncio.run(
            HubClient(member.files, 5).request("POST", world.urls[0], IDENTITY_PATH, body=body)
        )
    return status, json.loads(data)


def _answer(world: FleetWorld, host: FleetHost, **request: object) -> Mapping[str, Any]:
    status, shape = _as_host(world, host, **request)
    assert status == 200, shape
    (answer,) = shape["answers"]
    found: Mapping[str, Any] = answer
    return found


def test_a_guest_gets_a_token_of_the_fleet_s_records_that_verifiers_take(
    world: FleetWorld,
    signers: Signers,
    hosts: tuple[FleetHost, FleetHost],
    guests: tuple[Guest, Guest],
) -> None:
    created = _place(world, "web", hosts[0].name, tags={"role": "db", "name": "x"})
    token = wait_token(guests[0], instance_created=created)
    claims = claims_of(token)
    assert claims["placement"] == "fleet"
    assert claims["sub"] == f"spiffe://cloud.example/project/{_PROJECT}/instance/web"
    assert claims["tags"] == {"role": "db"}
    found = verify(
        token, audience="vault", issuer=signers.issuer, namespace=world.hubs[1].namespace
    )
    assert set(found.values()) == {claims["sub"]}


def test_tags_that_are_too_long_cost_no_other_guest_its_token(
    world: FleetWorld, hosts: tuple[FleetHost, FleetHost]
) -> None:
    _place(world, "web", hosts[0].name)
    policy = {"identity_tags": ["role", "name"]}
    tags = dict.fromkeys(("role", "name"), "\N{GRINNING FACE}" * 4096)
    _place(world, "big", hosts[0].name, tags=tags, policy=policy)
    member = Member.of_host(world, hosts[0])
    names = ("web", "big", "web")
    asked = [{"instance": one, "network": "blue", "audience": "vault"} for one in names]

    def answers() -> list[str]:
        status, shape = _ask(world, member, asked)
        assert status == 200, shape
        return [one.get("refused", "a token") for one in shape["answers"]]

    expected = ["a token", "tags", "a token"]
    until(lambda: answers() == expected, within_s=5, what="tokens of the other guest")


def test_the_hubs_sign_the_document_about_an_instance(
    world: FleetWorld, hosts: tuple[FleetHost, FleetHost], guests: tuple[Guest, Guest]
) -> None:
    created = _place(world, "web", hosts[0].name)
    wait_token(guests[0], instance_created=created)
    headers = with_token(take_token(guests[0]))
    path = "/latest/dynamic/instance-identity"
    document, signature = (
        guests[0].ask(f"{path}/{name}", headers=headers).body for name in ("document", "signature")
    )
    assert json.loads(document)["accountId"] == _PROJECT
    found = world.ask(lambda etcd: etcd.read(layout.ISSUER)).kvs[0].value
    (jwk,) = layout.parse_issuer(found).keys.values()
    public = RSAAlgorithm.from_jwk(jwk)
    assert isinstance(public, RSAPublicKey)
    public.verify(b64decode(signature), document, PKCS1v15(), SHA256())
    # Nothing in etcd opens the key.
    assert b"PRIVATE" not in found


def test_a_captured_host_gets_tokens_of_its_own_instances_alone_and_chooses_no_claim(
    world: FleetWorld, hosts: tuple[FleetHost, FleetHost], guests: tuple[Guest, Guest]
) -> None:
    here, there = hosts
    created = _place(world, "web", here.name)
    wait_token(guests[0], instance_created=created)
    assert "token" in _answer(world, here)
    assert _answer(world, there) == {"refused": "subject"}
    assert _answer(world, here, instance="nobody") == {"refused": "subject"}
    assert _answer(world, here, network="red") == {"refused": "subject"}
    assert _answer(world, here, audience="kubernetes") == {"refused": "audience"}
    assert _answer(world, here, audience="sts:rgw") == {"refused": "audience"}
    assert _answer(world, here, audience="*") == {"refused": "request"}
    assert _answer(world, here, nonce='"') == {"refused": "request"}
    told = claims_of(_answer(world, here, project="mine")["token"]["text"])
    assert told["project_id"] == _PROJECT
    for name in ("tags", "subject", "placement", "claims", "epoch"):
        assert _as_host(world, here, **{name: "mine"})[0] == 422


def test_an_instance_that_has_moved_is_known_on_its_new_host_alone_by_the_same_subject(
    world: FleetWorld, hosts: tuple[FleetHost, FleetHost], guests: tuple[Guest, Guest]
) -> None:
    here, there = hosts
    created = _place(world, "web", here.name)
    first = claims_of(wait_token(guests[0], instance_created=created))
    created = _place(world, "web", here.name, there.name)
    second = claims_of(wait_token(guests[1], instance_created=created))
    assert first["sub"] == second["sub"]
    _place(world, "web", there.name)
    name = "/latest/meta-data/hostname"
    until(lambda: guests[0].ask(name).status == 404, within_s=20, what="its end here")
    assert _answer(world, here) == {"refused": "subject"}
    assert "token" in _answer(world, there)


def test_an_operator_of_the_fleet_checks_the_chain_by_the_instance_s_host(
    world: FleetWorld,
    hosts: tuple[FleetHost, FleetHost],
    guests: tuple[Guest, Guest],
    operator: Operator,
) -> None:
    created = _place(world, "web", hosts[0].name)
    wait_token(guests[0], instance_created=created)
    shape = operator.do("identity", "check", "web", "-a", "vault", "--json").json
    verdicts = {one["link"]: one["verdict"] for one in shape["links"]}
    assert verdicts.pop("verifier") == "unchecked"
    assert set(verdicts.values()) == {"good"}, shape
    assert shape["host"] == hosts[0].name
    (placement,) = (one for one in shape["links"] if one["link"] == "placement")
    assert placement["reason"] == "the fleet's records place the instance on this host"
    refused = operator.run("identity", "check", "web", "-a", "mail", "--json")
    assert (refused.status, refused.json["failed"]) == (1, "policy")


def test_operators_see_an_instance_s_last_tokens_by_its_host_and_those_of_a_project_its_own_alone(
    world: FleetWorld,
    hosts: tuple[FleetHost, FleetHost],
    guests: tuple[Guest, Guest],
    operator: Operator,
) -> None:
    created = _place(world, "web", hosts[0].name)
    token = wait_token(guests[0], instance_created=created)
    mine, other = (Operator.new(world, one, Role.READER, one) for one in (_PROJECT, "other"))
    for one in (operator, mine):
        ran = one.do("identity", "tokens", "web", "--json")
        assert (ran.json["host"], ran.json["instance"]) == (hosts[0].name, "web")
        (use,) = ran.json["networks"]
        last = {each["audience"]: each["last"] for each in use["audiences"]}
        assert last["vault"]["token_id"] == claims_of(token)["jti"]
        assert last["keystone"]["outcome"] == "unasked"
        assert not [part for part in token.split(".")[1:] if part in ran.out]
    assert other.run("identity", "tokens", "web").status == 66
    assert claims_of(token)["jti"] in operator.do("identity", "tokens", "web").out


def test_a_policy_of_the_fleet_ends_tokens_at_once(
    world: FleetWorld, hosts: tuple[FleetHost, FleetHost], guests: tuple[Guest, Guest]
) -> None:
    created = _place(world, "web", hosts[0].name)
    wait_token(guests[0], "keystone", instance_created=created)
    key = f"{layout.POLICIES}host/{hosts[0].name}"
    project = f"{layout.POLICIES}project/{_PROJECT}"
    # The project's list is the more specific one.
    world.write({key: b'{"audiences":[]}'})
    assert "token" in _answer(world, hosts[0], audience="keystone")
    world.write({project: b'{"audiences":["vault"]}'})
    until(
        lambda: _answer(world, hosts[0], audience="keystone") == {"refused": "audience"},
        what="the hub's refusal",
    )
    until(lambda: request_token(guests[0], "keystone").status == 403, what="the host's refusal")
    world.write({key: b"{}", project: _POLICY})
    wait_token(guests[0], "keystone")


def test_tokens_go_on_when_a_hub_or_its_signer_ends(
    world: FleetWorld,
    signers: Signers,
    hosts: tuple[FleetHost, FleetHost],
    guests: tuple[Guest, Guest],
) -> None:
    created = _place(world, "web", hosts[0].name)
    held = wait_token(guests[0], instance_created=created)
    signers.kill("hub1")
    assert request_token(guests[0]).text == held
    until(lambda: request_token(guests[0], more=_NONCE).status == 200, what="the other hub's")
    world.hubs[0].end(9)
    until(lambda: request_token(guests[0], more=_NONCE).status == 200, what="the other hub's")
    signers.start(world.hubs[0])
    world.hubs[0].start()
    until(lambda: _as_host(world, hosts[0])[0] == 200, within_s=20, what="the first hub's again")


def test_a_hub_whose_signer_has_ended_is_not_ready_and_each_hub_s_status_names_it_with_the_remedy(
    world: FleetWorld, signers: Signers, operator: Operator
) -> None:
    def read(path: str) -> str:
        url = f"http://{world.hubs[0].address}:{METRICS_PORT}{path}"
        return run(*within(world.hubs[0].namespace), "curl", "-s", url)

    def named(hub: HubProcess) -> str | None:
        found = operator.at(hub).do("fleet", "status", "--json").json
        problem: str | None = found["problems"].get("hub hub1, signer")
        assert (problem is None) == (
            not any("signer" in one for one in found["readiness"]["degraded"])
        )
        return problem

    until(lambda: json.loads(read("/readyz"))["ready"], within_s=20, what="readiness")
    assert [named(hub) for hub in world.hubs] == [None, None]
    assert "imdsproxy_hub_identity_failing 0.0" in read("/metrics")
    signers.kill("hub1")
    try:
        until(lambda: not json.loads(read("/readyz"))["ready"], within_s=20, what="the refusal")
        assert "the signer does not answer" in read("/readyz")
        assert "imdsproxy_hub_identity_failing 1.0" in read("/metrics")
        for hub in world.hubs:
            until(lambda hub=hub: named(hub) is not None, within_s=20, what="the problem")  # type: ignore[misc] # as above
            assert "systemctl status imdsproxy-hub-signer" in str(named(hub))
        assert "the signer does not answer" in str(named(world.hubs[0]))
        assert "its /readyz has the reason" in str(named(world.hubs[1]))
        shown = " ".join(operator.at(world.hubs[1]).run("fleet", "status").out.split())
        assert "hub hub1, signer: it signs no identity token" in shown
    finally:
        signers.start(world.hubs[0])
    until(lambda: json.loads(read("/readyz"))["ready"], within_s=20, what="readiness again")
    assert [named(hub) for hub in world.hubs] == [None, None]


def test_a_revoked_host_gets_no_token_within_a_second(world: FleetWorld) -> None:
    member = Member.written(world, "c")
    _place(world, "of-c", member.name)
    until(lambda: "token" in _of(world, member)[1]["answers"][0], what="a token")
    revoked = render_host(StoredHost(HostState.REVOKED, revocations=1, version=5))
    world.write({host_key(HostId(member.name)): revoked})
    begun = time.monotonic()
    until(lambda: _of(world, member)[0] == 403, what="the refusal")
    assert time.monotonic() - begun < 1


def _keys(world: FleetWorld, signers: Signers) -> list[Mapping[str, Any]]:
    """Return the public keys as a verifier reads them, the signing key first."""
    issuer = signers.issuer
    curl = ("curl", "-sf", "--cacert", str(issuer.ca_file), issuer.jwks_url)
    found: list[Mapping[str, Any]] = json.loads(run(*within(world.hubs[1].namespace), *curl))[
        "keys"
    ]
    return found


def _make_due(world: FleetWorld) -> None:
    """Have the time of the next step come, as another hub would have written it."""
    found = world.ask(lambda etcd: etcd.read(layout.ISSUER)).kvs[0].value
    stored = layout.parse_issuer(found)
    keys = [{**one, "since": 0} for one in stored.ring["keys"]]
    ring = {**stored.ring, "sequence": stored.ring["sequence"] + 1, "keys": keys}
    world.write({layout.ISSUER: layout.render_issuer(replace(stored, ring=ring))})


def test_an_operator_rotates_the_fleet_s_keys_and_no_token_is_refused(
    world: FleetWorld,
    signers: Signers,
    hosts: tuple[FleetHost, FleetHost],
    guests: tuple[Guest, Guest],
    operator: Operator,
) -> None:
    created = _place(world, "web", hosts[0].name)
    wait_token(guests[0], instance_created=created)
    (first,) = operator.do("identity", "keys", "--json").json["keys"]
    refused: list[str] = []

    def has_turned(key: str) -> bool:
        """Return whether the key signs; each token on the way is verified with the keys of its moment."""
        token = request_token(guests[0], more=_NONCE).text
        published = {one["kid"]: one for one in _keys(world, signers)}
        kid = jwt.get_unverified_header(token)["kid"]
        if kid not in published:
            refused.append(token)
        else:
            PyJWT().decode(
                token, PyJWK(dict(published[kid])).key, algorithms=["RS256"], audience="vault"
            )
        return bool(kid == key)

    rotated = operator.do("identity", "rotate", "--json").json["keys"]
    assert [one["state"] for one in rotated] == ["signing", "next"]
    new = rotated[1]["id"]
    until(lambda: len(_keys(world, signers)) == 2, what="both keys")
    assert not has_turned(new)
    _make_due(world)
    until(lambda: has_turned(new), what="the other key")
    until(lambda: _keys(world, signers)[0]["kid"] == new, what="the signing key first")
    _make_due(world)
    until(lambda: len(_keys(world, signers)) == 1, what="the old key's end")
    assert has_turned(new)
    assert (refused, first["id"] != new) == ([], True)


def test_after_a_theft_no_guest_gets_a_token_of_the_stolen_key_from_any_hub_host_or_backup(
    world: FleetWorld,
    signers: Signers,
    hosts: tuple[FleetHost, FleetHost],
    guests: tuple[Guest, Guest],
    operator: Operator,
) -> None:
    created = _place(world, "web", hosts[0].name)
    held = wait_token(guests[0], instance_created=created)
    backup = world.ask(lambda etcd: etcd.read(layout.ISSUER)).kvs[0].value
    done = operator.do("identity", "rotate", "--compromised")
    assert ("OpenBao" in done.out, "seal.key" in done.out) == (True, True)
    (stolen,), (kept,) = (
        [one["id"] for one in layout.parse_issuer(value).ring["keys"]]
        for value in (backup, world.ask(lambda etcd: etcd.read(layout.ISSUER)).kvs[0].value)
    )
    assert stolen != kept
    # Neither HAProxy's cache nor the process behind it has the token any more.
    until(lambda: request_token(guests[0]).text not in {held, ""}, what="another token")
    assert jwt.get_unverified_header(wait_token(guests[0]))["kid"] == kept
    until(lambda: [one["kid"] for one in _keys(world, signers)] == [kept], what="one key")
    # An etcd of before, without its later changes.
    world.write({layout.ISSUER: backup})
    until(
        lambda: world.ask(lambda etcd: etcd.read(layout.ISSUER)).kvs[0].value != backup,
        within_s=20,
        what="the hubs' repair",
    )
    assert [one["id"] for one in operator.do("identity", "keys", "--json").json["keys"]] == [kept]
    assert jwt.get_unverified_header(request_token(guests[0], more=_NONCE).text)["kid"] == kept
    regained = operator.ask("GET", "/fleet/status")["regained"]
    assert "keeps the keys" in regained["issuer of identity tokens"]
    operator.ask("POST", "/fleet/accept-restore")
    wait_token(guests[0])


def test_readers_see_the_fleet_s_keys_and_rotate_none(world: FleetWorld) -> None:
    reader = Operator.new(world, "rita", Role.READER)
    assert reader.do("identity", "keys", "--json").json["keys"]
    assert reader.run("identity", "rotate").status == 77
