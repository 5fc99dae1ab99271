import json
import os
import re
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from imdsproxy.controller.token_report import OpenTree, TokenReport
from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.socket_file import SocketHolder
from imdsproxy.model.entities import InstanceId, NetworkId, Port
from imdsproxy.model.policy import PolicyRules, TokenMode
from imdsproxy.model.records import render_record
from imdsproxy.sources.sqlite.store import Store
from imdsproxy.tools import checks
from imdsproxy.tools.checks import Subject, host, openstack
from support.admin_server import admin_server
from support.certificates import Authority, make_authority, server_context
from support.check_subject import subject, summarise
from support.cli import run_main
from support.record_builders import instance, network

_ALL = (1 << 41) - 1
Prepare: TypeAlias = Callable[[Path], Subject]
Expected: TypeAlias = list[tuple[int, bool, str]]


@pytest.mark.parametrize(
    ("features", "exporter", "status", "text"),
    [
        ("+NS +PROMEX", "127.0.0.1:9", 0, "HAProxy 3.0.11 with network namespaces"),
        ("+NS -PROMEX", None, 0, "HAProxy 3.0.11 with network namespaces"),
        ("+NS -PROMEX", "127.0.0.1:9", 71, "HAProxy was built without its Prometheus exporter"),
        ("-NS", None, 71, "HAProxy 3.0.11 was built without network namespaces"),
    ],
)
def test_an_exporter_is_needed_only_where_it_is_wanted(
    tmp_path: Path, features: str, exporter: str | None, status: int, text: str
) -> None:
    program = tmp_path / "haproxy"
    program.write_text(f"#!/bin/sh\necho HAProxy version 3.0.11\necho Feature list : {features}\n")
    program.chmod(0o755)
    on = subject({"haproxy": {"binary": str(program)}, "metrics": {"haproxy_listen": exporter}})

    *_, last = host.check_haproxy(on)

    assert last.exit_status == status
    assert last.text.startswith(text)


