"""The program without HAProxy: its options, what it runs, how that ends, and what it asks of the host."""

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest

from imdsproxy.errors import (
    ConfigError,
    ConfigInvalid,
    ConfigRejected,
    ConfigUnreadable,
    HaproxyMissing,
    HostRefused,
    ImdsproxyError,
    PrivilegeMissing,
    RequestRefused,
)
from imdsproxy.host.files import write_atomic
from imdsproxy.tools.namespace_proxy import (
    NetworkMetadataProxyHandler,
    ProxyDaemon,
    main,
    parse_command_line,
    proxy,
    read_settings,
)
from support.umask import umask

UUID: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
PID: Final = 4711
_PAGE: Final = Path(__file__).parents[3] / "docs/how-to/namespace-proxy.md"
_ALERT: Final = "[ALERT]    (12) : Binding for proxy metadata: cannot bind socket ({}).\n"
_NAMES: Final = {
    "network-id": "network_id",
    "router-id": "router_id",
    "metadata-port": "port",
    "metadata-proxy-socket": "proxy_socket",
    "metadata-proxy-user": "user",
    "metadata-proxy-group": "group",
    "pid-file": "pidfile",
    "state-path": "state_path",
}


def parse(*words: str, environment: Mapping[str, str] = MappingProxyType({})) -> Mapping[str, Any]:
    return parse_command_line(words, program="ns", environment=environment)


# Options


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
        (("--log-file=a.log", "--log_dir", "/var/log", "--verbose", "--nouse-journal"), {}),
        # An empty one is the present one.
        (("--metadata_proxy_user=", "--metadata_proxy_group=", "--pid_file="), {}),
        (("cleanup", UUID), {"id": UUID}),
        (
            ("cleanup", UUID, "--pid_file=/run/p", "--state-path", "/srv"),
            {"id": UUID, "pidfile": "/run/p", "state_path": "/srv"},
        ),
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
        (("stray",), "stray"),
        (("--syslog-log-facility", "x"), "facility"),
        (("cleanup",), "ID"),
        (("cleanup", UUID, "--network-id", UUID), "--network-id"),
    ],
)
def test_what_is_not_understood_is_refused(words: tuple[str, ...], what: str) -> None:
    with pytest.raises(RequestRefused, match=re.escape(what)):
        parse(*words)


def test_the_command_line_wins_over_files_of_neutron_these_over_the_environment_that_over_settings(
    tmp_path: Path,
) -> None:
    settings, first, second = (tmp_path / name for name in ("s.yaml", "neutron.conf", "l3.ini"))
    settings.write_text(
        "namespace_proxy: {state_path: /opt/s, metadata_port: 80, metadata_proxy_socket: /run/sock, debug: true,\n"
        ' metadata_proxy_user: one, metadata_proxy_group: "112", use_syslog: false, syslog_log_facility: LOG_USER}'
    )
    expected = {"state_path": "/opt/s", "port": "80", "proxy_socket": "/run/sock", "debug": True}
    expected |= {"user": "one", "group": "112", "use_syslog": False, "facility": "user"}
    words = ["--config", str(settings)]
    assert parse(*words) == expected
    variables = {f"IMDSPROXY_NAMESPACE_PROXY__{name}": "81" for name in ("METADATA_PORT",)}
    variables["IMDSPROXY_NAMESPACE_PROXY__DEBUG"] = "false"
    expected |= {"port": "81", "debug": False}
    assert parse(*words, environment=variables) == expected
    first.write_text(
        "[DEFAULT]\nstate_path = /opt/n\nmetadata_port = 82\nuse_syslog = yes\nmetadata_proxy_user = two\n"
        "metadata_proxy_socket = $state_path/sock\nnetwork_id = nonsense\ndaemonize = false\n"
    )
    second.write_text("[DEFAULT]\nmetadata_proxy_user = three\nsyslog_log_facility=LOG_MAIL\n")
    words += ["--config-file", str(first), f"--config_file={second}"]
    expected |= {"state_path": "/opt/n", "port": "82", "use_syslog": True, "user": "three"}
    expected |= {"proxy_socket": "/opt/n/sock", "facility": "mail"}
    assert parse(*words, environment=variables) == expected
    # What a file refers to follows the command line too.
    words += ["--metadata-port", "83", "--nouse-syslog", "--state-path", "/srv"]
    expected |= {"port": "83", "use_syslog": False, "state_path": "/srv"}
    expected["proxy_socket"] = "/srv/sock"
    assert parse(*words, environment=variables) == expected


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


