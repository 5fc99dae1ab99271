from __future__ import annotations

import base64
import json

import pytest

from imdsproxy.core.documents.openstack import OPENSTACK_VERSIONS
from imdsproxy.core.model import Dialect, SshKey
from support.guest_records import GUEST, SEED, Guest, guest, header, port


def test_openstack_lists_its_versions_with_and_without_a_slash() -> None:
    expected = "\n".join((*OPENSTACK_VERSIONS, "latest"))
    assert Guest().text("/openstack") == expected
    assert Guest().text("/openstack/") == expected
    assert "2018-08-27" in expected


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("2012-08-10", "meta_data.json user_data"),
        ("2013-04-04", "meta_data.json user_data password"),
        ("2013-10-17", "meta_data.json user_data password vendor_data.json"),
        ("2015-10-15", "meta_data.json user_data password vendor_data.json network_data.json"),
        ("2016-06-30", "meta_data.json user_data password vendor_data.json network_data.json"),
        (
            "2016-10-06",
            "meta_data.json user_data password vendor_data.json network_data.json vendor_data2.json",
        ),
        (
            "latest",
            "meta_data.json user_data password vendor_data.json network_data.json vendor_data2.json",
        ),
    ],
)
def test_a_version_has_the_files_that_nova_gives_it(version: str, names: str) -> None:
    asked = Guest()
    assert asked.lines(f"/openstack/{version}") == names.split()
    for name in ("password", "vendor_data.json", "network_data.json", "vendor_data2.json"):
        expected = 200 if name in names.split() else 404
        assert asked.status(f"/openstack/{version}/{name}") == expected


COMMON = {
    "uuid",
    "meta",
    "public_keys",
    "keys",
    "hostname",
    "name",
    "launch_index",
    "availability_zone",
}


@pytest.mark.parametrize(
    ("version", "more"),
    [
        ("2012-08-10", set()),
        ("2013-04-04", {"random_seed"}),
        ("2013-10-17", {"random_seed"}),
        ("2015-10-15", {"random_seed", "project_id"}),
        ("2016-06-30", {"random_seed", "project_id", "devices"}),
        ("2016-10-06", {"random_seed", "project_id", "devices"}),
        ("2017-02-22", {"random_seed", "project_id", "devices"}),
        ("2018-08-27", {"random_seed", "project_id", "devices"}),
        ("2020-10-14", {"random_seed", "project_id", "devices", "dedicated_cpus"}),
        ("2025-04-04", {"random_seed", "project_id", "devices", "dedicated_cpus"}),
        ("latest", {"random_seed", "project_id", "devices", "dedicated_cpus"}),
    ],
)
def test_meta_data_has_the_fields_of_its_version(version: str, more: set[str]) -> None:
    assert set(Guest().json(f"/openstack/{version}/meta_data.json")) == COMMON | more


def test_meta_data_says_who_the_guest_is() -> None:
    assert Guest().json("/openstack/latest/meta_data.json") == {
        "uuid": GUEST.uuid,
        "meta": {"role": "web", "tier": "1"},
        "public_keys": {"alice": "ssh-ed25519 AAAAC3 alice@example.org"},
        "keys": [{"name": "alice", "type": "ssh", "data": "ssh-ed25519 AAAAC3 alice@example.org"}],
        "hostname": "web.example.org",
        "name": "web",
        "launch_index": 0,
        "availability_zone": "eu-north-1b",
        "project_id": "p1",
        "devices": [],
        "dedicated_cpus": [],
        "random_seed": base64.b64encode(SEED).decode(),
    }


def test_meta_and_keys_are_absent_when_there_are_none() -> None:
    document = Guest(guest(tags=(), ssh_keys=())).json("/openstack/latest/meta_data.json")
    assert not {"meta", "public_keys", "keys"} & set(document)


def test_keys_of_one_name_are_all_there() -> None:
    asked = Guest(guest(ssh_keys=(SshKey("k", "ssh-rsa A"), SshKey("k", "ssh-rsa B"))))
    document = asked.json("/openstack/latest/meta_data.json")
    assert document["public_keys"] == {"k": "ssh-rsa A", "k-2": "ssh-rsa B"}


def test_a_fresh_seed_keeps_meta_data_out_of_caches() -> None:
    response = Guest().ask("/openstack/latest/meta_data.json")
    assert not response.cacheable
    assert header(response, b"content-type") == b"application/json"
    assert isinstance(response.body, bytes)
    assert header(response, b"content-length") == b"%d" % len(response.body)


def test_the_oldest_meta_data_has_no_seed_and_may_be_cached() -> None:
    assert Guest().ask("/openstack/2012-08-10/meta_data.json").cacheable


def test_user_data_is_exact_or_404() -> None:
    asked = Guest(guest(user_data=b"\x1f\x8b\x00\xff\n"))
    assert asked.read("/openstack/latest/user_data") == b"\x1f\x8b\x00\xff\n"
    none = Guest(guest(user_data=None))
    assert none.status("/openstack/latest/user_data") == 404
    assert "user_data" not in none.lines("/openstack/latest")


@pytest.mark.parametrize("version", OPENSTACK_VERSIONS)
def test_json_documents_are_json_by_their_type(version: str) -> None:
    asked = Guest(guest(vendor_data=b"#cloud-config\n"))
    names = [name for name in asked.lines(f"/openstack/{version}") if name.endswith(".json")]
    assert "meta_data.json" in names
    for name in names:
        response = asked.ask(f"/openstack/{version}/{name}")
        assert header(response, b"content-type") == b"application/json"
        json.loads(asked.read(f"/openstack/{version}/{name}"))


def test_vendor_data_is_an_empty_object_without_any() -> None:
    assert Guest().json("/openstack/latest/vendor_data.json") == {}
    assert Guest().json("/openstack/latest/vendor_data2.json") == {"static": {}}


def test_vendor_data_is_run_once_by_cloud_init() -> None:
    asked = Guest(guest(vendor_data=b"#cloud-config\nruncmd: []\n"))
    first = asked.json("/openstack/latest/vendor_data.json")
    assert first == {"cloud-init": "#cloud-config\nruncmd: []\n"}
    assert asked.json("/openstack/latest/vendor_data2.json") == {"static": first}


@pytest.mark.parametrize(
    "path",
    [
        "/openstack/2012-08-11",
        "/openstack/content",
        "/openstack/content/0000",
        "/openstack/latest/meta_data.json/x",
        "/openstack/latest/meta-data",
        "/openstack/1.0",
        "/2012-08-10",
    ],
)
def test_what_is_not_there_is_404(path: str) -> None:
    assert Guest().status(path) == 404


def test_network_data_is_404_and_unlisted_where_no_nic_could_be_matched() -> None:
    asked = Guest(guest(ports=(port(None),)))
    assert asked.status("/openstack/latest/network_data.json") == 404
    assert "network_data.json" not in asked.lines("/openstack/latest")


def test_with_the_dialect_off_everything_is_404_and_unlisted() -> None:
    asked = Guest(guest(dialects=frozenset({Dialect.NOCLOUD})))
    for path in ("/openstack", "/openstack/latest", "/openstack/latest/meta_data.json"):
        assert asked.status(path) == 404
    assert asked.status("/openstack/latest/password", "POST") == 404
    assert asked.text("/") == "nocloud/"
