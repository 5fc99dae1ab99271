from __future__ import annotations

import json
import socket
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from imdsproxy.cli.checks import guests, host
from imdsproxy.cli.checks.finding import Area, Finding
from imdsproxy.config.schema import Settings, SourcesSettings
from imdsproxy.config.section import Endpoint
from imdsproxy.core.haproxy.runtime import Version
from imdsproxy.core.model import InstanceId, NetworkId, Port
from imdsproxy.core.policy import PolicyRules, TokenMode
from imdsproxy.core.records import render_instance
from imdsproxy.core.token_report import OpenTree, TokenReport
from imdsproxy.dataplane.launch import HaproxyProgram
from imdsproxy.errors import (
    ConfigInvalid,
    ConfigUnreadable,
    HaproxyMissing,
    Problem,
    SourceUnavailable,
)
from imdsproxy.sources.settings import FileSourceSettings
from imdsproxy.sources.sqlite.store import Store
from support.admin_server import admin_server
from support.record_builders import instance, network

ALL = (1 << 41) - 1


def _wrong(findings: list[Finding]) -> list[tuple[str, int]]:
    return [(finding.text, finding.exit_status) for finding in findings if not finding.ok]


def test_a_haproxy_with_all_it_needs_is_fine() -> None:
    program = HaproxyProgram("haproxy", Version(3, 0, "11"), frozenset({"NS", "PROMEX"}))

    (finding,) = host.check_haproxy(program, exporter_wanted=True)

    assert finding.ok
    assert "3.0.11" in finding.text


def test_a_missing_exporter_matters_only_where_it_is_wanted() -> None:
    program = HaproxyProgram("haproxy", Version(3, 0, "11"), frozenset({"NS"}))

    assert _wrong(host.check_haproxy(program, exporter_wanted=False)) == []
    ((text, status),) = _wrong(host.check_haproxy(program, exporter_wanted=True))
    assert "Prometheus" in text
    assert status == 71


def test_an_old_haproxy_is_one_line() -> None:
    error = HaproxyMissing("HAProxy 2.6.12 is too old: imdsproxy needs 3.0 or newer")

    assert _wrong(host.check_haproxy(error, exporter_wanted=True)) == [(error.message, 71)]


def test_each_missing_account_is_named_by_its_setting() -> None:
    wanted = [("haproxy.user", "haproxy"), ("haproxy.group", "www"), ("admin.group", "ops")]

    found = host.check_accounts(wanted, lambda kind, name: (kind, name) == ("group", "ops"))

    assert [text for text, _ in _wrong(found)] == [
        "haproxy.user: this host has no user haproxy",
        "haproxy.group: this host has no group www",
    ]
    assert {status for _, status in _wrong(found)} == {78}


def test_capabilities_are_read_from_proc() -> None:
    assert host.read_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n") == ALL
    assert host.read_capabilities("") == 0


def test_each_missing_capability_is_told_with_what_it_is_for() -> None:
    assert _wrong(host.check_privileges(ALL)) == []
    found = _wrong(host.check_privileges(ALL & ~(1 << 21) & ~(1 << 10)))
    assert [text.split()[0] for text, _ in found] == ["CAP_NET_BIND_SERVICE", "CAP_SYS_ADMIN"]
    assert {status for _, status in found} == {77}
    assert len(_wrong(host.check_privileges(0))) == 7


def test_named_namespaces_are_counted(tmp_path: Path) -> None:
    (tmp_path / "blue").touch()

    assert host.check_namespaces(tmp_path)[0].text == "1 named namespace"
    assert host.check_namespaces(tmp_path / "none")[0].ok
    assert _wrong(host.check_namespaces(tmp_path / "blue"))
    assert _wrong(host.check_namespaces(tmp_path, own=tmp_path / "none"))


def test_directories_that_are_there_or_can_be_made_are_fine(tmp_path: Path) -> None:
    wanted = {"a": tmp_path, "b": tmp_path / "x" / "y"}

    assert _wrong(host.check_directories(wanted, lambda _path: True)) == []


def test_a_directory_is_refused_for_each_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)

    found = _wrong(
        host.check_directories(
            {"a": tmp_path / "file" / "x", "b": tmp_path / "open"}, lambda _path: True
        )
    )

    assert [text for text, _ in found] == [
        f"a: {tmp_path}/file is no directory",
        f"b: every account can write to {tmp_path}/open",
    ]


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    ((text, status),) = _wrong(
        host.check_directories({"a": tmp_path / "x"}, lambda path: path != tmp_path)
    )

    assert text == f"a: {tmp_path} cannot be written to"
    assert status == 71


def test_each_port_that_is_taken_is_told() -> None:
    taken, free = Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2)

    found = host.check_ports(
        {"metrics.listen": taken, "metrics.haproxy_listen": free, "other": None},
        lambda endpoint: "Address already in use" if endpoint == taken else None,
    )

    assert [text for text, _ in _wrong(found)] == [
        "metrics.listen: 127.0.0.1:1: Address already in use"
    ]


def _settings(directory: Path) -> Settings:
    source = FileSourceSettings(enabled=True, directory=directory)
    return Settings(sources=SourcesSettings(file=source))


