from __future__ import annotations

import pytest

from imdsproxy.core.model import Dialect, Instance
from imdsproxy.core.records import MAX_PAYLOAD, Refused, Unreadable, parse_instance

PLAIN: dict[str, object] = {"id": "i-1", "name": "web"}


def read(**fields: object) -> Instance:
    found = parse_instance(PLAIN | fields)
    assert isinstance(found, Instance), f"refused: {found}"
    return found


def problems(**fields: object) -> dict[str, str]:
    found = parse_instance(PLAIN | fields)
    assert isinstance(found, Refused), f"accepted: {found}"
    return {problem.field: f"{problem.reason} ({problem.hint})" for problem in found.problems}


def with_address(address: object) -> dict[str, object]:
    return {"ports": [{"network": "n", "addresses": [address]}]}


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::a9fe:a9fe",
        "0.0.0.0",
        "0.1.2.3",
        "255.255.255.255",
        "::",
        "127.0.0.1",
        "::1",
        "224.0.0.1",
        "ff02::1",
        "::ffff:10.0.0.5",
        "::10.0.0.5",
        "fe80::1%eth0",
        "10.0.0.5/24",
        "10.0.0.05",
        " 10.0.0.5",
        "10.0.0.5\n",
        "ten",
        "",
        167772165,
        b"\x0a\x00\x00\x05",
        None,
    ],
)
def test_an_address_that_no_guest_can_have_is_refused(address: object) -> None:
    assert "ports[0].addresses[0]" in problems(**with_address(address))


@pytest.mark.parametrize(
    "address", ["10.0.0.5", "2001:db8::5", "fe80::1", "169.254.1.2", "240.0.0.1"]
)
def test_an_address_of_a_guest_is_read(address: str) -> None:
    assert str(read(**with_address(address)).ports[0].addresses[0]) == address


def test_an_address_outside_every_subnet_is_allowed() -> None:
    assert read(**with_address("192.0.2.77")).ports[0].addresses


@pytest.mark.parametrize(
    "mac",
    [
        "52:54:00:12:34",
        "52:54:00:12:34:5g",
        "52:54-00:12:34:56",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
        "525400123456",
        41150521956,
    ],
)
def test_a_mac_that_no_port_can_have_is_refused(mac: object) -> None:
    assert "ports[0].mac" in problems(ports=[{"network": "n", "mac": mac}])


@pytest.mark.parametrize("mac", ["52:54:00:AB:cd:EF", "52-54-00-AB-CD-EF"])
def test_a_mac_is_read_in_any_usual_spelling(mac: str) -> None:
    assert read(ports=[{"network": "n", "mac": mac}]).ports[0].mac == "52:54:00:ab:cd:ef"


def test_an_address_twice_in_a_network_is_refused_and_in_two_networks_is_not() -> None:
    twice = {"network": "n", "addresses": ["10.0.0.5"]}
    assert "ports[1].addresses[0]" in problems(ports=[twice, twice])
    assert len(read(ports=[twice, {**twice, "network": "m"}]).ports) == 2


def test_a_mac_twice_in_a_network_is_refused() -> None:
    twice = {"network": "n", "mac": "52:54:00:00:00:01"}
    assert "ports[1].mac" in problems(ports=[twice, twice])


@pytest.mark.parametrize("key", ["name", "project", "availability_zone", "instance_type"])
@pytest.mark.parametrize(
    "text",
    [
        "a\r\nSet-Cookie: x",
        "a\x00",
        "a\x1b[31m",
        "a\x85b",
        "a\u2028b",
        "\ud800",
        "",
        " a",
        "x" * 256,
    ],
)
def test_text_that_could_break_a_header_or_a_listing_is_refused(key: str, text: str) -> None:
    found = problems(**{key: text})
    assert key in found
    found[key].encode()  # what is told must be printable itself
    assert "\n" not in found[key]


@pytest.mark.parametrize("value", [7, 1.5, True, b"web", ["web"], {"a": "b"}])
def test_text_fields_take_nothing_but_text(value: object) -> None:
    assert "name" in problems(name=value)


@pytest.mark.parametrize(
    "hostname", ["web\nx", "web_1 x", "-web", "web-", "a..b", "a" * 64, "", "web."]
)
def test_a_host_name_that_is_none_is_refused(hostname: str) -> None:
    assert "hostname" in problems(hostname=hostname)


