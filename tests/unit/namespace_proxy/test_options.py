from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from imdsproxy.app.namespace_proxy.command import CleanUp, Run, parse_command_line, read_settings
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, RequestRefused

_UUID = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
_PAGE = Path(__file__).parents[3] / "docs" / "namespace-proxy.md"
_DEFAULT = Run(
    port="9697", daemonize=True, state_path="/var/lib/neutron", facility="local0", debug=False
)
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


def parse(*arguments: str, environment: Mapping[str, str] = MappingProxyType({})) -> Run:
    found = parse_command_line(arguments, program="ns", environment=environment)
    assert isinstance(found, Run)
    return found


def test_without_options_everything_is_as_it_was_with_the_old_program() -> None:
    assert parse() == _DEFAULT


@pytest.mark.parametrize(("option", "field"), _NAMES.items())
@pytest.mark.parametrize("underscored", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_an_option_is_taken_in_each_spelling(
    option: str, field: str, *, underscored: bool, joined: bool
) -> None:
    name = "--" + (option.replace("-", "_") if underscored else option)
    arguments = [f"{name}=word"] if joined else [name, "word"]
    assert parse(*arguments) == replace(_DEFAULT, **{field: "word"})  # type: ignore[arg-type]  # all are text


@pytest.mark.parametrize("word", ["--no-daemonize", "--nodaemonize", "--no_daemonize"])
def test_the_foreground_is_asked_for(word: str) -> None:
    assert parse(word) == replace(_DEFAULT, daemonize=False)
    assert parse(word, "--daemonize") == _DEFAULT


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--use-syslog", True),
        ("--use_syslog", True),
        ("--nouse-syslog", False),
        ("--nouse_syslog", False),
        ("--no-use-syslog", False),
    ],
)
def test_a_log_is_asked_for_or_not(word: str, *, expected: bool) -> None:
    assert parse(word) == replace(_DEFAULT, use_syslog=expected)


def test_the_levels_and_facilities_of_oslo_are_haproxys() -> None:
    found = parse("--debug", "--syslog-log-facility=LOG_LOCAL3")
    assert found == replace(_DEFAULT, debug=True, facility="local3")
    assert parse("--debug", "--nodebug") == _DEFAULT


@pytest.mark.parametrize(
    "words",
    [
        ("--metadata_proxy_watch_log",),
        ("--nometadata_proxy_watch_log",),
        ("--metadata-proxy-watch-log",),
        ("--no-metadata-proxy-watch-log",),
        ("--log-file=a.log", "--log-dir", "/var/log"),
        ("--log_file=a.log", "--log_dir=/var/log"),
        ("--verbose",),
        ("--noverbose",),
        ("--use-stderr", "--nouse-journal", "--log-config-append=x"),
    ],
)
def test_options_without_a_meaning_here_are_taken_and_change_nothing(
    words: tuple[str, ...],
) -> None:
    assert parse(*words) == _DEFAULT


def test_what_an_agent_of_old_says_is_understood() -> None:
    found = parse(
        f"--pid_file=/run/{_UUID}.pid",
        "--metadata_proxy_socket=/var/lib/neutron/metadata_proxy",
        f"--router_id={_UUID}",
        "--state_path=/var/lib/neutron",
        "--metadata_port=9697",
        "--metadata_proxy_user=107",
        "--metadata_proxy_group=112",
        "--nometadata_proxy_watch_log",
        "--debug",
        f"--log-file=neutron-ns-metadata-proxy-{_UUID}.log",
        "--log-dir=/var/log/neutron",
    )
    assert found == replace(
        _DEFAULT,
        pidfile=f"/run/{_UUID}.pid",
        proxy_socket="/var/lib/neutron/metadata_proxy",
        router_id=_UUID,
        user="107",
        group="112",
        debug=True,
    )


