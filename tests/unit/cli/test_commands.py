"""The program: its commands and their help, its errors and exit statuses, and the commands about the daemon."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from imdsproxy import __version__
from imdsproxy.api import client as admin_client
from imdsproxy.api.answers import Readiness
from imdsproxy.api.client import AdminClient
from imdsproxy.cli.main import EXAMPLES, build_program, iterate_commands
from imdsproxy.controller.audit import AuditReport
from imdsproxy.controller.companion import DocumentsReport
from imdsproxy.controller.sources import SourceReport
from imdsproxy.controller.watchdog import HaproxyReport
from imdsproxy.errors import (
    AdminError,
    AdminUnavailable,
    ConfigInvalid,
    ImdsproxyError,
    Problem,
    ReloadFailed,
)
from imdsproxy.fleet.guests import FleetReport
from imdsproxy.haproxy.process import ReloadReport
from imdsproxy.haproxy.unix_listener.listener import UnixListenerReport
from imdsproxy.reconcile.progress import Step
from support.cli import Cli, Ran, run_main

SET_BLUE, SET_WEB = ["network", "set", "blue"], ["instance", "set", "web-1"]
ADD_X = ["network", "add", "x", "--bridge", "a"]


def test_each_command_has_an_example_in_its_help_that_is_no_wrong_command_line(cli: Cli) -> None:
    program = build_program()
    seen = set()
    for path, command in iterate_commands(program):
        if not path or hasattr(command, "commands"):
            shown = cli(*path.split(), "--help").out
            assert "Example: imdsproxy " in " ".join(shown.split())
            continue
        seen.add(path)
        name, *words = shlex.split(EXAMPLES[path].partition("|")[0])
        assert (name, words[: len(path.split())]) == ("imdsproxy", path.split())
        context = typer.Context(program)
        command.make_context(path, words[len(path.split()) :], parent=context)
        assert command.epilog == f"Example: {EXAMPLES[path]}"
        if path != "namespace-proxy":
            shown = cli(*path.split(), "--help").out
            assert "--help" in shown
            assert re.findall("<[a-z]|[{]|boolean|TEXT", shown) == [], "a type of Python's"
    assert seen == EXAMPLES.keys()


def test_each_option_says_what_it_is_what_it_takes_and_what_it_is_without() -> None:
    for path, command in iterate_commands(build_program()):
        for one in command.params:
            assert one.help, (path, one.opts)
            if one.param_type_name == "argument":
                assert one.metavar
                continue
            assert (one.metavar == "") is one.is_flag, (path, one.opts)
            if "--network" in one.opts:
                assert "-n" in one.opts, path
            if one.default not in (None, False):
                assert "(default: " in one.help, (path, one.opts)


@pytest.mark.parametrize(
    ("kind", "flag", "default"),
    [
        ("network", "--scope", "network"),
        ("network", "--mac-check", "on"),
        ("network", "--manage-addresses", "off"),
        ("instance", "--upstream", "embedded"),
        ("instance", "--nocloud", "on"),
    ],
)
def test_what_a_new_record_has_by_default_is_said_where_it_is_added_and_not_where_it_is_changed(
    kind: str, flag: str, default: str
) -> None:
    commands = dict(iterate_commands(build_program()))
    helps = {
        verb: next(one.help for one in commands[f"{kind} {verb}"].params if flag in one.opts)
        for verb in ("add", "set")
    }
    assert helps["add"].endswith(f" (default: {default}).")
    assert "default" not in helps["set"]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("instance delete web", "did you mean `imdsproxy instance remove`?"),
        ("instance rm web", "did you mean `imdsproxy instance remove`?"),
        ("network create", "did you mean `imdsproxy network add`?"),
        ("rm web", "did you mean `imdsproxy network remove` or `imdsproxy instance remove`?"),
        ("create", "did you mean `imdsproxy network add` or `imdsproxy instance add`?"),
        ("ls", "did you mean `imdsproxy network list` or `imdsproxy instance list`?"),
        ("statsu", "did you mean `imdsproxy status`?"),
        ("token revok web", "did you mean `imdsproxy token revoke`?"),
        ("config shw", "did you mean `imdsproxy config show`?"),
        ("instance list --nework blue", "did you mean `--network`?"),
        ("status --chekc", "did you mean `--check`?"),
        ("network add --no-mac-chek", "did you mean `--no-mac-check`?"),
        ("--verson", "did you mean `--version`?"),
        ("xyzzy", "see `imdsproxy --help`"),
        ("status -n blue", "see `imdsproxy status --help`"),
    ],
)
def test_what_is_misspelt_or_called_as_elsewhere_gets_a_suggestion(line: str, hint: str) -> None:
    ran = run_main(*line.split())
    assert (ran.status, ran.out) == (64, "")
    assert re.fullmatch(r"imdsproxy: there is no (command|option) \S+\nhint: (.+)\n", ran.err)
    assert ran.err.endswith(f"hint: {hint}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (SET_BLUE, "no change was given"),
        (["network", "add", "x"], "--bridge DEV | --interface DEV | --namespace NAME"),
        (["instance", "add", "--project", "x"], "id is missing"),
        ([*ADD_X, "--interface", "b"], "exactly one kind"),
        (["network", "add", "x", "--device", "tap0"], "exactly one kind"),
        ([*ADD_X, "--subnet", "10.0.0.0/24,gw=1"], "gw=1"),
        ([*ADD_X, "--subnet", "10.0.0.1/24"], "subnets[0].cidr"),
        (["instance", "set", "x", "--address", "10.0.0.1"], "need a --network"),
        (["instance", "add", "x", "--port", "mac=52:54:00:00:00:01"], "has no network"),
        (["instance", "add", "x", "--tag", "novalue"], "has no value"),
        (["instance", "add", "x", "--ssh-key", "/nonexistent"], "cannot read /nonexistent"),
        (["instance", "add", "x", "--ssh-key", "PRIVATE"], "PRIVATE.pub"),
        (["instance", "add", "x", "--ssh-key", "EMPTY"], "contains no key"),
        (["instance", "add", "x", "--vendor-data", "BINARY"], "is not UTF-8 text"),
        (["instance", "add", "x", "--network", "blue", "--mac", "zz"], "ports[0].mac"),
        (["network", "add", "x", "--file", "y"], "other flags of a record"),
        (["explain", "--network", "blue", "--from", "10.0.0"], "is no IP address"),
        (["explain", "web-1", "--network", "blue"], "either an INSTANCE or both"),
        ([*SET_WEB, "--clear", "nonsense"], "nonsense cannot be cleared"),
        (["instance", "add", "x", "--clear", "tags"], "--clear"),
        ([*SET_WEB, "--tokens", "sometimes"], "one of off, optional, required"),
        ([*SET_BLUE, "--path-rule", "/2009-04-04/user-data=deny"], "/latest/user-data"),
        ([*SET_WEB, "--path-rule", "/latest"], "--path-rule /latest/user-data=deny"),
        (["snippet", "web-1"], "Choose from: qemu, libvirt, proxmox, incus"),
        (["nonsense"], "nonsense"),
        (["status", "--nonsense"], "--nonsense"),
        (["network", "remove"], "ID..."),
        (["network", "delete", "blue"], "hint: did you mean `imdsproxy network remove`?"),
        (["config", "import", "x.ini"], "--neutron"),
        (["config", "import", "--neutron"], "Missing argument 'FILE"),
        (["networks"], "hint: did you mean `imdsproxy network`?"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_reported_in_one_line(
    filled: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PRIVATE").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END …")
    Path("EMPTY").write_text("# none\n")
    Path("BINARY").write_bytes(b"\xff")
    ran = filled(*arguments)
    assert (ran.status, ran.out) == (64, "")
    assert ran.err.startswith("imdsproxy: ")
    assert text in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
    assert list(filled.server.instances) == ["web-1"]


def test_without_a_command_there_is_help(cli: Cli) -> None:
    helped = run_main()
    assert (helped.status, "Usage: imdsproxy" in helped.out) == (64, True)
    for line in ("--version", "version"):
        assert cli(line) == Ran(0, f"imdsproxy {__version__}\n", "")
    assert cli("version", "--json").json == {"version": __version__}


def test_an_error_is_one_line_and_a_hint_or_json_where_that_was_asked_for(filled: Cli) -> None:
    again = filled("network", "add", "blue", "--bridge", "br0")
    first = again.err.splitlines()[0]
    assert (again.status, first) == (73, "imdsproxy: there is a network blue already")
    missing = filled("instance", "show", "x", "--json")
    assert (missing.status, missing.out) == (66, "")
    assert json.loads(missing.err) == {
        "code": "not-found",
        "message": "there is no instance x",
        "hint": "imdsproxy instance list",
        "problems": [],
    }


@pytest.mark.parametrize(
    ("failure", "status", "lines"),
    [
        (
            ConfigInvalid(
                "the configuration has 2 problems",
                problems=[
                    Problem("haproxy.maxcon", "is not there", hint="?", file="/c", line=3),
                    Problem("log.level", "loud is not acceptable"),
                ],
            ),
            78,
            [
                "imdsproxy: the configuration has 2 problems",
                "  /c:3: haproxy.maxcon: is not there (?)",
                "  log.level: loud is not acceptable",
            ],
        ),
        (
            ConfigInvalid("/c: is blank", problems=[Problem("settings", "is blank", hint="{}")]),
            78,
            ["imdsproxy: /c: is blank", "hint: {}"],
        ),
        (ReloadFailed("no"), 70, ["imdsproxy: no"]),
        (RuntimeError("x"), 70, None),
    ],
)
def test_an_error_of_the_daemons_keeps_its_problems_and_its_exit_status(
    cli: Cli, failure: Exception, status: int, lines: list[str] | None
) -> None:
    cli.server.failure = failure
    for command in ("status", "reload"):
        ran = cli(command)
        assert ran.status == status
        if lines is None:
            assert "fault" in ran.err
        else:
            assert ran.err.splitlines()[: len(lines)] == lines


def test_an_error_has_its_level_in_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as journal:
        status = os.fstat(journal.fileno())
        ran = subprocess.run(
            [sys.executable, "-m", "imdsproxy", "status", "--socket", tmp_path / "none.sock"],
            stderr=journal,
            env={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
            check=False,
        )
        lines = (tmp_path / "journal").read_text("utf-8").splitlines()
    assert (ran.returncode, len(lines)) == (69, 2)
    assert all(line.startswith("<3>") for line in lines)


def test_a_daemon_that_is_not_there_is_69_and_the_hint_starts_it_as_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = tmp_path / "units"
    monkeypatch.setattr(admin_client, "_UNIT_DIRECTORIES", (units,))
    options = ("--socket", str(tmp_path / "none.sock"))
    for command in ("status", "watch", "stop"):
        shown = run_main(command, *options)
        assert shown.status == 69
        assert "no daemon answers" in shown.err
        assert "start it with `imdsproxy run`" in shown.err
    units.mkdir()
    (units / "imdsproxy.service").touch()
    shown = run_main("status", *options)
    assert (shown.status, "start it with `systemctl start imdsproxy`" in shown.err) == (69, True)
    shown = run_main("stop", "--data-plane", *options)
    assert (shown.status, "the settings belong to another daemon" in shown.err) == (69, True)


def _answer(body: bytes, kind: str, status: int = 200) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("sent", "kind", "message"),
    [
        (b"", AdminUnavailable, "broke off"),
        (b"SSH-2.0-OpenSSH\r\n", AdminUnavailable, "broke off"),
        (_answer(b"{}", "application/json")[:-1], AdminUnavailable, "broke off"),
        (None, AdminUnavailable, "did not answer on .* within 0 s"),
        (_answer(b"{", "application/json"), AdminError, "cannot be read"),
        (_answer(b"\xff", "text/plain"), AdminError, "cannot be read"),
        (_answer(b"<h1>", "text/html", 500), AdminError, "the daemon answered 500"),
    ],
)
def test_a_daemon_that_dies_or_hangs_or_is_another_program_is_an_error(
    tmp_path: Path, sent: bytes | None, kind: type[ImdsproxyError], message: str
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                if sent is None:
                    peer.recv(1)  # until the client gives up
                else:
                    peer.sendall(sent)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(kind, match=message):
            AdminClient(tmp_path / "s", timeout_s=5 if sent is not None else 0.05).get("/v1/status")
        thread.join()


# status


def test_status_shows_what_is_wrong(filled: Cli) -> None:
    assert filled("status", "--check").status == 0
    # Foreign text can't steer the terminal.
    filled.server.status["readiness"] = Readiness(ready=True, degraded=("blue has no port",))
    degraded = filled("status", "--check")
    assert (degraded.status, "ready, degraded blue has no port" in degraded.words) == (75, True)
    filled.server.leave_out("blue", "evil\x1b[2J [red]nginx[/red] (pid 7) has port 80", "stop it")
    filled.claim_twice()
    wrong = Problem("instances[3].ports[0].mac", "is odd", file="/etc/web.yaml", line=41)
    # What is no tag in its part of the line, and one in the whole line.
    odd = Problem("file", "is not YAML: expected ]", file="/etc/[/odd\\")
    silent = SourceReport("file", in_sync=True, stale_s=12.0, problems=(wrong, odd))
    filled.server.status["sources"] = (silent,)
    filled.server.status["readiness"] = Readiness(ready=False)
    filled.server.status["uptime_s"] = 93_784.0
    reload = ReloadReport(8, 6.0, "networks changed", False, "no file", 0.5)
    haproxy = HaproxyReport("3.0.11", 100, 102, (101,), 8, reload)
    filled.server.status["haproxy"] = haproxy
    filled.server.status["documents"] = DocumentsReport((1, 2, 3))
    ran = filled("status")
    assert (ran.status, filled("status", "--check").status) == (0, 1)
    for text in (
        "not ready",
        "1, 0 serving",
        "master 100, worker 102, draining 101",
        "reload 8 (networks changed): no file, 500 ms",
        "parent 1, workers 2 3",
        "up 1 d 2 h",
        "silent for 12 s",
        "\\x1b[2J [red]nginx[/red] (pid 7) has port 80",
        "stop it",
        "web.yaml:41: instances[3].ports[0].mac",
        "/etc/[/odd\\: file: is not YAML: expected ]",
        "address blue/10.0.0.5: claimed by web-2 (file), web-1 (sqlite)",
        "3 problems",
    ):
        assert text in ran.out
    assert "\x1b" not in ran.out
    assert filled("status", "--json").json["haproxy"]["old_workers"] == [101]


def test_status_lists_some_of_what_is_wrong_and_counts_the_rest(filled: Cli) -> None:
    problems = tuple(Problem(f"instances[{number}].name", "is empty") for number in range(1_030))
    filled.server.status["sources"] = (SourceReport("file", in_sync=True, problems=problems),)
    filled.claim_twice()
    for number in range(1_000):
        filled.server.leave_out(f"n-{number}", "is not there")
    ran = filled("status")
    assert "1,031 problems" in ran.out
    assert ran.out.count("is empty") == 20
    assert "and 1,010 more: see --json" in ran.out
    assert "address blue/10.0.0.5: claimed by" in ran.out
    assert filled("status", "--json").out.count("is empty") == 1_030
    assert ran.out.count("is not there") == 2 * 20
    assert "and 980 more: see --json" in ran.out


_PATH = "/var/lib/neutron/metadata_proxy"
_LISTENER = UnixListenerReport(_PATH, serving=True, mode="0644", user=64055, group=64056)
_TAKEN = UnixListenerReport(_PATH, serving=True, mode="0644", taken_from="agent (pid 7)")
_FOLLOWING = FleetReport("https://hub1", 2.5, 812, 3)
_ALONE = FleetReport("", 3_660.0, 812, 3, ("instance/a",), {"instance/b": "the disk is full"})
_BUSY = UnixListenerReport(_PATH, serving=False, problem="agent (pid 7) is there")


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [
        (
            "under way",
            {"progress": (Step("storing instances", 1_000, 2_000), Step("waiting", 0, 0))},
            "storing instances: 1,000 of 2,000 waiting",
        ),
        (
            "policy",
            {"unmatched_policies": ("policy.instances.web1", "policy.networks.bleu")},
            "for unknown names: policy.instances.web1, policy.networks.bleu",
        ),
        ("unix listener", {"unix_listener": _LISTENER}, f"{_PATH}, mode 0644 64055:64056, serving"),
        ("unix listener", {"unix_listener": _TAKEN}, "serving, taken over from agent (pid 7)"),
        ("unix listener", {"unix_listener": _BUSY}, f"{_PATH}, not served agent (pid 7) is there"),
        ("fleet", {"fleet": _FOLLOWING}, "revision 812 with 3 items, by https://hub1, 2 s old"),
        (
            "fleet",
            {"fleet": _ALONE},
            "no hub, 1 h 1 min old held: instance/a instance/b: the disk is full",
        ),
        ("audit log", {"audit": AuditReport("all", "/x.log", 17)}, "all, to /x.log, 17 lines"),
        (
            "audit log",
            {"audit": AuditReport("sampled", "/x.log", 17, 3, "/x.log: no room")},
            "to /x.log, 17 lines, 3 skipped not written /x.log: no room",
        ),
    ],
)
def test_status_shows_what_only_some_daemons_have(
    filled: Cli, name: str, changed: Mapping[str, Any], text: str
) -> None:
    assert f"{name} " not in filled("status").out
    filled.server.status |= changed
    words = filled("status").words
    assert f"{name} " in words
    assert text in words


# reload, stop, render


def test_reload_shows_what_was_taken_over_and_drops_settings_only_with_its_flag(cli: Cli) -> None:
    cli.server.pending = ("the data plane has not confirmed it yet",)
    lines = cli("reload").out.splitlines()
    cli("reload", "--allow-dropped")
    assert cli.server.reloads == [False, True]
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "resolver.hold_s 5.0 2.0 at once",
        "admin.mode 0660 0600 at the next restart",
        "HAProxy does not use these settings yet:",
        "the data plane has not confirmed it yet",
    ]


@pytest.mark.parametrize(
    ("flags", "ended"),
    [([], ["controller"]), (["--data-plane"], ["controller", "haproxy", "documents"])],
)
def test_stop_ends_the_data_plane_only_with_its_flag(
    cli: Cli, flags: list[str], ended: list[str]
) -> None:
    ran = cli("stop", "--json", *flags)
    assert (ran.status, ran.json) == (0, {"stopped": ended, "data_plane": bool(flags)})
    assert cli.server.stopped == [bool(flags)]
    assert not cli.server.socket.exists()


def test_stop_and_render_for_people(cli: Cli) -> None:
    assert cli("render").out == "global\n  maxconn 200\n"
    assert cli("render", "--json").json == {"haproxy_configuration": "global\n  maxconn 200\n"}
    assert cli("stop").out == "stopped: controller\n"
