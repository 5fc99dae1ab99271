from __future__ import annotations

import pytest

from imdsproxy.core.documents.ec2 import EC2_VERSIONS, permitted_tags, unique_names
from imdsproxy.core.model import Dialect, InstanceId, SshKey
from support.guest_records import BARE, GUEST, Guest, guest, header, port

META = "/latest/meta-data"


def test_the_root_lists_the_versions_and_ends_with_latest() -> None:
    lines = Guest().lines("/")
    assert lines == [*EC2_VERSIONS, "latest"]
    assert "2009-04-04" in lines


def test_a_version_lists_what_it_has() -> None:
    assert Guest().text("/latest") == "dynamic\nmeta-data\nuser-data"
    assert Guest(guest(user_data=None)).text("/latest") == "dynamic\nmeta-data"
    assert Guest().text("/2008-09-01") == "meta-data\nuser-data"


def test_meta_data_lists_leaves_and_directories_in_order() -> None:
    assert Guest().lines(META) == [
        "ami-id",
        "ami-launch-index",
        "ami-manifest-path",
        "block-device-mapping/",
        "hostname",
        "instance-action",
        "instance-id",
        "instance-type",
        "ipv6",
        "local-hostname",
        "local-ipv4",
        "mac",
        "network/",
        "placement/",
        "public-keys/",
        "reservation-id",
        "security-groups",
        "tags/",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instance-id", GUEST.ec2_id),
        ("hostname", "web.example.org"),
        ("local-hostname", "web.example.org"),
        ("local-ipv4", "10.0.0.5"),
        ("ipv6", "2001:db8::5"),
        ("mac", "fa:16:3e:00:00:01"),
        ("instance-type", "m1.small"),
        ("ami-launch-index", "0"),
        ("block-device-mapping", "ami\nroot"),
        ("block-device-mapping/ami", "vda"),
        ("block-device-mapping/root", "/dev/vda"),
        ("instance-action", "none"),
        ("placement/availability-zone", "eu-north-1b"),
        ("placement/region", "eu-north-1"),
        ("public-keys", "0=alice"),
        ("public-keys/0", "openssh-key"),
        ("public-keys/0/openssh-key", "ssh-ed25519 AAAAC3 alice@example.org"),
        ("tags", "instance/"),
        ("tags/instance", "role\ntier"),
        ("tags/instance/role", "web"),
        ("network/interfaces/macs", "fa:16:3e:00:00:01/"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/mac", "fa:16:3e:00:00:01"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/device-number", "0"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/local-ipv4s", "10.0.0.5"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/ipv6s", "2001:db8::5"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/owner-id", "p1"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/subnet-ipv4-cidr-block", "10.0.0.0/24"),
        ("network/interfaces/macs/fa:16:3e:00:00:01/subnet-ipv6-cidr-blocks", "2001:db8::/64"),
    ],
)
def test_a_leaf_says_its_value_and_nothing_else(name: str, value: str) -> None:
    assert Guest().text(f"{META}/{name}") == value


def test_an_id_in_ec2_form_is_used_as_it_is() -> None:
    assert Guest(guest(id=InstanceId("i-0abc"))).text(f"{META}/instance-id") == "i-0abc"


def test_the_reservation_id_has_ec2s_form() -> None:
    reservation = Guest().text(f"{META}/reservation-id")
    assert reservation == "r-0b57f5a46ff84ef58"


def test_user_data_is_binary_and_exact() -> None:
    data = b"\x1f\x8b\x08\x00\r\n\n\x00\xff"
    asked = Guest(guest(user_data=data))
    assert asked.read("/latest/user-data") == data
    assert header(asked.ask("/latest/user-data"), b"content-type") == b"application/octet-stream"
    assert header(asked.ask("/latest/user-data"), b"content-length") == b"9"


def test_no_user_data_is_404() -> None:
    assert Guest(guest(user_data=None)).status("/latest/user-data") == 404


def test_empty_user_data_is_served_empty() -> None:
    assert Guest(guest(user_data=b"")).read("/latest/user-data") == b""


