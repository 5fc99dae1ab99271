"""What a guest reads: path by path, for each dialect; and the compiled record that it is read from."""

import base64
from dataclasses import replace
from typing import Any, Final, TypeAlias
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.documents.compiled import (
    DocumentRecord,
    compile_instance,
    compiled_path,
    parse_compiled,
)
from imdsproxy.documents.dialects import ec2, openstack
from imdsproxy.documents.dialects.ec2 import list_warnings, warn_of_names
from imdsproxy.documents.dialects.nocloud import render_yaml
from imdsproxy.errors import Problem, RecordCorrupt, quoted
from imdsproxy.model.entities import (
    Dialect,
    Instance,
    InstanceId,
    Network,
    NetworkId,
    Port,
    SshKey,
    Upstream,
)
from support.guest_records import (
    BARE,
    BLUE,
    GUEST,
    SEED,
    Guest,
    compiled,
    guest,
    header,
    port,
    with_head,
)

Changes: TypeAlias = "dict[str, object]"
META: Final = "/latest/meta-data"
MACS: Final = f"{META}/network/interfaces/macs"
MAC: Final = f"{MACS}/fa:16:3e:00:00:01"
MAC_2: Final = f"{MACS}/fa:16:3e:00:00:02"
OPENSTACK: Final = "/openstack/latest"
OPENSTACK_META: Final = f"{OPENSTACK}/meta_data.json"
PASSWORD: Final = "/openstack/2013-04-04/password"
NOCLOUD: Final = ("meta-data", "user-data", "vendor-data", "network-config")
BINARY: Final = "\x1f\x8b\x08\x00\r\n\n\x00\xff"

SAME: Final[Changes] = {}
BINARY_DATA: Final[Changes] = dict.fromkeys(("user_data", "vendor_data"), BINARY.encode("latin-1"))
NOTHING: Final[Changes] = {
    "ports": (),
    "ssh_keys": (),
    "tags": (),
    "user_data": None,
    "availability_zone": None,
    "instance_type": None,
}
PORTS: Final[Changes] = {
    "ports": (
        port(),
        port(None, ["10.0.0.9"]),
        port("fa:16:3e:00:00:02", ["10.9.0.1", "10.9.0.2"], network=BARE),
        port("fa:16:3e:00:00:01", []),
    )
}
KEYS: Final[Changes] = {
    "ssh_keys": (SshKey("a=b", "ssh-rsa AAA one\n"), SshKey("c", "ssh-rsa BBB two"))
}
TAGS: Final[Changes] = {"tags": (("motd", "grüß\n  dich"), ("none", ""), ("a=b", "v"), ("=", "w"))}
UNLISTED: Final[Changes] = {"tags": (("0=x", "v"), ("with space", "w"))}
ODD: Final[Changes] = {
    **dict.fromkeys(("name", "hostname", "project"), "x\ud800y"),
    **dict.fromkeys(("availability_zone", "instance_type"), "x\ud800y"),
    "tags": (("x\ud800y", "x\ud800y"), ("role", "x\ud800y")),
    "ssh_keys": (SshKey("x\ud800y", "x\ud800y"),),
    "vendor_data": b'{"cloud-init": "\\ud800"}',
}


def zone(name: str) -> Changes:
    return {"availability_zone": name}


def dialects(*names: Dialect) -> Changes:
    return {"dialects": frozenset(names)}


_NAMES: Final = """
ami-id ami-launch-index ami-manifest-path block-device-mapping/ hostname instance-action instance-id instance-type
ipv6 local-hostname local-ipv4 mac network/ placement/ public-keys/ reservation-id security-groups tags/
"""
_NOT_OF_ALL: Final = "instance-type ipv6 local-ipv4 mac network/ placement/ public-keys/ tags/"