@pytest.mark.parametrize(
    ("name", "hostname"),
    [
        ("web", "web"),
        ("web.example.org", "web.example.org"),
        ("My web server", "My-web-server"),
        ("..web..", "web"),
        ("日本", "i-1"),
        ("a" * 70, "a" * 63),
    ],
)
def test_an_instance_without_a_host_name_is_called_as_its_name_allows(
    name: str, hostname: str
) -> None:
    assert read(name=name).hostname == hostname


def test_a_bare_ssh_key_is_named_by_its_comment() -> None:
    keys = read(
        ssh_keys=[
            "ssh-ed25519 AAAA alice@example.org",
            "ssh-ed25519 BBBB alice@example.org",
            "ssh-rsa CCCC",
            "ssh-rsa DDDD a = b / c",
        ]
    ).ssh_keys
    assert [key.name for key in keys] == [
        "alice@example.org",
        "alice@example.org-2",
        "key-3",
        "a-b-c",
    ]
    assert keys[0].key == "ssh-ed25519 AAAA alice@example.org"


def test_a_derived_name_never_takes_one_that_is_written() -> None:
    keys = read(ssh_keys=["ssh-rsa AAAA bob", {"name": "bob", "key": "ssh-rsa BBBB bob"}]).ssh_keys
    assert [key.name for key in keys] == ["bob-2", "bob"]


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ("ssh-rsa AAAA x\nssh-rsa BBBB y", "ssh_keys[0]"),
        ("ssh-rsa AAAA x\n", "ssh_keys[0]"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "ssh_keys[0]"),
        ("AAAA", "ssh_keys[0]"),
        (7, "ssh_keys[0]"),
        ({"name": "x"}, "ssh_keys[0].key"),
        ({"key": "ssh-rsa AAAA"}, "ssh_keys[0].name"),
        ({"name": "a=b", "key": "ssh-rsa AAAA"}, "ssh_keys[0].name"),
        ({"name": "a/b", "key": "ssh-rsa AAAA"}, "ssh_keys[0].name"),
        ({"name": "a\nb", "key": "ssh-rsa AAAA"}, "ssh_keys[0].name"),
        ({"name": "x", "key": "ssh-rsa AAAA", "type": "ssh"}, "ssh_keys[0].type"),
    ],
)
def test_an_ssh_key_that_is_no_single_line_or_breaks_the_listing_is_refused(
    entry: object, field: str
) -> None:
    assert field in problems(ssh_keys=[entry])


def test_two_ssh_keys_of_one_name_are_refused() -> None:
    keys = [{"name": "x", "key": "ssh-rsa AAAA"}, {"name": "x", "key": "ssh-rsa BBBB"}]
    assert "ssh_keys[1].name" in problems(ssh_keys=keys)


def test_tags_are_kept_in_name_order() -> None:
    assert read(tags={"b": "2", "a": ""}).tags == (("a", ""), ("b", "2"))


@pytest.mark.parametrize(
    ("tags", "field"),
    [
        ({"a": 1.10}, "tags.a"),
        ({"a": True}, "tags.a"),
        ({"a": "x\x00"}, "tags.a"),
        ({"a\r\nb": "x"}, 'tags["a\\r\\nb"]'),
        ({"": "x"}, 'tags[""]'),
        ({7: "x"}, "tags"),
        (["a"], "tags"),
    ],
)
def test_a_bad_tag_is_refused_at_its_field(tags: object, field: str) -> None:
    assert field in problems(tags=tags)


@pytest.mark.parametrize(
    ("user_data", "wanted"),
    [
        ("#cloud-config\n", b"#cloud-config\n"),
        ("", b""),
        ("ä", "ä".encode()),
        (b"\x1f\x8b\x00\xff", b"\x1f\x8b\x00\xff"),
        ({"base64": "H4sA/w=="}, b"\x1f\x8b\x00\xff"),
    ],
)
def test_user_data_is_kept_byte_for_byte(user_data: object, wanted: bytes) -> None:
    assert read(user_data=user_data).user_data == wanted


@pytest.mark.parametrize(
    ("user_data", "field"),
    [
        (7, "user_data"),
        (["x"], "user_data"),
        ("\ud800", "user_data"),
        ({"base64": "H4s"}, "user_data.base64"),
        ({"base64": "H4sA /w=="}, "user_data.base64"),
        ({"base64": 7}, "user_data.base64"),
        ({"base64": "", "gzip": True}, "user_data.gzip"),
        ({}, "user_data.base64"),
        (bytes(MAX_PAYLOAD + 1), "user_data"),
    ],
)
def test_user_data_that_is_no_bytes_or_too_much_is_refused(user_data: object, field: str) -> None:
    assert field in problems(user_data=user_data)