def test_settings_and_variables_that_break_the_schema_are_refused(tmp_path: Path) -> None:
    settings = tmp_path / "imdsproxy.yaml"
    for text in ("port: 80", "metadata_port: 0", "syslog_log_facility: LOG_X"):
        settings.write_text(f"namespace_proxy: {{{text}}}")
        with pytest.raises(ConfigInvalid, match=f"namespace_proxy.{text.partition(':')[0]}"):
            parse("--config", str(settings))
    with pytest.raises(ConfigInvalid, match="IMDSPROXY_NAMESPACE_PROXY_DEBUG"):
        parse(environment={"IMDSPROXY_NAMESPACE_PROXY_DEBUG": "1"})


def test_the_default_file_is_read_only_where_it_has_the_section(tmp_path: Path) -> None:
    file = tmp_path / "imdsproxy.yaml"
    assert read_settings(None, {}, default=file) == {}
    file.write_text("no such section: 1\n")
    assert read_settings(None, {}, default=file) == {}
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.yaml").write_text("namespace_proxy: {metadata_port: 80}\n")
    with pytest.raises(ConfigInvalid, match="no such section"):
        read_settings(None, {}, default=file)
    file.write_text("")
    assert read_settings(None, {}, default=file) == {"metadata_port": 80}


def test_the_help_and_the_page_have_every_option_in_todays_spelling(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["cleanup", "-h"], ["--help"]):
        assert main(words) == 0
        reported = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
        assert reported >= {"--state-path", "--pid-file", "--config"}
    assert reported >= {f"--{name}" for name in _NAMES}
    assert reported <= set(re.findall(r"--[a-z][\w-]+", _PAGE.read_text()))
    # Named as spellings of old.
    assert {one for one in reported if "_" in one} == set()


# What it runs


@dataclass
class FakeHaproxy:
    """In the place of a HAProxy that goes into the background.

    Attributes:
        failure: What running it raises.
        ended: Exit status and output of its first process.
        living: Pids of HAProxies that run with the proxy's configuration.
        killed: Pids, with the signals that they got.
    """

    failure: BaseException | None = None
    ended: tuple[int, str] = (0, "")
    living: set[int] = field(default_factory=lambda: {PID})
    killed: list[tuple[int, int]] = field(default_factory=list)

    def run(self, launch: proxy.Launch, *more: str) -> tuple[int, str]:
        assert stat.S_ISREG(os.fstat(launch.lock).st_mode)
        if self.failure is not None:
            raise self.failure
        if self.ended[0] == 0:
            Path(more[-1]).write_text(f"{PID}\n")
        return self.ended


@pytest.fixture
def haproxy(monkeypatch: pytest.MonkeyPatch) -> FakeHaproxy:
    fake = FakeHaproxy()

    def run(launch: proxy.Launch, *more: str) -> tuple[int, str]:
        return fake.run(launch, *more)

    monkeypatch.setattr(proxy.Launch, "run", run)
    known = f"{UUID}.conf"
    monkeypatch.setattr(proxy, "runs_with", lambda pid, name: name == known and pid in fake.living)
    monkeypatch.setattr(os, "kill", lambda *given: fake.killed.append(given))
    return fake


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where the proxy's configuration goes."""
    return tmp_path / "ns-metadata-proxy" / f"{UUID}.conf"


def start(state: Path) -> None:
    ProxyDaemon(state / "p", "9697", UUID, state_path=state).start()


