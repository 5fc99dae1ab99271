"""`imdsproxy get`, `explain`, `watch`, `token`, `instance reopen` and `snippet`."""

import json
import re
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.cli import doctor
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import FleetRules, OperatorOverride, PolicyBook, PolicyRules, TokenMode
from imdsproxy.model.tokens import TokenKey
from imdsproxy.model.wire import HEADER_AUDITED
from imdsproxy.nova.routing import EndpointSet, NovaRouting
from support.cli import Cli, Ran
from support.controllers import NOW

GUEST = ("--network", "blue", "--from", "10.0.0.5")
EXPLAIN = ("explain", *GUEST)


@pytest.fixture
def documented(filled: Cli) -> Cli:
    filled.server.answer("/latest/user-data", b"\xff\x00\n", (b"content-type", b"text/plain"))
    return filled


def test_get_gives_the_bytes_and_nothing_else(documented: Cli) -> None:
    argv = [sys.executable, "-m", "imdsproxy", "--socket", str(documented.server.socket)]
    command = [*argv, "get", "/latest/user-data", *GUEST]
    ran = subprocess.run(command, capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"\xff\x00\n", b"")


def test_get_shows_headers_and_json_where_asked_and_exits_1_from_status_400_up(
    documented: Cli,
) -> None:
    assert documented("get", "/latest/user-data", *GUEST, "--json").json == {
        "status": 200,
        "headers": [["content-type", "text/plain"]],
        "body": {"base64": "/wAK"},
    }
    documented.server.answer("/x", b"body", (b"a", b"b"), (HEADER_AUDITED.encode(), b"1"))
    assert documented("get", "/x", *GUEST, "--json").json["body"] == {"text": "body"}
    assert documented("get", "/x", *GUEST, "-i").out == "HTTP/1.1 200 OK\na: b\n\nbody"
    missing = documented("get", "/none", *GUEST)
    assert (missing.status, missing.out) == (1, "")
    assert missing.err == "imdsproxy: the guest gets 404 Not Found\n"


def test_explain_names_the_instance_its_source_and_the_origin_of_each_rule(filled: Cli) -> None:
    filled.server.policy_store._book = PolicyBook(
        host=PolicyRules(tokens=TokenMode.REQUIRED), networks={"blue": PolicyRules(endpoint=False)}
    )
    ran = filled(*EXPLAIN)
    assert ran.status == 0
    for text in (
        "found, its requests for documents get 403",
        "web-1 (web-1)",
        "source sqlite",
        "web-1|",
        "ec2, nocloud, openstack",
        "endpoint off (network)",
        "tokens required (host)",
        "hop_limit 64 (default)",
        "boot until 2025-10-10 ",
    ):
        assert text in ran.words
    assert "revoked" not in ran.words
    assert "policy" not in ran.out

    filled("token", "revoke", "web-1")
    filled("instance", "reopen", "web-1")
    words = filled(*EXPLAIN).words
    assert "tokens revoked 1 times" in words
    assert re.search(r"boot until 2025-10-1. ..:..:.. \S+, opened again at 2025-10-1. ", words)

    filled.server.policy_store._book = PolicyBook()
    filled("instance", "set", "web-1", "--no-ec2", "--no-openstack", "--no-nocloud")
    assert "found, its requests for documents get 404" in filled(*EXPLAIN).words


def test_of_an_instance_of_a_fleet_commands_say_whose_its_rules_and_tokens_are(
    filled: Cli,
) -> None:
    filled.server.take_fleet(
        FleetPolicies(
            FleetRules(host=PolicyRules(tokens=TokenMode.REQUIRED)),
            {"web-1": OperatorOverride(2)},
            {InstanceId("web-1"): (TokenKey(b"f" * 32),)},
        )
    )
    words = filled(*EXPLAIN).words
    assert "tokens required (fleet-host)" in words
    assert "tokens signed by the fleet's key of the instance, revoked 2 times" in words
    for refused in (filled("token", "revoke", "web-1"), filled("instance", "reopen", "web-1")):
        assert refused.status != 0
        assert "instance web-1 is a fleet's" in refused.err
        assert "--fleet URL" in refused.err
    rotated = filled("token", "rotate")
    assert rotated.status == 0
    assert "the fleet's keys still sign the tokens of 1 instance of the fleet" in rotated.words


