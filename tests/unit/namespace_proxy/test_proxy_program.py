"""The program without HAProxy: what it asks of the host, and what becomes of the host's answers."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.app.namespace_proxy import (
    NetworkMetadataProxyHandler,
    ProxyDaemon,
    cleanup_config_file,
    main,
)
from imdsproxy.app.namespace_proxy.host import Ended, Surroundings, claim_file
from imdsproxy.errors import (
    ConfigRejected,
    HaproxyMissing,
    HostRefused,
    ImdsproxyError,
    PrivilegeMissing,
    RequestRefused,
)

UUID: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
HAPROXY: Final = "/usr/sbin/haproxy"
PID: Final = 4711
_ALERT: Final = "[ALERT]    (12) : Binding for proxy metadata: cannot bind socket ({}).\n"


class Became(BaseException):
    """This process has become another program."""


def free(_port: int, *, dual_stack: bool) -> None:
    """Nobody listens on the port."""
    del dual_stack


@dataclass(slots=True)
class Host:
    """A host that a test describes, and what was done on it.

    Attributes:
        ended: What comes of running HAProxy.
        pid: What HAProxy writes into the pid file that it is told, when it starts.
        living: Pids of HAProxies that run with the proxy's configuration.
    """

    ended: Ended = field(default_factory=lambda: Ended(0, "", ""))
    pid: str = f"{PID}\n"
    living: set[int] = field(default_factory=lambda: {PID})
    ids: tuple[int, int] = (0, 0)
    ran: list[list[str]] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    killed: list[tuple[int, int]] = field(default_factory=list)
    dropped: int = 0

    def run(self, arguments: Sequence[str], descriptor: int, *, alone: bool) -> Ended:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.ran.append(list(arguments))
        self.alone.append(alone)
        if "-p" in arguments and self.ended.status == 0:
            Path(arguments[list(arguments).index("-p") + 1]).write_text(self.pid)
        return self.ended

    def execute(self, path: str, arguments: list[str]) -> None:
        assert path == arguments[0]
        self.executed = arguments
        raise Became

    def drop(self) -> None:
        self.dropped += 1

    def kill(self, pid: int, number: int) -> None:
        self.killed.append((pid, number))

    def runs_with(self, pid: int, name: str) -> bool:
        assert name == f"{UUID}.conf"
        return pid in self.living

    def surroundings(
        self,
        *,
        program: str | None = HAPROXY,
        bind: Callable[..., None] = free,
    ) -> Surroundings:
        names = {"0": "root", "1000": "neutron"}
        return Surroundings(
            execute=self.execute,
            run=self.run,
            find_program=lambda: program,
            user_name=lambda word: names.get(word, word),
            group_name=lambda word: names.get(word, word),
            ids=lambda: self.ids,
            drop_groups=self.drop,
            has_ipv6=lambda: True,
            has_syslog=lambda: True,
            try_to_bind=bind,
        )


@pytest.fixture
def host() -> Host:
    return Host()


def daemon(host: Host, state: Path, *, pid_file: Path | None = None, user: str = "") -> ProxyDaemon:
    return ProxyDaemon(
        pid_file,
        "80",
        UUID,
        None,
        user,
        "",
        state_path=state,
        surroundings=host.surroundings(),
        runs_with=host.runs_with,
        end=host.kill,
    )


def handler(
    host: Host, state: Path, *, user: str | None = None, group: str | None = None
) -> NetworkMetadataProxyHandler:
    return NetworkMetadataProxyHandler(
        None, UUID, None, 9697, user, group, state, surroundings=host.surroundings()
    )


# The handler


def test_the_places_are_those_of_old(tmp_path: Path, host: Host) -> None:
    assert NetworkMetadataProxyHandler.get_config_path("/srv") == Path("/srv/ns-metadata-proxy")
    found = handler(host, tmp_path)
    assert found.config_file == tmp_path / "ns-metadata-proxy" / f"{UUID}.conf"
    assert found.unix_socket_path == tmp_path / "metadata_proxy"
    plain = NetworkMetadataProxyHandler(UUID, None)
    assert plain.config_file == Path(f"/var/lib/neutron/ns-metadata-proxy/{UUID}.conf")
    assert plain.port == 9697


def test_the_process_becomes_haproxy_with_the_uuid_in_its_command_line(
    tmp_path: Path, host: Host
) -> None:
    with pytest.raises(Became):
        handler(host, tmp_path).run_proxy()
    config = tmp_path / "ns-metadata-proxy" / f"{UUID}.conf"
    assert host.executed == [HAPROXY, "-f", str(config)]
    assert host.ran == [[HAPROXY, "-c", "-f", str(config)]]
    assert f"X-Neutron-Router-ID {UUID}" in config.read_text()
    assert host.dropped == 0


def test_the_lock_on_the_configuration_outlives_the_program(tmp_path: Path, host: Host) -> None:
    inheritable = []

    def execute(_path: str, _arguments: list[str]) -> None:
        # Whoever holds the lock is one of our own descriptors.
        config = (tmp_path / "ns-metadata-proxy" / f"{UUID}.conf").stat()
        for number in (int(path.name) for path in Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(number), config):
                    inheritable.append(os.get_inheritable(number))
        raise Became

    host_surroundings = host.surroundings()
    surroundings = Surroundings(
        execute=execute,
        run=host.run,
        find_program=host_surroundings.find_program,
        has_ipv6=host_surroundings.has_ipv6,
        try_to_bind=host_surroundings.try_to_bind,
    )
    with pytest.raises(Became):
        NetworkMetadataProxyHandler(
            UUID, None, state_path=tmp_path, surroundings=surroundings
        ).run_proxy()
    assert inheritable == [True]


def test_supplementary_groups_go_when_an_account_is_taken(tmp_path: Path, host: Host) -> None:
    with pytest.raises(Became):
        handler(host, tmp_path, user="nobody").run_proxy()
    assert host.dropped == 1


@pytest.mark.parametrize(
    ("user", "group", "expected"),
    [
        (None, None, (None, None)),
        ("nobody", None, ("nobody", None)),
        (None, "nogroup", (None, "nogroup")),
        ("1000", "1000", ("neutron", "neutron")),
    ],
)
def test_root_takes_any_account_by_its_name(
    tmp_path: Path, host: Host, user: str | None, group: str | None, expected: tuple[str, str]
) -> None:
    spec = handler(host, tmp_path, user=user, group=group).spec()
    assert (spec.user, spec.group) == expected


def test_who_is_not_root_can_be_only_who_it_is(tmp_path: Path, host: Host) -> None:
    host.ids = (1000, 1000)
    spec = handler(host, tmp_path, user="neutron", group="1000").spec()
    assert (spec.user, spec.group) == (None, None)
    for changed in ({"user": "nobody"}, {"group": "nogroup"}):
        with pytest.raises(PrivilegeMissing, match="cannot become"):
            handler(host, tmp_path, **changed).spec()


@pytest.mark.parametrize(("asked", "logs"), [(None, True), (False, False), (True, True)])
def test_requests_are_logged_where_there_is_a_log_or_one_is_asked_for(
    tmp_path: Path, host: Host, *, asked: bool | None, logs: bool
) -> None:
    found = NetworkMetadataProxyHandler(
        UUID, None, state_path=tmp_path, use_syslog=asked, debug=True,
        facility="user", surroundings=host.surroundings(),
    ).spec()  # fmt: skip
    assert (found.syslog is not None) == logs
    if found.syslog is not None:
        assert (found.syslog.facility, found.syslog.level) == ("user", "debug")


@pytest.mark.parametrize(
    ("socket", "state", "what"),
    [
        ("relative/sock", "/srv", "no absolute path"),
        (None, "srv", "no absolute path"),
        ("/" + "s" * 107, "/srv", "too long"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(socket: str | None, state: str, what: str) -> None:
    with pytest.raises(RequestRefused, match=what):
        NetworkMetadataProxyHandler(UUID, None, socket, state_path=state)


def test_a_path_that_haproxy_cannot_take_is_refused(tmp_path: Path, host: Host) -> None:
    with pytest.raises(RequestRefused, match="cannot take"):
        NetworkMetadataProxyHandler(
            UUID, None, tmp_path / "a\nb", state_path=tmp_path, surroundings=host.surroundings()
        ).prepare()


def test_without_haproxy_nothing_is_written(tmp_path: Path, host: Host) -> None:
    with pytest.raises(HaproxyMissing, match="no haproxy on PATH"):
        NetworkMetadataProxyHandler(
            UUID, None, state_path=tmp_path, surroundings=host.surroundings(program=None)
        ).run_proxy()
    assert list(tmp_path.iterdir()) == []


def test_a_haproxy_that_cannot_be_run_is_told(tmp_path: Path, host: Host) -> None:
    def execute(path: str, _: list[str]) -> None:
        raise OSError(errno.ENOEXEC, "Exec format error", path)

    surroundings = Surroundings(
        execute=execute,
        run=host.run,
        find_program=lambda: HAPROXY,
        try_to_bind=free,
    )
    with pytest.raises(HaproxyMissing, match="Exec format error"):
        NetworkMetadataProxyHandler(
            UUID, None, state_path=tmp_path, surroundings=surroundings
        ).run_proxy()


def test_a_socket_without_a_directory_is_refused(tmp_path: Path, host: Host) -> None:
    with pytest.raises(HostRefused, match=r"there is no directory .*none for the metadata socket"):
        NetworkMetadataProxyHandler(
            UUID, None, tmp_path / "none" / "s", state_path=tmp_path, surroundings=host.surroundings()
        ).run_proxy()  # fmt: skip


def test_a_configuration_that_haproxy_refuses_is_told_in_its_words(
    tmp_path: Path, host: Host
) -> None:
    host.ended = Ended(1, "", "[NOTICE] (1) : x\n[ALERT]    (1) : config : unknown keyword 'x'\n")
    with pytest.raises(ConfigRejected, match=r"did not start: config : unknown keyword 'x'\n"):
        handler(host, tmp_path).run_proxy()
    assert host.executed == []
    # Nothing of it stays in use.
    assert cleanup_config_file(UUID, tmp_path)


def test_a_port_that_cannot_be_bound_is_told_before_haproxy_is(tmp_path: Path, host: Host) -> None:
    def bind(port: int, *, dual_stack: bool) -> None:
        raise HostRefused(f"cannot listen on {port} {dual_stack}")

    with pytest.raises(HostRefused, match="cannot listen on 9697 True"):
        NetworkMetadataProxyHandler(
            UUID, None, state_path=tmp_path, surroundings=host.surroundings(bind=bind)
        ).run_proxy()
    assert host.executed == []


# The daemon


def test_a_daemon_is_haproxys_own_and_its_pid_is_written(tmp_path: Path, host: Host) -> None:
    pid_file = tmp_path / "p"
    assert daemon(host, tmp_path, pid_file=pid_file, user="nobody").start() == PID
    config = tmp_path / "ns-metadata-proxy" / f"{UUID}.conf"
    own = config.with_suffix(".pid")
    assert host.ran == [[HAPROXY, "-f", str(config), "-D", "-p", str(own)]]
    assert host.alone == [True]
    assert pid_file.read_text() == f"{PID}\n"
    assert not own.exists()


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_pid_file_can_be_read_by_all_and_written_by_its_owner(
    tmp_path: Path, host: Host, umask: int
) -> None:
    before = os.umask(umask)
    try:
        daemon(host, tmp_path, pid_file=tmp_path / "p").start()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o644


def test_without_a_pid_file_none_is_written(tmp_path: Path, host: Host) -> None:
    daemon(host, tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["ns-metadata-proxy"]


def test_a_second_start_is_refused_while_the_pid_of_the_first_lives(
    tmp_path: Path, host: Host
) -> None:
    pid_file = tmp_path / "p"
    pid_file.write_text(f"{PID}\n")
    for start in (daemon(host, tmp_path, pid_file=pid_file).start,
                  daemon(host, tmp_path, pid_file=pid_file).run):  # fmt: skip
        with pytest.raises(HostRefused, match=rf"runs already \(pid {PID}\)"):
            start()
    assert host.ran == []


@pytest.mark.parametrize("text", ["", "999\n", "garbage", "-1", "9" * 60, "1\n2\n"])
def test_a_pid_file_that_names_nobodys_proxy_is_replaced(
    tmp_path: Path, host: Host, text: str
) -> None:
    (tmp_path / "p").write_text(text)
    daemon(host, tmp_path, pid_file=tmp_path / "p").start()
    assert (tmp_path / "p").read_text() == f"{PID}\n"


def test_a_second_start_is_refused_while_the_configuration_is_in_use(
    tmp_path: Path, host: Host
) -> None:
    config = tmp_path / "ns-metadata-proxy" / f"{UUID}.conf"
    config.parent.mkdir()
    lock = claim_file(config, b"running")
    with pytest.raises(HostRefused, match="in use"):
        daemon(host, tmp_path).start()
    os.close(lock)
    assert config.read_bytes() == b"running"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Address already in use", HostRefused),
        ("Permission denied", PrivilegeMissing),
        ("anything else", ConfigRejected),
    ],
)
def test_what_haproxy_refuses_is_told_in_its_words_and_no_pid_is_written(
    tmp_path: Path, host: Host, words: str, kind: type[ImdsproxyError]
) -> None:
    host.ended = Ended(1, "", _ALERT.format(words))
    with pytest.raises(kind, match=words):
        daemon(host, tmp_path, pid_file=tmp_path / "p").start()
    assert not (tmp_path / "p").exists()


def test_what_a_start_that_was_killed_left_is_not_taken_for_success(
    tmp_path: Path, host: Host
) -> None:
    own = tmp_path / "ns-metadata-proxy" / f"{UUID}.pid"
    own.parent.mkdir()
    own.write_text(host.pid)
    host.ended = Ended(1, "", _ALERT.format("x"))
    with pytest.raises(ConfigRejected):
        daemon(host, tmp_path).start()
    assert not own.exists()


def test_a_haproxy_that_ends_at_once_is_a_failure(tmp_path: Path, host: Host) -> None:
    host.living = set()
    host.ended = Ended(0, "", "[ALERT]    (1) : Cannot set uid 65534.\n")
    with pytest.raises(ConfigRejected, match="Cannot set uid"):
        daemon(host, tmp_path, pid_file=tmp_path / "p").start()
    host.ended = Ended(0, "", "")
    with pytest.raises(ConfigRejected, match="wrote nothing"):
        daemon(host, tmp_path).start()


def test_a_haproxy_whose_pid_cannot_be_written_is_ended(tmp_path: Path, host: Host) -> None:
    (tmp_path / "p").mkdir()
    host.living = set()
    pid_file = tmp_path / "q" / "p"
    pid_file.parent.mkdir()

    def run(arguments: Sequence[str], descriptor: int, *, alone: bool) -> Ended:
        pid_file.parent.rmdir()
        host.living = {PID}
        return host.run(arguments, descriptor, alone=alone)

    surroundings = Surroundings(run=run, find_program=lambda: HAPROXY)
    started = ProxyDaemon(
        pid_file, 80, UUID, state_path=tmp_path, surroundings=surroundings,
        runs_with=host.runs_with, end=host.kill,
    )  # fmt: skip
    with pytest.raises(HostRefused, match="cannot write"):
        started.start()
    assert host.killed == [(PID, 15)]


def test_a_pid_file_without_a_directory_is_refused_before_anything_is_done(
    tmp_path: Path, host: Host
) -> None:
    with pytest.raises(HostRefused, match="for the pid file"):
        daemon(host, tmp_path, pid_file=tmp_path / "none" / "p").start()
    assert host.ran == []


def test_in_the_foreground_the_pid_file_has_this_process(tmp_path: Path, host: Host) -> None:
    written = []
    pid_file = tmp_path / "p"
    started = daemon(host, tmp_path, pid_file=pid_file)

    def run(arguments: Sequence[str], descriptor: int, *, alone: bool) -> Ended:
        written.append(pid_file.read_text())
        return host.run(arguments, descriptor, alone=alone)

    object.__setattr__(started.handler._host, "run", run)
    with pytest.raises(Became):
        started.run()
    assert written == [f"{os.getpid()}\n"]


def test_in_the_foreground_a_failure_leaves_no_pid_file(tmp_path: Path, host: Host) -> None:
    host.ended = Ended(1, "", _ALERT.format("x"))
    with pytest.raises(ConfigRejected):
        daemon(host, tmp_path, pid_file=tmp_path / "p").run()
    assert not (tmp_path / "p").exists()


# Cleaning up


def test_a_configuration_is_removed_once(tmp_path: Path, host: Host) -> None:
    daemon(host, tmp_path).start()
    assert cleanup_config_file(UUID, tmp_path)
    assert not cleanup_config_file(UUID, tmp_path)
    assert list((tmp_path / "ns-metadata-proxy").iterdir()) == []


def test_cleaning_up_what_is_no_uuid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "neutron.conf").touch()
    with pytest.raises(RequestRefused):
        cleanup_config_file("../neutron", tmp_path)
    assert (tmp_path / "neutron.conf").exists()


# The command


def command(host: Host, *arguments: str) -> tuple[int, str]:
    said: list[str] = []
    status = main(arguments, surroundings=host.surroundings(), say=said.append)
    return status, "".join(said)


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ((), 64, "imdsproxy: the id of a network or of a router is needed"),
        (("--network-id", UUID, "--router-id", UUID), 64, "a router's id are given"),
        (("--network-id", "blue"), 64, "'blue' is no UUID"),
        (("--network-id", ""), 64, "'' is no UUID"),
        (("--network-id", UUID, "--metadata-port", "0"), 64, "'0' is no port"),
        (("--network-id", UUID, "--metadata-port", "70000"), 64, "'70000' is no port"),
        (("--nonsense",), 64, "unrecognized arguments: --nonsense"),
        (("--config-file", "/nonexistent/n"), 78, "cannot read /nonexistent/n"),
        (("--network-id", UUID, "--state-path", "/nonexistent/n"), 71, "for the metadata socket"),
        (("cleanup", "blue"), 64, "'blue' is no UUID"),
    ],
)
def test_a_failure_is_a_line_a_hint_and_a_status(
    host: Host, words: tuple[str, ...], status: int, line: str
) -> None:
    ended, said = command(host, *words)
    lines = said.splitlines()
    assert ended == status
    assert line in lines[0]
    assert len(lines) <= 2
    assert all(one.startswith("hint: ") for one in lines[1:])


def test_the_foreground_becomes_haproxy(tmp_path: Path, host: Host) -> None:
    with pytest.raises(Became):
        command(host, "--network_id", UUID, f"--state_path={tmp_path}", "--nodaemonize")


def test_an_error_that_nobody_has_thought_of_is_a_line_too(tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> Ended:
        raise OSError(errno.EIO, "Input/output error")

    said: list[str] = []
    surroundings = Surroundings(run=fails, find_program=lambda: HAPROXY)
    words = ("--network-id", UUID, "--state-path", str(tmp_path))
    assert main(words, surroundings=surroundings, say=said.append) == 71
    assert "".join(said) == "imdsproxy: cannot be the proxy: Input/output error (EIO)\n"


def test_an_interruption_is_130(tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> Ended:
        raise KeyboardInterrupt

    surroundings = Surroundings(run=interrupted, find_program=lambda: HAPROXY)
    words = ("--network-id", UUID, "--state-path", str(tmp_path))
    assert main(words, surroundings=surroundings) == 130


def test_help_is_0(capsys: pytest.CaptureFixture[str], host: Host) -> None:
    assert command(host, "--help") == (0, "")
    assert command(host, "cleanup", "-h") == (0, "")
    assert "--network-id UUID" in capsys.readouterr().out


def test_cleaning_up_takes_the_pid_file_of_a_dead_proxy(tmp_path: Path, host: Host) -> None:
    daemon(host, tmp_path, pid_file=tmp_path / "p").start()
    (tmp_path / "p").write_text("4194304999\n")
    words = ("cleanup", UUID, "--state-path", str(tmp_path), "--pid-file", str(tmp_path / "p"))
    assert command(host, *words) == (0, "")
    assert command(host, *words) == (0, "")
    assert not (tmp_path / "p").exists()