def _unix_listener(enabled: object) -> dict[str, object]:
    return {"enabled": enabled, "user": "imdst-none", "proxy_group": "4294967"}


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"haproxy": {"user": "root", "group": "root"}, "admin": {"group": "root"}}, []),
        (
            {"haproxy": {"user": "imdst-none", "group": "imdst-www"}, "admin": {"group": "root"}},
            ["haproxy.user: this host has no user imdst-none", "haproxy.group: this host has no group imdst-www"],
        ),
        ({"unix_listener": _unix_listener(False)}, []),
        ({"unix_listener": _unix_listener(True)}, ["unix_listener.user: this host has no user imdst-none"]),
    ],
)  # fmt: skip
def test_each_missing_account_is_named_by_its_setting(
    settings: dict[str, Any], missing: list[str]
) -> None:
    section = {"user": "root", "group": "root"}
    on = subject({"haproxy": section, "documents": section, "admin": {"group": "root"}, **settings})
    expected = [(78, False, text) for text in missing] or [(0, False, "all accounts exist")]
    assert summarise(host.check_accounts(on)) == expected


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        (_ALL, []),
        (_ALL & ~(1 << 21) & ~(1 << 10), ["CAP_NET_BIND_SERVICE", "CAP_SYS_ADMIN"]),
        (0, ["CAP_CHOWN", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN", "CAP_SYS_CHROOT",
             "CAP_SYS_ADMIN"]),
    ],
)  # fmt: skip
def test_each_missing_capability_is_reported_with_what_it_is_for(
    tmp_path: Path, effective: int, missing: list[str]
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nCapEff:\t{effective:016x}\n")
    found = host.check_privileges(subject(), status)
    assert [one.text.partition(" is missing, to ")[0] for one in found if not one.ok] == missing
    assert {one.exit_status for one in found} == {77 if missing else 0}


def test_named_namespaces_are_counted(tmp_path: Path) -> None:
    (tmp_path / "blue").touch()
    on = subject({"paths": {"netns_dir": str(tmp_path)}})
    assert summarise(host.check_namespaces(on)) == [(0, False, "1 named namespace")]
    assert [one.exit_status for one in host.check_namespaces(on, tmp_path / "none")] == [71]
    for name, status in (("none", 0), ("blue", 71)):
        other = subject({"paths": {"netns_dir": str(tmp_path / name)}})
        assert [one.exit_status for one in host.check_namespaces(other)] == [status]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("mine", ""),
        ("none/yet", ""),
        ("file/x", "{0}/file is not a directory"),
        ("open", "every account can write to {0}/open"),
        ("sticky", ""),
        # Made by the daemon, with a mode of its own.
        ("open/x", ""),
        ("closed/x", "this account cannot write to {0}/closed"),
    ],
)
def test_a_directory_can_be_used_or_is_refused_with_the_reason(
    tmp_path: Path, name: str, fault: str
) -> None:
    (tmp_path / "file").touch()
    for directory, mode in (
        ("mine", 0o755),
        ("open", 0o777),
        ("sticky", 0o1777),
        ("closed", 0o755),
    ):
        (tmp_path / directory).mkdir()
        (tmp_path / directory).chmod(mode)
    on = subject({"paths": {"runtime_dir": f"{tmp_path}/mine", "state_dir": f"{tmp_path}/{name}"}})
    found = host.check_directories(on, lambda path, _: path.name != "closed")
    expected = (71, False, f"paths.state_dir: {fault.format(tmp_path)}")
    assert summarise(found) == [expected if fault else (0, False, "all directories can be used")]


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: path, ""),
        (Path.touch, ""),
        (lambda path: path / "audit.log", "No such file"),
        (lambda path: path.touch() or path / "audit.log", "log is not a directory"),
        (lambda path: path.symlink_to("elsewhere"), "the path is a symbolic link"),
        (os.mkfifo, "the path is not a regular file"),
        (Path.mkdir, "the path is not a regular file"),
        (lambda path: path.parent.chmod(0o777), "accounts other than root can create files"),
    ],
)
@pytest.mark.root
def test_an_audit_log_that_cannot_be_written_is_a_warning_with_what_helps(
    tmp_path: Path, make: Callable[[Path], object], fault: str
) -> None:
    made = make(tmp_path / "log")
    path = made if isinstance(made, Path) else tmp_path / "log"
    (found,) = host.check_audit(subject({"audit": {"mode": "all", "destination": str(path)}}))
    assert (found.ok, found.warning) == (True, bool(fault))
    assert fault in found.text
    assert bool(found.hint) is bool(fault)


@pytest.mark.root
def test_what_an_account_may_not_look_at_is_a_finding_and_the_rest_is_checked() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        closed, other = Path(directory, "closed"), Path(directory, "other")
        for path, owner in ((closed, 0), (other, 1234)):
            path.mkdir(0o700)
            os.chown(path, owner, owner)
        config = Path(directory, "c.yaml")
        sources = f"sources: {{file: {{enabled: true, directory: {closed}}}}}\n"
        config.write_text(f"{sources}audit: {{mode: all, destination: {closed}/log}}\n")
        os.setresuid(65534, 65534, 0)
        try:
            arguments = ("--socket", f"{directory}/none.sock", "--config", str(config))
            on_other = subject({"audit": {"mode": "all", "destination": f"{other}/log"}})
            (of_other,) = host.check_audit(on_other)
            found = run_main(*arguments, "check", "--json").json["findings"]
        finally:
            os.setresuid(0, 0, 0)
    texts = {(one["area"], one["text"].replace(directory, "D")) for one in found}
    assert texts >= {
        ("records", "this account cannot open D/closed"),
        ("audit", "audit.destination: D/closed/log: this account cannot write to D/closed"),
        ("settings", "D/c.yaml"),
    }
    assert "accounts other than root can create files" in of_other.text


def test_a_journal_that_is_not_there_is_a_warning_where_there_is_an_audit_log(
    tmp_path: Path,
) -> None:
    journal = tmp_path / "socket"
    on = subject({"audit": {"mode": "all", "destination": "journal"}})
    assert [one.warning for one in host.check_audit(on, journal)] == [True]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(os.fspath(journal))
        assert summarise(host.check_audit(on, journal)) == [
            (0, False, "imdsproxy writes lines to the journal")
        ]
    assert host.check_audit(subject(), journal) == []