def test_explain_names_the_rule_that_decides_about_a_path(filled: Cli) -> None:
    filled.server.policy_store._book = PolicyBook(
        projects={"p1": PolicyRules(tokens=TokenMode.REQUIRED)},
        instances={"web-1": PolicyRules(tokens=TokenMode.REQUIRED)},
    )
    assert (
        "policy to GET //latest/user-data: "
        "without a token: 401, EC2's tree needs a token (tokens, instance) with a valid token: allowed"
    ) in filled(*EXPLAIN, "--path", "//latest/user-data").words
    without = "; without a session token /latest/meta-data/ gets 401"
    assert f"its requests for documents get 200{without}" in filled(*EXPLAIN).words
    words = filled(*EXPLAIN, "--path", "/a/../b").words
    assert "without a token: 400, no document has this path" in words
    assert "(path)" in words
    assert "probe" not in words
    refused = filled(*EXPLAIN, "--path", "latest")
    assert (refused.status, "does not begin with /" in refused.err) == (64, True)


def test_explain_of_an_instance_explains_each_of_its_addresses(filled: Cli) -> None:
    port = "network=blue,address=10.0.0.6"
    filled("instance", "set", "web-1", "-n", "blue", "--address", "10.0.0.5", "--port", port)
    ran = filled("explain", "web-1")
    assert (ran.status, ran.out.count("verdict ")) == (0, 2)
    explained = filled("explain", "web-1", "--json").json
    assert [one["address"] for one in explained] == ["10.0.0.5", "10.0.0.6"]
    filled("instance", "set", "web-1", "--clear", "ports")
    nowhere = filled("explain", "web-1")
    assert (nowhere.status, "has no address" in nowhere.out) == (1, True)
    assert filled("explain", "unknown").status == 66


def test_explain_of_novas_guest_says_that_nova_decides(filled: Cli) -> None:
    default = EndpointSet("default", b"secret", None, frozenset(), frozenset())
    filled.server.records.routing = lambda: NovaRouting((default,))
    filled("instance", "set", "web-1", "--upstream", "nova", "--project", "p1")
    assert "found, its requests go to Nova" in filled("explain", "web-1").out
    assert filled(*EXPLAIN, "--json").json["answer"] is None


def test_explain_in_a_network_without_its_listener_says_that_none_serves_it(filled: Cli) -> None:
    filled.server.leave_out("blue", "nginx has port 80", "stop it")
    ran = filled("explain", "web-1")
    assert (ran.status, "verdict not-served, no listener serves this network" in ran.words) == (
        1,
        True,
    )


def test_explain_of_no_instance_or_of_two_exits_1(filled: Cli) -> None:
    ran = filled("explain", "--network", "blue", "--from", "10.0.0.9")
    assert (ran.status, "unknown" in ran.out) == (1, True)
    filled.claim_twice()
    ran = filled(*EXPLAIN, "--json")
    assert (ran.status, ran.json["verdict"], ran.json["answer"]) == (1, "conflict", 503)
    assert "claimed by web-2 (source file) web-1 (source sqlite)" in filled(*EXPLAIN).words


_BLUE: dict[str, object] = {"network": "blue", "address": "10.0.0.5", "instance": "vm-1"}
_AT = 1_795_684_004.0


def _events(first: int, at: float = _AT) -> str:
    """What HAProxy keeps of two requests, numbered from `first` on."""
    blue = {**_BLUE, "path": "/latest/user-data", "by": "documents/documents-0", "status": 200}
    red = {**_BLUE, "network": "red", "address": "10.0.0.6", "instance": "-"}
    red |= {"path": "/latest/meta-data/", "by": "resolver/resolver", "status": 404}
    times = ((first, blue, at + 0.318, 3), (first + 1, red, at + 0.4, 12))
    return "".join(
        json.dumps({**one, "number": number, "method": "GET", "time": when, "ms": ms}) + "\n"
        for number, one, when, ms in times
    )


def _watch(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, *arguments: str, lines: str = ""
) -> list[str]:
    """Watch while guests ask between the first question and the second, then Ctrl-C; what was shown."""
    slept = 0

    def sleep(_seconds: float) -> None:
        nonlocal slept
        slept += 1
        if slept > 1:
            raise KeyboardInterrupt
        cli.server.haproxy.events = lines or _events(1)

    monkeypatch.setattr("imdsproxy.cli.guests.time.sleep", sleep)
    ran = cli("watch", *arguments)
    assert ran.status == 130
    return ran.out.splitlines()


