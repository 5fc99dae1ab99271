"""The command line end to end, against the admin API on a real unix socket."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from imdsproxy.admin import tokens
from imdsproxy.admin.status import AuditReport, SourceReport, UnixListenerReport
from imdsproxy.cli import admin_client
from imdsproxy.cli.main import EXAMPLES, build_program, iterate_commands, main
from imdsproxy.core.endpoints import LeftOutCode
from imdsproxy.core.model import BridgeListener, Dialect, InstanceId, NamespaceListener, NetworkId
from imdsproxy.core.nova import EndpointSet, NovaRouting
from imdsproxy.core.path_rules import PathRules, PathWord
from imdsproxy.core.policy import (
    NO_RULES,
    RULES,
    PolicyBook,
    PolicyRules,
    Rule,
    TokenMode,
)
from imdsproxy.core.timing import Step
from imdsproxy.errors import ConfigInvalid, Problem, ReloadFailed, SourceUnavailable
from support.admin_server import AdminServer, admin_server
from support.record_builders import instance, port

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ root@host"


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        decoded: dict[str, object] = json.loads(self.out)
        return decoded


@dataclass
class Cli:
    server: AdminServer
    capture: pytest.CaptureFixture[str]

    def claim_twice(self) -> None:
        """Another source has an instance with the address of web-1."""
        self.server.claim_twice(instance("web-2", ports=[port("blue", "10.0.0.5")]))

    def __call__(self, *arguments: str) -> Ran:
        status = main(["--socket", str(self.server.socket), *arguments])
        captured = self.capture.readouterr()
        return Ran(status, captured.out, captured.err)


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with admin_server(tmp_path) as server:
        yield Cli(server, capsys)


@pytest.fixture
def filled(cli: Cli) -> Cli:
    assert cli("network", "add", "blue", "--namespace", "blue").status == 0
    added = cli("instance", "add", "web-1", "--network", "blue", "--address", "10.0.0.5")
    assert added.status == 0
    return cli


def test_a_network_is_added_with_flags(cli: Cli) -> None:
    ran = cli(
        *("network", "add", "blue", "--namespace", "ns-blue", "--device", "tap0"),
        *("--manage-addresses", "--name", "Blue", "--project", "p1", "--mtu", "1400"),
        *("--subnet", "10.0.0.0/24,gateway=10.0.0.1,dns=10.0.0.2,dns=10.0.0.3"),
        *("--subnet", "2001:db8::/64"),
    )

    assert (ran.status, ran.out) == (0, "done: network blue added\n")
    network = cli.server.networks[NetworkId("blue")]
    assert network.listener == NamespaceListener("ns-blue", "tap0", manage_addresses=True)
    assert (network.name, network.project, network.mtu) == ("Blue", "p1", 1400)
    first, second = network.subnets
    assert (str(first.gateway), [str(one) for one in first.dns]) == (
        "10.0.0.1",
        ["10.0.0.2", "10.0.0.3"],
    )
    assert str(second.cidr) == "2001:db8::/64"


def test_an_instance_is_added_with_flags(cli: Cli, tmp_path: Path) -> None:
    cli("network", "add", "blue", "--bridge", "br0")
    cli("network", "add", "red", "--interface", "eth1")
    keys = tmp_path / "keys.pub"
    keys.write_text(f"# mine\n\n{KEY}\n{KEY}2\n")
    data = tmp_path / "user-data"
    data.write_bytes(b"\x1f\x8b\x00\xff")
    vendor = tmp_path / "vendor"
    vendor.write_text("#cloud-config\n")

    ran = cli(
        *("instance", "add", "web-1", "--name", "Web 1", "--hostname", "web-1.example"),
        *("--network", "blue", "--mac", "52:54:00:12:34:56", "--address", "10.0.0.5"),
        *(
            "--address",
            "2001:db8::5",
            "--port",
            "network=red,mac=52:54:00:12:34:57,address=10.1.0.5",
        ),
        *("--ssh-key", str(keys), "--ssh-key", f"{KEY}3", "--tag", "role=web", "--tag", "a=b=c"),
        *("--user-data", str(data), "--vendor-data", str(vendor)),
        *("--availability-zone", "az1", "--instance-type", "m1", "--no-nocloud"),
    )

    assert ran.status == 0, ran.err
    instance = cli.server.instances[InstanceId("web-1")]
    assert (instance.name, instance.hostname) == ("Web 1", "web-1.example")
    assert [(port.network, port.mac, len(port.addresses)) for port in instance.ports] == [
        ("blue", "52:54:00:12:34:56", 2),
        ("red", "52:54:00:12:34:57", 1),
    ]
    assert [key.key for key in instance.ssh_keys] == [KEY, f"{KEY}2", f"{KEY}3"]
    assert instance.tags == (("a", "b=c"), ("role", "web"))
    assert (instance.user_data, instance.vendor_data) == (b"\x1f\x8b\x00\xff", b"#cloud-config\n")
    assert (instance.availability_zone, instance.instance_type) == ("az1", "m1")
    assert instance.dialects == {Dialect.EC2, Dialect.OPENSTACK}


@pytest.mark.parametrize("kind", ["network", "instance"])
def test_the_policy_of_a_record_is_said_by_flags_rule_by_rule(filled: Cli, kind: str) -> None:
    def policy() -> PolicyRules:
        if kind == "network":
            return filled.server.networks[NetworkId("blue")].policy
        return filled.server.instances[InstanceId("web-1")].policy

    name = {"network": "blue", "instance": "web-1"}[kind]
    assert filled(kind, "set", name, "--tokens", "required").status == 0
    assert filled(kind, "set", name, "--seal-user-data").status == 0
    assert policy() == PolicyRules(tokens=TokenMode.REQUIRED, seal_user_data=True)
    filled(kind, "set", name, "--tokens", "off", "--no-seal-user-data")
    assert policy() == PolicyRules(tokens=TokenMode.OFF, seal_user_data=False)
    filled(kind, "set", name, "--clear", "policy")
    assert policy() == NO_RULES
    refused = filled(kind, "set", name, "--tokens", "sometimes")
    assert refused.status != 0
    assert "policy.tokens" in refused.err
    assert "one of off, optional, required" in refused.err


@pytest.mark.parametrize("kind", ["network", "instance"])
def test_what_is_said_of_paths_is_said_and_unsaid_by_flags_path_by_path(
    filled: Cli, kind: str
) -> None:
    def paths() -> PathRules | None:
        if kind == "network":
            return filled.server.networks[NetworkId("blue")].policy.paths
        return filled.server.instances[InstanceId("web-1")].policy.paths

    name = {"network": "blue", "instance": "web-1"}[kind]
    for words in ("/latest/user-data=deny", "/latest/meta-data/tags/instance/a=b=optional"):
        assert filled(kind, "set", name, "--path-rule", words).status == 0
    assert paths() == (
        ("/latest/meta-data/tags/instance/a=b", PathWord.OPTIONAL),
        ("/latest/user-data", PathWord.DENY),
    )
    shown = filled(kind, "show", name).out
    assert "    paths:\n" in shown
    assert "      /latest/user-data: deny\n" in shown
    changed = ("--no-path-rule", "/latest/meta-data/tags/instance/a=b", "--path-rule", "/=required")
    assert filled(kind, "set", name, *changed).status == 0
    assert paths() == (("/", PathWord.REQUIRED), ("/latest/user-data", PathWord.DENY))
    filled(kind, "set", name, "--no-path-rule", "/", "--no-path-rule", "/latest/user-data")
    assert paths() is None
    for words, hint in (
        ("/2009-04-04/user-data=deny", "/latest/user-data"),
        ("/latest=refuse", "one of deny, allow, required, optional"),
        ("/latest", "--path-rule /latest/user-data=deny"),
    ):
        refused = filled(kind, "set", name, "--path-rule", words)
        assert refused.status != 0
        assert "policy.paths" in refused.err
        assert hint in " ".join(refused.err.split())


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.kind is not tuple])
@pytest.mark.parametrize("kind", ["network", "instance"])
def test_every_rule_of_a_policy_has_a_flag(filled: Cli, kind: str, rule: Rule) -> None:
    flag, name = f"--{rule.name.replace('_', '-')}", {"network": "blue", "instance": "web-1"}[kind]
    value: object = rule.bounds[1] if rule.bounds else "required"
    words = (flag,) if rule.kind is bool else (flag, str(value))
    assert filled(kind, "set", name, *words).status == 0
    blue = filled.server.networks[NetworkId("blue")]
    web = filled.server.instances[InstanceId("web-1")]
    wanted = {rule.name: True if rule.kind is bool else value}
    assert (blue if kind == "network" else web).policy == PolicyRules(**wanted)  # type: ignore[arg-type] # by the rule's kind


def test_a_network_and_an_instance_are_added_with_a_policy(cli: Cli) -> None:
    cli("network", "add", "blue", "--bridge", "br0", "--tokens", "required")
    said = ("--path-rule", "/latest/user-data=deny", "--no-path-rule", "/")
    cli("instance", "add", "web-1", "--network", "blue", "--seal-user-data", *said)
    blue = cli.server.networks[NetworkId("blue")]
    assert blue.policy == PolicyRules(tokens=TokenMode.REQUIRED)
    web = cli.server.instances[InstanceId("web-1")]
    paths = (("/latest/user-data", PathWord.DENY),)
    assert web.policy == PolicyRules(seal_user_data=True, paths=paths)


def test_show_tells_the_policy_and_when_an_instance_was_made(filled: Cli, tmp_path: Path) -> None:
    filled("instance", "set", "web-1", "--tokens", "off", "--seal-user-data")
    body = {"created_at": 1_795_694_400}
    filled.server.client.request("PATCH", "/v1/instances/web-1", body=body)
    made = filled.server.instances[InstanceId("web-1")]
    shown = filled("instance", "show", "web-1").out
    assert "# created: 2026-11-26T12:00:00Z\n" in shown
    assert "  created_at: 1795694400\n" in shown
    assert "  policy:\n    tokens: 'off'\n    seal_user_data: true\n" in shown
    (tmp_path / "instance.yaml").write_text(shown)
    filled("instance", "remove", "web-1")
    assert filled("instance", "add", "--file", str(tmp_path / "instance.yaml")).status == 0
    assert filled.server.instances[made.id] == made


def test_an_instance_without_a_name_is_named_by_its_id(filled: Cli) -> None:
    assert filled.server.instances[InstanceId("web-1")].name == "web-1"


def test_user_data_comes_from_standard_input(filled: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"#!/bin/sh\r\n")))

    assert filled("instance", "set", "web-1", "--user-data", "-").status == 0

    assert filled.server.instances[InstanceId("web-1")].user_data == b"#!/bin/sh\r\n"


def test_set_changes_only_what_is_given(filled: Cli) -> None:
    filled("instance", "set", "web-1", "--tag", "a=1", "--project", "p")
    filled("instance", "set", "web-1", "--tag", "b=2", "--clear", "project", "--no-ec2")
    filled("instance", "set", "web-1", "--ec2")

    instance = filled.server.instances[InstanceId("web-1")]
    assert instance.tags == (("a", "1"), ("b", "2"))
    assert instance.project is None
    assert instance.dialects == frozenset(Dialect)
    assert len(instance.ports) == 1


def test_set_replaces_a_listener_as_a_whole(filled: Cli) -> None:
    filled("network", "set", "blue", "--device", "tap0", "--manage-addresses")
    network = filled.server.networks[NetworkId("blue")]
    assert network.listener == NamespaceListener("blue", "tap0", manage_addresses=True)

    filled("network", "set", "blue", "--bridge", "br0")
    assert filled.server.networks[NetworkId("blue")].listener == BridgeListener("br0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["network", "set", "blue"], "nothing to change"),
        (["network", "add"], "--bridge DEV | --interface DEV | --namespace NAME"),
        (["instance", "add", "--project", "x"], "id is missing"),
        (["network", "add", "x", "--bridge", "a", "--interface", "b"], "exactly one kind"),
        (["network", "add", "x", "--device", "tap0"], "exactly one kind"),
        (["network", "add", "x", "--bridge", "a", "--device", "b"], "exactly one kind"),
        (["network", "add", "x"], "--bridge DEV | --interface DEV | --namespace NAME"),
        (["network", "add", "x", "--bridge", "a", "--subnet", "10.0.0.0/24,gw=1"], "gw=1"),
        (["network", "add", "x", "--bridge", "a", "--subnet", "10.0.0.1/24"], "subnets[0].cidr"),
        (["instance", "set", "x", "--address", "10.0.0.1"], "need a --network"),
        (["instance", "add", "x", "--port", "mac=52:54:00:00:00:01"], "has no network"),
        (["instance", "add", "x", "--tag", "novalue"], "has no value"),
        (["instance", "add", "x", "--ssh-key", "/nonexistent"], "cannot read /nonexistent"),
        (["instance", "add", "x", "--user-data", "/nonexistent"], "cannot read /nonexistent"),
        (["instance", "add", "x", "--network", "blue", "--mac", "zz"], "ports[0].mac"),
        (["network", "add", "x", "--file", "y"], "no other flag"),
        (["explain", "--network", "blue", "--from", "10.0.0"], "is no IP address"),
        (["explain", "--network", "blue"], "--from"),
        (["explain", "web-1", "--network", "blue"], "either an INSTANCE or both"),
        (["instance", "set", "web-1", "--clear", "nonsense"], "nonsense cannot be cleared"),
        (["instance", "set", "web-1", "--clear", "name"], "name cannot be cleared"),
        (["network", "set", "blue", "--clear", "listener"], "listener cannot be cleared"),
        (["instance", "add", "x", "--clear", "tags"], "--clear"),
        (["snippet", "web-1"], "Choose from: qemu, libvirt, proxmox, incus"),
        (["network", "add", "x", "--mtu", "wide"], "--mtu"),
        (["nonsense"], "nonsense"),
        (["status", "--nonsense"], "--nonsense"),
        (["network", "remove"], "ID..."),
    ],
)
def test_what_is_wrong_with_a_command_line_is_said_in_one_line(
    filled: Cli, arguments: list[str], words: str
) -> None:
    ran = filled(*arguments)

    assert ran.status == 64
    assert ran.out == ""
    assert ran.err.startswith("imdsproxy: ")
    assert words in ran.err
    assert "Traceback" not in ran.err


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64

    assert "Usage: imdsproxy" in capsys.readouterr().out


def test_what_is_there_is_73_and_what_is_not_there_66(filled: Cli) -> None:
    again = filled("network", "add", "blue", "--bridge", "br0")
    assert (again.status, again.err.splitlines()[0]) == (
        73,
        "imdsproxy: there is a network blue already",
    )

    missing = filled("instance", "show", "nobody")
    assert missing.status == 66
    assert missing.err.splitlines() == [
        "imdsproxy: there is no instance nobody",
        "hint: imdsproxy instance list",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_a_daemon_that_is_not_there_is_69_and_the_hint_starts_it_as_it_is_installed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    installed: bool,
) -> None:
    monkeypatch.setattr(admin_client, "_UNIT_DIRECTORIES", (tmp_path / "units",))
    if installed:
        (tmp_path / "units").mkdir()
        (tmp_path / "units" / "imdsproxy.service").touch()

    assert main(["status", "--socket", str(tmp_path / "none.sock")]) == 69

    said = capsys.readouterr().err
    assert "no daemon answers" in said
    assert ("`systemctl start imdsproxy`" in said, "`imdsproxy run`" in said) == (
        installed,
        not installed,
    )


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("network delete blue", "imdsproxy network remove"),
        ("instance rm web-1", "imdsproxy instance remove"),
        ("instance create web-1", "imdsproxy instance add"),
        ("instance update web-1", "imdsproxy instance set"),
        ("networks", "imdsproxy network"),
    ],
)
def test_what_other_programs_call_a_command_gets_a_suggestion(
    cli: Cli, words: str, meant: str
) -> None:
    ran = cli(*words.split())
    assert ran.status == 64
    assert f"hint: did you mean `{meant}`?" in ran.err


def test_the_version_is_an_option_too(cli: Cli) -> None:
    assert (cli("--version").out, cli("--version").status) == (cli("version").out, 0)


def _commands() -> dict[str, list[str]]:
    """Each command that can be run, and the words of its example."""
    everything = iterate_commands(build_program())
    return {
        path: shlex.split(EXAMPLES[path].partition("|")[0])
        for path, command in everything
        if path and not hasattr(command, "commands")
    }


@pytest.mark.parametrize("path", _commands())
def test_each_command_has_an_example_in_its_help_that_is_no_wrong_command_line(path: str) -> None:
    program, *words = _commands()[path]
    assert program == "imdsproxy"
    assert words[: len(path.split())] == path.split()
    context = typer.Context(build_program())
    command = build_program()
    for name in path.split():
        command = command.commands[name]
    command.make_context(path, words[len(path.split()) :], parent=context)
    assert command.epilog == f"Example: {EXAMPLES[path]}"


@pytest.mark.parametrize("path", [one for one in _commands() if one != "namespace-proxy"])
def test_no_help_shows_a_type_for_a_switch(cli: Cli, path: str) -> None:
    shown = cli(*path.split(), "--help").out
    assert "--help" in shown
    assert "bool" not in shown.lower()


@pytest.mark.parametrize("kind", ["network", "instance"])
def test_set_describes_set_and_add_describes_add(kind: str) -> None:
    commands = build_program().commands[kind].commands
    added, changed = (
        {
            one.name: one.help
            for one in commands[name].params
            if one.name not in ("config", "socket")
        }
        for name in ("add", "set")
    )
    assert changed.keys() - added.keys() == {"clear"}
    assert any("without it" in text for text in added.values())
    assert not any("without it" in text or "`add`" in text for text in changed.values())


def test_an_error_is_json_where_json_was_asked_for(filled: Cli) -> None:
    ran = filled("instance", "show", "nobody", "--json")

    assert ran.out == ""
    assert json.loads(ran.err) == {
        "code": "not-found",
        "message": "there is no instance nobody",
        "hint": "imdsproxy instance list",
        "problems": [],
    }


def test_every_problem_that_the_daemon_has_is_shown(filled: Cli) -> None:
    filled.server.failure = ConfigInvalid(
        "the configuration has 2 problems",
        problems=[
            Problem("haproxy.maxcon", "there is no such setting", hint="?", file="/c", line=3),
            Problem("log.level", "loud is not acceptable"),
        ],
    )

    ran = filled("reload")

    assert ran.status == 78
    assert ran.err.splitlines() == [
        "imdsproxy: the configuration has 2 problems",
        "  /c:3: haproxy.maxcon: there is no such setting (?)",
        "  log.level: loud is not acceptable",
    ]


@pytest.mark.parametrize(
    ("failure", "status"), [(SourceUnavailable("locked"), 69), (ReloadFailed("no"), 70)]
)
def test_a_failure_keeps_its_exit_status(
    cli: Cli, failure: SourceUnavailable | ReloadFailed, status: int
) -> None:
    cli.server.failure = failure

    assert cli("status").status == status


def test_a_fault_of_the_daemon_is_70(cli: Cli) -> None:
    cli.server.failure = RuntimeError("x")

    ran = cli("status")

    assert ran.status == 70
    assert "fault" in ran.err


def test_tables_of_records(filled: Cli) -> None:
    filled.server.leave_out("blue", "pid 7 has the port")

    networks, instances = filled("network", "list").out, filled("instance", "list").out

    assert networks.splitlines()[0].split() == [
        *("NETWORK", "NAME", "LISTENER", "INSTANCES", "SOURCE", "STATE")
    ]
    assert networks.splitlines()[2].split() == [
        "blue",
        "namespace",
        "blue",
        "1",
        "sqlite",
        "port-busy",
    ]
    assert "web-1" in instances
    assert "blue 10.0.0.5" in instances
    assert "\x1b" not in networks + instances


def test_instances_are_listed_by_network(filled: Cli) -> None:
    assert "no instances" in filled("instance", "list", "--network", "red").out
    assert json.loads(filled("instance", "list", "--network", "red", "--json").out) == []


def test_no_line_is_cut_where_there_is_no_terminal(filled: Cli) -> None:
    name = "n" * 200
    filled("network", "set", "blue", "--name", name)

    assert name in filled("network", "list").out


def test_what_show_prints_can_be_stored_again(filled: Cli, tmp_path: Path) -> None:
    data = "#cloud-config\nusers:\n  - name: a\n\n# ü: 'x'\n"
    (tmp_path / "data").write_text(data)
    filled("instance", "set", "web-1", "--user-data", str(tmp_path / "data"), "--tag", "n=0123")
    before = dict(filled.server.instances), dict(filled.server.networks)
    for kind, name in (("network", "blue"), ("instance", "web-1")):
        (tmp_path / f"{kind}.yaml").write_text(filled(kind, "show", name).out)
    filled("instance", "remove", "web-1")
    filled("network", "remove", "blue")

    assert filled("network", "add", "--file", str(tmp_path / "network.yaml")).status == 0
    assert filled("instance", "add", "--file", str(tmp_path / "instance.yaml")).status == 0

    assert (filled.server.instances, filled.server.networks) == before


def test_several_are_removed_until_one_cannot_be(filled: Cli) -> None:
    filled("instance", "add", "web-2", "--network", "blue")

    ran = filled("instance", "remove", "web-1", "nobody", "web-2")

    assert ran.status == 66
    assert ran.out == "done: instance web-1 removed\n"
    assert list(filled.server.instances) == ["web-2"]


def test_a_change_that_is_not_in_force_yet_says_why(filled: Cli) -> None:
    filled.server.leave_out("blue", "namespace blue is missing", code=LeftOutCode.NAMESPACE_MISSING)

    ran = filled("network", "set", "blue", "--mtu", "1400")

    assert ran.status == 75
    assert ran.out.splitlines() == [
        "stored: network blue changed; not in force yet:",
        "  network blue is not served: namespace blue is missing",
    ]


def test_of_a_thousand_reasons_twenty_are_shown(
    filled: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_APPLY_DEADLINE_S", 0.1)
    filled.server.haproxy.stop_answering_after = 0
    filled.server.unapplied += [Problem("x", f"reason {number}") for number in range(999)]
    ran = filled("token", "revoke", "web-1")
    assert ran.status == 75
    assert len(ran.out.splitlines()) == 22
    assert ran.out.splitlines()[-1] == "  and 980 more: imdsproxy status"


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


def test_many_records_are_added_from_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"beside the file")
    (tmp_path / "records.yaml").write_text(FILE)

    ran = cli("instance", "add", "--file", str(tmp_path / "records.yaml"))

    assert ran.out == "done: 1 network, 2 instances added\n"
    stored = cli.server.instances
    assert stored[InstanceId("db-1")].user_data == b"beside the file"
    assert stored[InstanceId("db-2")].user_data == b"\xff"
    assert cli("network", "add", "--file", str(tmp_path / "records.yaml")).status == 73
    assert cli("network", "set", "--file", str(tmp_path / "records.yaml")).status == 0


@pytest.mark.parametrize(
    "text",
    ['{"networks": [{"id": "n", "listener": {"bridge": "b"}}]}', FILE.split("inst", maxsplit=1)[0]],
)
def test_records_come_from_standard_input_in_both_languages(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    assert cli("network", "add", "--file", "-", "--json").json["networks"] == 1


def test_every_bad_record_of_a_file_is_told_with_its_line(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "networks:\n- id: a\n- id: b\n  listener: {bridge: b}\n  mtu: x\ninstances:\n- id: c\n"
    )

    ran = cli("network", "add", "--file", str(path))

    assert ran.status == 64
    assert f"{path}:2: networks[0].listener: is missing" in ran.err
    assert f"{path}:5: networks[1].mtu" in ran.err
    assert f"{path}:7: instances[0].name: is missing" in ran.err
    assert cli.server.networks == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "holds no records"), ("a: [", "is not YAML"), ("networks: []", "holds no records")],
)
def test_a_file_without_records_is_refused(cli: Cli, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)

    ran = cli("network", "add", "--file", str(tmp_path / "r.yaml"))

    assert ran.status == 64
    assert words in ran.err


def test_status_shows_what_is_wrong(filled: Cli) -> None:
    filled.server.leave_out("blue", "nginx (pid 7) has port 80", "stop it")
    filled.claim_twice()

    ran = filled("status")

    assert ran.status == 0
    for words in (
        "not ready",
        "1, 0 serving",
        "master 100, worker 102, draining 101",
        "parent 200, workers 201 202",
        "up 1 d 2 h",
        "silent for 12 s",
        "nginx (pid 7) has port 80",
        "stop it",
        "web.yaml:41: instances[3].ports[0].mac",
        "address blue/10.0.0.5: claimed by web-2 (file), web-1 (sqlite)",
        "2 problems",
    ):
        assert words in ran.out


def test_status_lists_some_of_the_problems_of_a_source_and_counts_the_rest(filled: Cli) -> None:
    problems = tuple(Problem(f"instances[{number}].name", "is empty") for number in range(1_030))
    filled.server.status["sources"] = (SourceReport("file", in_sync=True, problems=problems),)
    filled.claim_twice()

    ran = filled("status")

    assert "1,031 problems" in ran.out
    assert ran.out.count("is empty") == 20
    assert "and 1,010 more: --json has all" in ran.out
    assert "address blue/10.0.0.5: claimed by" in ran.out
    assert filled("status", "--json").out.count("is empty") == 1_030


def test_status_lists_some_of_the_networks_that_are_not_served_and_counts_the_rest(
    filled: Cli,
) -> None:
    for number in range(1_000):
        filled.server.leave_out(f"n-{number}", "is not there")

    ran = filled("status")

    assert ran.out.count("is not there") == 20
    assert ran.out.count("is left out") == 20
    assert ran.out.count("and 980 more: --json has all") == 2


def test_status_shows_what_takes_long_while_it_does(filled: Cli) -> None:
    assert "under way" not in filled("status").out
    filled.server.status["progress"] = (
        Step("storing instances", 1_000, 2_000),
        Step("waiting", 0, 0),
    )
    ran = filled("status")
    assert "storing instances: 1,000 of 2,000\n" in ran.out
    assert "waiting\n" in ran.out


def test_status_names_settings_that_are_for_nobody(filled: Cli) -> None:
    assert "nobody" not in filled("status").out
    filled.server.status["policy_for_nobody"] = ("policy.instances.web1", "policy.networks.bleu")
    said = "for names that are not known: policy.instances.web1, policy.networks.bleu"
    assert said in filled("status").out


def test_status_shows_the_unix_listener_where_there_is_one(filled: Cli) -> None:
    assert "unix listener" not in filled("status").out
    path = "/var/lib/neutron/metadata_proxy"
    filled.server.status["unix_listener"] = UnixListenerReport(
        path, serving=True, mode="0644", user=64055, group=64056
    )
    assert f"{path}, mode 0644 64055:64056, serving" in filled("status").out
    filled.server.status["unix_listener"] = UnixListenerReport(
        path, serving=True, mode="0644", taken_over=2, taken_from="neutron-ovn-met (pid 7)"
    )
    assert "serving, taken over from neutron-ovn-met (pid 7)" in filled("status").out
    reason = "neutron-metadat (pid 7) listens there"
    filled.server.status["unix_listener"] = UnixListenerReport(path, serving=False, problem=reason)
    assert f"{path}, left out {reason}" in filled("status").out


def test_status_shows_the_audit_log_where_there_is_one(filled: Cli) -> None:
    assert "audit log" not in filled("status").out
    filled.server.status["audit"] = AuditReport("all", "/x.log", written=17)
    assert "all, to /x.log, 17 lines\n" in filled("status").out
    filled.server.status["audit"] = AuditReport("sampled", "/x.log", 17, 3, "/x.log: no room")
    told = filled("status").out
    assert "sampled, to /x.log, 17 lines, 3 left out" in told
    assert "not written /x.log: no room" in told


def test_status_in_json_is_the_daemons_own(filled: Cli) -> None:
    told = filled("status", "--json").json

    assert told["controller"] == 4711
    assert told["haproxy"] == filled.server.client.get("/v1/status")["haproxy"]


def test_status_check_says_by_its_exit_status_whether_it_is_ready(filled: Cli) -> None:
    assert filled("status", "--check").status == 0
    filled.server.leave_out("blue", "y")
    assert filled("status", "--check").status == 1


def test_explain_says_who_why_and_from_where(filled: Cli) -> None:
    ran = filled("explain", "--network", "blue", "--from", "10.0.0.5")

    assert ran.status == 0
    for words in ("web-1 (web-1)", "source sqlite", "web-1|", "ec2, nocloud, openstack"):
        assert words in ran.out


def test_explain_says_what_the_guest_may_and_who_said_so(filled: Cli) -> None:
    filled.server.policy_store._book = PolicyBook(
        host=PolicyRules(tokens=TokenMode.REQUIRED), networks={"blue": PolicyRules(endpoint=False)}
    )
    words = " ".join(filled("explain", "--network", "blue", "--from", "10.0.0.5").out.split())
    for said in (
        "endpoint off (network)",
        "tokens required (host)",
        "hop_limit 64 (default)",
        "boot until 2025-10-10 ",
    ):
        assert said in words
    assert "revoked" not in words

    filled("token", "revoke", "web-1")
    filled("instance", "reopen", "web-1")
    words = " ".join(filled("explain", "--network", "blue", "--from", "10.0.0.5").out.split())
    assert "tokens revoked 1 times" in words
    assert re.search(r"boot until 2025-10-1. ..:..:.. \S+, opened again at 2025-10-1. ", words)


def test_explain_says_which_rule_decides_about_a_path(filled: Cli) -> None:
    filled.server.policy_store._book = PolicyBook(
        projects={"p1": PolicyRules(tokens=TokenMode.REQUIRED)},
        instances={"web-1": PolicyRules(tokens=TokenMode.REQUIRED)},
    )
    asked = ("explain", "--network", "blue", "--from", "10.0.0.5", "--path")
    words = " ".join(filled(*asked, "//latest/user-data").out.split())
    assert (
        "policy to GET //latest/user-data: "
        "without a token: 401, EC2's tree takes a token (tokens, instance) with a good one: it passes"
    ) in words
    words = " ".join(filled(*asked, "/a/../b").out.split())
    assert "without a token: 400, no document has such a path" in words
    assert "(path)" in words
    refused = filled(*asked, "latest")
    assert (refused.status, "does not begin with /" in refused.err) == (64, True)
    assert "policy" not in filled("explain", "--network", "blue", "--from", "10.0.0.5").out


def test_explain_of_an_instance_explains_each_of_its_addresses(filled: Cli) -> None:
    port = "network=blue,address=10.0.0.6"
    filled("instance", "set", "web-1", "-n", "blue", "--address", "10.0.0.5", "--port", port)
    ran = filled("explain", "web-1")
    assert (ran.status, ran.out.count("verdict ")) == (0, 2)
    told = json.loads(filled("explain", "web-1", "--json").out)
    assert [one["address"] for one in told] == ["10.0.0.5", "10.0.0.6"]
    filled("instance", "set", "web-1", "--clear", "ports")
    nowhere = filled("explain", "web-1")
    assert (nowhere.status, "has no address" in nowhere.out) == (1, True)
    assert filled("explain", "nobody").status == 66


def test_explain_sends_a_probe_only_where_one_is_asked_for(documented: Cli) -> None:
    asked = ("explain", *GUEST, "--path", "/latest/user-data")
    assert "probe" not in documented(*asked).out
    probed = documented(*asked, "--probe")
    assert (probed.status, "GET /latest/user-data: 200 OK" in probed.out) == (0, True)
    refused = documented("explain", *GUEST, "--path", "/nothing", "--probe")
    assert (refused.status, "GET /nothing: 404 Not Found" in refused.out) == (1, True)


def test_explain_of_novas_guest_says_that_nova_decides(filled: Cli) -> None:
    default = EndpointSet("default", b"secret", None, frozenset(), frozenset())
    filled.server.records.routing = lambda: NovaRouting((default,))
    filled("instance", "set", "web-1", "--upstream", "nova", "--project", "p1")
    assert "found, its requests are sent to Nova" in filled("explain", "web-1").out
    assert filled("explain", *GUEST, "--json").json["answer"] is None


def test_a_name_stands_for_an_id_where_one_alone_has_it(filled: Cli) -> None:
    filled("network", "set", "blue", "--name", "Blue")
    filled("instance", "set", "web-1", "--name", "front")
    assert filled("instance", "set", "front", "--tag", "a=b").status == 0
    assert filled("instance", "add", "web-2", "-n", "Blue", "--name", "front").status == 0
    refused = filled("instance", "remove", "front")
    assert refused.status == 64
    assert refused.err == "imdsproxy: 2 have the name front\nhint: use an id: web-1, web-2\n"
    assert filled("instance", "add", "front", "--network", "blue").status == 0
    assert filled("instance", "remove", "front").status == 0
    assert set(filled.server.instances) == {"web-1", "web-2"}


@pytest.mark.parametrize(
    "clear", ["instance set web-1 --clear password", "instance password web-1 --clear"]
)
def test_a_posted_password_is_shown_and_cleared(filled: Cli, clear: str) -> None:
    assert filled.server.passwords.keep(InstanceId("web-1"), b"c2VjcmV0")
    assert filled("instance", "password", "web-1").out == "c2VjcmV0"
    shown = filled("instance", "password", "web-1", "--json").json
    assert shown == {"instance": "web-1", "password": {"text": "c2VjcmV0"}}
    assert filled(*clear.split()).status == 0
    assert filled.server.passwords.read(InstanceId("web-1")) is None
    none = filled("instance", "password", "web-1")
    assert (none.status, "has posted no password" in none.err) == (66, True)


def test_explain_of_nobody_is_1(filled: Cli) -> None:
    ran = filled("explain", "--network", "blue", "--from", "10.0.0.9")
    assert (ran.status, "unknown" in ran.out) == (1, True)

    filled.claim_twice()
    ran = filled("explain", "--network", "blue", "--from", "10.0.0.5", "--json")
    assert (ran.status, ran.json["verdict"], ran.json["answer"]) == (1, "conflict", 503)


@pytest.fixture
def documented(filled: Cli) -> Cli:
    filled.server.answer("/latest/user-data", b"\xff\x00\n", (b"content-type", b"text/plain"))
    return filled


GUEST = ("--network", "blue", "--from", "10.0.0.5")


def test_get_gives_the_bytes_and_nothing_else(documented: Cli) -> None:
    argv = [sys.executable, "-m", "imdsproxy", "--socket", str(documented.server.socket)]
    ran = subprocess.run(
        [*argv, "get", "/latest/user-data", *GUEST], capture_output=True, check=True
    )

    assert (ran.stdout, ran.stderr) == (b"\xff\x00\n", b"")


def test_get_shows_the_headers_when_asked(documented: Cli) -> None:
    documented.server.answer("/x", b"body", (b"a", b"b"))

    assert documented("get", "/x", *GUEST, "-i").out == "HTTP/1.1 200 OK\na: b\n\nbody"


def test_get_of_what_the_guest_is_not_given_is_1(documented: Cli) -> None:
    ran = documented("get", "/none", *GUEST)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "imdsproxy: the guest is answered 404 Not Found\n"


def test_get_in_json(documented: Cli) -> None:
    assert documented("get", "/latest/user-data", *GUEST, "--json").json == {
        "status": 200,
        "headers": [["content-type", "text/plain"]],
        "body": {"base64": "/wAK"},
    }


def test_reload_shows_what_was_taken_over(cli: Cli) -> None:
    lines = cli("reload").out.splitlines()

    assert lines[2].split() == ["resolver.hold_s", "5.0", "2.0", "at", "once"]
    assert lines[3].split() == ["admin.mode", "0660", "0600", "at", "the", "next", "restart"]


@pytest.mark.parametrize(("flags", "allowed"), [((), False), (("--allow-dropped",), True)])
def test_reload_may_drop_settings_only_with_its_flag(
    cli: Cli, flags: tuple[str, ...], *, allowed: bool
) -> None:
    cli("reload", *flags)
    assert cli.server.reloads == [allowed]


def test_reload_says_what_is_not_in_force_yet(cli: Cli) -> None:
    cli.server.pending = ("the data plane has not confirmed it yet",)

    lines = cli("reload").out.splitlines()

    assert lines[-2:] == [
        "HAProxy has not taken it over:",
        "  the data plane has not confirmed it yet",
    ]


@pytest.mark.parametrize(
    ("flags", "data_plane", "ended"),
    [
        ([], False, ["controller"]),
        (["--data-plane"], True, ["controller", "haproxy", "documents"]),
    ],
)
def test_stop_ends_the_data_plane_only_when_told_to(
    cli: Cli, flags: list[str], *, data_plane: bool, ended: list[str]
) -> None:
    ran = cli("stop", "--json", *flags)

    assert (ran.status, ran.json) == (0, {"stopped": ended, "data_plane": data_plane})
    assert cli.server.stopped == [data_plane]
    assert not cli.server.socket.exists()


def test_stop_says_what_has_ended(cli: Cli) -> None:
    assert cli("stop").out == "stopped: controller\n"


def test_without_a_daemon_there_is_nothing_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", "--socket", str(tmp_path / "none.sock")]) == 69
    assert "no daemon answers" in capsys.readouterr().err


def test_another_daemons_data_plane_is_not_ended_for_a_dead_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", "--data-plane", "--socket", str(tmp_path / "none.sock")]) == 69
    assert "the settings are of another one" in capsys.readouterr().err


def test_render_prints_the_configuration(cli: Cli) -> None:
    assert cli("render").out == "global\n  maxconn 200\n"
    assert cli("render", "--json").json == {"haproxy_configuration": "global\n  maxconn 200\n"}


def test_foreign_text_cannot_steer_the_terminal(filled: Cli) -> None:
    filled.server.leave_out("blue", "evil\x1b[2J [red]program[/red]")

    ran = filled("status")

    assert "\x1b" not in ran.out
    assert "[red]program[/red]" in ran.out


def test_options_may_stand_before_the_command(filled: Cli) -> None:
    assert filled("--json", "network", "list").out.startswith("[")
