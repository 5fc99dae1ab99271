from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from imdsproxy.app.namespace_proxy.command import parse_command_line, read_settings
from imdsproxy.errors import ConfigError, ConfigInvalid, ConfigUnreadable, RequestRefused

_UUID = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
_PAGE = Path(__file__).parents[3] / "docs" / "namespace-proxy.md"
_NAMES = {
    "network-id": "network_id",
    "router-id": "router_id",
    "metadata-port": "port",
    "metadata-proxy-socket": "proxy_socket",
    "metadata-proxy-user": "user",
    "metadata-proxy-group": "group",
    "pid-file": "pidfile",
    "state-path": "state_path",
}


def parse(
    *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Mapping[str, Any]:
    return parse_command_line(arguments, program="ns", environment=environment)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ((), {}),
        *(
            (words, {field: "word"})
            for option, field in _NAMES.items()
            for name in (f"--{option}", f"--{option.replace('-', '_')}")
            for words in ((name, "word"), (f"{name}=word",))
        ),
        *(((one,), {"daemonize": False}) for one in ("--no-daemonize", "--nodaemonize", "--no_daemonize")),
        (("--nodaemonize", "--daemonize"), {"daemonize": True}),
        *(((one,), {"use_syslog": True}) for one in ("--use-syslog", "--use_syslog")),
        *(((one,), {"use_syslog": False}) for one in ("--nouse-syslog", "--nouse_syslog", "--no-use-syslog")),
        (("--debug", "--syslog-log-facility=LOG_LOCAL3"), {"debug": True, "facility": "local3"}),
        (("--debug", "--nodebug"), {"debug": False}),
        # Without a meaning here.
        *(((f"--{no}metadata{sep}proxy{sep}watch{sep}log",), {}) for no in ("", "no", "no-") for sep in "-_"),
        (("--log-file=a.log", "--log-dir", "/var/log"), {}),
        (("--log_file=a.log", "--log_dir=/var/log"), {}),
        (("--verbose", "--noverbose", "--use-stderr", "--nouse-journal", "--log-config-append=x"), {}),
        # An empty one is the present one.
        (("--metadata_proxy_user=", "--metadata_proxy_group=", "--pid_file="), {}),
    ],
)  # fmt: skip
def test_an_option_is_taken_in_each_spelling(
    words: tuple[str, ...], changes: Mapping[str, Any]
) -> None:
    assert parse(*words) == changes


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--network",), "--network"),
        (("--network-id",), "expected one argument"),
        (("--daemonise",), "--daemonise"),
        (("stray",), "stray"),
        (("--syslog-log-facility", "x"), "facility"),
        (("cleanup",), "ID"),
        (("cleanup", _UUID, "--network-id", _UUID), "--network-id"),
    ],
)
def test_what_is_not_understood_is_refused(words: tuple[str, ...], what: str) -> None:
    with pytest.raises(RequestRefused, match=re.escape(what)):
        parse(*words)


def test_files_of_neutron_are_read_and_the_command_line_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "neutron.conf", tmp_path / "l3.ini"
    first.write_text(
        "[DEFAULT]\nstate_path = /opt/n\nmetadata_port = 80\ndebug = True\nuse_syslog = yes\n"
        "metadata_proxy_socket = $state_path/sock\nmetadata_proxy_user = neutron\n"
        "network_id = nonsense\ndaemonize = false\n"
    )
    second.write_text("[DEFAULT]\nmetadata_proxy_user = nobody\nsyslog_log_facility=LOG_USER\n")

    found = parse(
        *("--config-file", str(first), f"--config_file={second}", "--metadata-port", "81")
    )

    assert found == {
        "state_path": "/opt/n",
        "port": "81",
        "proxy_socket": "/opt/n/sock",
        "user": "nobody",
        "facility": "user",
        "debug": True,
        "use_syslog": True,
    }


def test_a_socket_below_the_state_path_follows_the_command_lines(tmp_path: Path) -> None:
    file = tmp_path / "neutron.conf"
    file.write_text("[DEFAULT]\nstate_path=/opt/n\nmetadata_proxy_socket=$state_path/sock\n")
    found = parse("--config-file", str(file), "--state-path", "/srv")
    assert found == {"state_path": "/srv", "proxy_socket": "/srv/sock"}


def test_the_files_of_a_directory_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.conf").write_text("[DEFAULT]\nmetadata_port = 2\n")
    (tmp_path / "a.conf").write_text("[DEFAULT]\nmetadata_port = 1\ndebug = no\n")
    (tmp_path / "c.txt").write_text("nonsense")
    assert parse("--config-dir", str(tmp_path)) == {"port": "2", "debug": False}