TABLE: Final[tuple[tuple[Changes, str, str | int], ...]] = (
    (SAME, "/", "\n".join(ec2.VERSIONS)),
    (SAME, "/latest", "dynamic\nmeta-data\nuser-data"),
    (NOTHING, "/latest", "dynamic\nmeta-data"),
    (SAME, "/2008-09-01", "meta-data\nuser-data"),
    # cloud-init on a guest with Amazon's DMI asks for it.
    (SAME, "/latest/dynamic/", "instance-identity/"),
    (SAME, "/latest/dynamic/instance-identity", ""),
    (SAME, META, "\n".join(_NAMES.split())),
    (NOTHING, META, "\n".join(sorted(set(_NAMES.split()) - set(_NOT_OF_ALL.split())))),
    *((NOTHING, f"{META}/{name}", 404) for name in _NOT_OF_ALL.split()),
    (SAME, f"{META}/instance-id", GUEST.ec2_id),
    ({"id": InstanceId("i-0abc")}, f"{META}/instance-id", "i-0abc"),
    (SAME, f"{META}/hostname", "web.example.org"),
    (SAME, f"{META}/local-ipv4", "10.0.0.5"),
    (SAME, f"{META}/reservation-id", "r-0b57f5a46ff84ef58"),
    (SAME, f"{META}/ami-launch-index", "0"),
    (SAME, f"{META}/block-device-mapping", "ami\nroot"),
    (SAME, f"{META}/block-device-mapping/ami", "vda"),
    (SAME, f"{META}/instance-action", "none"),
    (SAME, f"{META}/placement", "availability-zone\nregion"),
    (zone("EU-NORTH-1b"), f"{META}/placement/region", "EU-NORTH-1"),
    (zone("europe-west4-a"), f"{META}/placement/region", "europe-west4"),
    *((zone(name), f"{META}/placement/region", name) for name in ("eu-north-1", "zone-red", "b")),
    *((zone(name), f"{META}/placement/region", name) for name in ("nova", "rack7")),
    (SAME, f"{META}/public-keys", "0=alice"),
    (SAME, f"{META}/public-keys/0", "openssh-key"),
    (SAME, f"{META}/public-keys/0/openssh-key", "ssh-ed25519 AAAAC3 alice@example.org"),
    (KEYS, f"{META}/public-keys", "0=a-b\n1=c"),
    (KEYS, f"{META}/public-keys/0/openssh-key/", "ssh-rsa AAA one"),
    (SAME, f"{META}/tags", "instance/"),
    (SAME, f"{META}/tags/instance", "role\ntier"),
    # One that looks like an ssh key is served and not listed.
    (TAGS, f"{META}/tags/instance/", "motd\nnone"),
    (TAGS, f"{META}/tags/instance/motd", "grüß\n  dich"),
    (TAGS, f"{META}/tags/instance/none", ""),
    (TAGS, f"{META}/tags/instance/a=b", "v"),
    (TAGS, f"{META}/tags/instance/a%3Db", "v"),
    (TAGS, f"{META}/tags/instance/%3D", "w"),
    (UNLISTED, f"{META}/tags", 404),
    (SAME, f"{MAC}/device-number", "0"),
    (SAME, f"{MAC}/local-ipv4s", "10.0.0.5"),
    (SAME, f"{MAC}/ipv6s", "2001:db8::5"),
    (SAME, f"{MAC}/owner-id", "p1"),
    (SAME, f"{MAC}/subnet-ipv4-cidr-block", "10.0.0.0/24"),
    (SAME, f"{MAC}/subnet-ipv6-cidr-blocks", "2001:db8::/64"),
    (PORTS, MACS, "fa:16:3e:00:00:01/\nfa:16:3e:00:00:02/"),
    (PORTS, f"{MAC_2}/local-ipv4s", "10.9.0.1\n10.9.0.2"),
    (PORTS, f"{MAC_2}/device-number", "2"),
    (PORTS, f"{MAC_2}/subnet-ipv4-cidr-block", 404),
    # Of the version that brought it, and not of the one before.
    *(
        row
        for before, since, name, text in (
            ("1.0", "2007-01-19", "local-hostname", "web.example.org"),
            ("2007-03-01", "2007-08-29", "instance-type", "m1.small"),
            ("2007-10-10", "2007-12-15", "block-device-mapping/root", "/dev/vda"),
            ("2007-12-15", "2008-02-01", "placement/availability-zone", "eu-north-1b"),
            ("2009-04-04", "2011-01-01", "mac", "fa:16:3e:00:00:01"),
            ("2009-04-04", "2011-01-01", "network/interfaces/macs", "fa:16:3e:00:00:01/"),
            ("2019-10-01", "2020-10-27", "placement/region", "eu-north-1"),
            ("2020-10-27", "2021-01-03", "ipv6", "2001:db8::5"),
            ("2021-01-03", "2021-03-23", "tags/instance/role", "web"),
        )
        for row in (
            (SAME, f"/{before}/meta-data/{name}", 404),
            (SAME, f"/{since}/meta-data/{name}", text),
        )
    ),
    (SAME, "/1.0/meta-data/instance-id", GUEST.ec2_id),
    *(
        (SAME, path, 404)
        for path in (
            *("/2009-04-05/meta-data/", "/2099-01-01", f"{META}/instance-id/x", f"{META}/%00"),
            *(f"{META}/security-groups/default", f"{META}/public-ipv4", f"{META}/services/domain"),
            *(f"{META}/iam/security-credentials/", f"{META}/block-device-mapping/swap"),
            *(f"{META}/public-keys/0=alice", f"{META}/public-keys/1", "/latest%2fmeta-data"),
            *("/latest/api", "/latest/dynamic/instance-identity/document", "/computeMetadata/v1/"),
            *("/metadata/instance", "/opc/v1/instance/", "/2012-08-10", "/openstack/1.0"),
            *("/openstack/2012-08-11", "/openstack/content", "/openstack/content/0000"),
            *(f"{OPENSTACK_META}/x", f"{OPENSTACK}/meta-data"),
        )
    ),
    *((SAME, path, 400) for path in ("/%", "/latest%2", f"{META}/%zz", "/latest/%4/meta-data")),
    # Slashes collapse, escapes are undone once; dot segments lead nowhere above the first name.
    *(
        (SAME, path, GUEST.ec2_id)
        for path in (
            *("//latest///meta-data/./instance-id//", "/latest/user-data/../meta-data/instance-id"),
            *("/latest/x/%2e./meta-data/instance-%69d", "/latest/meta-data/instance-id/."),
        )
    ),
    *(
        (SAME, path, 404)
        for path in (
            *("/..", "/../latest", "/latest/..", "/latest/%2e%2E", "/openstack/../latest", "/./.."),
            *("/latest/x/../../latest", "/...", "/latest/meta-data%25%32%66instance-id"),
        )
    ),
    # Data is exact, or empty, or not there.
    *(
        (BINARY_DATA, path, BINARY)
        for path in ("/latest/user-data", f"{OPENSTACK}/user_data", "/nocloud/user-data")
    ),
    ({"user_data": b""}, "/latest/user-data", ""),
    (NOTHING, "/latest/user-data", 404),
    (NOTHING, f"{OPENSTACK}/user_data", 404),
    (BINARY_DATA, "/nocloud/vendor-data", BINARY),
    (SAME, "/openstack", "\n".join(openstack.VERSIONS)),
    ({"ports": (port(None),)}, f"{OPENSTACK}/network_data.json", 404),
    ({"ports": (port(None),)}, "/nocloud/network-config", ""),
    (SAME, "/nocloud/", "\n".join(NOCLOUD)),
    *((NOTHING, f"/nocloud/{name}", "") for name in NOCLOUD[1:]),
    # Half a surrogate pair.
    (ODD, f"{META}/hostname", "x?y"),
    (ODD, f"{META}/tags/instance/role", "x?y"),
    (ODD, f"{META}/public-keys", "0=x?y"),
    (ODD, "/nocloud/vendor-data", "?"),
    # A dialect that is off.
    (dialects(), "/", 404),
    (dialects(Dialect.NOCLOUD), "/", "nocloud/"),
    (dialects(Dialect.OPENSTACK, Dialect.NOCLOUD), "/", "nocloud/\nopenstack/"),
    *((dialects(Dialect.NOCLOUD), f"/{one}", 404) for one in ec2.VERSIONS),
    *(
        (dialects(Dialect.NOCLOUD), path, 404)
        for path in (f"{META}/instance-id", "/openstack", OPENSTACK, OPENSTACK_META)
    ),
    *((dialects(Dialect.EC2), f"/nocloud/{name}", 404) for name in ("", *NOCLOUD)),
)