def test_every_finding_has_its_texts_and_its_check() -> None:
    folder = Path(checks.__file__).parent
    source = "".join(page.read_text() for page in folder.glob("*.py"))
    texts = tomllib.loads((folder / "findings.toml").read_text())
    assert {name for name in texts if f'"{name}"' not in source} == set()
    assert set(re.findall(r'found\("([^"]+)"', source)) <= texts.keys()


def _check(*arguments: str) -> tuple[int, dict[str, dict[str, object]]]:
    """The exit status, and each finding by its text."""
    ran = run_main("check", "--json", *arguments)
    return ran.status, {one["text"]: one for one in ran.json["findings"]}


def test_check_shows_all_problems_at_once(tmp_path: Path) -> None:
    config, path, secret = (tmp_path / name for name in ("c.yaml", "metadata_proxy", "secret"))
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        port = taken.getsockname()[1]
        config.write_text(
            f"paths: {{runtime_dir: {tmp_path}/r, state_dir: {tmp_path}/s}}\n"
            f"metrics: {{listen: '127.0.0.1:{port}', haproxy_listen: null}}\n"
            "haproxy: {binary: /nonexistent/haproxy, user: nobody-here}\n"
            "nova: {endpoint_sets: {default: {endpoints: [{url: 'http://127.0.0.1:1'}], "
            f"secret_file: {secret}}}}}}}\n"
            f"unix_listener: {{enabled: true, path: {path}}}\n"
        )
        status, found = _check("--config", str(config))
        shown = run_main("check", "--config", str(config))
    assert status == 78
    expected = {
        "haproxy.user: this host has no user nobody-here": ("settings", False, False),
        "cannot run /nonexistent/haproxy: No such file or directory": ("haproxy", False, False),
        f"metrics.listen: 127.0.0.1:{port}: Address already in use": ("ports", False, False),
        "all secrets can be read": ("nova", True, False),
        "nova.endpoint_sets.default.endpoints[0]: http://127.0.0.1:1: Connection refused": ("nova", True, True),
    }  # fmt: skip
    for text, finding in expected.items():
        assert tuple(found[text][name] for name in ("area", "ok", "warning")) == finding
    assert any(f"(pid {os.getpid()}) listens at {path}" in text for text in found)
    wrong = sum(not one["ok"] for one in found.values())
    assert shown.status == 78
    assert shown.out.endswith(f"\n{wrong} problems\n")
    assert "no user nobody-here" in shown.out


def test_the_port_of_a_haproxy_that_runs_on_without_its_controller_is_not_taken(
    tmp_path: Path,
) -> None:
    runtime = tmp_path / "r"
    runtime.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as exporter, socket.socket(socket.AF_UNIX) as own:
        port = exporter.getsockname()[1]
        metrics = {"listen": None, "haproxy_listen": f"127.0.0.1:{port}"}
        on = subject({"paths": {"runtime_dir": str(runtime)}, "metrics": metrics})
        taken = f"metrics.haproxy_listen: 127.0.0.1:{port}: Address already in use"
        assert [one.text for one in host.check_ports(on)] == [taken]
        own.bind(str(on.layout.master_socket))
        own.listen()
        assert [one.text for one in host.check_ports(on)] == ["all ports are free"]


