"""`imdsproxy network` and `instance`: flags and files to records, records to tables and files."""

import asyncio
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.api.answers import Written
from imdsproxy.api.client import AdminClient, read_record
from imdsproxy.api.host_records import HostRecords
from imdsproxy.api.record_routes import Change
from imdsproxy.cli import output
from imdsproxy.errors import AdminError, Problem, RequestRefused, SourceUnavailable
from imdsproxy.model.entities import BridgeListener, Dialect, InstanceId, NamespaceListener
from imdsproxy.model.path_rules import PathWord
from imdsproxy.model.policy import NO_RULES, RULES, PolicyRules, TokenMode
from imdsproxy.model.records import parse_network
from imdsproxy.network.planned import NotServedCode
from imdsproxy.reconcile.progress import Step
from imdsproxy.sources.libvirt.xml import METADATA_URI
from support.cli import Cli, on_a_terminal
from support.libvirt_backing import FakeLibvirt, domain_xml, uuid_of
from support.patience import patience
from support.record_builders import port

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ root@host"
MAC = "52:54:00:12:34:56"
NAMES = {"network": "blue", "instance": "web-1"}
every_kind = pytest.mark.parametrize("kind", NAMES)


def test_a_network_is_added_with_flags(cli: Cli) -> None:
    ran = cli(
        *("network", "add", "blue", "--namespace", "ns-blue", "--device", "tap0"),
        *("--manage-addresses", "--name", "Blue", "--project", "p1", "--mtu", "1400"),
        *("--subnet", "10.0.0.0/24,gateway=10.0.0.1,dns=10.0.0.2,dns=10.0.0.3"),
        *("--subnet", "2001:db8::/64", "--tokens", "required"),
    )
    assert (ran.status, ran.out) == (0, "done: network blue added\n")
    network = cli.network()
    assert network.listener == NamespaceListener("ns-blue", "tap0", manage_addresses=True)
    assert (network.name, network.project, network.mtu) == ("Blue", "p1", 1400)
    first, second = network.subnets
    assert (str(first.gateway), [*map(str, first.dns)]) == ("10.0.0.1", ["10.0.0.2", "10.0.0.3"])
    assert str(second.cidr) == "2001:db8::/64"
    assert network.policy == PolicyRules(tokens=TokenMode.REQUIRED)


def test_an_instance_is_added_with_flags(cli: Cli, tmp_path: Path) -> None:
    cli("network", "add", "blue", "--bridge", "br0")
    cli("network", "add", "red", "--interface", "eth1")
    keys, data, vendor = (tmp_path / name for name in ("keys.pub", "user-data", "vendor"))
    keys.write_text(f"# mine\n\n{KEY}\n{KEY}2\n")
    data.write_bytes(b"\x1f\x8b\x00\xff")
    vendor.write_text("#cloud-config\n")
    further = "network=red,mac=52:54:00:12:34:57,address=10.1.0.5"
    ran = cli(
        *("instance", "add", "web-1", "--name", "Web 1", "--hostname", "web-1.example"),
        *("--network", "blue", "--mac", MAC, "--address", "10.0.0.5"),
        *("--address", "2001:db8::5", "--port", further),
        *("--ssh-key", str(keys), "--ssh-key", f"{KEY}3", "--tag", "role=web", "--tag", "a=b=c"),
        *("--user-data", str(data), "--vendor-data", str(vendor)),
        *("--availability-zone", "az1", "--instance-type", "m1", "--no-nocloud"),
        *("--seal-user-data", "--path-rule", "/latest/user-data=deny", "--no-path-rule", "/"),
    )
    assert ran.status == 0, ran.err
    instance = cli.instance()
    assert (instance.name, instance.hostname) == ("Web 1", "web-1.example")
    assert [(port.network, port.mac, len(port.addresses)) for port in instance.ports] == [
        ("blue", MAC, 2),
        ("red", "52:54:00:12:34:57", 1),
    ]
    assert [key.key for key in instance.ssh_keys] == [KEY, f"{KEY}2", f"{KEY}3"]
    assert instance.tags == (("a", "b=c"), ("role", "web"))
    assert (instance.user_data, instance.vendor_data) == (b"\x1f\x8b\x00\xff", b"#cloud-config\n")
    assert (instance.availability_zone, instance.instance_type) == ("az1", "m1")
    assert instance.dialects == {Dialect.EC2, Dialect.OPENSTACK}
    paths = (("/latest/user-data", PathWord.DENY),)
    assert instance.policy == PolicyRules(seal_user_data=True, paths=paths)


