"""Each fault that a server can have, put into one that has none: the doctor finds that one; and what it asks."""

import base64
import gzip
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from imdsproxy.model.entities import Dialect
from imdsproxy.tools.doctor import (
    GOOGLE,
    TOKEN,
    Answer,
    Finding,
    Nic,
    Severity,
    Surroundings,
    crawl,
)
from imdsproxy.tools.doctor.checks_documents import check_smbios, examine
from support.demonstration import REPOSITORY
from support.metadata_server import GOOD, MetadataServer, Reply

MAC = "52:54:00:12:34:56"
NOWHERE = Surroundings()
OPENSTACK = "/openstack/2018-08-27"
META, NETWORK, USER = (
    f"{OPENSTACK}/{name}" for name in ("meta_data.json", "network_data.json", "user_data")
)
LIST = "/latest/meta-data"
ZONE = f"{LIST}/placement/availability-zone"
NIC = {"id": "i0", "ethernet_mac_address": MAC}
TTL = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
DATA = "#cloud-config\n{}\n"
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE


def found(server: MetadataServer, around: Surroundings = NOWHERE) -> dict[str, Finding]:
    return {one.code: one for one in examine(crawl(server.fetch, direct=True), around)}


def server(changes: Mapping[str, Reply | None] | None = None, **more: Any) -> MetadataServer:
    """A server without a fault but for these replies; `None` takes a path away."""
    replies = {**GOOD, **(changes or {})}
    return MetadataServer(replies={path: one for path, one in replies.items() if one}, **more)


SILENCE = Answer(why="nothing")


def silent(path: str, *, timed_out: bool = False) -> MetadataServer:
    return MetadataServer(instead={path: Answer(why="nothing", timed_out=timed_out)})


_ALSO = {
    "key-listing-form": "empty-directory",
    "openstack-probe": "server-error",
    "openstack-not-ready": "server-error",
}
"""What these faults are as well."""


def document(path: str, **members: object) -> Mapping[str, Reply]:
    """Changes members of a JSON document; `None` takes one away."""
    changed = {**json.loads(GOOD[path].body), **members}
    kept = {name: value for name, value in changed.items() if value is not None}
    return {path: Reply(json.dumps(kept).encode())}