def test_what_a_guest_does_not_have_is_neither_listed_nor_served() -> None:
    asked = Guest(
        guest(
            ports=(),
            ssh_keys=(),
            tags=(),
            availability_zone=None,
            instance_type=None,
            user_data=None,
        )
    )
    lines = asked.lines(META)
    for name in (
        "local-ipv4",
        "ipv6",
        "mac",
        "network",
        "placement",
        "public-keys",
        "tags",
        "instance-type",
    ):
        assert name not in {line.rstrip("/") for line in lines}
        assert asked.status(f"{META}/{name}") == 404


@pytest.mark.parametrize(
    "path",
    [
        "/2009-04-05/meta-data/",
        "/2099-01-01",
        "/latest/meta-data/instance-id/x",
        "/latest/meta-data/security-groups/default",
        "/latest/meta-data/public-ipv4",
        "/latest/meta-data/iam/security-credentials/",
        "/latest/meta-data/block-device-mapping/swap",
        "/latest/meta-data/services/domain",
        "/latest/meta-data/public-keys/0=alice",
        "/latest/meta-data/public-keys/1",
        "/latest/api",
        "/latest/dynamic/instance-identity/document",
        "/computeMetadata/v1/",
        "/metadata/instance",
        "/opc/v1/instance/",
        "/latest/meta-data/%00",
        "/latest%2fmeta-data",
    ],
)
def test_what_is_not_there_is_404_without_a_body(path: str) -> None:
    response = Guest().ask(path)
    assert (response.status, response.body) == (404, b"")
    assert header(response, b"content-length") == b"0"


@pytest.mark.parametrize(
    ("zone", "region"),
    [
        ("eu-north-1b", "eu-north-1"),
        ("EU-NORTH-1b", "EU-NORTH-1"),
        ("europe-west4-a", "europe-west4"),
        ("eu-north-1", "eu-north-1"),
        ("zone-red", "zone-red"),
        ("nova", "nova"),
        ("rack7", "rack7"),
        ("b", "b"),
    ],
)
def test_a_zone_that_is_not_named_after_its_region_is_one(zone: str, region: str) -> None:
    asked = Guest(guest(availability_zone=zone))
    assert asked.text(f"{META}/placement") == "availability-zone\nregion"
    assert asked.text(f"{META}/placement/region") == region


@pytest.mark.parametrize("zone", ["eu-north-1b", "zone-red", None])
def test_the_region_of_the_settings_is_that_of_every_zone(zone: str | None) -> None:
    asked = Guest(guest(availability_zone=zone), region="red-1")
    assert asked.text(f"{META}/placement/region") == "red-1"


@pytest.mark.parametrize(
    ("version", "name", "there"),
    [
        ("1.0", "instance-id", True),
        ("1.0", "local-hostname", False),
        ("2007-01-19", "local-hostname", True),
        ("2007-03-01", "instance-type", False),
        ("2007-08-29", "instance-type", True),
        ("2007-10-10", "block-device-mapping/root", False),
        ("2007-12-15", "block-device-mapping/root", True),
        ("2007-12-15", "placement", False),
        ("2008-02-01", "placement/availability-zone", True),
        ("2009-04-04", "mac", False),
        ("2009-04-04", "public-keys/0/openssh-key", True),
        ("2011-01-01", "network/interfaces/macs/fa:16:3e:00:00:01/mac", True),
        ("2019-10-01", "placement/region", False),
        ("2020-10-27", "placement/region", True),
        ("2020-10-27", "ipv6", False),
        ("2021-01-03", "tags/instance", False),
        ("2021-03-23", "tags/instance/role", True),
        ("2022-09-24", "tags/instance/role", True),
    ],
)
def test_a_dated_version_has_what_it_had_then(version: str, name: str, there: bool) -> None:  # noqa: FBT001 - a table's column
    assert Guest().status(f"/{version}/meta-data/{name}") == (200 if there else 404)


def test_cloud_init_with_amazons_dmi_finds_an_empty_identity() -> None:
    assert Guest().read("/latest/dynamic/instance-identity") == b""
    assert Guest().text("/latest/dynamic/") == "instance-identity/"