_EVERY: dict[str, Any] = {
    rule.name: rule.bounds[1] if rule.bounds else rule.kind is bool or TokenMode.REQUIRED
    for rule in RULES.values()
    if rule.kind not in (tuple, list)
}
_EVERY_FLAG = " ".join(
    f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
    for name, value in _EVERY.items()
)
_TAG = "/latest/meta-data/tags/instance/a=b"
_DENIED = ("/latest/user-data", PathWord.DENY)


@every_kind
def test_a_policy_is_changed_by_flags_rule_by_rule(filled: Cli, kind: str) -> None:
    sealed = PolicyRules(tokens=TokenMode.REQUIRED, seal_user_data=True)
    for flags, policy in (
        ("--tokens required", PolicyRules(tokens=TokenMode.REQUIRED)),
        ("--seal-user-data", sealed),
        (
            "--tokens off --no-seal-user-data",
            PolicyRules(tokens=TokenMode.OFF, seal_user_data=False),
        ),
        (_EVERY_FLAG, PolicyRules(**_EVERY)),
        ("--clear policy", NO_RULES),
        (
            f"--path-rule /latest/user-data=deny --path-rule {_TAG}=optional",
            PolicyRules(paths=((_TAG, PathWord.OPTIONAL), _DENIED)),
        ),
        (
            f"--no-path-rule {_TAG} --no-path-rule / --path-rule /=required",
            PolicyRules(paths=(("/", PathWord.REQUIRED), _DENIED)),
        ),
        ("--no-path-rule / --no-path-rule /latest/user-data", NO_RULES),
        (
            "--audience vault --audience * --audience vault --identity-tag role",
            PolicyRules(audiences=("*", "vault"), identity_tags=("role",)),
        ),
    ):
        assert filled(kind, "set", NAMES[kind], *flags.split()).status == 0
        record = filled.network() if kind == "network" else filled.instance()
        assert record.policy == policy


def test_set_changes_only_what_is_given(filled: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"#!/bin/sh\r\n")))
    assert filled("instance", "set", "web-1", "--user-data", "-").status == 0
    filled("instance", "set", "web-1", "--tag", "a=1", "--project", "p")
    filled("instance", "set", "web-1", "--tag", "b=2", "--clear", "project", "--no-ec2")
    filled("instance", "set", "web-1", "--ec2")
    instance = filled.instance()
    assert instance.tags == (("a", "1"), ("b", "2"))
    assert (instance.project, instance.user_data) == (None, b"#!/bin/sh\r\n")
    assert instance.dialects == frozenset(Dialect)
    assert len(instance.ports) == 1
    filled("network", "set", "blue", "--device", "tap0", "--manage-addresses")
    listener = filled.network().listener
    assert listener == NamespaceListener("blue", "tap0", manage_addresses=True)
    filled("network", "set", "blue", "--bridge", "br0")
    assert filled.network().listener == BridgeListener("br0"), "it is replaced as a whole"


def test_a_posted_password_is_shown_and_cleared(filled: Cli) -> None:
    assert filled.server.passwords.keep(InstanceId("web-1"), b"c2VjcmV0")
    assert filled("instance", "password", "web-1").out == "c2VjcmV0"
    assert "c2VjcmV0" not in filled("instance", "show", "web-1", "--json").out
    shown = filled("instance", "password", "web-1", "--json").json
    assert shown == {"instance": "web-1", "password": {"text": "c2VjcmV0"}}
    assert filled("instance", "password", "web-1", "--clear").status == 0
    assert filled.server.passwords.read(InstanceId("web-1")) is None
    none = filled("instance", "password", "web-1")
    assert (none.status, "has posted no password" in none.err) == (66, True)