@pytest.mark.parametrize(("changes", "path", "expected"), TABLE)
def test_a_path_leads_to_its_document(changes: Changes, path: str, expected: str | int) -> None:
    asked = Guest(guest(**changes))
    response = asked.ask(path)
    if isinstance(expected, int):
        assert (response.status, response.body) == (expected, b"")
        assert header(response, b"content-length") == b"0"
    else:
        data = expected.encode("latin-1" if expected is BINARY else "utf-8")
        assert asked.read(path) == data
        assert header(response, b"content-length") == b"%d" % len(data)
        if expected is BINARY:
            assert header(response, b"content-type") == b"application/octet-stream"


@pytest.mark.parametrize("zone", ["eu-north-1b", "zone-red", None])
def test_the_region_of_the_settings_is_that_of_every_zone(zone: str | None) -> None:
    asked = Guest(guest(availability_zone=zone), region="red-1")
    assert asked.text(f"{META}/placement/region") == "red-1"


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["a/", "a b\tc", "a\nb", "alice@example.org"], "0=a\n1=a-b-c\n2=a-b\n3=alice@example.org"),
        (["", "="], "0=key-0\n1=key-1"),
        (["k=", "k", "k-2", "k"], "0=k\n1=k-2\n2=k-2-2\n3=k-3"),
    ],
)
def test_key_names_fit_a_listing_and_are_each_there_once(names: list[str], listed: str) -> None:
    keys = tuple(SshKey(name, "ssh-rsa A") for name in names)
    assert Guest(guest(ssh_keys=keys)).text(f"{META}/public-keys") == listed