@pytest.mark.parametrize(
    ("broken", "code", "path"),
    [
        (server({LIST: Reply(b"hostname\nami-id")}), "listed-missing", "ami-id (404)"),
        (server({f"{LIST}/hostname": Reply(status=500)}), "listed-missing", "hostname (500)"),
        (server({LIST: Reply(b"hostname\n")}), "listing-newline", LIST),
        (server({f"{LIST}/hostname": Reply(b"web-1\n")}), "leaf-newline", "hostname"),
        (server({f"{LIST}/tags/instance": Reply()}), "empty-directory", "instance/"),
        (server({f"{LIST}/public-keys": Reply(b"0=a=b")}), "key-name-equals", "keys"),
        (server({f"{LIST}/public-keys": Reply(b"ssh-ed25519 AAAA me")}), "key-listing-form", "public-keys"),
        (server({f"{LIST}/tags/instance": Reply(b"my key"), f"{LIST}/tags/instance/my key": Reply(b"x")}),
         "tag-characters", "my key"),
        (server({"/latest//meta-data/instance-id": Reply(status=404)}), "double-slash", "//"),
        (server({"/": Reply(b"latest")}), "root-versions", "/"),
        (server({"/2009-04-04/meta-data/instance-id": None}), "old-version-missing", "2009-04-04"),
        (server({f"{LIST}/instance-id/x": Reply(status=500)}), "server-error", "instance-id/x"),
        (server({LIST: Reply(status=301)}), "redirect", LIST),
        (server({path: Reply(one.body, length=-1) for path, one in GOOD.items()}), "close-delimited", "/"),
        (server(version="HTTP/1.0"), "close-delimited", "/"),
        (server({f"{LIST}/hostname": Reply(b"web-1", length=9)}), "cut-off", "hostname"),
        (server({"/latest/user-data": Reply(b"#!/bin/sh\n" + b"x" * (2 << 20))}), "large", "user-data"),
        (server(token=Reply(headers=TTL)), "token-empty", "token"),
        (server(token=Reply(b"abc\n", headers=TTL)), "token-form", "token"),
        (server(token=Reply(b"abc")), "token-ttl-missing", "token"),
        (server(token=Reply(b"<html>\n</html>", 404)), "token-error-body", "token"),
        (server(everywhere={"Metadata-Flavor": "Google"}), "google-flavor", "/"),
        (server({"/openstack": Reply(status=401)}), "openstack-refused", "/openstack"),
        (server({"/openstack": Reply(status=500)}), "openstack-probe", "/openstack"),
        (server({"/openstack": Reply(status=503)}), "openstack-not-ready", "/openstack"),
        (server({"/openstack": Reply(b"latest")}), "openstack-versions", "/openstack"),
        (server({META: Reply(b"[]")}), "meta-data-unreadable", "meta_data"),
        (server(document(META, uuid=None)), "meta-data-incomplete", "meta_data"),
        (server(document(META, random_seed="!")), "random-seed", "meta_data"),
        (server(document(META, keys={})), "meta-data-member", "meta_data"),
        (server({f"{OPENSTACK}/vendor_data.json": Reply(b"#cloud-config")}), "json-unreadable", "vendor_data.json"),
        (server({"/openstack/content/0000": None}), "content-unreadable", "content/0000 (404)"),
        (server({"/openstack/2013-04-04/password": None}), "password", "password"),
        (server(document(NETWORK, networks=[{"id": "n", "link": "lost"}])), "link-missing", "network_data"),
        (server(document(NETWORK, links=[NIC, {"id": "v", "type": "vlan", "vlan_link": "lost"}])),
         "link-missing", "network_data"),
        (server(document(NETWORK, links=[{"id": "i0", "type": "phy"}])), "link-without-mac", "network_data"),
        (server(document(NETWORK, links=[NIC, NIC])), "link-twice", "network_data"),
        (server(document(NETWORK, links=[NIC | {"id": ["l"]}])), "link-missing", "network_data"),
        (server(document(NETWORK, links=[NIC, NIC | {"id": "v", "type": {}}, NIC | {"id": {}, "type": []}],
                         networks=[{"link": ["l"]}])), "link-missing", "network_data"),
        (server(document(NETWORK, links=[], networks=[])), "network-data-empty", "network_data"),
        (server({"/nocloud/vendor-data": None}), "nocloud-missing", "vendor-data"),
        (server({"/nocloud/meta-data": Reply(b"hostname: x")}), "nocloud-instance-id", "meta-data"),
        (server({USER: Reply(b"hello")}), "user-data-header", "user_data"),
        (server({USER: Reply(base64.b64encode(DATA.encode()))}), "user-data-header", "user_data"),
        (server({USER: Reply(gzip.compress(b"hello"))}), "user-data-header", "user_data"),
        (server({USER: Reply(b"#!/bin/sh\r\nx\r\n")}), "user-data-crlf", "user_data"),
        (server({USER: Reply()}), "user-data-empty", "user_data"),
        (silent(f"{OPENSTACK}/vendor_data.json"), "no-answer", f"{OPENSTACK}/vendor_data.json"),
    ],
)  # fmt: skip
def test_a_fault_is_found_with_its_place_and_nothing_else(
    broken: MetadataServer, code: str, path: str
) -> None:
    findings = found(broken)
    assert set(findings) == {code, *([_ALSO[code]] if code in _ALSO else [])}
    finding = findings[code]
    assert any(path in one for one in finding.paths)
    assert finding.change
    assert finding.what