def test_tables_of_records(filled: Cli) -> None:
    filled.server.leave_out("blue", "pid 7 has the port")
    name = "n" * 200
    filled("network", "set", "blue", "--name", name)
    head, _, row = filled("network", "list").out.splitlines()
    assert head.split() == ["NETWORK", "NAME", "LISTENER", "INSTANCES", "SOURCE", "STATE"]
    assert row.split() == ["blue", name, "namespace", "blue", "1", "sqlite", "port-busy"]
    addresses = [f"--address=10.0.0.{number}" for number in range(5, 10)]
    filled("instance", "set", "web-1", "-n", "blue", *addresses)
    head, _, row = filled("instance", "list").out.splitlines()
    assert head.split() == ["INSTANCE", "NAME", "PORTS", "USER", "DATA", "SOURCE", "STATE"]
    ports = "blue 10.0.0.5 10.0.0.6 10.0.0.7 +2"
    assert " ".join(row.split()) == f"web-1 web-1 {ports} - sqlite not in force"
    assert "no instances" in filled("instance", "list", "--network", "red").out
    assert filled("instance", "list", "--network", "red", "--json").json == []
    assert filled("--json", "network", "list").json[0]["record"]["id"] == "blue"
    filled.claim_twice()
    assert "conflict" in filled("instance", "list").out
    assert "# conflict 1: address blue/10.0.0.5\n" in filled("instance", "show", "web-1").out


def test_what_show_prints_can_be_stored_again(filled: Cli, tmp_path: Path) -> None:
    data = "#cloud-config\nusers:\n  - name: a\n\n# ü: 'x'\n"
    (tmp_path / "data").write_text(data)
    given = ("--user-data", str(tmp_path / "data"), "--tag", "n=0123", "--tokens", "off")
    ruled = ("--seal-user-data", "--path-rule", "/latest/user-data=deny")
    filled("instance", "set", "web-1", *given, *ruled)
    body = {"created_at": 1_795_694_400}
    filled.server.client.request("PATCH", "/v1/instances/web-1", body=body)
    before = dict(filled.server.instances), dict(filled.server.networks)
    files = {kind: tmp_path / f"{kind}.yaml" for kind in NAMES}
    for kind, file in files.items():
        file.write_text(filled(kind, "show", NAMES[kind]).out)
    shown = files["instance"].read_text()
    assert "# created: 2026-11-26T12:00:00Z\n" in shown
    assert "  created_at: 1795694400\n" in shown
    assert "  policy:\n    tokens: 'off'\n    seal_user_data: true\n" in shown
    assert "    paths:\n      /latest/user-data: deny\n" in shown
    filled("instance", "remove", "web-1")
    filled("network", "remove", "blue")
    for kind, file in files.items():
        assert filled(kind, "add", "--file", str(file)).status == 0
    assert (filled.server.instances, filled.server.networks) == before


def test_several_are_removed_until_one_cannot_be(filled: Cli) -> None:
    filled("instance", "add", "web-2", "--network", "blue")
    ran = filled("instance", "remove", "web-1", "unknown", "web-2")
    assert (ran.status, ran.out) == (66, "done: instance web-1 removed\n")
    assert list(filled.server.instances) == ["web-2"]
    (removed,) = filled("instance", "remove", "web-2", "--json").json
    assert removed["applied"] is True


def test_a_change_that_is_not_in_force_yet_names_the_reason(filled: Cli) -> None:
    filled.server.leave_out(
        "blue", "namespace blue is missing", code=NotServedCode.NAMESPACE_MISSING
    )
    ran = filled("network", "set", "blue", "--mtu", "1400")
    assert ran.status == 75
    assert ran.out.splitlines() == [
        "stored: network blue changed; not in force yet:",
        "  network blue is not served: namespace blue is missing",
    ]
    shown = filled("network", "show", "blue").out
    assert "# state: not served: namespace blue is missing (namespace-missing)\n" in shown


def test_a_record_of_a_daemon_of_another_version_is_refused() -> None:
    with pytest.raises(AdminError, match="record of network blue is not understood"):
        read_record("network", parse_network, {"id": "blue", "listener": {"teleport": "x"}})


# What `add` takes when flags leave it out


@pytest.mark.parametrize(
    ("flag", "name"), [("--bridge", "br0"), ("--interface", "eth1"), ("--namespace", "net-a")]
)
def test_a_network_without_an_id_is_named_by_what_it_is_reached_through(
    cli: Cli, flag: str, name: str
) -> None:
    assert cli("network", "add", flag, name).out == f"done: network {name} added\n"
    assert cli.network(name).id == name