def test_requests_are_shown_as_they_happen_all_or_of_a_network_or_an_instance(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, *rows = _watch(cli, monkeypatch)
    assert head.split()[:3] == ["TIME", "NETWORK", "ADDRESS"]
    assert [" ".join(row.split()[1:]) for row in rows] == [
        "blue 10.0.0.5 vm-1 documents 3 200 GET /latest/user-data",
        "red 10.0.0.6 - resolver 12 404 GET /latest/meta-data/",
    ]
    again = _watch(cli, monkeypatch, "--network", "red", lines=_events(1) + _events(5))
    assert again[1:] == rows[1:]
    lines = _events(1) + _events(3)
    (line,) = _watch(cli, monkeypatch, "--instance", "vm-1", "--json", lines=lines)
    assert json.loads(line) == {
        **_BLUE,
        "at": _AT + 0.318,
        "method": "GET",
        "path": "/latest/user-data",
        "status": 200,
        "answered_by": "documents",
        "milliseconds": 3,
    }


@pytest.mark.parametrize(("flags", "text"), [([], "there were too many"), (["--json"], '"missed"')])
def test_that_some_requests_were_missed_is_shown(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: list[str], text: str
) -> None:
    cli.server.haproxy.events = _events(1, at=_AT - 1000)
    assert text in "\n".join(_watch(cli, monkeypatch, *flags))


def test_tokens_are_revoked_and_a_boot_is_opened_again(filled: Cli) -> None:
    revoked = filled("token", "revoke", "web-1")
    assert revoked == Ran(0, "done: all tokens of instance web-1 revoked\n", "")
    reopened = filled("instance", "reopen", "web-1")
    assert reopened == Ran(0, "done: boot grace of instance web-1 restarted\n", "")
    overrides = filled.server.policy_store.overrides
    assert dict(overrides) == {"web-1": OperatorOverride(1, NOW)}
    filled.server.policy_store.keys._path = Path("/etc/imdsproxy/token-keys")
    shared = filled("token", "revoke", "web-1")
    assert shared.status == 0
    assert "valid on other hosts with the keys of /etc/imdsproxy/token-keys" in shared.out
    assert "also revoke them" in shared.out


MAC = "52:54:00:12:34:56"
SUBNET = "10.0.0.0/24,gateway=10.0.0.1"


@pytest.fixture
def plugged(filled: Cli) -> Cli:
    """web-1 has a NIC on a bridge whose network has a gateway."""
    filled("network", "set", "blue", "--bridge", "br0", "--subnet", SUBNET)
    assert filled("instance", "set", "web-1", "-n", "blue", "--mac", MAC).status == 0
    return filled


def test_a_snippet_is_made_of_the_daemons_record(plugged: Cli) -> None:
    ran = plugged("snippet", "web-1", "--for", "qemu")
    uuid = plugged("instance", "show", "web-1", "--json").json["uuid"]
    assert ran.status == 0
    for text in ("product=OpenStack Nova", f"mac={MAC}", "no route is needed", f"uuid={uuid}"):
        assert text in ran.out
    shape = plugged("snippet", "web-1", "--for", "incus", "--json").json
    assert (shape["instance"], shape["for"], shape["dialect"]) == ("web-1", "incus", "nocloud")
    kinds = {part["kind"] for part in shape["parts"]}
    assert kinds == {"SMBIOS", "container", "NIC", "route", "systemd-imdsd"}


def test_no_route_is_wanted_where_this_host_is_the_gateway(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("network", "add", "nat", "--interface", "virbr0", "--subnet", SUBNET)
    cli("instance", "add", "local", "--network", "nat", "--address", "10.0.0.9")
    for address, own in (("127.0.0.1", True), ("::1", True), ("192.0.2.1", False)):
        assert doctor._host_has(ip_address(address)) is own, "what can be bound"
    assert "dhcp-option" in cli("snippet", "local", "--for", "qemu").out
    monkeypatch.setattr(doctor, "_host_has", lambda address: str(address) == "10.0.0.1")
    assert "no route is needed" in cli("snippet", "local", "--for", "qemu").out


def test_a_dialect_that_the_instance_does_not_have_is_refused(plugged: Cli) -> None:
    wanted = ("snippet", "web-1", "--for", "qemu")
    plugged("instance", "set", "web-1", "--no-nocloud")
    refused = plugged(*wanted, "--dialect", "nocloud")
    assert refused.status == 64
    assert "has no nocloud documents (it has: ec2, openstack)" in refused.err
    assert plugged("snippet", "web-1", "--for", "incus", "--json").json["dialect"] == "openstack"
    plugged("instance", "set", "web-1", "--no-ec2", "--no-openstack")
    refused = plugged(*wanted)
    assert (refused.status, "no documents" in refused.err) == (64, True)
    added = plugged(
        "instance", "set", "web-1", "--clear", "dialects", "--upstream", "nova", "--project", "p"
    )
    assert added.status == 0, added.err
    assert "OpenStack Nova" in plugged(*wanted).out, (
        "Nova has two dialects, whatever the record says"
    )
    assert plugged(*wanted, "--dialect", "nocloud").status == 64