@pytest.mark.parametrize(
    ("own", "user", "group", "expected"),
    [
        (0, None, None, (None, None)),
        (0, "nobody", None, ("nobody", None)),
        (0, "65534", "65534", ("nobody", "nogroup")),
        (65534, "nobody", "65534", (None, None)),
        (65534, "root", None, None),
        (65534, None, "root", None),
    ],
)
def test_root_takes_any_account_and_another_only_its_own(
    monkeypatch: pytest.MonkeyPatch,
    own: int,
    user: str | None,
    group: str | None,
    expected: tuple[str | None, str | None] | None,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: own)
    monkeypatch.setattr(os, "getegid", lambda: own)
    asked = NetworkMetadataProxyHandler(None, UUID, user=user, group=group)
    if expected is None:
        with pytest.raises(PrivilegeMissing, match="cannot become"):
            asked.spec()
        return
    spec = asked.spec()
    assert (spec.user, spec.group) == expected


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"unix_socket_path": "relative/sock"}, "not an absolute path"),
        ({"state_path": "srv"}, "not an absolute path"),
        ({"unix_socket_path": "/" + "s" * 107}, "too long"),
        ({"unix_socket_path": "/a\nb"}, "cannot use a path"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(members: Mapping[str, str], what: str) -> None:
    given: dict[str, Any] = {"state_path": "/srv", **members}
    with pytest.raises(RequestRefused, match=what):
        NetworkMetadataProxyHandler(UUID, None, **given).prepare()


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize("text", ["", "999\n", "garbage", "1\n2\n"])
def test_a_pid_file_without_a_living_proxy_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "p").write_text(text)
    start(tmp_path)
    assert (tmp_path / "p").read_text() == f"{PID}\n"


@pytest.mark.parametrize(
    ("ended", "kind", "words"),
    [
        ((1, _ALERT.format("Address already in use")), HostRefused, "already in use"),
        ((1, _ALERT.format("Permission denied")), PrivilegeMissing, "Permission denied"),
        ((1, _ALERT.format("anything else")), ConfigRejected, "anything else"),
        # It ended at once.
        ((0, "[ALERT]    (1) : Cannot set uid 65534.\n"), ConfigRejected, "Cannot set uid"),
        ((0, ""), ConfigRejected, "without a message"),
    ],
)
def test_a_haproxy_that_does_not_run_is_reported_in_its_words_and_leaves_no_pid(
    tmp_path: Path,
    haproxy: FakeHaproxy,
    config: Path,
    ended: tuple[int, str],
    *,
    kind: type[ImdsproxyError],
    words: str,
) -> None:
    own = config.with_suffix(".pid")
    own.parent.mkdir()
    # Of a start that was killed: not to be taken for success.
    own.write_text(f"{PID}\n")
    haproxy.ended = ended
    haproxy.living = {PID} if ended[0] else set()
    with pytest.raises(kind, match=words):
        start(tmp_path)
    assert not own.exists()
    assert not (tmp_path / "p").exists()


def test_a_haproxy_whose_pid_cannot_be_written_is_ended(
    tmp_path: Path, haproxy: FakeHaproxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes, *, mode: int) -> None:
        if path.name == "p":
            raise HostRefused("cannot write")
        write_atomic(path, data, mode=mode)

    monkeypatch.setattr(proxy, "write_atomic", refuse)
    with pytest.raises(HostRefused, match="cannot write"):
        start(tmp_path)
    assert haproxy.killed == [(PID, 15)]


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ((), 64, "imdsproxy: the id of a network or of a router is needed"),
        (("--network-id", UUID, "--router-id", UUID), 64, "a router's id are given"),
        (("--network-id", ""), 64, "'' is not a UUID"),
        (("--network-id", UUID, "--metadata-port", "0"), 64, "'0' is not a TCP port"),
        (("--network-id", UUID, "--metadata-port", "70000"), 64, "'70000' is not a TCP port"),
        (("--nonsense",), 64, "unrecognized arguments: --nonsense"),
        (("--config-file", "/nonexistent/n"), 78, "cannot read /nonexistent/n"),
        (("--network-id", UUID, "--state-path", "/nonexistent/n"), 71, "for the metadata socket"),
        (("--network-id", UUID, "--metadata-proxy-user", "imdst-none"), 71, "no user imdst-none"),
        (("--network-id", UUID, "--metadata-proxy-group", "4294967200"), 71, "no group 4294967200"),
        (("--network-id", UUID, "--pid-file", "/nonexistent/d/p"), 71, "/nonexistent/d for the pid"),
        (("cleanup", "../neutron"), 64, "'../neutron' is not a UUID"),
    ],
)  # fmt: skip
def test_a_failure_is_a_line_a_hint_and_a_status(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, line: str
) -> None:
    assert main(words) == status
    lines = capsys.readouterr().err.splitlines()
    assert line in lines[0]
    assert len(lines) <= 2
    assert all(one.startswith("hint: ") for one in lines[1:])