def test_an_instance_is_in_the_only_network_and_has_its_id_as_a_name(cli: Cli) -> None:
    none = cli("instance", "add", "web-1", "--mac", MAC)
    assert none.status == 64
    assert "need a network, but there is none yet" in none.err
    assert "imdsproxy network add --bridge" in none.err
    cli("network", "add", "--bridge", "br0")
    assert cli("instance", "add", "web-1", "--mac", MAC).out == "done: instance web-1 added\n"
    instance = cli.instance()
    assert (instance.name, instance.hostname) == ("web-1", "web-1")
    assert instance.ports == (port("br0", mac=MAC),)
    assert "need a --network" in cli("instance", "set", "web-1", "--mac", MAC).err
    cli("network", "add", "--bridge", "br1")
    several = cli("instance", "add", "web-2", "--address", "10.0.0.5")
    assert several.status == 64
    assert "there are 2 networks" in several.err
    assert "br0, br1" in several.err


def test_an_instance_with_a_name_only_gets_an_id_that_is_made_of_it(cli: Cli) -> None:
    assert cli("instance", "add", "--name", "Web server (1)").status == 0
    instance = cli.instance("Web-server-1")
    assert (instance.name, instance.hostname) == ("Web server (1)", "Web-server-1")
    unnamed = cli("instance", "add", "--name", "…")
    assert (unnamed.status, "id is missing" in unnamed.err) == (64, True)


# From libvirt

_NETWORK = (
    "<network><name>default</name><uuid>u</uuid><bridge name='virbr0'/>"
    "<ip address='192.168.122.1' prefix='24'>"
    f"<dhcp><host mac='{MAC}' ip='192.168.122.5'/></dhcp></ip></network>"
)
_ELEMENT = (
    f"<i:instance xmlns:i='{METADATA_URI}'><i:hostname>www</i:hostname>"
    "<i:user-data>#!/bin/sh</i:user-data></i:instance>"
)