def test_check_goes_on_with_defaults_when_the_settings_are_broken(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("log: {level: loud}\n")
    status, found = _check("--config", str(config))
    assert status == 78
    assert any("log.level" in text for text in found)
    areas = {one["area"] for one in found.values()}
    assert "privileges" in areas
    assert not areas & {"nova", "neutron", "unix listener"}, "there is none"


def test_check_reports_what_the_running_daemon_does_not_serve(tmp_path: Path) -> None:
    with admin_server(tmp_path) as server:
        server.leave_out("blue", "pid 7 has the port")
        tree = OpenTree(NetworkId("red"), InstanceId("web"), "/nocloud")
        server.token_report = TokenReport(0.0, (), (tree,), 12)
        _, found = _check("--socket", str(server.socket))
        assert found["network blue is not served: pid 7 has the port"]["area"] == "namespaces"
        assert any("gives: /nocloud of web in red and 11 more" in text for text in found)

        server.failure = SourceUnavailable("the store is locked")
        _, found = _check("--socket", str(server.socket))
        assert found["the store is locked"]["area"] == "daemon"


def test_check_warns_of_open_user_data_in_record_files_and_in_the_store(tmp_path: Path) -> None:
    web, mail = (
        replace(
            instance(name, address),
            user_data=b"x",
            policy=PolicyRules(tokens=TokenMode.REQUIRED),
            ports=(Port(NetworkId("red"), addresses=(IPv4Address(address),)),),
        )
        for name, address in (("web", "10.0.0.5"), ("mail", "10.0.0.6"))
    )
    with closing(Store(tmp_path / "store.sqlite")) as store:
        store.put([network("red")], [web])
    (tmp_path / "records").mkdir()
    (tmp_path / "records/mail.json").write_text(json.dumps({"instances": [render_record(mail)]}))
    config, locked = tmp_path / "c.yaml", tmp_path / "locked.yaml"
    config.write_text(
        f"paths: {{runtime_dir: {tmp_path}/r, state_dir: {tmp_path}}}\n"
        f"sources: {{file: {{enabled: true, directory: {tmp_path}/records}}}}\n"
    )
    host = "policy: {host: {openstack_tokens: required, nocloud_tokens: required}}\n"
    locked.write_text(config.read_text() + host)
    _, found = _check("--config", str(locked))
    assert not any(text.startswith("one tree protects") for text in found)
    _, found = _check("--config", str(config))
    assert found[
        "one tree protects user-data that another tree gives: "
        "/openstack of mail in red, /nocloud of mail in red, /openstack of web in red and 1 more"
    ]["warning"]

    (tmp_path / "store.sqlite").write_bytes(b"no store, and long enough to be read as one" * 99)
    _, found = _check("--config", str(config))
    assert [one["area"] for text, one in found.items() if "store.sqlite" in text] == ["records"]
    assert any("/openstack of mail in red, /nocloud of mail in red" in text for text in found)


_SECRET = b"0123456789abcdef"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(_SECRET + b"\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"), "ca")


def _on(secret: Path, **members: object) -> Subject:
    default = {"endpoints": [{"url": "http://127.0.0.1:1"}], "secret_file": str(secret), **members}
    return subject({"nova": {"endpoint_sets": {"default": default}}})


