"""Recipes of `identity setup`, followed with the genuine verifiers, and with a guest's own curl."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from support.certificates import make_authority, server_context
from support.daemon import instance
from support.guest import Guest
from support.identity.openbao import open_openbao
from support.identity.recipes import (
    SERVICE,
    guarding_haproxy,
    recipe_of,
    request_of,
    run_in,
)
from support.identity.requests import claims_of, identity_settings, wait_token
from support.identity.signing import Issuer
from support.lab import ip, until
from support.pinned_venv import pinned_venv
from support.recorder import Recorder, reply
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "0123456789abcdef0123456789abcdef"
_OTHER: Final = "22222222222222222222222222222222"
_AUDIENCES: Final = ("internal", "kubernetes", "openbao")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Issuer]]:
    section, issuer = identity_settings(tmp_path_factory.mktemp("issuer"))
    policy = {"host": {"audiences": list(_AUDIENCES)}}
    with open_world({"identity": section, "policy": policy}) as world:
        ip("-n", world.lab.host, "address", "add", f"{SERVICE}/24", "dev", "blue")
        yield world, issuer


@pytest.fixture(scope="module")
def shared_world(shared: tuple[World, Issuer]) -> World:
    return shared[0]


def _before_login(script: str) -> str:
    """Return the commands with which a guest gets its token."""
    return "\n".join(line for line in script.splitlines() if line.startswith(("session", "token")))


@pytest.fixture
def guest(world: World) -> Guest:
    """The guest of blue, which reaches the host by its bridge."""
    return _have(world, _PROJECT)


def _have(world: World, project: str) -> Guest:
    record = instance("blue-5", "blue", fields={"project": project})
    assert world.daemon.put(instances=[record])["applied"]
    guest = world.guests["blue"]
    wait_token(guest, "internal", project_id=project)
    return guest


def test_openbao_is_set_up_as_printed_and_gives_a_guest_its_secret(
    world: World, guest: Guest, shared: tuple[World, Issuer], tmp_path: Path
) -> None:
    recipe, place = recipe_of(world, "openbao"), world.lab.host
    setup, _, in_guest = recipe.partition("# In a guest:")
    # The issuer of the test has a CA of its own.
    setup = setup.replace(
        "bound_issuer=", f"oidc_discovery_ca_pem=@{shared[1].ca_file} bound_issuer="
    )
    program = pinned_venv("identity") / "bin"
    with open_openbao(place, tmp_path) as bao:
        environment = {
            "BAO_ADDR": bao.url,
            "BAO_TOKEN": "root",
            "HOME": str(tmp_path),
            "PATH": f"{program}:{os.environ['PATH']}",
        }
        done = run_in(place, f"cd {tmp_path}; {setup}", **environment)
        assert done.returncode == 0, done
        token = run_in(guest.namespace, f'{_before_login(in_guest)}\nprintf %s "$token"').stdout
        login = bao.login("vm", token)
        assert f"project-{_PROJECT}" in login.policies


def test_haproxy_guards_a_service_as_printed(
    world: World, guest: Guest, shared: tuple[World, Issuer], tmp_path: Path
) -> None:
    recipe = recipe_of(world, "haproxy")
    script = request_of(recipe)
    with guarding_haproxy(world, shared[1], recipe, tmp_path):
        until(lambda: run_in(guest.namespace, script).stdout == "200", what="the service")
        bare = f"curl -s -o /dev/null -w '%{{http_code}}' http://{SERVICE}:8080/"
        assert run_in(guest.namespace, bare).stdout == "401"
        foreign = script.replace("audience: internal", "audience: openbao")
        assert run_in(guest.namespace, foreign).stdout == "401"
        forged = script.replace("Bearer $token", "Bearer ${token%??????}AAAAAA")
        assert run_in(guest.namespace, forged).stdout == "401"
        _have(world, _OTHER)
        assert run_in(guest.namespace, script).stdout == "403"


def test_kubectl_gets_its_token_by_a_plug_in_that_is_only_curl(
    world: World, guest: Guest, tmp_path: Path
) -> None:
    recipe = recipe_of(world, "kubernetes")
    user = yaml.safe_load(recipe[recipe.index("users:\n") :])["users"][0]
    server = yaml.safe_load(recipe[recipe.index("apiVersion: apiserver") : recipe.index("# Bind")])
    assert server["jwt"][0]["issuer"]["url"] == "https://127.0.0.1:8443"
    authority = make_authority(tmp_path, "ca")
    own = authority.issue("api", names=[f"IP:{SERVICE}"])
    tls = server_context(own)
    with Recorder(namespace=world.lab.host, address=SERVICE, port=6443, tls=tls) as api:
        api.default = lambda _: reply(b"{}", headers=("Content-Type: application/json",))
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "c",
                    "cluster": {
                        "server": f"https://{SERVICE}:6443",
                        "certificate-authority": str(authority.ca_file),
                    },
                }
            ],
            "users": [user],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": user["name"]}}],
            "current-context": "c",
        }
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        words = f"kubectl --kubeconfig {path} get --raw /version"
        done = run_in(guest.namespace, words, HOME=str(tmp_path))
        assert done.returncode == 0, done
        (request,) = api.requests
    sent = {name.lower(): value for name, value in request.headers}[b"authorization"].decode()
    claims = claims_of(sent.removeprefix("Bearer "))
    assert (claims["aud"], claims["project_id"]) == ("kubernetes", _PROJECT)


@pytest.mark.parametrize(
    "verifier", ["keystone", "openbao", "vault", "kubernetes", "rgw", "haproxy"]
)
def test_each_recipe_names_this_issuer(world: World, verifier: str) -> None:
    recipe = recipe_of(world, verifier)
    assert "127.0.0.1:8443" in recipe
    assert not re.search(r"\$(?:issuer|trust_domain|provider|audience)\b|\$\$", recipe)


def test_an_unknown_verifier_is_refused_with_the_known_ones(world: World) -> None:
    done = world.daemon.command("identity", "setup", "dex")
    assert (done.status != 0, "keystone" in done.err) == (True, True)