@pytest.mark.parametrize("token", [Reply(status=404), Reply(b"abc", headers=TTL)])
def test_a_server_without_a_fault_has_none(token: Reply) -> None:
    assert found(server(token=token), Surroundings(macs=frozenset({MAC}))) == {}


@pytest.mark.parametrize(
    "data",
    [
        DATA, "  \n#cloud-config\n", "#!/bin/sh\n", "#include https://example.org/x\n",
        "## template: jinja\n#cloud-config\n", "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n",
        "From: x\nMIME-Version: 1.0\n", '{"ignition": {"version": "3.4.0"}}', "#ps1_sysnative\n", "<powershell>\n",
    ],
)  # fmt: skip
def test_user_data_that_a_client_understands_is_no_finding(data: str) -> None:
    for body in (data.encode(), gzip.compress(data.encode())):
        assert found(server({USER: Reply(body)})) == {}


OTHER = Surroundings(macs=frozenset({"52:54:00:ff:ff:ff"}))
UNNAMED: Mapping[str, Reply | None] = {NETWORK: None}
MATCH = json.dumps({"match": {"macaddress": MAC}}).encode()


@pytest.mark.parametrize(
    ("changes", "paths", "severity"),
    [
        ({}, (NETWORK,), ERROR),
        (UNNAMED, (), None),
        ({**UNNAMED, "/nocloud/network-config": Reply(MATCH)}, ("/nocloud/network-config",), ERROR),
        ({**UNNAMED, LIST: Reply(b"hostname\nmac"), f"{LIST}/mac": Reply(MAC.encode())}, (f"{LIST}/mac",), WARNING),
    ],
)  # fmt: skip
def test_a_mac_that_no_nic_has_is_found_in_every_dialect(
    changes: Mapping[str, Reply | None], paths: tuple[str, ...], severity: Severity | None
) -> None:
    findings = [one for one in found(server(changes), OTHER).values() if "mac" in one.code]
    assert [(one.paths, one.severity) for one in findings] == ([(paths, severity)] if paths else [])
    assert all(MAC in one.what for one in findings)


@pytest.mark.parametrize(
    ("nics", "code"),
    [
        ([Nic("red", MAC, frozenset({MAC}))], None),
        ([Nic("red", MAC, frozenset({"52:54:00:ff:ff:ff"}))], "mac-mismatch"),
        ([Nic("red", "52:54:00:ff:ff:ff", frozenset({"52:54:00:ff:ff:ff"})), Nic("blue", MAC)], "nic-not-seen"),
        ([Nic("red", MAC)], None),
    ],
)  # fmt: skip
def test_the_hosts_own_view_of_macs_counts_where_the_guests_is_not_known(
    nics: list[Nic], code: str | None
) -> None:
    findings = found(server(), Surroundings(nics=tuple(nics)))
    assert set(findings) == ({code} if code else set())
    assert all(MAC in one.what for one in findings.values())


def test_a_zone_from_which_some_clients_derive_another_region_is_noted() -> None:
    placement = {f"{LIST}/placement": Reply(b"availability-zone\nregion")}
    note = found(server({**placement, f"{LIST}/placement/region": Reply(b"az1")}))["region-of-zone"]
    assert (note.severity, note.clients) == (NOTE, ("botocore and the AWS CLI",))
    assert "use az" in note.what
    fine = found(server({**placement, f"{LIST}/placement/region": Reply(b"az")}))
    assert "region-of-zone" not in fine


