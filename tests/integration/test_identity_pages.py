"""The how-to pages of identity tokens, each followed to the letter with the genuine verifier."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from support.certificates import server_context
from support.document_blocks import Block, missing_lines
from support.identity.kubernetes import ADMIN, ApiServer
from support.identity.openbao import open_openbao
from support.identity.site import ADDRESS, OTHER_PROJECT, PROJECT, Site
from support.lab import until
from support.openstack.servers import Server, ends_with_us
from support.pinned_venv import pinned_venv
from support.recorder import Recorder
from support.world import World

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared_world(shared_site: Site) -> World:
    return shared_site.world


_BAO: Final = "identity-openbao.md"


@pytest.fixture
def bao(site: Site, tmp_path: Path) -> Iterator[Site]:
    own = site.authority.issue("bao", names=["DNS:bao.example"])
    listener = f"""
listener "tcp" {{
  address = "{ADDRESS}:8200"
  tls_cert_file = "{own.certificate}"
  tls_key_file = "{own.key}"
}}
"""
    (site.programs / "bao").symlink_to(pinned_venv("identity") / "bin/bao")
    host = site.world.lab.host
    with open_openbao(host, tmp_path, within=site.within(host), settings=listener):
        site.variables = {"BAO_ADDR": "https://bao.example:8200", "BAO_TOKEN": "root"}
        yield site
    site.programs.joinpath("bao").unlink()


_SECRET: Final = f"""
printf 'X-Vault-Token: %s' $(cat token) | curl --silent --header @- \
    https://bao.example:8200/v1/secret/data/{PROJECT}/database
"""


def test_a_guest_reads_its_project_s_secrets_of_openbao_as_the_page_says(bao: Site) -> None:
    bao.follow(
        _BAO,
        "## OpenBao takes the issuer's tokens",
        "## imdsproxy gives tokens for OpenBao",
        "## The guest logs in",
    )
    bao.succeed("sh login.sh >token", in_guest=True)
    bao.follow(_BAO, "### For one project")
    assert "404" in bao.run("sh login.sh", in_guest=True).stdout
    assert "permission denied" in bao.run(_SECRET, in_guest=True).stdout
    bao.succeed("BAO_TOKEN=$(cat token) bao token lookup")
    bao.follow(_BAO, "### For all guests")
    assert "permission denied" in bao.run("BAO_TOKEN=$(cat token) bao token lookup").stdout


def test_the_page_of_openbao_names_the_reason_of_each_refusal(bao: Site) -> None:
    def login() -> str:
        return bao.run("sh login.sh", in_guest=True).stdout

    def is_seen(failure: str) -> bool:
        return not missing_lines(Block(0, "", (failure,)), login())

    def allow(audience: str) -> None:
        bao.world.have_policy({"host": {"audiences": [audience]}})

    def admit(role: str) -> None:
        allow("openbao")
        bao.succeed(f"bao write auth/jwt/role/vm role_type=jwt user_claim=sub {role}")

    def believe(issuer: str) -> None:
        url = "oidc_discovery_url=https://id.cloud.example"
        bao.succeed(f"sh openbao.sh; bao write auth/jwt/config {url} bound_issuer={issuer}")

    def lose_the_project() -> None:
        bao.succeed("sh openbao.sh")
        bao.have_guest(None)

    bao.follow(_BAO, "## OpenBao takes the issuer's tokens")
    bao.succeed("imdsproxy identity setup openbao --part guest >login.sh")
    causes: dict[str, Callable[[], object]] = {
        "curl: (22) … error: 404": lambda: None,
        "curl: (22) … error: 403": lambda: allow("vault"),
        "error validating token: invalid audience (aud) claim": lambda: admit(
            "bound_audiences=vault"
        ),
        "error validating token: invalid issuer (iss) claim": lambda: believe("https://x.example"),
        'claim "project_id" is missing': lose_the_project,
    }
    # test_identity_clocks.py causes the other.
    assert set(bao.failures(_BAO)) == {*causes, "curl: (22) … error: 503"}
    for failure, cause in causes.items():
        cause()
        until(partial(is_seen, failure), what=failure)
    unreachable = bao.run("sed s/id.cloud.example/id.invalid/ openbao.sh | sh").stdout
    assert "error checking oidc discovery URL" in unreachable


def test_vault_s_recipe_gives_a_guest_its_project_s_policy(bao: Site) -> None:
    """Vault is not at hand; OpenBao has the same API, and its program takes the same commands."""
    bao.install("vault", '#!/bin/sh\nexec bao "$@"\n')
    words = f"--project {PROJECT} --url https://bao.example:8200"
    for part in ("admin", "host"):
        bao.succeed(f"imdsproxy identity setup vault {words} --part {part} | sh")
    assert bao.run(f"imdsproxy identity setup vault {words} --part guest >login.sh").stdout == ""
    token = bao.run("sh login.sh", in_guest=True).stdout.strip()
    shown = bao.run(f"BAO_TOKEN={token} bao token lookup -format=json").stdout
    assert json.loads(shown)["data"]["policies"] == ["default", f"project-{PROJECT}"]
    bao.run("rm /etc/imdsproxy/conf.d/*; imdsproxy reload --allow-dropped")


_HAPROXY: Final = "identity-haproxy.md"
_HAPROXY_CFG: Final = """
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 5s
frontend service
    bind 127.0.0.1:8080
    http-request return status 200 content-type text/plain lf-string "%[req.hdr(x-subject)]\\n"