@pytest.fixture
def domains(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The domain `web` that libvirt has; virbr0 is a network of the daemon's."""
    cli("network", "add", "--interface", "virbr0")
    libvirt = FakeLibvirt()
    libvirt.network_xml["default"] = _NETWORK
    libvirt.xml["web"] = domain_xml("web", [("network=default", MAC)], _ELEMENT)
    monkeypatch.setattr("imdsproxy.sources.libvirt.source.LibvirtClient", lambda _uri: libvirt)
    return libvirt.xml


def test_a_domain_is_taken_over_and_once_more_when_it_has_changed(
    cli: Cli, domains: dict[str, str]
) -> None:
    assert cli("instance", "add", "--from-libvirt", "web").status == 0
    instance = cli.instance(uuid_of("web"))
    assert (instance.name, instance.hostname, instance.user_data) == ("web", "www", b"#!/bin/sh")
    assert instance.ports == (port("virbr0", "192.168.122.5", mac=MAC),)
    domains["web"] = domains["web"].replace("www", "mail")
    assert cli("instance", "set", "--from-libvirt", "web").status == 0
    assert cli.instance(uuid_of("web")).hostname == "mail"


def test_flags_win_over_the_domain_and_a_network_may_have_libvirts_name(
    cli: Cli, domains: dict[str, str]
) -> None:
    cli("network", "add", "other", "--bridge", "br1")
    added = ("instance", "add", "web-1", "--from-libvirt", "web", "--network", "other")
    assert cli(*added, "--hostname", "mail", "--ssh-key", KEY).status == 0
    instance = cli.instance()
    assert (instance.hostname, instance.user_data) == ("mail", b"#!/bin/sh")
    assert [each.key for each in instance.ssh_keys] == [KEY]
    assert instance.ports == (port("other", "192.168.122.5", mac=MAC),)
    domains["web"] = domain_xml("web", [("network=other", "52:54:00:00:00:07")])
    assert cli("instance", "add", "web", "--from-libvirt", "web").status == 0
    assert cli.instance("web").ports[0].network == "other"


@pytest.mark.parametrize(
    ("interfaces", "element", "arguments", "text"),
    [
        ([("bridge=br7", MAC)], "", [], "imdsproxy network add --bridge br7"),
        ([("network=gone", MAC)], "", [], "no network has the listener gone"),
        ([("user=x", MAC)], "", [], "no NIC on a bridge"),
        ([("bridge=virbr0", MAC)] * 2, "", ["--network", "virbr0"], "has 2 NICs"),
        ([("bridge=virbr0", MAC)], "", ["--mac", MAC], "uses the domain's MACs"),
        ([("bridge=virbr0", MAC)], _ELEMENT.replace("hostname", "nonsense"), [], "unknown element"),
    ],
)
def test_a_domain_that_cannot_be_taken_over_is_refused_with_the_reason(
    cli: Cli,
    domains: dict[str, str],
    *,
    interfaces: list[tuple[str, str]],
    element: str,
    arguments: list[str],
    text: str,
) -> None:
    domains["web"] = domain_xml("web", interfaces, element)
    ran = cli("instance", "add", "--from-libvirt", "web", *arguments)
    assert (ran.status, text in ran.err) == (64, True)
    assert not cli.server.instances


def test_libvirt_is_asked_where_the_settings_say(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def connect(uri: str) -> None:
        raise SourceUnavailable(f"{uri} is down")

    monkeypatch.setattr("imdsproxy.sources.libvirt.source.LibvirtClient", connect)
    settings = tmp_path / "imdsproxy.yaml"
    settings.write_text(json.dumps({"sources": {"libvirt": {"uri": "test:///default"}}}))
    ran = cli("instance", "add", "--from-libvirt", "web", "--config", str(settings))
    assert (ran.status, "test:///default is down" in ran.err) == (69, True)


# Files

FILE = """\
networks:
- {id: green, listener: {bridge: br0}}
instances:
- id: db-1
  name: db-1
  user_data_file: data
  ports: [{network: green, mac: 52:54:00:00:00:01}]
- id: db-2
  name: db-2
  user_data: !!binary /w==
"""


def test_many_records_are_added_from_a_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_bytes(b"beside the file")
    (tmp_path / "records.yaml").write_text(FILE)
    ran = cli("instance", "add", "--file", str(tmp_path / "records.yaml"))
    assert ran.out == "done: 1 network, 2 instances added\n"
    assert cli.instance("db-1").user_data == b"beside the file"
    assert cli.instance("db-2").user_data == b"\xff"
    assert cli("network", "add", "--file", str(tmp_path / "records.yaml")).status == 73
    stored = cli("network", "set", "--file", str(tmp_path / "records.yaml"))
    assert stored.out == "done: 1 network, 2 instances stored\n"
    for text in (
        '{"networks": [{"id": "n", "listener": {"bridge": "b"}}]}',
        FILE.partition("inst")[0],
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert cli("network", "set", "--file", "-", "--json").json["networks"] == 1


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["contains no records"]),
        ("a: [", ["is not YAML"]),
        ("networks: []", ["contains no records"]),
        (
            "networks:\n- id: a\n- id: b\n  listener: {bridge: b}\n  mtu: x\ninstances:\n- id: c\n",
            [
                ":2: networks[0].listener: is missing",
                ":5: networks[1].mtu",
                ":7: instances[0].name: is missing",
            ],
        ),
    ],
)
def test_a_file_that_is_not_acceptable_is_refused_with_every_problem(
    cli: Cli, tmp_path: Path, text: str, problems: list[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    ran = cli("network", "add", "--file", str(path))
    assert ran.status == 64
    assert [one for one in problems if one not in ran.err] == []
    assert cli.server.networks == {}


def _slow_down(monkeypatch: pytest.MonkeyPatch, steps: Sequence[Step]) -> None:
    """Have the daemon take its time for each step before it stores anything."""
    store = HostRecords.put

    async def put(host: HostRecords, change: Change) -> Written:
        progress = host.parts.records.progress
        for step in steps:
            progress.note(step.what, step.done, step.of)
            await asyncio.sleep(0.3)
            progress.end(step.what)
        return await store(host, change)

    monkeypatch.setattr(HostRecords, "put", put)


_STEPS = (Step("storing instances", 1000, 2000), Step("compiling instances", 2000, 2000))


def _write(path: Path, count: int, name: str = "web") -> str:
    records = [{"id": f"web-{number}", "name": name} for number in range(count)]
    path.write_text(json.dumps({"instances": records}))
    return str(path)


def test_what_takes_long_is_shown_line_by_line_and_no_program_is_bothered(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_LINE_EVERY_S", 0.0)
    monkeypatch.setattr("imdsproxy.api.client._LOOK_EVERY_S", 0.05)
    _slow_down(monkeypatch, _STEPS)
    file = _write(tmp_path / "many.json", 2000)
    shown = cli("instance", "add", "--file", file)
    assert shown.out == "done: 0 networks, 2000 instances added\n"
    for line in (
        f"checking {tmp_path}/many.json: 500 of 2,000",
        "sending records: 2,000 of 2,000",
        "storing instances: 1,000 of 2,000",
        "compiling instances: 2,000 of 2,000",
    ):
        assert line in shown.err.splitlines()
    quiet = cli("instance", "set", "--file", file, "--json")
    assert (quiet.json["instances"], quiet.err) == (2000, "")


def test_a_terminal_shows_a_bar_while_records_of_a_file_are_stored_and_then_takes_it_away(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_down(monkeypatch, (Step("storing instances", 1000, 2000),) * 6)
    file = _write(tmp_path / "many.json", 200)
    shown = "\n".join(on_a_terminal(cli, f"instance add --file {file}"))
    bar, _, rest = re.sub(r"\x1b\[[0-9;]*m", "", shown).rpartition("\x1b[2K")
    assert re.search(r"storing instances \u2501+.* 1000/2000 ", bar)
    assert "done: 0 networks, 200 instances added" in rest


def test_a_list_has_what_is_searched_for_and_by_host_only_in_a_fleet(filled: Cli) -> None:
    assert "web-1" in filled("instance", "list", "--search", "WEB").out
    assert "web-1" not in filled("instance", "list", "--search", "none").out
    assert "web-1" not in filled("instance", "list", "--project", "none").out
    refused = filled("instance", "list", "--host", "a")
    assert refused.status != 0
    assert "--host needs a fleet" in refused.err


def test_work_may_take_longer_than_any_single_answer(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_down(monkeypatch, _STEPS * 4)
    client = AdminClient(cli.server.socket, timeout_s=patience())
    seen: list[object] = []
    line = b'{"instance": {"id": "web", "name": "web"}}\n'
    assert client.post_records([line], {}, seen.extend)["instances"] == 1
    assert {"what": "storing instances", "done": 1000, "of": 2000} in seen


def test_records_that_come_by_line_are_stored_all_or_none(cli: Cli) -> None:
    lines = [b'{"instance": {"id": "web", "name": "web"}}\n', b'{"instance": {"id": "-"}}\n']
    with pytest.raises(RequestRefused) as caught:
        cli.server.client.post_records(lines, {}, print)
    fields = [problem.field for problem in caught.value.problems]
    assert sorted(fields) == ["instances[1].id", "instances[1].name"]
    with pytest.raises(RequestRefused, match="neither a network nor an instance"):
        cli.server.client.post_records([b"[]\n"], {}, print)
    with pytest.raises(RequestRefused) as caught:
        cli.server.client.post_records(lines[:1] * 2, {}, print)
    assert [problem.field for problem in caught.value.problems] == ["instances[1].id"]
    assert not cli.server.instances


def test_of_many_reasons_and_problems_some_are_printed_and_the_rest_counted(
    cli: Cli, tmp_path: Path
) -> None:
    refused = cli("instance", "add", "--file", _write(tmp_path / "bad.json", 100, name=""))
    assert refused.status != 0
    lines = refused.err.splitlines()
    assert lines[21] == "  and 80 more: see --json"
    assert len(lines) <= 23
    missing = (Problem("x", f"namespace n{number} is missing") for number in range(9485))
    cli.server.unapplied.extend(missing)
    stored = cli("instance", "add", "--file", _write(tmp_path / "one.json", 1))
    assert stored.status != 0
    lines = stored.out.splitlines()
    assert lines[1] == "  namespace n0 is missing"
    assert lines[21:] == ["  and 9,465 more: imdsproxy status"]