@pytest.mark.parametrize(
    ("content", "following", "mode", "found"),
    [
        (_SECRET, None, 0o600, [(0, False, "all secrets can be read")]),
        (b" \n", None, 0o600, [(78, False, "is empty")]),
        (_SECRET, None, 0o604, [(78, False, "every user of this host can use it")]),
        (None, None, 0, [(78, False, "No such file")]),
        (b" short\n", b"short", 0o600,
         [(0, True, "only 5 bytes"), (0, True, "only 5 bytes"), (0, True, "the same as the current one")]),
    ],
)  # fmt: skip
def test_a_secret_that_run_would_refuse_is_wrong_and_one_that_is_easily_guessed_a_warning(
    tmp_path: Path,
    content: bytes | None,
    following: bytes | None,
    mode: int,
    found: list[tuple[int, bool, str]],
) -> None:
    for name, data in (("secret", content), ("next", following)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
            (tmp_path / name).chmod(mode)
    more = {} if following is None else {"next_secret_file": str(tmp_path / "next")}
    findings = openstack.check_secrets(_on(tmp_path / "secret", **more))
    assert [(one.exit_status, one.warning) for one in findings] == [one[:2] for one in found]
    for finding, (status, warning, text) in zip(findings, found, strict=True):
        assert text in finding.text
        assert finding.text.startswith("nova.endpoint_sets.default") is bool(status or warning)
        assert bool(finding.hint) is bool(status or warning)


@pytest.fixture(scope="module")
def directory(authority: Authority) -> Path:
    """Of the files in the table below."""
    client, other, shown = (authority.issue(name) for name in ("client", "other", "shown"))
    for one, mode in ((client, 0o600), (other, 0o600), (shown, 0o644)):
        one.key.chmod(mode)
    authority.ca_file.with_name("text").write_text("no PEM\n")
    return authority.ca_file.parent


@pytest.mark.parametrize(
    ("members", "setting"),
    [
        (
            {
                "ca_file": "ca.crt",
                "client_cert_file": "client.crt",
                "client_key_file": "client.key",
            },
            "",
        ),
        ({"ca_file": "ca.crt", "client_cert_file": "client.pem"}, ""),
        ({"ca_file": "text"}, "ca_file"),
        ({"ca_file": "none"}, "ca_file"),
        ({"client_cert_file": "text"}, "client_cert_file"),
        ({"client_cert_file": "client.crt"}, "client_cert_file"),
        ({"client_cert_file": "client.crt", "client_key_file": "other.key"}, "client_cert_file"),
        ({"client_cert_file": "client.crt", "client_key_file": "none"}, "client_key_file"),
        ({"client_cert_file": "shown.crt", "client_key_file": "shown.key"}, "client_key_file"),
    ],
)
def test_a_file_that_is_no_certificate_or_key_is_wrong_by_its_setting(
    secret: Path, directory: Path, members: Mapping[str, str], setting: str
) -> None:
    on = _on(secret, **{name: str(directory / one) for name, one in members.items()})
    (finding,) = openstack.check_certificates(on)
    assert finding.exit_status == (78 if setting else 0)
    expected = (
        f"nova.endpoint_sets.default.{setting}: " if setting else "all certificates can be used"
    )
    assert finding.text.startswith(expected)


@contextmanager
def _server(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Something that takes one connection after another, and ends TLS where there is a context."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if context is not None:
                with suppress(OSError):
                    context.wrap_socket(self.request, server_side=True).close()

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


_ENDPOINT = "nova.endpoint_sets.default.endpoints"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"ca_file": "ca"}, ""),
        ({"verify": False}, ""),
        ({}, "issuer"),
        ({"ca_file": "ca", "server_name": "other.example.org"}, "mismatch"),
    ],
)
def test_an_endpoint_is_tried_as_far_as_its_certificate(
    secret: Path, authority: Authority, members: Mapping[str, object], reason: str
) -> None:
    given = {one: str(authority.ca_file) if one == "ca_file" else to for one, to in members.items()}
    own = authority.issue("nova", names=["DNS:nova.example.org"])
    with _server(server_context(own)) as port:
        endpoints = [{"url": f"https://127.0.0.1:{port}"}]
        named = {"endpoints": endpoints, "server_name": "nova.example.org", **given}
        (finding,) = openstack.check_endpoints(_on(secret, **named))
    assert (finding.ok, finding.warning) == (True, bool(reason))
    assert reason in finding.text


def test_each_endpoint_that_cannot_be_reached_is_a_warning(secret: Path) -> None:
    with _server() as port:
        here = {"url": f"http://127.0.0.1:{port}"}
        elsewhere = {"url": "http://nova.invalid"}
        refusing = {"url": "http://127.0.0.1:1"}
        fine = openstack.check_endpoints(_on(secret, endpoints=[here]))
        found = openstack.check_endpoints(_on(secret, endpoints=[here, refusing, elsewhere]))
    assert summarise(fine) == [(0, False, "1 endpoint can be reached")]
    assert [(one.ok, one.warning) for one in found] == [(True, True)] * 2
    assert found[0].text == f"{_ENDPOINT}[1]: http://127.0.0.1:1: Connection refused"
    assert found[1].text.startswith(f"{_ENDPOINT}[2]: http://nova.invalid:8775: ")


def _clouds(path: Path, **source: object) -> Subject:
    neutron = {"enabled": True, "cloud": "here", "clouds_file": str(path), **source}
    sets = {"default": {"endpoints": [{"url": "http://nova"}], "secret_file": "/x"}}
    return subject({"sources": {"neutron": neutron}, "nova": {"endpoint_sets": sets}})