@pytest.mark.parametrize(
    ("broken", "code", "severity", "client"),
    [
        (server({f"{LIST}/hostname": Reply(b"web-1", delay_s=0.45)}), "slow", WARNING, "New Relic"),
        (server({f"{LIST}/hostname": Reply(b"web-1", delay_s=1.4)}), "slow", ERROR, "botocore"),
        (server({"/latest/user-data/": Reply(status=404)}), "trailing-slash", ERROR, "Ohai"),
        (server({f"{ZONE}/": Reply(status=404)}), "trailing-slash", ERROR, "botocore"),
        (server(token=Reply(status=403)), "token-refused", ERROR, "Ansible"),
        (server(token=Reply(status=405)), "token-refused", ERROR, "Ignition"),
        (server(token=Reply(status=400)), "token-refused", ERROR, "botocore"),
        (server({"/computeMetadata/v1/instance/id": Reply(b"1")}), "foreign-cloud", WARNING, "google-auth"),
        (server({"/nocloud/vendor-data": None}), "nocloud-missing", WARNING, "NoCloud"),
        (server({"/nocloud/user-data": None}), "nocloud-missing", ERROR, "NoCloud"),
        (silent(f"{OPENSTACK}/vendor_data.json", timed_out=True), "no-answer", ERROR, "cloudbase-init"),
        (silent(f"{LIST}/instance-id/x"), "no-answer", WARNING, "29 clients"),
    ],
)  # fmt: skip
def test_how_bad_a_fault_is_and_for_whom_depends_on_what_was_seen(
    broken: MetadataServer, code: str, severity: Severity, client: str
) -> None:
    finding = found(broken)[code]
    assert finding.severity is severity
    assert client in "; ".join(finding.clients)
    assert finding.paths


def test_tokens_that_are_required_are_used_and_noted() -> None:
    refusals = {"/latest/meta": Answer(401), "/2009": Answer(401)}
    findings = found(server(token=Reply(b"abc", headers=TTL), instead=refusals))
    assert {code: one.severity for code, one in findings.items()} == {"token-required": NOTE}


def test_the_worst_comes_first() -> None:
    broken = server({USER: Reply(), "/": Reply(b"latest"), "/nocloud/meta-data": Reply(b"x")})
    assert [one.severity for one in found(broken).values()] == [ERROR, WARNING, NOTE]


def test_every_code_has_its_texts_its_check_and_its_line_in_the_documents() -> None:
    source = REPOSITORY / "src/imdsproxy/tools/doctor"
    codes = set(tomllib.loads((source / "findings.toml").read_text()))
    assert len(codes) > 35
    checks = "".join(page.read_text() for page in source.glob("*.py"))
    assert {code for code in codes if f'"{code}"' not in checks} == set()
    page = (REPOSITORY / "docs/how-to/being-found.md").read_text()
    assert {code for code in codes if f"`{code}`" not in page} == set()


@pytest.mark.parametrize(
    ("around", "code", "text"),
    [
        (NOWHERE, "refused", "the server answers every request with 403"),
        (Surroundings(verdict="mismatch", why=("web-1 has MAC a", "it came from b")), "mac-mismatch",
         "web-1 has MAC a; it came from b"),
    ],
)  # fmt: skip
def test_a_guest_that_is_always_refused_gets_that_alone_with_the_daemons_reason(
    around: Surroundings, code: str, text: str
) -> None:
    (finding,) = examine(crawl(lambda _: Answer(403), direct=True), around)
    assert (finding.code, finding.severity, finding.what) == (code, ERROR, text)


def test_a_server_that_does_not_know_the_guest_serves_nothing() -> None:
    around = Surroundings(verdict="unknown", why=("no record has the address",))
    nothing = found(MetadataServer(replies={}), around)["nothing-served"]
    assert nothing.severity is ERROR
    assert "no record has the address" in nothing.what


def test_without_an_answer_at_the_root_nothing_is_found_about_versions() -> None:
    old = server({"/2009-04-04/meta-data/instance-id": None})
    findings = examine(
        crawl(lambda ask: SILENCE if ask.path == "/" else old.fetch(ask), direct=True), NOWHERE
    )
    assert {one.code for one in findings} == {"no-answer"}


# What is asked


