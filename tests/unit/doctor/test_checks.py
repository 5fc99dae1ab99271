"""Each fault that a server can have, put into one that has none: the doctor finds that one."""

from __future__ import annotations

import base64
import gzip
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import TypeAlias

import pytest

from imdsproxy.core.doctor import (
    Answer,
    Answered,
    Ask,
    Finding,
    Severity,
    Surroundings,
    Unanswered,
    crawl,
    examine,
    run_crawl,
)
from support.demonstration import REPOSITORY
from support.metadata_server import GOOD, MetadataServer, Reply

MAC = "52:54:00:12:34:56"
NOWHERE = Surroundings()
OPENSTACK = "/openstack/2018-08-27"
NOTHING: Mapping[str, str] = {}
Worsen: TypeAlias = Callable[[MetadataServer], object]


def found(server: MetadataServer, around: Surroundings = NOWHERE) -> dict[str, Finding]:
    findings = examine(run_crawl(crawl(direct=True), server.fetch), around)
    return {one.code: one for one in findings}


def replace(
    path: str,
    body: bytes | str,
    *,
    status: int = 200,
    delay_s: float = 0.0,
    length: int | None = None,
) -> Worsen:
    raw = body.encode() if isinstance(body, str) else body

    def worsen(server: MetadataServer) -> None:
        server.replies[path] = Reply(raw, status, {}, delay_s, length)

    return worsen


def remove(*paths: str) -> Worsen:
    def worsen(server: MetadataServer) -> None:
        for path in paths:
            del server.replies[path]

    return worsen


def token(body: bytes, *, status: int = 200, headers: Mapping[str, str] = NOTHING) -> Worsen:
    def worsen(server: MetadataServer) -> None:
        server.token = Reply(body, status, headers)

    return worsen


def document(path: str, **members: object) -> Worsen:
    """Changes members of a JSON document; `None` takes one away."""
    changed = {**json.loads(GOOD[path].body), **members}
    kept = {name: value for name, value in changed.items() if value is not None}
    return replace(path, json.dumps(kept))


def everywhere(name: str, value: str) -> Worsen:
    return lambda server: server.everywhere.update({name: value})


def without_length(server: MetadataServer) -> None:
    for path, reply in server.replies.items():
        server.replies[path] = Reply(reply.body, length=-1)


TTL = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
LIST = "/latest/meta-data"
DATA = "#cloud-config\n{}\n"
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE


@pytest.mark.parametrize(
    ("worsen", "code", "severity", "client", "path"),
    [
        (replace(LIST, "hostname\nami-id"), "listed-missing", ERROR, "cloud-init", "ami-id (404)"),
        (
            replace(f"{LIST}/hostname", b"", status=500),
            "listed-missing",
            ERROR,
            "os-collect-config",
            "hostname (500)",
        ),
        (replace(LIST, "hostname\n"), "listing-newline", ERROR, "awscrt", LIST),
        (replace(f"{LIST}/hostname", "web-1\n"), "leaf-newline", ERROR, "29 clients", "hostname"),
        (replace(f"{LIST}/tags/instance", b""), "empty-directory", ERROR, "os-coll", "instance/"),
        (replace(f"{LIST}/public-keys", "0=a=b"), "key-name-equals", ERROR, "cloudbase", "keys"),
        (
            replace(f"{LIST}/public-keys", "ssh-ed25519 AAAA me"),
            "key-listing-form",
            ERROR,
            "cloudbase-init",
            "public-keys",
        ),
        (
            lambda server: (
                replace(f"{LIST}/tags/instance", "my key")(server),
                replace(f"{LIST}/tags/instance/my key", "x")(server),
            ),
            "tag-characters",
            WARNING,
            "cloud-init",
            "my key",
        ),
        (replace("/latest/user-data/", b"", status=404), "trailing-slash", ERROR, "Ohai", "data/"),
        (
            replace(f"{LIST}/placement/availability-zone/", b"", status=404),
            "trailing-slash",
            ERROR,
            "botocore",
            "zone/",
        ),
        (
            replace("/latest//meta-data/instance-id", b"", status=404),
            "double-slash",
            WARNING,
            "amazon-ec2-utils",
            "//",
        ),
        (replace("/", "latest"), "root-versions", WARNING, "Ohai", "/"),
        (
            remove("/2009-04-04/meta-data/instance-id"),
            "old-version-missing",
            ERROR,
            "cloudbase-init",
            "2009-04-04",
        ),
        (
            replace(f"{LIST}/instance-id/x", b"", status=500),
            "server-error",
            WARNING,
            "cloud-init",
            "instance-id/x",
        ),
        (replace(LIST, b"", status=301), "redirect", WARNING, "botocore", LIST),
        (
            replace(f"{LIST}/hostname", "web-1", delay_s=0.45),
            "slow",
            WARNING,
            "New Relic",
            "hostname",
        ),
        (replace(f"{LIST}/hostname", "web-1", delay_s=1.4), "slow", ERROR, "botocore", "hostname"),
        (without_length, "close-delimited", ERROR, "awscrt", "/"),
        (
            lambda server: setattr(server, "version", "HTTP/1.0"),
            "close-delimited",
            ERROR,
            "awscrt",
            "/",
        ),
        (replace(f"{LIST}/hostname", "web-1", length=9), "cut-off", ERROR, "19 of 29", "hostname"),
        (
            replace("/latest/user-data", b"#!/bin/sh\n" + b"x" * (2 << 20)),
            "large",
            WARNING,
            "boot",
            "user-data",
        ),
        (token(b"", status=403), "token-refused", ERROR, "Ansible", "token"),
        (token(b"", status=405), "token-refused", ERROR, "Ignition", "token"),
        (token(b"", status=400), "token-refused", ERROR, "botocore", "token"),
        (token(b"", headers=TTL), "token-empty", ERROR, "botocore", "token"),
        (token(b"abc\n", headers=TTL), "token-form", ERROR, "every client", "token"),
        (token(b"abc"), "token-ttl-missing", ERROR, "Go", "token"),
        (token(b"<html>\n</html>", status=404), "token-error-body", WARNING, "elastic", "token"),
        (everywhere("Metadata-Flavor", "Google"), "google-flavor", ERROR, "google-auth", "/"),
        (
            replace("/computeMetadata/v1/instance/id", "1"),
            "foreign-cloud",
            WARNING,
            "google-auth",
            "computeMetadata",
        ),
        (replace("/openstack", b"", status=401), "openstack-refused", ERROR, "Ignition", "/open"),
        (replace("/openstack", b"", status=500), "openstack-probe", ERROR, "once", "/openstack"),
        (replace("/openstack", b"", status=503), "openstack-not-ready", WARNING, "cloud", "/open"),
        (replace("/openstack", "latest"), "openstack-versions", WARNING, "heat", "/openstack"),
        (
            replace(f"{OPENSTACK}/meta_data.json", "[]"),
            "meta-data-unreadable",
            ERROR,
            "cloud-init",
            "meta_data",
        ),
        (
            document(f"{OPENSTACK}/meta_data.json", uuid=None),
            "meta-data-incomplete",
            ERROR,
            "cloud-init",
            "meta_data",
        ),
        (
            document(f"{OPENSTACK}/meta_data.json", random_seed="!"),
            "random-seed",
            ERROR,
            "cloud-init",
            "meta_data",
        ),
        (
            document(f"{OPENSTACK}/meta_data.json", keys={}),
            "meta-data-member",
            ERROR,
            "cloudbase-init",
            "meta_data",
        ),
        (
            replace(f"{OPENSTACK}/vendor_data.json", "#cloud-config"),
            "json-unreadable",
            ERROR,
            "cloud-init",
            "vendor_data.json",
        ),
        (
            remove("/openstack/content/0000"),
            "content-unreadable",
            ERROR,
            "cloudbase-init",
            "content/0000 (404)",
        ),
        (
            remove("/openstack/2013-04-04/password"),
            "password",
            WARNING,
            "cloudbase-init",
            "password",
        ),
        (
            document(f"{OPENSTACK}/network_data.json", networks=[{"id": "n", "link": "lost"}]),
            "link-missing",
            ERROR,
            "cloud-init",
            "network_data",
        ),
        (
            document(
                f"{OPENSTACK}/network_data.json",
                links=[
                    {"id": "i0", "ethernet_mac_address": MAC},
                    {"id": "v", "type": "vlan", "vlan_link": "lost"},
                ],
            ),
            "link-missing",
            ERROR,
            "cloud-init",
            "network_data",
        ),
        (
            document(f"{OPENSTACK}/network_data.json", links=[{"id": "i0", "type": "phy"}]),
            "link-without-mac",
            ERROR,
            "cloudbase-init",
            "network_data",
        ),
        (
            document(
                f"{OPENSTACK}/network_data.json",
                links=[{"id": "i0", "ethernet_mac_address": MAC}] * 2,
            ),
            "link-twice",
            ERROR,
            "cloud-init",
            "network_data",
        ),
        (
            document(f"{OPENSTACK}/network_data.json", links=[], networks=[]),
            "network-data-empty",
            ERROR,
            "cloud-init",
            "network_data",
        ),
        (remove("/nocloud/vendor-data"), "nocloud-missing", WARNING, "NoCloud", "vendor-data"),
        (remove("/nocloud/user-data"), "nocloud-missing", ERROR, "NoCloud", "user-data"),
        (
            replace("/nocloud/meta-data", "hostname: x"),
            "nocloud-instance-id",
            ERROR,
            "NoCloud",
            "meta-data",
        ),
        (
            replace(f"{OPENSTACK}/user_data", "hello"),
            "user-data-header",
            WARNING,
            "cloud-init",
            "user_data",
        ),
        (
            replace(f"{OPENSTACK}/user_data", base64.b64encode(DATA.encode())),
            "user-data-header",
            WARNING,
            "cloud-init",
            "user_data",
        ),
        (
            replace(f"{OPENSTACK}/user_data", gzip.compress(b"hello")),
            "user-data-header",
            WARNING,
            "cloud-init",
            "user_data",
        ),
        (
            replace(f"{OPENSTACK}/user_data", "#!/bin/sh\r\nx\r\n"),
            "user-data-crlf",
            WARNING,
            "cloud-init",
            "user_data",
        ),
        (replace(f"{OPENSTACK}/user_data", b""), "user-data-empty", NOTE, "", "user_data"),
    ],
)
def test_a_fault_is_found_with_who_suffers_and_where(
    worsen: Worsen, code: str, severity: Severity, client: str, path: str
) -> None:
    server = MetadataServer()
    worsen(server)

    finding = found(server)[code]

    assert finding.severity is severity
    assert client in "; ".join(finding.clients)
    assert any(path in one for one in finding.paths)
    assert finding.change
    assert finding.what