def test_every_bad_record_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("networks:\n- id: a\n  listener: {bridge: b}\n  mtu: x\n")
    (tmp_path / "b.json").write_text('{"instances": [{"id": "i"}]}')
    (tmp_path / "c.yaml").write_text("networks: [")
    (tmp_path / "notes.txt").write_text("networks: [")

    found = _wrong(guests.check_records(_settings(tmp_path)))

    assert len(found) == 3
    assert found[0][0].startswith(f"{tmp_path}/a.yaml:4: networks[0].mtu")
    assert {status for _, status in found} == {69}


def test_good_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("networks:\n- id: a\n  listener: {bridge: b}\n")

    (finding,) = guests.check_records(_settings(tmp_path))

    assert finding.ok
    assert finding.text.startswith("1 in ")


def test_a_missing_record_directory_is_told(tmp_path: Path) -> None:
    assert _wrong(guests.check_records(_settings(tmp_path / "none")))
    assert guests.check_records(Settings()) == []


def test_a_running_daemon_says_what_it_leaves_out() -> None:
    left_out = [{"network": "blue", "code": "x", "reason": "no namespace", "hint": "make it"}]
    status: dict[str, object] = {
        "left_out": left_out,
        "readiness": {"ready": False, "reasons": ["a", "b"]},
        "controller": 7,
    }

    found = _wrong(guests.check_daemon(status))

    assert [text for text, _ in found] == [
        "network blue is not served: no namespace",
        "runs and is not ready (pid 7): a; b",
    ]


def test_an_error_becomes_one_finding_for_each_problem() -> None:
    several = ConfigInvalid("2 problems", problems=[Problem("a", "x"), Problem("b", "y")])

    assert _wrong(Area("settings").of(several)) == [("a: x", 78), ("b: y", 78)]
    single = ConfigUnreadable("cannot read", hint="h")
    assert _wrong(Area("settings").of(single)) == [("cannot read", 78)]


def test_check_shows_all_problems_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imdsproxy.cli.main import main  # noqa: PLC0415 - only here

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "c.yaml"
        config.write_text(
            f"paths: {{runtime_dir: {tmp_path}/r, state_dir: {tmp_path}/s}}\n"
            f"metrics: {{listen: '127.0.0.1:{port}', haproxy_listen: null}}\n"
            "haproxy: {binary: /nonexistent/haproxy, user: nobody-here}\n"
        )
        status = main(["check", "--config", str(config)])

    out = capsys.readouterr().out
    assert status == 78
    assert "no user nobody-here" in out
    assert "cannot run /nonexistent/haproxy" in out
    assert f"127.0.0.1:{port}: Address already in use" in out


def test_check_goes_on_with_defaults_when_the_settings_are_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imdsproxy.cli.main import main  # noqa: PLC0415 - only here

    config = tmp_path / "c.yaml"
    config.write_text("log: {level: loud}\n")

    status = main(["check", "--json", "--config", str(config)])

    assert status == 78
    out = capsys.readouterr().out
    assert "log.level" in out
    assert '"area": "privileges"' in out


def test_check_tells_what_the_running_daemon_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imdsproxy.cli.main import main  # noqa: PLC0415 - only here

    with admin_server(tmp_path) as server:
        server.leave_out("blue", "pid 7 has the port")
        main(["check", "--socket", str(server.socket)])
        assert "network blue is not served: pid 7 has the port" in capsys.readouterr().out

        server.failure = SourceUnavailable("the store is locked")
        main(["check", "--socket", str(server.socket)])
        assert "the store is locked" in capsys.readouterr().out


def test_check_warns_of_open_user_data_that_record_files_and_the_store_tell_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imdsproxy.cli.main import main  # noqa: PLC0415 - only here

    red, web, mail = network("red"), instance("web", "10.0.0.5"), instance("mail", "10.0.0.6")
    required = PolicyRules(tokens=TokenMode.REQUIRED)
    with closing(Store(tmp_path / "store.sqlite")) as store:
        store.put(
            [red], [replace(web, user_data=b"x", policy=required, ports=_ports("red", "10.0.0.5"))]
        )
    other = replace(mail, user_data=b"x", policy=required, ports=_ports("red", "10.0.0.6"))
    (tmp_path / "records").mkdir()
    (tmp_path / "records/mail.json").write_text(json.dumps({"instances": [render_instance(other)]}))
    config = tmp_path / "c.yaml"
    config.write_text(
        f"paths: {{runtime_dir: {tmp_path}/r, state_dir: {tmp_path}}}\n"
        f"sources: {{file: {{enabled: true, directory: {tmp_path}/records}}}}\n"
    )
    main(["check", "--json", "--config", str(config)])
    (warned,) = [
        one
        for one in json.loads(capsys.readouterr().out)["findings"]
        if one["warning"] and "user-data" in one["text"]
    ]
    assert warned["text"] == (
        "user-data is open beside a tree that keeps it: "
        "/openstack of mail in red, /nocloud of mail in red, /openstack of web in red and 1 more"
    )


def test_check_warns_of_open_user_data_that_the_daemon_tells_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imdsproxy.cli.main import main  # noqa: PLC0415 - only here

    with admin_server(tmp_path) as server:
        tree = OpenTree(NetworkId("red"), InstanceId("web"), "/nocloud")
        server.token_report = TokenReport(0.0, (), (tree,), 12)
        main(["check", "--json", "--socket", str(server.socket)])
    assert "keeps it: /nocloud of web in red and 11 more" in capsys.readouterr().out


def _ports(place: str, address: str) -> tuple[Port, ...]:
    return (Port(NetworkId(place), addresses=(IPv4Address(address),)),)