@pytest.mark.parametrize("option", ["--config-file", "--config-dir"])
def test_a_file_that_is_not_there_is_no_empty_one(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigUnreadable, match=r"none: No such file"):
        parse(option, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (b"state_path = \xff", ConfigUnreadable, "n.conf:2 is not UTF-8 text"),
        (b"debug = perhaps", ConfigInvalid, "n.conf:2: debug: 'perhaps' is neither"),
        (b"metadata_proxy_socket = $nothing/sock", ConfigInvalid,
         "n.conf:2: metadata_proxy_socket: refers to $nothing"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused_with_the_line(
    tmp_path: Path, line: bytes, kind: type[ConfigError], reason: str
) -> None:
    (tmp_path / "n.conf").write_bytes(b"[DEFAULT]\n" + line + b"\n")
    with pytest.raises(kind) as refused:
        parse("--config-dir", str(tmp_path))
    assert reason in "; ".join([str(refused.value), *map(str, refused.value.problems)])


_WRITTEN = """
namespace_proxy:
  state_path: /opt/n
  metadata_port: 80
  metadata_proxy_socket: /run/sock
  metadata_proxy_user: neutron
  metadata_proxy_group: "112"
  debug: true
  use_syslog: false
  syslog_log_facility: LOG_USER
"""


def test_settings_have_each_option_and_the_environment_a_neutron_file_and_the_command_line_win(
    tmp_path: Path,
) -> None:
    settings, ini = tmp_path / "imdsproxy.yaml", tmp_path / "n.conf"
    settings.write_text(_WRITTEN)
    named = ("--config", str(settings))
    written = {
        "state_path": "/opt/n",
        "port": "80",
        "proxy_socket": "/run/sock",
        "user": "neutron",
        "group": "112",
        "debug": True,
        "use_syslog": False,
        "facility": "user",
    }
    assert parse(*named) == written
    variables = {
        "IMDSPROXY_NAMESPACE_PROXY__METADATA_PORT": "81",
        "IMDSPROXY_NAMESPACE_PROXY__DEBUG": "false",
    }
    in_environment = dict(written, port="81", debug=False)
    assert parse(*named, environment=variables) == in_environment
    ini.write_text("[DEFAULT]\nmetadata_port = 82\nmetadata_proxy_user = nobody\n")
    in_ini = dict(in_environment, port="82", user="nobody")
    assert parse(*named, "--config-file", str(ini), environment=variables) == in_ini
    words = (*named, "--config-file", str(ini), "--metadata-port", "83", "--use-syslog")
    on_the_line = dict(in_ini, port="83", use_syslog=True)
    assert parse(*words, environment=variables) == on_the_line


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("namespace_proxy: {port: 80}", "namespace_proxy.port"),
        ("namespace_proxy: {metadata_port: 0}", "namespace_proxy.metadata_port"),
        ("namespace_proxy: {metadata_proxy_user: a b}", "namespace_proxy.metadata_proxy_user"),
        (
            "namespace_proxy: {syslog_log_facility: LOG_X}",
            "namespace_proxy.syslog_log_facility: 'LOG_X' is no facility",
        ),
    ],
)
def test_settings_that_break_the_schema_are_refused_with_their_place(
    tmp_path: Path, text: str, what: str
) -> None:
    settings = tmp_path / "imdsproxy.yaml"
    settings.write_text(text)
    with pytest.raises(ConfigInvalid, match=re.escape(what)):
        parse("--config", str(settings))


def test_a_variable_that_no_setting_has_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="IMDSPROXY_NAMESPACE_PROXY_DEBUG"):
        parse(environment={"IMDSPROXY_NAMESPACE_PROXY_DEBUG": "1"})


def test_the_default_file_is_read_only_where_it_has_the_section(tmp_path: Path) -> None:
    file = tmp_path / "imdsproxy.yaml"
    assert read_settings(None, {}, default=file) == {}
    file.write_text("no such section: 1\n")
    assert read_settings(None, {}, default=file) == {}
    file.write_text("")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.yaml").write_text("namespace_proxy: {metadata_port: 80}\n")
    assert read_settings(None, {}, default=file) == {"metadata_port": 80}
    file.write_text("no such section: 1\n")
    with pytest.raises(ConfigInvalid, match="no such section"):
        read_settings(None, {}, default=file)


def test_cleaning_up_takes_an_id_a_pid_file_and_a_state_path() -> None:
    found = parse_command_line(
        ["cleanup", _UUID, "--pid_file=/run/p", "--state-path", "/srv"],
        program="ns",
        environment={},
    )
    assert found == {"id": _UUID, "pidfile": "/run/p", "state_path": "/srv"}
    plain = parse_command_line(["cleanup", _UUID], program="ns", environment={})
    assert plain == {"id": _UUID}
    moved = {"IMDSPROXY_NAMESPACE_PROXY__STATE_PATH": "/srv"}
    placed = parse_command_line(["cleanup", _UUID], program="ns", environment=moved)
    assert placed == {"id": _UUID, "state_path": "/srv"}


def test_the_help_has_todays_spellings_and_none_of_old(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    options, _, rest = capsys.readouterr().out.partition("options:")[2].partition("`ns cleanup ID`")
    assert set(re.findall(r"^  (--[\w-]+)", options, re.MULTILINE)) == {
        *(f"--{name}" for name in _NAMES),
        *("--daemonize", "--no-daemonize", "--debug", "--use-syslog", "--no-use-syslog"),
        *("--syslog-log-facility", "--config-file", "--config-dir", "--config"),
    }
    without = set(rest.partition("options without effect")[2].partition("Exit statuses")[0].split())
    assert {one.strip(",.") for one in without if one.startswith("--")} == {
        *("--log-file", "--logfile", "--log-dir", "--logdir", "--log-config", "--verbose"),
        *("--log-config-append", "--log-date-format", "--metadata-proxy-watch-log"),
        *("--use-stderr", "--use-journal", "--use-json", "--watch-log-file"),
    }


def test_the_page_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    reported = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
    assert reported - set(re.findall(r"--[a-z][\w-]+", _PAGE.read_text())) == set()