def test_a_server_without_a_fault_has_none() -> None:
    assert found(MetadataServer(), Surroundings(macs=frozenset({MAC}))) == {}


def test_a_server_with_good_tokens_has_none_either() -> None:
    server = MetadataServer(token=Reply(b"abc", headers=TTL))

    assert found(server) == {}


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        "  \n#cloud-config\n",
        "#!/bin/sh\n",
        "#include https://example.org/x\n",
        "## template: jinja\n#cloud-config\n",
        "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n",
        "From: x\nMIME-Version: 1.0\n",
        '{"ignition": {"version": "3.4.0"}}',
        "#ps1_sysnative\n",
        "<powershell>\n",
    ],
)
def test_user_data_that_somebody_understands_is_no_finding(data: str) -> None:
    for body in (data.encode(), gzip.compress(data.encode())):
        server = MetadataServer()
        replace(f"{OPENSTACK}/user_data", body)(server)
        assert found(server) == {}


def test_a_mac_that_no_card_has_is_found_in_every_dialect() -> None:
    around = Surroundings(macs=frozenset({"52:54:00:ff:ff:ff"}))
    server = MetadataServer()
    assert found(server, around)["mac-mismatch"].severity is ERROR
    assert MAC in found(server, around)["mac-mismatch"].what

    remove(f"{OPENSTACK}/network_data.json")(server)
    assert found(server, around) == {}
    replace("/nocloud/network-config", f'{{"match": {{"macaddress": "{MAC}"}}}}')(server)
    assert found(server, around)["mac-mismatch"].paths == ("/nocloud/network-config",)
    replace("/nocloud/network-config", "")(server)
    replace(LIST, "hostname\ninstance-id\nmac")(server)
    replace(f"{LIST}/mac", MAC)(server)
    assert found(server, around)["mac-mismatch"].severity is WARNING