"""
_SYSTEMCTL: Final = """#!/bin/sh
[ "$1 $2" = "reload haproxy" ] || exit 1
exec {python} -c '
import socket
with socket.socket(socket.AF_UNIX) as master:
    master.connect("{socket}")
    master.sendall(b"reload\\n")
    answer = master.makefile().read()
raise SystemExit(0 if "Success=1" in answer else answer)
'
"""


@pytest.fixture
def haproxy(site: Site, tmp_path: Path) -> Iterator[Site]:
    """HAProxy in front of a service that answers with the header `X-Subject`."""
    own = site.authority.issue("service", names=["DNS:service.example"])
    site.write("/etc/haproxy/service.pem", own.bundle.read_text())
    site.write("/etc/haproxy/haproxy.cfg", _HAPROXY_CFG)
    site.write("/etc/cron.hourly/.placeholder", "")
    socket = tmp_path / "master.sock"
    site.install("systemctl", _SYSTEMCTL.format(python=sys.executable, socket=socket))
    words = ("haproxy", "-W", "-db", "-S", str(socket), "-f", "/etc/haproxy/haproxy.cfg")
    server = Server(
        name="HAProxy",
        argv=[*ends_with_us(), *site.within(site.world.lab.host), *words],
        cwd=tmp_path,
        environment={},
        log=tmp_path / "haproxy.log",
        is_up=socket.exists,
    )
    try:
        server.start()
        yield site
    finally:
        server.stop()
        site.programs.joinpath("systemctl").unlink()


def test_haproxy_guards_a_service_as_the_page_says(haproxy: Site) -> None:
    def ask(script: str = "sh ask.sh") -> str:
        return haproxy.run(script, in_guest=True).stdout

    haproxy.follow(
        _HAPROXY,
        "## HAProxy verifies tokens",
        "## imdsproxy gives tokens for the service",
        "## The guest asks the service",
    )
    assert haproxy.failures(_HAPROXY) == [
        f"curl: (22) … error: {status}" for status in (404, 401, 403, 503)
    ]
    # The recipe of another verifier keeps the project's audiences.
    haproxy.succeed("imdsproxy identity setup openbao --part host | sh")
    foreign = "sed 's/audience: internal/audience: openbao/' ask.sh | sh"
    forged = 'sed \'s/"$token" |/"${token%??????}AAAAAA" |/\' ask.sh | sh'
    assert ("401" in ask(foreign), "401" in ask(forged)) == (True, True)
    haproxy.world.have_policy({"projects": {OTHER_PROJECT: {"audiences": ["internal"]}}})
    haproxy.have_guest(OTHER_PROJECT)
    until(lambda: "403" in ask(), what="the refusal of another project")
    haproxy.have_guest()
    until(lambda: ask().endswith("/instance/blue-5\n"), what="the answer")
    haproxy.follow(_HAPROXY, "## When the issuer rotates its keys", "## End the trust")
    assert "404" in ask()


def test_haproxy_knows_a_key_before_it_signs_if_the_page_is_followed(haproxy: Site) -> None:
    def ask() -> str:
        return haproxy.run("sh ask.sh", in_guest=True).stdout

    def files() -> list[str]:
        """Return what cron's job writes."""
        done = haproxy.run(
            "/etc/cron.hourly/imdsproxy-issuer >&2\n"
            "sha256sum /etc/haproxy/issuer-*.pem | cut -c -64 | tail -n 2"
        )
        return done.stdout.splitlines()[-2:]

    haproxy.follow(
        _HAPROXY,
        "## HAProxy verifies tokens",
        "## imdsproxy gives tokens for the service",
        "## The guest asks the service",
        "## When the issuer rotates its keys",
    )
    first, same = files()
    assert first == same
    haproxy.succeed("imdsproxy identity rotate")
    until(lambda: files()[0] != files()[1], what="the next key")
    assert files()[0] == first
    haproxy.succeed("imdsproxy identity rotate --compromised")
    until(lambda: "401" in ask(), what="the refusal of a key that HAProxy does not know")
    until(lambda: first not in files(), what="other keys")
    until(lambda: ask().endswith("/instance/blue-5\n"), what="the answer")
    haproxy.follow(_HAPROXY, "## End the trust")