def test_nothing_is_asked_twice() -> None:
    asked_of = server()
    done = crawl(asked_of.fetch, direct=True)
    asked = [(method, path, tuple(headers.items())) for method, path, headers in asked_of.asked]
    assert len(asked) == len(set(asked)) == len(done.asked)
    assert done.served == list(Dialect)
    assert ("PUT", TOKEN.path, TOKEN.headers) in asked
    assert ("GET", "/", GOOGLE.headers) in asked


def test_the_daemon_is_asked_only_what_it_can_say() -> None:
    asked_of = server()
    crawl(asked_of.fetch, direct=False)
    assert {(method, *headers) for method, _, headers in asked_of.asked} == {("GET",)}
    assert not any("computeMetadata" in path for _, path, _ in asked_of.asked)


def test_every_listed_leaf_is_read_and_no_credentials() -> None:
    asked_of = server({LIST: Reply(b"a/\nb\niam/"), f"{LIST}/a": Reply(b"c")})
    crawl(asked_of.fetch, direct=False)
    paths = {path for _, path, _ in asked_of.asked}
    assert {f"{LIST}/a/c", f"{LIST}/b"} <= paths
    assert not any("iam" in path for path in paths)


def test_cloud_inits_newest_version_and_the_latest_tree_or_else_an_old_one_are_taken() -> None:
    listed = server({"/openstack": Reply(b"2013-04-04\n2012-08-10\n2099-01-01\nlatest")})
    assert crawl(listed.fetch, direct=False).version == "2013-04-04"
    old = server({path: None for path in GOOD if path.startswith("/latest")})
    assert crawl(old.fetch, direct=False).base == "/2009-04-04"


@pytest.mark.parametrize(
    ("answer", "most", "why"),
    [(SILENCE, 3, "nothing"), (Answer(200, body=b"a/\nb/\nc/\nd/"), 600, "")],
)
def test_a_server_that_is_not_there_or_a_tree_without_end_is_not_asked_for_long(
    answer: Answer, most: int, why: str
) -> None:
    done = crawl(lambda _: answer, direct=True)
    assert len(done.asked) <= most
    assert done.given_up
    assert why in done.given_up


QEMU = Surroundings(dmi={"sys_vendor": "QEMU", "product_name": "Standard PC"})
NOVA = replace(QEMU, dmi={"product_name": "OpenStack Nova"})


@pytest.mark.parametrize(
    ("around", "found"),
    [
        (NOVA, None),
        (replace(QEMU, kernel="ds=nocloud;s=http://169.254.169.254/nocloud/"), None),
        (replace(QEMU, sources=("OpenStack", "None")), None),
        (replace(QEMU, environment={"product_name": "OpenStack Nova"}, container=True), None),
        (Surroundings(), None),
        (QEMU, ("smbios-mismatch", "error")),
        (replace(NOVA, container=True), ("smbios-mismatch", "error")),
        (replace(NOVA, kernel="ds=None"), ("smbios-mismatch", "error")),
        (replace(NOVA, kernel="ds=OpenStack ds=None"), ("smbios-mismatch", "error")),
        (replace(NOVA, sources=()), ("smbios-mismatch", "error")),
        (Surroundings(dmi={}), ("smbios-mismatch", "error")),
        # A serial number that may not be read leaves it open.
        (replace(QEMU, dmi_complete=False), ("smbios-unreadable", "note")),
    ],
)
def test_a_guest_asks_for_what_is_served_or_that_is_an_error(
    around: Surroundings, found: tuple[str, str] | None
) -> None:
    done = crawl(MetadataServer().fetch, direct=True)
    findings = [(one.code, one.severity.value) for one in check_smbios(done, around)]
    assert findings == ([found] if found else [])


def test_a_guest_that_asks_for_what_is_not_served_is_an_error() -> None:
    server = MetadataServer()
    server.replies = {path: one for path, one in server.replies.items() if "/nocloud" in path}
    (finding,) = check_smbios(crawl(server.fetch, direct=True), NOVA)
    assert finding.code == "smbios-mismatch"