# OpenStack

_FILES: Final = {
    "meta_data.json": "2012-08-10",
    "user_data": "2012-08-10",
    "password": "2013-04-04",
    "vendor_data.json": "2013-10-17",
    "network_data.json": "2015-10-15",
    "vendor_data2.json": "2016-10-06",
}
_FIELDS: Final = {
    **dict.fromkeys(("uuid", "meta", "public_keys", "keys", "hostname", "name"), "2012-08-10"),
    **dict.fromkeys(("launch_index", "availability_zone"), "2012-08-10"),
    "random_seed": "2013-04-04",
    "project_id": "2015-10-15",
    "devices": "2016-06-30",
    "dedicated_cpus": "2020-10-14",
}


@pytest.mark.parametrize("version", openstack.VERSIONS)
def test_a_version_has_the_files_and_fields_that_nova_gives_it(version: str) -> None:
    asked, since = Guest(), openstack.VERSIONS[-2] if version == "latest" else version
    names = [name for name, first in _FILES.items() if first <= since]
    assert asked.lines(f"/openstack/{version}") == names
    for name in _FILES:
        response = asked.ask(f"/openstack/{version}/{name}")
        assert response.status == (200 if name in names else 404)
        if name in names and name.endswith(".json"):
            assert header(response, b"content-type") == b"application/json"
            assert asked.json(f"/openstack/{version}/{name}") is not None
    fields = {name for name, first in _FIELDS.items() if first <= since}
    assert set(asked.json(f"/openstack/{version}/meta_data.json")) == fields