def test_an_unforeseen_error_is_a_line_too_and_an_interruption_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], haproxy: FakeHaproxy
) -> None:
    line = "imdsproxy: cannot run the proxy: Input/output error (EIO)\n"
    unforeseen = OSError(errno.EIO, "Input/output error")
    for failure, status, text in ((unforeseen, 71, line), (KeyboardInterrupt(), 130, "")):
        haproxy.failure = failure
        assert main(["--network-id", UUID, "--state-path", str(tmp_path)]) == status
        assert capsys.readouterr().err == text


# The host


def test_haproxy_is_found_on_the_path_or_where_an_agent_leaves_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "haproxy").mkdir(parents=True)
    for name, mode in (("b", 0o644), ("c", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "haproxy").touch(mode=mode)
    monkeypatch.setenv("PATH", ":".join(["", *(str(tmp_path / name) for name in "abc")]))
    assert proxy.find_haproxy() == str(tmp_path / "c" / "haproxy")
    monkeypatch.setenv("PATH", "")
    assert Path(proxy.find_haproxy()).name == "haproxy"


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[proxy.Launch]:
    """A shell script in HAProxy's place, `haproxy`, which a test writes."""
    program = tmp_path / "haproxy"
    program.touch(mode=0o755)
    lock = os.open(tmp_path, os.O_RDONLY)
    yield proxy.Launch(str(program), tmp_path / "u.conf", lock, alone=False)
    os.close(lock)


def test_a_haproxy_that_hangs_or_cannot_be_run_is_reported(launch: proxy.Launch) -> None:
    Path(launch.program).write_text("#!/bin/sh\nsleep 60 & sleep 60")
    with pytest.raises(HostRefused, match=r"has not started within 0\.2 s"):
        launch.run(deadline_s=0.2)
    Path(launch.program).write_text("\0")
    for start_it in (launch.run, launch.become):
        with pytest.raises(HaproxyMissing, match=f"cannot run {launch.program}"):
            start_it()


def test_groups_that_cannot_be_given_up_are_no_missing_haproxy(
    launch: proxy.Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        # As of `setgroups` in the child; what cannot be executed has its name.
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(PrivilegeMissing, match="give up the supplementary groups"):
        launch.run("-c")


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (("haproxy", "-f", "/elsewhere/u.conf", "-D"), True),
        (("/usr/sbin/haproxy", "-f", "/srv/v.conf"), False),
        (("vim", "/srv/u.conf"), False),
        ((), False),
        (None, False),
    ],
)
def test_a_proxy_is_known_by_its_program_and_its_configuration(
    tmp_path: Path, words: tuple[str, ...] | None, *, known: bool
) -> None:
    if words is not None:
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "cmdline").write_text("".join(f"{word}\0" for word in words))
    assert proxy.runs_with(7, "u.conf", proc=tmp_path) is known