def test_sixteen_mebibytes_of_user_data_are_accepted() -> None:
    assert read(user_data=bytes(MAX_PAYLOAD)).user_data == bytes(MAX_PAYLOAD)


def test_user_data_from_a_file_is_read_by_who_is_passed_in() -> None:
    asked: list[str] = []

    def read_file(name: str) -> bytes:
        asked.append(name)
        return b"\x00\xff"

    found = parse_instance(PLAIN | {"user_data_file": "web.gz"}, read_file=read_file)
    assert isinstance(found, Instance)
    assert found.user_data == b"\x00\xff"
    assert asked == ["web.gz"]


def test_a_file_that_cannot_be_read_is_told_at_its_field() -> None:
    found = parse_instance(
        PLAIN | {"user_data_file": "gone"}, read_file=lambda _name: Unreadable("there is no gone")
    )
    assert isinstance(found, Refused)
    assert [(one.field, one.reason) for one in found.problems] == [
        ("user_data_file", "there is no gone")
    ]


def test_a_file_larger_than_the_limit_is_refused() -> None:
    found = parse_instance(
        PLAIN | {"user_data_file": "big"}, read_file=lambda _name: bytes(MAX_PAYLOAD + 1)
    )
    assert isinstance(found, Refused)
    assert found.problems[0].field == "user_data_file"


def test_files_are_refused_where_nobody_reads_them() -> None:
    assert "user_data_file" in problems(user_data_file="/etc/shadow")


def test_user_data_inline_and_from_a_file_is_refused() -> None:
    assert "user_data_file" in problems(user_data="x", user_data_file="y")


def test_vendor_data_may_be_text_or_a_mapping() -> None:
    assert read(vendor_data="#cloud-config\n").vendor_data == b"#cloud-config\n"
    assert read(vendor_data={"a": [1, None, "ä"]}).vendor_data == '{"a": [1, null, "ä"]}'.encode()


@pytest.mark.parametrize(
    ("vendor_data", "field"),
    [
        ({"a": [b"x"]}, "vendor_data.a[0]"),
        ({"a": float("nan")}, "vendor_data.a"),
        ({"a": float("inf")}, "vendor_data.a"),
        ({"a": "\ud800"}, "vendor_data.a"),
        ({"\ud800": 1}, "vendor_data"),
        ({1: "x"}, "vendor_data"),
        (7, "vendor_data"),
        (b"\xff", "vendor_data"),
    ],
)
def test_vendor_data_that_json_cannot_carry_is_refused(vendor_data: object, field: str) -> None:
    assert field in problems(vendor_data=vendor_data)


def test_vendor_data_nested_without_end_is_refused() -> None:
    nested: object = "x"
    for _ in range(500):
        nested = {"a": nested}
    assert any("nested too deep" in text for text in problems(vendor_data=nested).values())


def test_dialects_are_on_unless_they_are_off() -> None:
    assert read().dialects == frozenset(Dialect)
    assert read(dialects={"ec2": False, "nocloud": True}).dialects == {
        Dialect.OPENSTACK,
        Dialect.NOCLOUD,
    }


@pytest.mark.parametrize(
    ("dialects", "field"),
    [({"gce": True}, "dialects.gce"), ({"ec2": "no"}, "dialects.ec2"), (["ec2"], "dialects")],
)
def test_a_dialect_that_is_unknown_or_no_boolean_is_refused(dialects: object, field: str) -> None:
    assert field in problems(dialects=dialects)


def test_null_is_the_same_as_left_out() -> None:
    assert read(project=None, ports=None, user_data=None, tags=None) == read()


def test_a_number_in_place_of_text_is_told_about_quotes() -> None:
    assert "quotes" in problems(name=123)["name"]


def test_lines_are_looked_up_by_path() -> None:
    found = parse_instance(
        PLAIN | with_address("x"),
        file="web.yaml",
        path=("instances", 3),
        line_of=lambda path: 17 if path == ("instances", 3, "ports", 0, "addresses", 0) else None,
    )
    assert isinstance(found, Refused)
    assert str(found.problems[0]).startswith("web.yaml:17: instances[3].ports[0].addresses[0]: ")