def test_each_interface_with_a_mac_is_listed_once() -> None:
    ports = (
        port(),
        port(None, ["10.0.0.9"]),
        port("fa:16:3e:00:00:02", ["10.9.0.1", "10.9.0.2"], network=BARE),
        port("fa:16:3e:00:00:01", []),
    )
    asked = Guest(guest(ports=ports))
    macs = f"{META}/network/interfaces/macs"
    assert asked.lines(macs) == ["fa:16:3e:00:00:01/", "fa:16:3e:00:00:02/"]
    assert asked.lines(f"{macs}/fa:16:3e:00:00:02/local-ipv4s") == ["10.9.0.1", "10.9.0.2"]
    assert asked.text(f"{macs}/fa:16:3e:00:00:02/device-number") == "2"
    assert asked.status(f"{macs}/fa:16:3e:00:00:02/subnet-ipv4-cidr-block") == 404
    assert asked.text(f"{META}/local-ipv4") == "10.0.0.5"


def test_only_tags_that_ec2_permits_are_listed() -> None:
    tags = {
        "Name": "a",
        "with space": "b",
        "slash/ed": "c",
        ".": "d",
        "..": "e",
        "_index": "f",
        "ümlaut": "g",
        "a+b-c=d.e,f_g:h@i": "h",
        "": "i",
        "empty": "",
        "tail\n": "j",
    }
    assert permitted_tags(tags.items()) == {"Name": "a", "a+b-c=d.e,f_g:h@i": "h", "empty": ""}


@pytest.mark.parametrize("name", ["0=x", "-1=y", "a=b", "="])
def test_a_tag_that_looks_like_a_public_key_is_served_and_not_listed(name: str) -> None:
    asked = Guest(guest(tags=((name, "v"), ("plain", "w"))))
    assert asked.text(f"{META}/tags/instance/") == "plain"
    assert asked.text(f"{META}/tags/instance/{name}") == "v"
    assert asked.text(f"{META}/tags/instance/{name.replace('=', '%3D')}") == "v"


def test_without_a_tag_to_list_there_is_no_empty_directory() -> None:
    asked = Guest(guest(tags=(("0=x", "v"), ("with space", "w"))))
    assert asked.status(f"{META}/tags") == 404
    assert "tags/" not in asked.lines(META)


def test_tag_values_are_raw() -> None:
    asked = Guest(guest(tags=(("motd", "grüß\n  dich"), ("none", ""))))
    assert asked.text(f"{META}/tags/instance/motd") == "grüß\n  dich"
    assert asked.read(f"{META}/tags/instance/none") == b""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["alice"], ["alice"]),
        (["my=key"], ["my-key"]),
        (["a/"], ["a"]),
        (["a b\tc"], ["a-b-c"]),
        (["a\nb"], ["a-b"]),
        (["", "="], ["key-0", "key-1"]),
        (["k", "k", "k"], ["k", "k-2", "k-3"]),
        (["k=", "k", "k-2"], ["k", "k-2", "k-2-2"]),
        (["alice@example.org"], ["alice@example.org"]),
    ],
)
def test_key_names_fit_a_listing_and_are_each_there_once(
    names: list[str], expected: list[str]
) -> None:
    assert unique_names(names) == tuple(expected)


def test_every_key_is_listed_and_served_without_its_newline() -> None:
    keys = (SshKey("a=b", "ssh-rsa AAA one\n"), SshKey("c", "ssh-rsa BBB two"))
    asked = Guest(guest(ssh_keys=keys))
    assert asked.lines(f"{META}/public-keys") == ["0=a-b", "1=c"]
    assert asked.text(f"{META}/public-keys/0/openssh-key/") == "ssh-rsa AAA one"
    assert asked.text(f"{META}/public-keys/1/openssh-key") == "ssh-rsa BBB two"


def test_with_the_dialect_off_every_version_is_404() -> None:
    asked = Guest(guest(dialects=frozenset({Dialect.OPENSTACK, Dialect.NOCLOUD})))
    for version in (*EC2_VERSIONS, "latest"):
        assert asked.status(f"/{version}") == 404
        assert asked.status(f"/{version}/meta-data/instance-id") == 404
    assert asked.text("/") == "nocloud/\nopenstack/"


def test_with_every_dialect_off_even_the_root_is_404() -> None:
    assert Guest(guest(dialects=frozenset())).status("/") == 404