@pytest.mark.parametrize(
    ("content", "mode", "reported"),
    [
        (b"clouds: {here: {}}\n", 0o600, (True, False, "has the cloud here")),
        (b"clouds: {here: {auth_type: none}}\n", 0o644, (True, False, "has the cloud here")),
        (b"clouds: {here: {auth_type: none}, there: {auth: {password: x}}}\n", 0o644,
         (True, True, "which contains a secret (password)")),
        (b"clouds: {here: {auth: {application_credential_secret: x}}}\n", 0o644,
         (True, True, "a secret (application_credential_secret)")),
        (b"clouds: {there: {}}\n", 0o600, (False, False, "has no cloud here")),
        (b"- 1\n", 0o600, (False, False, "has no cloud here")),
        (b"a: [\n", 0o600, (False, False, "is not YAML")),
        (b"\xff", 0o600, (False, False, "not UTF-8")),
        (None, 0, (False, False, "No such file")),
    ],
)  # fmt: skip
def test_the_cloud_has_to_be_in_its_file(
    tmp_path: Path, content: bytes | None, mode: int, reported: tuple[bool, bool, str]
) -> None:
    path = tmp_path / "clouds.yaml"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)

    (finding,) = openstack.check_clouds(_clouds(path))

    assert (finding.ok, finding.warning) == reported[:2]
    assert reported[2] in finding.text
    alone = {"cloud": None, "clouds_file": None, "endpoint": "http://127.0.0.1:9696"}
    assert openstack.check_clouds(_clouds(path, **alone)) == [], "without Keystone it needs none"


def test_without_openstacksdk_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keystoneauth1", None)
    (finding,) = openstack.check_clouds(_clouds(Path("/nonexistent")))
    assert "openstacksdk cannot be imported" in finding.text
    assert "apt install python3-openstacksdk" in finding.hint
    assert "pip install 'imdsproxy[neutron]'" in finding.hint


_AGENT = SocketHolder(8, ("/usr/bin/python3", "/usr/bin/neutron-metadata-agent", "--config-file"))
_MODULE = SocketHolder(8, ("python3", "-m", "neutron.agent.metadata_agent"))
_OVN = SocketHolder(8, ("/usr/bin/python3", "/usr/bin/neutron-ovn-agent"))
_OURS = SocketHolder(7, ("haproxy", "-Ws", "-f", "/run/imdst/haproxy.cfg"))
_SOCAT = SocketHolder(9, ("socat", "x"))
_UNTIL = "neutron-metadata-agent serves its guests until you stop it"


@pytest.mark.parametrize(
    ("holder", "take_over", "status", "text", "hint"),
    [
        (None, False, 0, "no process listens at /var/s", ""),
        (_OURS, False, 0, "imdsproxy's HAProxy listens at /var/s (pid 7)", ""),
        (_AGENT, False, 0, "neutron-metadata-agent (pid 8) listens at /var/s", _UNTIL),
        (_MODULE, False, 0, "neutron-metadata-agent (pid 8) listens at /var/s", _UNTIL),
        (_SOCAT, False, 71, "socat x (pid 9) listens", "stop the process, or change"),
        (SocketHolder(), False, 71, "an unknown process listens", "stop the process, or change"),
        (_OVN, True, 0, "neutron-ovn-agent (pid 8) listens at /var/s",
         "each time neutron-ovn-agent starts (unix_listener.take_over)"),
        (_SOCAT, True, 0, "socat x (pid 9) listens", "each time the process starts"),
        (SocketHolder(), True, 0, "an unknown process listens", "imdsproxy takes the path over"),
    ],
)  # fmt: skip
def test_a_process_at_the_sockets_path_is_wrong_unless_it_is_to_be_replaced(
    holder: SocketHolder | None, *, take_over: bool, status: int, text: str, hint: str
) -> None:
    listener = {"enabled": True, "path": "/var/s", "take_over": take_over}
    on = subject({"unix_listener": listener, "paths": {"runtime_dir": "/run/imdst"}})

    (finding,) = openstack.check_unix_listener(on, lambda _: holder)

    assert finding.exit_status == status
    assert finding.warning is (status == 0 and bool(hint))
    assert text in finding.text
    assert hint in finding.hint