def test_the_program_loads_nothing_of_the_daemon() -> None:
    code = "import sys, imdsproxy.tools.namespace_proxy; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    heavy = ("asyncio", "pydantic", "typer", "rich", "yaml", "uvicorn", "fastapi", "structlog")
    assert [name for name in loaded if name.partition(".")[0] in heavy] == []
    ours = {name.split(".")[1] for name in loaded if name.startswith("imdsproxy.")}
    assert ours == {"config", "errors", "haproxy", "host", "model", "tools"}


# The configuration's file


@pytest.mark.parametrize("mask", [0, 0o077])
def test_a_claimed_file_is_0640_and_directories_0755_or_tighter_whatever_the_umask_is(
    tmp_path: Path, mask: int
) -> None:
    path = tmp_path / "b" / "c" / "a.conf"
    with umask(mask):
        proxy.make_directories(path.parent)
        os.close(proxy.claim_file(path, b"text"))
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"text", 0o640)
    assert list(path.parent.iterdir()) == [path]
    for directory in (path.parent, path.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) & ~0o755 == 0


def test_a_directory_that_others_may_write_to_is_tightened_and_one_that_cannot_be_made_reported(
    tmp_path: Path,
) -> None:
    for before, after in ((0o777, 0o755), (0o770, 0o750), (0o700, 0o700)):
        tmp_path.chmod(before)
        proxy.make_directories(tmp_path)
        assert stat.S_IMODE(tmp_path.stat().st_mode) == after
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(HostRefused, match="cannot create the directory") as refused:
            proxy.make_directories(path)
        assert "--state-path" in refused.value.hint


def test_of_many_that_want_a_file_one_gets_it(tmp_path: Path) -> None:
    for turn in range(30):
        path = tmp_path / f"{turn}.conf"
        if turn % 2:
            path.write_bytes(b"old")

        def claim(number: int, path: Path = path) -> tuple[int, int] | None:
            try:
                return number, proxy.claim_file(path, b"%d" % number)
            except HostRefused:
                return None

        with ThreadPoolExecutor(8) as pool:
            got = [one for one in pool.map(claim, range(8)) if one is not None]
        assert len(got) == 1
        assert path.read_bytes() == b"%d" % got[0][0]
        os.close(got[0][1])


def test_a_file_that_is_replaced_while_it_is_locked_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.conf"
    path.write_bytes(b"old")
    others: list[int] = []
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not others:
            # Another process was faster between our opening and our locking.
            others.append(-1)
            others.append(proxy.claim_file(path, b"theirs"))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(HostRefused, match="in use"):
        proxy.claim_file(path, b"ours")
    assert path.read_bytes() == b"theirs"
    os.close(others[1])


def test_removing_takes_what_killed_writers_left_and_says_whether_the_file_was_there(
    tmp_path: Path, config: Path
) -> None:
    config.parent.mkdir()
    config.touch()
    config.with_suffix(".pid").touch()
    config.with_name(".a.conf.4194304999-1.tmp").touch()
    assert proxy.cleanup_config_file(UUID, tmp_path)
    assert list(config.parent.iterdir()) == []
    assert not proxy.cleanup_config_file(UUID, tmp_path)
    assert not proxy.cleanup_config_file(UUID, tmp_path / "none")


def test_a_file_that_cannot_be_written_is_reported_and_all_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.conf").write_bytes(b"old")
    (tmp_path / "a.conf").mkdir()
    (tmp_path / "link.conf").symlink_to(tmp_path / "other")
    for name, why in (
        ("old.conf/a.conf", "Not a directory"),
        ("a.conf", "Is a directory"),
        ("link.conf", ""),
    ):
        with pytest.raises(HostRefused, match=rf"cannot write .*\.conf: {why}"):
            proxy.claim_file(tmp_path / name, b"text")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for name in ("old.conf", "new.conf"):
        with pytest.raises(HostRefused, match="No space left"):
            proxy.claim_file(tmp_path / name, b"text")
    assert {path.name for path in tmp_path.iterdir()} == {"old.conf", "a.conf", "link.conf"}
    assert (tmp_path / "old.conf").read_bytes() == b"old"
