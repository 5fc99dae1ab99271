"""Check of the chain between an instance and a verifier, with each link broken once."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.issuer.holder import CHECK_NONCE
from support.commands import Command
from support.daemon import instance
from support.identity.openbao import OpenBao, open_openbao
from support.identity.requests import claims_of, identity_settings, wait_token
from support.identity.signing import Issuer
from support.lab import until
from support.recorder import Recorder, reply
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_LINKS: Final = ("record", "policy", "placement", "signer", "clocks", "issuer", "verifier")


@dataclass(frozen=True, slots=True)
class _Site:
    world: World
    issuer: Issuer
    bao: OpenBao
    seen: Recorder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Site]:
    directory = tmp_path_factory.mktemp("issuer")
    section, issuer = identity_settings(directory)
    login = {
        "verifier_url": "http://127.0.0.1:8200/v1/auth/jwt/login",
        "verifier_role": "vm",
        "subject": "spiffe://{trust_domain}/project/{project}",
    }
    audiences: dict[str, object] = {"vault": login}
    section |= {"ca_file": str(issuer.ca_file), "audiences": audiences}
    policy = {"host": {"audiences": ["internal", "vault"]}}
    with open_world({"identity": section, "policy": policy}) as world:
        place = world.lab.host
        with open_openbao(place, directory) as bao, Recorder(namespace=place) as seen:
            audiences["internal"] = {"verifier_url": f"http://{seen.authority}/"}
            world.daemon.reconfigure(world.settings)
            wait_token(world.red, "internal")
            bao.trust(issuer)
            bao.admit("vm", audience="vault", projects=[_PROJECT])
            yield _Site(world, issuer, bao, seen)


@pytest.fixture(scope="module")
def shared_world(site: _Site) -> World:
    return site.world


@pytest.fixture
def ready(world: World, site: _Site) -> _Site:
    """The site, whose guest of red has a project and gets tokens."""
    record = instance("red-5", "red", fields={"project": _PROJECT})
    assert world.daemon.put(instances=[record])["applied"]
    wait_token(world.red, "internal", project_id=_PROJECT)
    site.seen.default = lambda _: reply(b"welcome")
    return site


def _run(site: _Site, *words: str) -> Command:
    return site.world.daemon.command("identity", "check", *words)


def _check(
    site: _Site, audience: str = "vault", *words: str, name: str = "red-5"
) -> dict[str, Any]:
    done = _run(site, name, "--audience", audience, "--json", *words)
    assert done.out, done
    shape: dict[str, Any] = json.loads(done.out)
    assert done.status == (0 if shape["failed"] is None else 1), done
    assert [one["link"] for one in shape["links"]] == list(_LINKS)
    return shape


def _assert_fails(shape: dict[str, Any], link: str, said: str) -> None:
    place = _LINKS.index(link)
    assert shape["failed"] == link, shape
    verdicts = [one["verdict"] for one in shape["links"]]
    assert verdicts[place:] == ["failed", *["unchecked"] * (len(_LINKS) - place - 1)], shape
    found = shape["links"][place]
    assert said in f"{found['reason']} {found['hint']}", found


def _settings(site: _Site, **identity: object) -> None:
    """Have these settings of identity tokens, which need no restart."""
    settings = site.world.settings
    changed = {**settings["identity"], **identity}
    site.world.daemon.reconfigure({**settings, "identity": changed})


def test_a_chain_without_a_fault_is_good_to_openbao_s_own_login(ready: _Site) -> None:
    shape = _check(ready)
    assert shape["failed"] is None
    assert {one["verdict"] for one in shape["links"]} == {"good"}, shape
    shown = _run(ready, "red-5", "-a", "vault")
    assert shown.status == 0
    assert [line.split()[:2] for line in shown.out.splitlines()] == [
        [link, "good"] for link in _LINKS
    ]


def test_the_login_of_a_check_is_given_up(ready: _Site) -> None:
    before = _logins(ready)
    assert _check(ready)["failed"] is None
    assert _logins(ready) == before


def _logins(site: _Site) -> set[str]:
    found: set[str] = set(site.bao.read("auth/token/accessors?list=true")["data"]["keys"])
    return found


def test_the_verifier_gets_the_token_of_the_check_and_the_operator_does_not(
    ready: _Site,
) -> None:
    site, before = ready, len(ready.seen.requests)
    site.seen.default = lambda asked: reply(asked.values("authorization")[0], status=401)
    done = _run(site, "red-5", "-a", "internal")
    (request,) = list(site.seen.requests)[before:]
    token = request.values("authorization")[0].decode().removeprefix("Bearer ")
    claims = claims_of(token)
    assert (claims["nonce"], claims["instance_id"]) == (CHECK_NONCE, "red-5")
    assert done.status == 1
    assert "answers 401" in done.out
    log = site.world.daemon.log.read_text()
    for secret in (token, token.rpartition(".")[2], token.split(".")[1]):
        assert secret not in done.out + done.err + log


def test_a_bearer_that_is_welcome_is_good(ready: _Site) -> None:
    assert _check(ready, "internal")["failed"] is None


def test_an_audience_without_a_verifier_leaves_the_last_link_unchecked(
    ready: _Site, world: World
) -> None:
    record = instance("red-5", "red", fields={"policy": {"audiences": ["mail"]}})
    assert world.daemon.put(instances=[record])["applied"]
    wait_token(world.red, "mail")
    shape = _check(ready, "mail")
    assert shape["failed"] is None
    assert shape["links"][-1]["verdict"] == "unchecked"


def test_an_unknown_instance_and_a_wrong_audience_are_refused(ready: _Site) -> None:
    assert _run(ready, "nobody", "-a", "vault").status == 66
    assert _run(ready, "red-5", "-a", "two words").status == 64


def test_an_instance_without_a_served_address_fails_at_its_record(
    ready: _Site, world: World
) -> None:
    spare = world.lab.namespace_network("check")
    world.daemon.put([spare])
    world.daemon.put(instances=[instance("check-5", "check")])
    _assert_fails(
        _check(ready, "vault", "--network", "red", name="check-5"), "record", "no address"
    )
    world.daemon.remove_instance("check-5")
    world.daemon.remove_network("check")


def test_an_audience_that_no_policy_allows_fails_at_the_policy(ready: _Site) -> None:
    _assert_fails(_check(ready, "openbao"), "policy", "internal, vault")
    _assert_fails(_check(ready, "sts:s3"), "policy", "no guest's")


def test_a_path_rule_that_refuses_tokens_fails_at_the_policy(ready: _Site, world: World) -> None:
    denying = {"paths": {"/latest/api/identity": "deny"}}
    record = instance("red-5", "red", fields={"project": _PROJECT, "policy": denying})
    assert world.daemon.put(instances=[record])["applied"]
    _assert_fails(_check(ready), "policy", "refuses /latest/api/identity")


def test_a_subject_with_a_project_fails_at_the_policy_of_an_instance_without_one(
    ready: _Site, world: World
) -> None:
    assert world.daemon.put(instances=[instance("red-5", "red")])["applied"]
    _assert_fails(_check(ready), "policy", "the instance has none")


def _signer_pid(world: World) -> int:
    return int((world.daemon.runtime / "signer.pid").read_text().split()[0])


def test_a_signer_that_does_not_answer_fails_at_the_signer(ready: _Site, world: World) -> None:
    os.kill(_signer_pid(world), signal.SIGSTOP)
    _assert_fails(_check(ready), "signer", "does not answer")


def test_a_clock_before_the_time_of_the_key_fails_at_the_clocks(ready: _Site, world: World) -> None:
    ring = next(Path(world.daemon.state).rglob("ring.json"))
    before, first = ring.read_text(), _signer_pid(world)
    shape = json.loads(before)
    shape["keys"][0]["since"] += 86_400
    ring.write_text(json.dumps(shape))
    os.kill(first, signal.SIGKILL)
    try:
        until(lambda: _check(ready)["failed"] == "clocks", within_s=20, what="the clocks' failure")
        _assert_fails(_check(ready), "clocks", "before the time since which its key signs")
    finally:
        ring.write_text(before)
        os.kill(_signer_pid(world), signal.SIGKILL)
        until(lambda: _check(ready)["failed"] is None, within_s=20, what="the signer")


def test_an_issuer_whose_certificate_is_not_trusted_fails_at_the_issuer(ready: _Site) -> None:
    _settings(ready, ca_file=None)
    _assert_fails(_check(ready), "issuer", "identity.ca_file")


def test_a_file_of_cas_that_is_missing_fails_at_the_issuer(ready: _Site) -> None:
    _settings(ready, ca_file="/nonexistent.pem")
    _assert_fails(_check(ready), "issuer", "cannot use /nonexistent.pem")


def test_documents_that_are_not_served_fail_at_the_issuer(ready: _Site) -> None:
    _settings(ready, listen=None, certificate=None)
    _assert_fails(_check(ready), "issuer", "127.0.0.1:8443")


def test_a_verifier_that_knows_no_such_role_fails_in_its_own_words(ready: _Site) -> None:
    audiences: Any = ready.world.settings["identity"]["audiences"]
    changed = {**audiences["vault"], "verifier_role": "other"}
    _settings(ready, audiences={**audiences, "vault": changed})
    _assert_fails(_check(ready), "verifier", 'role "other" could not be found')


def test_a_verifier_of_another_audience_fails_in_its_own_words(ready: _Site) -> None:
    ready.bao.admit("vm", audience="elsewhere", projects=[_PROJECT])
    try:
        _assert_fails(_check(ready), "verifier", "aud")
    finally:
        ready.bao.admit("vm", audience="vault", projects=[_PROJECT])