def test_openstacks_meta_data_describes_the_guest() -> None:
    assert Guest().json(OPENSTACK_META) == {
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
    assert not {"meta", "public_keys", "keys"} & set(Guest(guest(**NOTHING)).json(OPENSTACK_META))
    assert Guest(guest(**ODD)).read(OPENSTACK_META)


@pytest.mark.parametrize(
    ("data", "for_openstack", "for_nocloud"),
    [
        (None, {}, b""),
        (b"", {}, b""),
        *(
            (data, {"cloud-init": data.decode()}, data)
            for data in (b"#cloud-config\n{}", b"[1, 2]", b'"text"', b"{broken", b"[" * 100_000)
        ),
        (
            b'{"cloud-init": "#!/bin/sh\\n", "region": "lab"}',
            {"cloud-init": "#!/bin/sh\n", "region": "lab"},
            b"#!/bin/sh\n",
        ),
        (b'{"region": "lab"}', {"region": "lab"}, b""),
        (
            b'{"cloud-init": ["a", "#cloud-config\\n{}"]}',
            {"cloud-init": ["a", "#cloud-config\n{}"]},
            b'#cloud-config-archive\n["a", "#cloud-config\\n{}"]',
        ),
        # Data that is no text is for NoCloud alone.
        (b"\x1f\x8b\xff", {}, b"\x1f\x8b\xff"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_vendor_data_is_run_once_in_each_dialect(
    data: bytes | None, for_openstack: Changes, for_nocloud: bytes
) -> None:
    asked = Guest(guest(vendor_data=data))
    assert asked.read("/nocloud/vendor-data") == for_nocloud
    assert asked.json(f"{OPENSTACK}/vendor_data.json") == for_openstack
    assert asked.json(f"{OPENSTACK}/vendor_data2.json") == {"static": for_openstack}


# NoCloud


def test_noclouds_meta_data_describes_the_guest() -> None:
    text = Guest().text("/nocloud/meta-data")
    assert text.startswith(f'instance-id: "{GUEST.uuid}"\n')
    assert not text.endswith("\n")
    assert yaml.safe_load(text) == {
        "instance-id": GUEST.uuid,
        "local-hostname": "web.example.org",
        "availability-zone": "eu-north-1b",
        "instance-type": "m1.small",
        "public-keys": {"alice": "ssh-ed25519 AAAAC3 alice@example.org"},
        "tags": {"role": "web", "tier": "1"},
    }
    assert Guest(guest(**NOTHING)).status("/nocloud/meta-data") == 200
    assert Guest(guest(**ODD)).read("/nocloud/meta-data")


_ODD_TEXTS: Final = (
    *("\x85", "\u2028", "\u2029", "\ufeff", "\x7f", "\x00", "\U0001f600"),
    *("yes", "1", "~", "a: b # c"),
)


@given(st.dictionaries(st.text(max_size=40), st.text(max_size=80), max_size=5))
@example({f"k{number}": text for number, text in enumerate(_ODD_TEXTS)})
def test_yaml_reads_back_every_text(tags: dict[str, str]) -> None:
    readable = {
        key.encode("utf-8", "surrogatepass").decode("utf-8", "replace"): value
        for key, value in tags.items()
    }
    assert yaml.safe_load(render_yaml({"tags": dict(readable)})) == {"tags": readable}


# Methods


_CACHED = "/ /latest/user-data /openstack /openstack/2012-08-10/meta_data.json /nocloud/meta-data"


@pytest.mark.parametrize(
    ("path", "cacheable"),
    [
        *((path, True) for path in _CACHED.split()),
        # The seed is another each time, and the password may come.
        (OPENSTACK_META, False),
        (PASSWORD, False),
        ("/nothing", False),
    ],
)
def test_head_is_like_get_without_the_body_and_what_depends_on_the_record_may_be_cached(
    path: str, *, cacheable: bool
) -> None:
    asked = Guest()
    get, head = asked.ask(path), asked.ask(path, "HEAD")
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")
    assert get.cacheable is head.cacheable is cacheable


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH", "OPTIONS", "get"])
def test_another_method_is_405_with_those_allowed_and_404_where_nothing_is(method: str) -> None:
    for path in ("/", "/latest", f"{META}/instance-id", OPENSTACK_META, "/nocloud/meta-data"):
        response = Guest().ask(path, method)
        assert (response.status, response.body) == (405, b"")
        assert header(response, b"allow") == b"GET, HEAD"
    if method != "POST":
        assert header(Guest().ask(PASSWORD, method), b"allow") == b"GET, HEAD, POST"
    # Clients use what is behind a 404 for a token as one.
    for path in ("token", "%74oken", "x/../token", "/token/"):
        response = Guest().ask(f"//latest/api/{path}", method, b"ignored")
        assert (response.status, response.body) == (404, b"")


@pytest.mark.parametrize(
    ("present", "posted", "status", "kept"),
    [
        (None, b"c2VjcmV0", 200, b"c2VjcmV0"),
        (None, b"x" * 1020, 200, b"x" * 1020),
        (None, b"x" * 1021, 400, None),
        (None, b"", 200, None),
        (b"one", b"two", 409, None),
    ],
)
def test_a_password_is_posted_once_and_read_back(
    present: bytes | None, posted: bytes, status: int, kept: bytes | None
) -> None:
    asked = Guest()
    asked.password = present
    response = asked.ask(PASSWORD, "POST", posted)
    assert (response.status, response.body, response.new_password) == (status, b"", kept)
    assert asked.read(f"{OPENSTACK}/password") == (present or b"")
    # The first version has none.
    assert asked.status("/openstack/2012-08-10/password", "POST") == 404


# Networks


V4: Final = {
    "network_id": "blue",
    "type": "ipv4",
    "ip_address": "10.0.0.5",
    "netmask": "255.255.255.0",
    "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"}],
    "services": [{"type": "dns", "address": "10.0.0.2"}],
}
V6: Final = {
    "network_id": "blue",
    "type": "ipv6",
    "ip_address": "2001:db8::5",
    "netmask": "ffff:ffff:ffff:ffff::",
    "routes": [{"network": "::", "netmask": "::", "gateway": "2001:db8::1"}],
    "services": [],
}


def _network_data(asked: Guest) -> Any:
    return asked.json("/openstack/latest/network_data.json")


def _network_config(asked: Guest) -> Any:
    return yaml.safe_load(asked.read("/nocloud/network-config"))


def test_a_port_has_a_link_and_a_network_for_each_address() -> None:
    document = _network_data(Guest())
    (link,) = document["links"]
    assert len(link.pop("vif_id")) == 36
    assert link == {
        "id": "interface0",
        "type": "phy",
        "mtu": 1450,
        "ethernet_mac_address": "fa:16:3e:00:00:01",
    }
    networks = [
        {"id": f"network{n}", "link": "interface0", **one} for n, one in enumerate((V4, V6))
    ]
    assert document["networks"] == networks
    assert document["services"] == V4["services"]
    assert _network_config(Guest()) == {
        "version": 2,
        "ethernets": {
            "interface0": {
                "match": {"macaddress": "fa:16:3e:00:00:01"},
                "mtu": 1450,
                "dhcp4": False,
                "dhcp6": False,
                "addresses": ["10.0.0.5/24", "2001:db8::5/64"],
                "routes": [
                    {"to": "0.0.0.0/0", "via": "10.0.0.1", "metric": 100},
                    {"to": "::/0", "via": "2001:db8::1", "metric": 100},
                ],
                "nameservers": {"addresses": ["10.0.0.2"]},
            }
        },
    }


@pytest.mark.parametrize(
    ("addresses", "types", "dhcp"),
    [
        (["192.0.2.7"], ["ipv4_dhcp"], (True, False)),
        (["192.0.2.7", "192.0.2.8"], ["ipv4_dhcp"], (True, False)),
        (["2001:db8:1::7"], ["ipv6_slaac"], (False, True)),
        (["192.0.2.7", "2001:db8:1::7"], ["ipv4_dhcp", "ipv6_slaac"], (True, True)),
        ([], ["ipv4_dhcp"], (True, False)),
        (["fe80::7"], ["ipv4_dhcp"], (True, False)),
    ],
)
def test_without_a_known_subnet_the_guest_is_to_ask(
    addresses: list[str], types: list[str], dhcp: tuple[bool, bool]
) -> None:
    asked = Guest(guest(ports=(port(addresses=addresses, network=BARE),)))
    document = _network_data(asked)
    assert document["links"][0]["mtu"] is None
    assert document["networks"] == [
        {"id": f"network{n}", "link": "interface0", "network_id": "bare", "type": one}
        for n, one in enumerate(types)
    ]
    ethernet = {"match": {"macaddress": "fa:16:3e:00:00:01"}}
    expected = {**ethernet, "dhcp4": dhcp[0], "dhcp6": dhcp[1]}
    assert _network_config(asked) == {"version": 2, "ethernets": {"interface0": expected}}


def test_a_further_default_route_is_left_away_or_gives_way() -> None:
    twice = Guest(guest(ports=(port(addresses=["10.0.0.5", "10.0.0.6"]),)))
    assert [len(one["routes"]) for one in _network_data(twice)["networks"]] == [1, 0]
    ports = (port(addresses=["10.0.0.5"]), port("fa:16:3e:00:00:02", ["10.0.0.7"]))
    ethernets = _network_config(Guest(guest(ports=ports)))["ethernets"].values()
    assert [route["metric"] for one in ethernets for route in one["routes"]] == [100, 200]


@pytest.mark.parametrize("network", [BLUE, BARE])
def test_a_port_without_a_mac_of_its_own_is_left_out(network: Network) -> None:
    ports = (port(None, ["10.0.0.8"]), *GUEST.ports, port(addresses=["10.0.0.9"], network=network))
    asked = Guest(guest(ports=ports))
    assert [link["id"] for link in _network_data(asked)["links"]] == ["interface1"]
    assert {one["link"] for one in _network_data(asked)["networks"]} == {"interface1"}
    assert list(_network_config(asked)["ethernets"]) == ["interface1"]
    none = Guest(guest(ports=()))
    assert none.read("/nocloud/network-config") == b""
    assert none.status("/openstack/latest/network_data.json") == 404


# Names that documents change or lack

_SSH: Final = "ssh-ed25519 AAAAC3"
_TAGS: Final = f"{META}/tags/instance"


@pytest.mark.parametrize("name", ["a", "Name", "a+b-c.d,e_f:g@h", "0"])
def test_names_that_documents_have_as_they_are_are_not_warned_of(name: str) -> None:
    named = guest(tags=((name, "v"),), ssh_keys=(SshKey(name, _SSH),))
    assert warn_of_names(named) == ()
    assert Guest(named).lines(_TAGS) == [name]
    assert Guest(named).text(f"{_TAGS}/{name}") == "v"


@pytest.mark.parametrize(
    "name", ["a b", "a/b", "größe", "", ".", "..", "_index", "tail\n", "a+b=c.d"]
)
def test_a_tag_that_ec2_does_not_list_is_warned_of(name: str) -> None:
    tagged = guest(tags=((name, "v"), ("plain", "w")))
    (warning,) = warn_of_names(tagged)
    asked = Guest(tagged)
    assert asked.text(_TAGS) == "plain"
    # One with `=` is served and not listed.
    path = f"{_TAGS}/{quote(name, safe='')}"
    if name not in ("", ".", ".."):
        assert asked.status(path) == (200 if "=" in name else 404)
    assert warning.field == f"instances.{GUEST.id}.tags[{quoted(name)}]"
    assert "EC2" in warning.reason


def test_tags_are_not_warned_of_where_ec2_is_off() -> None:
    assert warn_of_names(guest(tags=(("a b", "v"),), dialects=frozenset({Dialect.NOCLOUD}))) == ()
    assert warn_of_names(guest(tags=(("a b", "v"),), upstream=Upstream.NOVA)) == ()


def test_a_key_that_guests_see_under_another_name_is_warned_of() -> None:
    keys = (SshKey("my key", _SSH), SshKey("my-key", _SSH), SshKey("other", _SSH))
    found = warn_of_names(guest(ssh_keys=keys))
    assert [(one.field, one.reason) for one in found] == [
        (f'instances.{GUEST.id}.ssh_keys["my key"]', 'guests see this key as "my-key"'),
        (f'instances.{GUEST.id}.ssh_keys["my-key"]', 'guests see this key as "my-key-2"'),
    ]


def test_of_many_warnings_the_first_are_listed_and_the_others_counted() -> None:
    lines = list_warnings(Problem(str(number), "no") for number in range(123))
    assert (lines[0], lines[19], lines[20:]) == ("0: no", "19: no", ("and 103 more",))


# Compiled records


def read(instance: Instance) -> DocumentRecord:
    return parse_compiled(compiled(instance).content)


def test_a_port_in_a_network_that_is_gone_keeps_its_addresses() -> None:
    (gone,) = read(guest(ports=(Port(NetworkId("gone"), None, port().addresses),)))["ports"]
    assert [one["ip"] for one in gone["addresses"]] == ["10.0.0.5", "2001:db8::5"]
    assert (gone["mtu"], {one["cidr"] for one in gone["addresses"]}) == (None, {None})


@pytest.mark.parametrize(
    "change",
    [
        {"hostname": "other"},
        {"user_data": b"#!/bin/sh\necho hellp\n"},
        {"vendor_data": b"{}"},
        {"tags": ()},
        {"dialects": frozenset({Dialect.EC2})},
    ],
)
def test_every_change_of_the_instance_changes_the_revision(change: dict[str, object]) -> None:
    assert compiled(guest()) == compiled(GUEST)
    assert compiled(guest(**change)).revision != compiled(GUEST).revision
    other = compile_instance(GUEST, {BLUE.id: replace(BLUE, mtu=9000)})
    assert other.revision != compiled(GUEST).revision


def test_a_record_that_was_changed_cut_or_lengthened_is_refused() -> None:
    whole = compiled(guest(vendor_data=b"#!/bin/sh\n", user_data=b"x" * 300)).content
    flipped = [bytearray(whole) for _ in range(0, len(whole), 7)]
    for number, content in enumerate(flipped):
        content[number * 7] ^= 0x10
    cut = [whole[:-missing] for missing in (1, 10, 21, 300, 10_000)]
    longer = [compiled(guest(user_data=data)).content + b"\n" for data in (b"a", b"", None)]
    for wrong in (*map(bytes, flipped), *cut, *longer):
        with pytest.raises(RecordCorrupt):
            parse_compiled(wrong)


@pytest.mark.parametrize(
    ("old", "new", "revision"),
    [
        (b'format":2,', b'format":99,"more":1,', False),
        (b'format":2,', b'format":1,', False),
        (b'"region":null,', b"", True),
    ],
)
def test_a_record_of_another_format_is_read_without_a_revision(
    old: bytes, new: bytes, *, revision: bool
) -> None:
    record, here = parse_compiled(with_head(old, new)), read(GUEST)
    assert bool(record["revision"]) is revision
    for name in ("id", "hostname", "ports", "tags", "vendor_data"):
        assert record[name] == here[name]


def test_a_format_that_lacks_what_is_needed_is_refused_by_its_number() -> None:
    with pytest.raises(RecordCorrupt, match="format 99"):
        parse_compiled(with_head(b'format":2,"id":', b'format":99,"name_of_it":'))


def test_paths_spread_over_directories_and_never_move() -> None:
    paths = [compiled_path(InstanceId(f"vm-{number}")) for number in range(4000)]
    assert len(set(paths)) == 4000
    assert len({path.split("/")[0] for path in paths}) == 256
    assert compiled_path(InstanceId("vm-1")) == "14/vm-1.rec"
