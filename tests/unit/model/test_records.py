"""What records are read, and what is refused, at which field."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from imdsproxy.config.describe import explain_finding
from imdsproxy.config.policy import PolicyRulesSettings
from imdsproxy.config.strict_yaml import Decoded, decode_yaml
from imdsproxy.model.entities import (
    Dialect,
    Instance,
    NamespaceListener,
    Network,
    NetworkId,
    Upstream,
)
from imdsproxy.model.path_rules import MOST_PATH_RULES
from imdsproxy.model.policy import NO_RULES, RULES, PolicyRules, Rule, TokenMode
from imdsproxy.model.records import parse_instance, parse_network, parse_records, render_record
from imdsproxy.model.records.schema import MAX_PAYLOAD, Fault, Findings, Refused
from imdsproxy.model.records.values import LAST_SECOND, unix_time_of

INSTANCE: dict[str, object] = {"id": "i-1", "name": "web"}
NETWORK: dict[str, object] = {"id": "blue", "listener": {"bridge": "br0"}}
NOVA: dict[str, object] = {"id": "i", "name": "vm", "project": "p1", "upstream": "nova"}


def read(**fields: object) -> Instance:
    found = parse_instance(INSTANCE | fields)
    assert isinstance(found, Instance), f"refused: {found}"
    return found


def problems(found: object) -> dict[str, str]:
    assert isinstance(found, Refused), f"accepted: {found}"
    texts = {problem.field: f"{problem.reason} ({problem.hint})" for problem in found.problems}
    for text in texts.values():
        assert text.isprintable()
        text.encode()
    return texts


def nested(levels: int) -> object:
    value: object = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


_TEXTS = ("a\r\nb: x", "a\x00", "a\x1b[31m", "a\x85b", "a\u2028b", "\ud800", "", " a", "x" * 256)
_NO_TEXTS = (7, 1.5, True, b"web", ["web"], {"a": "b"})
_NO_ADDRESSES = (
    "169.254.169.254", "fe80::a9fe:a9fe", "0.0.0.0", "0.1.2.3", "255.255.255.255", "::", "127.0.0.1", "::1",
    "224.0.0.1", "ff02::1", "::ffff:10.0.0.5", "::10.0.0.5", "fe80::1%eth0", "10.0.0.5/24", "10.0.0.05", "ten",
    " 10.0.0.5", "10.0.0.5\n", "", 167772165, b"\x0a\x00\x00\x05", None,
)  # fmt: skip
_NO_MACS = (
    "52:54:00:12:34", "52:54:00:12:34:5g", "52:54-00:12:34:56", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff",
    "00:00:00:00:00:00", "525400123456", 41150521956,
)  # fmt: skip
_NO_TIMES: tuple[object, ...] = (
    "", "now", "1795694400", "2026-11-26", "2026-11-26T12:00:00", "2026-11-26T12:00Z", "2026-11-26T12:00:00.Z",
    "2026-11-26T12:00:00,5Z", "20261126T120000Z", "2026-W48-4T12:00:00Z", "2026-11-26T12:00:00+0000",
    "2026-11-26T12:00:00 Z", " 2026-11-26T12:00:00Z", "2026-11-26T12:00:00Z\n", "2026-11-26T25:00:00Z",
    "2026-11-26T12:00:60Z", "2026-02-30T12:00:00Z", "2026-11-26T12:00:00+24:00", "1969-12-31T23:59:59Z",
    "0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00", "\uff12026-11-26T12:00:00Z",
    True, 1.5, -1, LAST_SECOND + 1, [], {}, b"x",
)  # fmt: skip
_KEY = "ssh-rsa AAAA"
_REFUSED_OF_INSTANCES: dict[str, tuple[tuple[str, object], ...]] = {
    **{key: tuple((key, text) for text in _TEXTS)
       for key in ("name", "project", "availability_zone", "instance_type")},
    "id": tuple(("id", value) for value in (*_NO_TEXTS, ".x", "-x", "a b", "a/b", "a|b", "a\n", "ä", "x" * 65)),
    "hostname": tuple(
        ("hostname", text) for text in ("web\nx", "web_1 x", "-web", "web-", "a..b", "a" * 64, "", "web.")
    ),
    "ports": (
        *(("ports[0].addresses[0]", [{"network": "n", "addresses": [one]}]) for one in _NO_ADDRESSES),
        *(("ports[0].mac", [{"network": "n", "mac": mac}]) for mac in _NO_MACS),
        ("ports[1].addresses[0]", [{"network": "n", "addresses": ["10.0.0.5"]}] * 2),
        ("ports[0].addresses[2]", [{"network": "n", "addresses": ["::5", "ten", "0:0::5"]}]),
        ("ports[1].mac", [{"network": "n", "mac": "52:54:00:00:00:01"}] * 2),
    ),
    "ssh_keys": (
        *(("ssh_keys[0]", [one]) for one in (f"{_KEY} x\n{_KEY} y", f"{_KEY} x\n", "-----BEGIN", "AAAA", 7)),
        ("ssh_keys[0].key", [{"name": "x"}]),
        *(("ssh_keys[0].name", [{"name": name, "key": _KEY}]) for name in ("a=b", "a/b", "a\nb", None)),
        ("ssh_keys[0].type", [{"name": "x", "key": _KEY, "type": "ssh"}]),
        ("ssh_keys[1].name", [{"name": "x", "key": _KEY}] * 2),
    ),
    "tags": (
        *(("tags.a", {"a": value}) for value in (1.10, True, "x\x00")),
        ('tags["a\\r\\nb"]', {"a\r\nb": "x"}),
        ('tags[""]', {"": "x"}),
        *(("tags", value) for value in ({7: "x"}, ["a"])),
    ),
    "user_data": (
        *(("user_data", value) for value in (7, ["x"], "\ud800", bytes(MAX_PAYLOAD + 1))),
        *(("user_data.base64", value) for value in ({"base64": "H4s"}, {"base64": "H4sA /w=="}, {"base64": 7}, {})),
        ("user_data.gzip", {"base64": "", "gzip": True}),
    ),
    "user_data_file": (("user_data_file", "/etc/shadow"),),
    "policy": (("policy", []), *(("policy", value) for value in ("required", 1, True))),
    "vendor_data": (
        ("vendor_data.a[0]", {"a": [b"x"]}),
        *(("vendor_data.a", {"a": value}) for value in (float("nan"), float("inf"), "\ud800")),
        *(("vendor_data", value) for value in ({"\ud800": 1}, {1: "x"}, 7, b"\xff")),
        (f"vendor_data{'.a' * 65}", nested(500)),
    ),
    "created_at": tuple(("created_at", value) for value in _NO_TIMES),
    "dialects": (
        ("dialects.gce", {"gce": True}),
        ("dialects.ec2", {"ec2": "no"}),
        ("dialects", ["ec2"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [(key, *case) for key, cases in _REFUSED_OF_INSTANCES.items() for case in cases],
)
def test_what_an_instance_cannot_have_is_refused_at_its_field(
    key: str, field: str, value: object
) -> None:
    assert field in problems(parse_instance(INSTANCE | {key: value}))


@pytest.mark.parametrize("mac", ["52:54:00:AB:cd:EF", "52-54-00-AB-CD-EF"])
def test_an_address_and_a_mac_are_read_in_any_usual_spelling(mac: str) -> None:
    addresses = ["10.0.0.5", "2001:db8::5", "fe80::1", "169.254.1.2", "240.0.0.1"]
    written = {"network": "n", "addresses": addresses, "mac": mac}
    one, other = read(ports=[written, {**written, "network": "m"}]).ports
    assert [str(each) for each in one.addresses] == addresses
    assert one.mac == other.mac == "52:54:00:ab:cd:ef"


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


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["ssh-ed25519 AAAA alice@example.org"] * 2, ["alice@example.org", "alice@example.org-2"]),
        ([_KEY, f"{_KEY} a = b / c"], ["key-1", "a-b-c"]),
        ([f"{_KEY} bob", {"name": "bob", "key": f"{_KEY} bob"}], ["bob-2", "bob"]),
    ],
)
def test_a_bare_ssh_key_is_named_by_its_comment_and_takes_no_name_that_is_written(
    keys: list[object], names: list[str]
) -> None:
    found = read(ssh_keys=keys).ssh_keys
    assert [key.name for key in found] == names
    assert found[0].key == keys[0]


def test_other_values_of_an_instance_are_read() -> None:
    assert read(tags={"b": "2", "a": ""}).tags == (("a", ""), ("b", "2"))
    binary = b"\x1f\x8b\x00\xff"
    for written in (binary, {"base64": "H4sA/w=="}):
        assert read(user_data=written).user_data == binary
    assert read(user_data="ä\r\n ").user_data == "ä\r\n ".encode()
    assert read(user_data="").user_data == b""
    assert read(user_data=bytes(MAX_PAYLOAD)).user_data == bytes(MAX_PAYLOAD)
    assert read(vendor_data="#cloud-config\n").vendor_data == b"#cloud-config\n"
    assert read(vendor_data={"a": [1, None, "ä"]}).vendor_data == '{"a": [1, null, "ä"]}'.encode()
    assert read().dialects == frozenset(Dialect)
    off = read(dialects={"ec2": False, "nocloud": True}).dialects
    assert off == {Dialect.OPENSTACK, Dialect.NOCLOUD}
    assert read(project=None, ports=None, user_data=None, tags=None) == read()
    network = parse_network({"id": "n", "listener": {"namespace": "ns", "device": None}})
    assert network == Network(NetworkId("n"), NamespaceListener("ns"))


_NOON = 1_795_694_400
"""2026-11-26, noon in UTC."""


@pytest.mark.parametrize(
    "written",
    [
        *(
            f"2026-11-26T12:00:00{zone}"
            for zone in ("Z", "+00:00", "-00:00", ".0Z", ".999999999999Z")
        ),
        *("2026-11-26t12:00:00z", "2026-11-26 12:00:00Z", "2026-11-26T14:30:00+02:30"),
        *("2026-11-26T00:00:00-12:00", _NOON),
    ],
)
def test_a_time_with_its_zone_is_a_second_of_unix_time(written: str | int) -> None:
    found = read(created_at=written)
    assert found.created_at == _NOON
    assert render_record(found)["created_at"] == _NOON
    # YAML needs no quotes for one.
    decoded = decode_yaml(f"instances: [{{id: i, name: i, created_at: {written}}}]")
    assert isinstance(decoded, Decoded)
    assert [each.created_at for each in parse_records(decoded.value).instances] == [_NOON]
    assert [read(created_at=second).created_at for second in (0, LAST_SECOND)] == [0, LAST_SECOND]


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2286, 11, 19)),  # noqa: DTZ001 - each gets its zone below
    st.integers(-1439, 1439),
)
def test_every_time_is_read_as_python_means_it(when: datetime, minutes: int) -> None:
    aware = when.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    seconds = unix_time_of(aware.isoformat())
    assert seconds == int(aware.timestamp() // 1)
    assert seconds is not None
    assert unix_time_of(datetime.fromtimestamp(seconds, UTC).isoformat()) == seconds


# Nova's


def test_an_instance_of_nova_is_its_id_project_and_ports() -> None:
    ports, policy = [{"network": "n", "project": "p2"}], {"tokens": "required"}
    instance = parse_instance({**NOVA, "ports": ports, "policy": policy})
    assert isinstance(instance, Instance)
    assert (instance.upstream, instance.project) == (Upstream.NOVA, "p1")
    assert instance.policy.tokens is TokenMode.REQUIRED
    assert instance.ports[0].project == "p2"


_OF_NOVA = {
    "ssh_keys": ["ssh-ed25519 AAAA"],
    "tags": {"a": "b"},
    "dialects": {"ec2": False},
    **dict.fromkeys(("user_data", "vendor_data", "availability_zone", "instance_type"), "x"),
}


@pytest.mark.parametrize(
    ("key", "value", "field", "text"),
    [
        ("project", None, "upstream", "needs project (Nova needs the instance's project)"),
        *(("project", one, "project", "") for one in ("a|b", "a b", "", "a\n", "-x", "x" * 65)),
        *(
            (key, value, key, "with upstream: nova (Nova has this value)")
            for key, value in _OF_NOVA.items()
        ),
        ("upstream", "novaa", "upstream", "one of embedded, nova"),
    ],
)
def test_what_does_not_go_with_nova_is_refused(
    key: str, value: object, field: str, text: str
) -> None:
    found = problems(parse_instance({**NOVA, key: value}))
    assert found.keys() == {field}
    assert text in found[field]


# Networks


_NET = "10.0.0.0/24"


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        *(("listener", "listener", one) for one in ({}, {"bridge": "b", "interface": "e"}, "br0")),
        ("listener", "listener.device", {"bridge": "br0", "device": "eth0"}),
        ("listener", "listener.manage_addresses", {"interface": "e", "manage_addresses": True}),
        ("listener", "listener.manage_addresses", {"namespace": "ns", "manage_addresses": True}),
        ("listener", "listener.manage_addresses", {"namespace": "ns", "manage_addresses": "no"}),
        *(
            ("listener", "listener.namespace", {"namespace": name})
            for name in ("../../etc/passwd", "ns name", "ns\n", ".")
        ),
        ("listener", "listener.bridge", {"bridge": "a-name-of-16-chars"}),
        ("listener", "listener.interface", {"interface": "eth0/x"}),
        ("listener", "listener.vlan", {"vlan": 5, "bridge": "br0"}),
        *(
            ("subnets", "subnets[0].cidr", [{"cidr": cidr}])
            for cidr in ("10.0.0.0", "10.0.0.0/255.255.255.0", "10.0.0.0/33", "224.0.0.0/24", 10)
        ),
        ("subnets", "subnets[0].cidr", [{}]),
        ("subnets", "subnets[0].gateway", [{"cidr": _NET, "gateway": "2001:db8::1"}]),
        ("subnets", "subnets[0].gateway", [{"cidr": _NET, "gateway": "10.0.0"}]),
        ("subnets", "subnets[0].dns", [{"cidr": _NET, "dns": "10.0.0.2"}]),
        ("subnets", "subnets[0].dns[1]", [{"cidr": _NET, "dns": ["10.0.0.2", "0.0.0.0"]}]),
        ("subnets", "subnets[0].dhcp", [{"cidr": _NET, "dhcp": True}]),
        ("subnets", "subnets[1]", [{"cidr": _NET}, {"cidr": _NET}]),
        *(("mtu", "mtu", value) for value in (67, 65536, "1500", 1500.0, True)),
        ("scope", "scope", "subnet"),
    ],
)
def test_what_a_network_cannot_have_is_refused_at_its_field(
    key: str, field: str, value: object
) -> None:
    assert field in problems(parse_network(NETWORK | {key: value}))


# Every record


def test_all_problems_of_a_record_come_at_once_and_its_id_is_kept() -> None:
    found = problems(
        parse_network({"id": "a b", "listener": {"bridge": ""}, "mtu": 1, "sub_nets": []})
    )
    assert found.keys() == {"id", "listener.bridge", "mtu", "sub_nets"}
    refused = parse_network(NETWORK | {"mtu": 1})
    assert isinstance(refused, Refused)
    assert refused.id == "blue"
    both = problems(parse_instance(INSTANCE | {"user_data": "x", "user_data_file": "x"}))
    assert both["user_data_file"] == "cannot be combined with user_data (keep one of the two)"


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ({"subnet": []}, "unknown key (did you mean subnets?)"),
        ({"name": 123}, "expected text, found the number 123 (put it in quotes)"),
        ({"subnets": [{"cidr": "10.0.0.7/24"}]}, "has host bits set (write 10.0.0.0/24)"),
        ({"mtu": 10**5000}, "a huge number is out of range (68 to 65535)"),
        ({"policy": {"token": "required"}}, "unknown key (did you mean tokens?)"),
        ({"scope": "subnet"}, '"subnet" is not acceptable (one of network, router)'),
        (
            {"subnets": [{"cidr": "fe80::/64", "gateway": "FE80:0::01%br0"}]},
            "is scoped (write fe80::1)",
        ),
    ],
)
def test_a_problem_says_what_would_be_right(patch: dict[str, object], text: str) -> None:
    (found,) = problems(parse_network(NETWORK | patch)).values()
    assert text in found


@pytest.mark.parametrize("record", [None, [], "blue", 7, b"x"])
def test_a_record_that_is_no_mapping_is_refused(record: object) -> None:
    assert problems(parse_network(record))


# Documents


def test_good_records_stand_beside_bad_ones() -> None:
    records = parse_records(
        {"instances": [INSTANCE, {"id": "y", "name": 7}, 8], "networks": [NETWORK, {"id": "x"}]}
    )
    assert [(path, one.id) for path, one in records.found] == [
        (("networks", 0), "blue"),
        (("networks", 1), "x"),
        (("instances", 0), "i-1"),
        (("instances", 1), "y"),
        (("instances", 2), None),
    ]
    assert [one.id for one in records.networks] == ["blue"]
    assert [one.id for one in records.instances] == ["i-1"]
    assert [problem.field for problem in records.all_problems] == [
        "networks[1].listener",
        "instances[1].name",
        "instances[2]",
    ]


@pytest.mark.parametrize(
    ("document", "fields"),
    [
        (None, []),
        ({}, []),
        ({"instance": [INSTANCE], "networks": [NETWORK]}, ["instance"]),
        ([INSTANCE], ["record"]),
    ],
)
def test_a_document_with_a_problem_of_its_own_has_no_records(
    document: object, fields: list[str]
) -> None:
    records = parse_records(document)
    assert not records.found
    assert [problem.field for problem in records.problems] == fields


def test_a_fault_refuses_the_record_that_it_is_in_or_else_the_document() -> None:
    document = {"instances": [INSTANCE, INSTANCE | {"id": "j", "tags": {"a": "b"}}]}
    fault = Fault(("instances", 1, "tags", "a"), "appears twice", line=9)
    records = parse_records(document, Findings("f"), [fault])
    assert [each.id for each in records.instances] == ["i-1"]
    assert str(records.all_problems[0]) == "f:9: instances[1].tags.a: appears twice"
    records = parse_records(document, faults=[Fault(("instances",), "appears twice")])
    assert not records.found
    assert records.problems


# Policies


def _of_instance(policy: object) -> PolicyRules | Refused:
    found = parse_instance(INSTANCE | {"policy": policy})
    return found.policy if isinstance(found, Instance) else found


def _of_network(policy: object) -> PolicyRules | Refused:
    found = parse_network(NETWORK | {"policy": policy})
    return found.policy if isinstance(found, Network) else found


@pytest.mark.parametrize("policy", [None, {}, {"tokens": None}, {"paths": {}}, {"paths": None}])
def test_a_rule_that_is_missing_is_left_to_other_scopes(policy: object) -> None:
    assert _of_instance(policy) == _of_network(policy) == NO_RULES


def _values_of(rule: Rule) -> tuple[object, ...]:
    if rule.bounds is not None:
        least, most = rule.bounds
        return (least, most, None, least - 1, most + 1, -1, True, 1.5, "1", "", [], {})
    if rule.kind is bool:
        return (True, False, None, 1, 0, "true", "yes", "", 1.5, [], {})
    return ("off", "optional", "required", None, False, True, "OFF", "on", "", 0, 1, [], {})


_VALUES = {name: _values_of(rule) for name, rule in RULES.items() if rule.kind is not tuple}


_PATHS: tuple[object, ...] = (
    None,
    {},
    {"/": "deny"},
    {"/latest/user-data": "allow", "/nocloud": "optional", "/openstack/content": "required"},
    {f"/latest/{number}": "deny" for number in range(MOST_PATH_RULES)},
    {f"/latest/{number}": "deny" for number in range(MOST_PATH_RULES + 1)},
    {"/1.0/user-data": "deny"},
    {"/latest": "refuse"},
    {"/latest": False},
    {"/latest": {}},
    ["/latest"],
    "/latest",
    True,
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key, values in _VALUES.items() for value in values),
        *(("paths", value) for value in _PATHS),
    ],
)
def test_records_take_what_settings_take(key: str, value: object) -> None:
    found = _of_instance({key: value})
    assert isinstance(found, Refused) or found == _of_network({key: value})
    try:
        settings = PolicyRulesSettings.model_validate({key: value}).rules()
    except ValidationError as error:
        assert isinstance(found, Refused)
        (problem,) = found.problems
        assert problem.field.startswith(f"policy.{key}")
        assert problem.hint or key == "paths"
        (finding,) = map(explain_finding, error.errors())
        if isinstance(value, dict) and len(value) == 1 and finding.field != "paths./latest":
            assert (finding.reason, finding.hint) == (problem.reason, problem.hint)
    else:
        assert found == settings