_KUBERNETES: Final = "identity-kubernetes.md"
_KUBECONFIG: Final = """
apiVersion: v1
kind: Config
current-context: own
contexts: [{{name: own, context: {{cluster: own, user: own}}}}]
clusters: [{{name: own, cluster: {{server: "https://kubernetes.example:6443", certificate-authority: {ca}}}}}]
users: [{{name: own, user: {{token: {token}}}}}]
"""


@pytest.fixture
def cluster(site: Site, tmp_path: Path) -> Iterator[tuple[Site, ApiServer]]:
    """A stand-in for a cluster, and `kubectl` as its administrator."""
    own = site.authority.issue("kubernetes", names=["DNS:kubernetes.example"])

    server = ApiServer(
        lambda: site.succeed("cat /etc/kubernetes/authentication.yaml"),
        lambda issuer: site.succeed(f"curl -sSf {issuer}/jwks"),
    )
    (site.directory / "ca.crt").write_bytes(site.authority.ca_file.read_bytes())
    kubeconfig = tmp_path / "admin.conf"
    kubeconfig.write_text(_KUBECONFIG.format(ca=site.authority.ca_file, token=ADMIN))
    site.write("/etc/kubernetes/.placeholder", "")
    site.variables = {"KUBECONFIG": str(kubeconfig)}
    with Recorder(
        namespace=site.world.lab.host, address=ADDRESS, port=6443, tls=server_context(own)
    ) as api:
        api.default = server.answer
        yield site, server


def test_kubectl_in_a_guest_is_its_project_s_user_as_the_page_says(
    cluster: tuple[Site, ApiServer],
) -> None:
    site, server = cluster
    site.follow(
        _KUBERNETES,
        "## The API server takes the issuer's tokens",
        "## imdsproxy gives tokens for the cluster",
        "## The guest uses kubectl",
    )
    (binding,) = server.bindings.values()
    assert (f"vm:project:{PROJECT}".encode() in binding, b"view" in binding) == (True, True)
    forbidden = site.run("kubectl get --raw /version", in_guest=True).stdout
    other = "sed --in-place s/kubernetes/other/ /etc/kubernetes/authentication.yaml"
    site.succeed(other)
    refused = site.run("kubectl auth whoami", in_guest=True).stdout
    site.follow(_KUBERNETES, "## End the trust")
    assert not server.bindings
    ended = site.run("kubectl auth whoami", in_guest=True).stdout
    named = site.failures(_KUBERNETES)
    assert not missing_lines(Block(0, "", (named[0],)), ended)
    assert (named[3] in refused, named[4] in forbidden) == (True, True)