def test_an_empty_user_is_the_present_one() -> None:
    assert parse("--metadata_proxy_user=", "--metadata_proxy_group=", "--pid_file=") == _DEFAULT


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

    assert found == replace(
        _DEFAULT,
        state_path="/opt/n",
        port="81",
        proxy_socket="/opt/n/sock",
        user="nobody",
        facility="user",
        debug=True,
        use_syslog=True,
    )


def test_a_socket_below_the_state_path_follows_the_command_lines(tmp_path: Path) -> None:
    file = tmp_path / "neutron.conf"
    file.write_text("[DEFAULT]\nstate_path=/opt/n\nmetadata_proxy_socket=$state_path/sock\n")
    found = parse("--config-file", str(file), "--state-path", "/srv")
    assert found == replace(_DEFAULT, state_path="/srv", proxy_socket="/srv/sock")


def test_the_files_of_a_directory_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.conf").write_text("[DEFAULT]\nmetadata_port = 2\n")
    (tmp_path / "a.conf").write_text("[DEFAULT]\nmetadata_port = 1\ndebug = no\n")
    (tmp_path / "c.txt").write_text("nonsense")
    assert parse("--config-dir", str(tmp_path)) == replace(_DEFAULT, port="2")


@pytest.mark.parametrize("option", ["--config-file", "--config-dir"])
def test_a_file_that_is_not_there_is_no_empty_one(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigUnreadable, match=r"none: No such file"):
        parse(option, str(tmp_path / "none"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n.conf").write_bytes(b"[DEFAULT]\nstate_path = \xff\n")
    with pytest.raises(ConfigUnreadable, match="UTF-8"):
        parse("--config-dir", str(tmp_path))


def test_a_word_that_is_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n.conf").write_text("[DEFAULT]\ndebug = perhaps\n")
    with pytest.raises(ConfigInvalid) as refused:
        parse("--config-dir", str(tmp_path))
    assert "n.conf:2: debug: 'perhaps' is neither" in str(refused.value.problems[0])


def test_a_reference_to_nothing_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "n.conf").write_text("[DEFAULT]\nmetadata_proxy_socket = $nothing/sock\n")
    with pytest.raises(ConfigInvalid) as refused:
        parse("--config-dir", str(tmp_path))
    assert "n.conf:2: metadata_proxy_socket: refers to $nothing" in str(refused.value.problems[0])


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
    written = replace(
        _DEFAULT,
        state_path="/opt/n",
        port="80",
        proxy_socket="/run/sock",
        user="neutron",
        group="112",
        debug=True,
        use_syslog=False,
        facility="user",
    )
    assert parse(*named) == written
    variables = {
        "IMDSPROXY_NAMESPACE_PROXY__METADATA_PORT": "81",
        "IMDSPROXY_NAMESPACE_PROXY__DEBUG": "false",
    }
    in_environment = replace(written, port="81", debug=False)
    assert parse(*named, environment=variables) == in_environment
    ini.write_text("[DEFAULT]\nmetadata_port = 82\nmetadata_proxy_user = nobody\n")
    in_ini = replace(in_environment, port="82", user="nobody")
    assert parse(*named, "--config-file", str(ini), environment=variables) == in_ini
    words = (*named, "--config-file", str(ini), "--metadata-port", "83", "--use-syslog")
    on_the_line = replace(in_ini, port="83", use_syslog=True)
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
    assert found == CleanUp(_UUID, "/run/p", "/srv")
    plain = parse_command_line(["cleanup", _UUID], program="ns", environment={})
    assert plain == CleanUp(_UUID, None, "/var/lib/neutron")
    moved = {"IMDSPROXY_NAMESPACE_PROXY__STATE_PATH": "/srv"}
    placed = parse_command_line(["cleanup", _UUID], program="ns", environment=moved)
    assert placed == CleanUp(_UUID, None, "/srv")


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
    told = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
    assert told - set(re.findall(r"--[a-z][\w-]+", _PAGE.read_text())) == set()