def test_a_zone_that_some_clients_make_another_region_of_is_noted() -> None:
    server = MetadataServer()
    replace(f"{LIST}/placement", "availability-zone\nregion")(server)
    replace(f"{LIST}/placement/region", "az1")(server)
    note = found(server)["region-of-zone"]
    assert (note.severity, note.clients) == (Severity.NOTE, ("botocore and the AWS CLI",))
    assert "take az" in note.what
    replace(f"{LIST}/placement/region", "az")(server)
    assert "region-of-zone" not in found(server)


def test_a_server_that_knows_nobody_serves_nothing() -> None:
    assert found(MetadataServer(replies={}))["nothing-served"].severity is ERROR


class Required(MetadataServer):
    """Gives EC2's documents only for a token."""

    def fetch(self, ask: Ask) -> Answered:
        if ask.path.startswith(("/latest/meta", "/2009")) and not ask.headers:
            return Answer(401)
        return super().fetch(ask)


def test_tokens_that_are_required_are_used_and_noted() -> None:
    findings = found(Required(token=Reply(b"abc", headers=TTL)))

    assert set(findings) == {"token-required"}
    assert findings["token-required"].severity is NOTE


def test_the_worst_comes_first() -> None:
    server = MetadataServer()
    replace(f"{OPENSTACK}/user_data", b"")(server)
    replace("/", "latest")(server)
    replace("/nocloud/meta-data", "x")(server)

    severities = [
        one.severity for one in examine(run_crawl(crawl(direct=True), server.fetch), NOWHERE)
    ]
    assert severities == [ERROR, WARNING, NOTE]


def test_every_code_has_its_texts_its_check_and_its_line_in_the_documents() -> None:
    source = REPOSITORY / "src/imdsproxy/core/doctor"
    codes = set(tomllib.loads((source / "findings.toml").read_text()))
    checks = "".join(page.read_text() for page in source.glob("*.py"))
    assert len(codes) > 35
    assert set(re.findall(r'found\(\s*"([a-z0-9-]+)"', checks)) == codes
    page = (REPOSITORY / "docs/being-found.md").read_text()
    assert {code for code in codes if f"`{code}`" not in page} == set()


class Refusing(MetadataServer):
    """Lets nobody in."""

    def fetch(self, ask: Ask) -> Answered:
        del ask
        return Answer(403)


def test_who_is_let_in_nowhere_is_told_that_alone() -> None:
    (finding,) = found(Refusing()).values()

    assert (finding.code, finding.severity) == ("refused", ERROR)
    assert "imdsproxy explain" in finding.change


def test_the_daemons_own_word_on_another_mac_is_told() -> None:
    around = Surroundings(verdict="mismatch", why=("web-1 has MAC a", "the packet came from b"))

    (finding,) = found(Refusing(), around).values()
    assert (finding.code, finding.severity) == ("mac-mismatch", ERROR)
    assert finding.what == "web-1 has MAC a; the packet came from b"
    around = Surroundings(verdict="unknown", why=("nobody has the address",))
    served = found(MetadataServer(replies={}), around)["nothing-served"]
    assert "nobody has the address" in served.what


class Silent(MetadataServer):
    """Says nothing on one path."""

    where = "/openstack/2018-08-27/vendor_data.json"
    timed_out = True

    def fetch(self, ask: Ask) -> Answered:
        if ask.path == self.where:
            return Unanswered("nothing", timed_out=self.timed_out)
        return super().fetch(ask)


def test_silence_on_one_path_is_found() -> None:
    finding = found(Silent())["no-answer"]

    assert finding.severity is ERROR
    assert finding.paths == (Silent.where,)
    assert "cloudbase-init" in finding.clients[0]


def test_a_connection_that_ends_below_a_leaf_is_less() -> None:
    server = Silent()
    server.where, server.timed_out = "/latest/meta-data/instance-id/x", False

    finding = found(server)["no-answer"]
    assert finding.severity is WARNING
    assert "29 clients" in finding.clients[0]
