"""Proxies from their start to their end, as agents start and end them; and every way not to start."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.daemon import alive
from support.guest import inside
from support.lab import until
from support.namespace_proxy import (
    NETWORK,
    OTHER,
    PROGRAM,
    Place,
    Started,
    command_line,
    open_place,
    process_status,
)

pytestmark = pytest.mark.root

_MODES = ("--daemonize", "--nodaemonize")
_COMMAND = (sys.executable, "-m", "imdsproxy", "namespace-proxy")
_NOBODY = pwd.getpwnam("nobody")
_NOGROUP = grp.getgrnam("nogroup")


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    with open_place() as place:
        yield place


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    """A network without a proxy."""
    yield shared
    shared.clear()


@pytest.mark.parametrize("before", [(PROGRAM,), _COMMAND, ("-m", "imdsproxy", "CONFIG")], ids=len)
def test_a_proxy_is_what_the_settings_and_the_environment_say(
    place: Place, before: tuple[str, ...]
) -> None:
    file = place.state / "imdsproxy.yaml"
    file.write_text(
        f"namespace_proxy:\n  state_path: {place.state}\n  metadata_port: 81\n"
        "  metadata_proxy_user: nobody\n  metadata_proxy_group: nogroup\n",
    )
    named = ("--config", str(file))
    words = (f"--network-id={NETWORK}", f"--pid-file={place.pid_file}")
    variables = {"IMDSPROXY_NAMESPACE_PROXY__METADATA_PORT": "80"}
    if "CONFIG" in before:
        # The program's own option stands before the command.
        program = (*_COMMAND[:-1], *named, _COMMAND[-1])
        started = place.run(*words, program=program, environment=variables)
        before = _COMMAND
    else:
        started = place.run(*named, *words, program=before, environment=variables)
    assert (started.status, started.errors) == (0, "")
    assert place.guest.ask("/").status == 200
    assert process_status(place.pid())["Uid"] == [str(_NOBODY.pw_uid)] * 4
    assert place.config.exists()
    os.kill(place.pid(), signal.SIGTERM)
    until(lambda: place.proxies() == [])
    assert place.run(*named, "cleanup", NETWORK, program=before).status == 64
    assert place.run("cleanup", NETWORK, *named, program=before) == Started(0, "", "")
    assert not place.config.exists()


# In the background


def test_haproxy_is_a_daemon_that_holds_nothing_of_who_started_it(place: Place) -> None:
    read, write = os.pipe()
    pipe = f"pipe:[{os.fstat(write).st_ino}]"
    os.set_inheritable(write, True)
    try:
        done = subprocess.run(
            place.inside(PROGRAM, *place.words()),
            check=True,
            pass_fds=(write,),
            timeout=30,
            umask=0o077,
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0
    pid = place.pid()
    assert place.proxies() == [pid]
    assert [stat.S_IMODE(one.stat().st_mode) for one in (place.pid_file, place.config)] == [
        0o644,
        0o640,
    ]
    assert command_line(pid)[1:3] == ["-f", str(place.config)]
    assert place.guest.ask("/a").body == b"/a"
    links = {int(path.name): str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert {links[number] for number in range(3)} == {"/dev/null"}
    assert pipe not in links.values()
    assert str(Path(f"/proc/{pid}/cwd").readlink()) == "/"
    status = process_status(pid)
    assert status["Umask"] == ["0027"]
    # What was its session ended with its first process.
    assert os.getsid(pid) != os.getsid(0)
    assert int(status["PPid"][0]) != os.getpid()


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize(
    ("user", "group", "gid"),
    [
        ("nobody", "nogroup", _NOGROUP.gr_gid),
        (str(_NOBODY.pw_uid), str(_NOGROUP.gr_gid), _NOGROUP.gr_gid),
        # Without a group it keeps the agent's, and no other.
        ("nobody", "", 4),
    ],
)
def test_the_account_is_taken_with_none_of_roots_groups(
    place: Place, user: str, group: str, gid: int, mode: str
) -> None:
    words = (f"--metadata_proxy_user={user}", f"--metadata_proxy_group={group}")
    who = ("/usr/bin/setpriv", "--regid", "4", "--groups", f"0,{_NOGROUP.gr_gid},12", PROGRAM)
    if mode == "--daemonize":
        assert place.run(*place.words(*words), program=who).status == 0
    else:
        place.open(*words, program=who)
    status = process_status(place.pid())
    assert status["Uid"] == [str(_NOBODY.pw_uid)] * 4
    assert status["Gid"] == [str(gid)] * 4
    assert status["Groups"] == []
    assert status["CapEff"] == ["0" * 16]
    # A port below 1024 was bound before.
    assert place.guest.ask("/").status == 200


def test_what_an_agent_puts_into_the_environment_stays(place: Place) -> None:
    tag = {"PROCESS_TAG": f"haproxy-{NETWORK}"}
    assert place.run(*place.words(), environment=tag).status == 0
    environment = Path(f"/proc/{place.pid()}/environ").read_text()
    assert f"PROCESS_TAG=haproxy-{NETWORK}\0" in environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_to_the_pid_in_the_file_ends_it_and_frees_the_port(
    place: Place, number: signal.Signals
) -> None:
    pid = place.start()
    os.kill(pid, number)
    until(lambda: not alive(pid), what="HAProxy ends")
    assert place.proxies() == []
    assert not place.guest.reaches()
    # The pid file of a process that is gone does not prevent a start.
    assert place.start() != pid


@pytest.mark.parametrize("mode", _MODES)
def test_closed_standard_files_cost_nothing(place: Place, mode: str) -> None:
    script = f'exec "$@" {mode} 0<&- 1>&- 2>&-'
    if mode == "--nodaemonize":
        script += " &"
    started = place.run(*place.words(), program=["/bin/sh", "-c", script, "sh", PROGRAM])
    assert started.status == 0
    until(place.guest.reaches, what="the proxy listens")
    # Its lock is there as well.
    assert place.run(*place.words("--pid-file=", port=8080)).status == 71


# In the foreground


def test_in_the_foreground_the_program_becomes_haproxy_with_its_pid(place: Place) -> None:
    process = place.open()
    # `ip netns exec` becomes what it runs, and so does that.
    assert place.proxies() == [process.pid]
    assert place.pid() == process.pid
    assert command_line(process.pid)[1:] == ["-f", str(place.config)]
    assert place.guest.ask("/a").body == b"/a"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0


# One at a time


@pytest.mark.parametrize(
    ("mode", "with_pid_file"), [("--daemonize", True), ("--nodaemonize", True), ("--nodaemonize", False)]
)  # fmt: skip
def test_a_second_start_is_refused_and_changes_nothing(
    place: Place, mode: str, *, with_pid_file: bool
) -> None:
    pid = place.start()
    before = place.config.read_bytes()
    words = place.words(mode, "--debug", "--use-syslog", port=8080)
    started = place.run(*words) if with_pid_file else place.run(*words, "--pid-file=")
    assert started.status == 71
    reported = f"runs already (pid {pid})" if with_pid_file else "is in use: its proxy runs"
    assert reported in started.lines[0]
    assert place.pid() == pid
    assert place.config.read_bytes() == before
    assert place.proxies() == [pid]


def test_of_starts_at_once_one_succeeds(place: Place) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: place.run(*place.words()), range(6)))
    assert sorted(one.status for one in found) == [0] + [71] * 5
    assert place.proxies() == [place.pid()]
    assert place.guest.ask("/a").body == b"/a"


# Cleaning up


def clean(place: Place, *words: str) -> Started:
    return place.run("cleanup", NETWORK, "--state-path", str(place.state), *words)


@pytest.mark.parametrize("mode", _MODES)
def test_a_proxy_that_runs_is_not_cleaned_up(place: Place, mode: str) -> None:
    if mode == "--daemonize":
        place.start()
    else:
        place.open()
    for words in ((), ("--pid-file", str(place.pid_file))):
        cleaned = clean(place, *words)
        assert cleaned.status == 71
        assert "in use" in cleaned.lines[0]
    assert place.config.exists()
    assert place.guest.ask("/").status == 200


def test_what_a_proxy_left_is_cleaned_up(place: Place) -> None:
    pid = place.start()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), what="HAProxy ends")
    assert place.config.exists()
    for _ in range(2):
        assert clean(place, "--pid-file", str(place.pid_file)) == Started(0, "", "")
        assert list(place.config.parent.iterdir()) == []
        assert not place.pid_file.exists()


# Not to start


def refused(place: Place, started: Started, status: int, line: str) -> None:
    """A failure is a status, one line and a hint, and nothing runs or seems to run."""
    assert (started.status, started.output) == (status, ""), started.errors
    assert line in started.lines[0], started.errors
    assert started.lines[0].startswith("imdsproxy: ")
    assert [one.partition(":")[0] for one in started.lines[1:]] in ([], ["hint"])
    assert place.proxies() == []
    assert not place.pid_file.exists()


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("who", ["a sharing program", "another proxy"])
def test_a_port_in_use_is_refused(place: Place, mode: str, who: str) -> None:
    if who == "another proxy":
        words = place.words(uuid=OTHER)
        assert place.run(*words).status == 0
        started = place.run(*place.words(mode))
        os.kill(int((place.state / f"{OTHER}.pid").read_text()), signal.SIGTERM)
        until(lambda: place.proxies() == [])
    else:
        intruder = place.lab.intrude(place.network, "169.254.169.254", reuse_port=True)
        started = place.run(*place.words(mode))
        intruder.stop()
    refused(place, started, 71, "Address already in use")
    assert "sport = :80" in started.lines[1]
    # It was no reason to stay away.
    assert place.start()


@pytest.mark.parametrize("mode", _MODES)
def test_a_configuration_that_haproxy_refuses_is_reported_in_its_own_words(
    place: Place, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.cfg").write_text("global\n  nonsense here\n")
    wrapper = tmp_path / "haproxy"
    wrapper.write_text(f'#!/bin/sh\nexec /usr/sbin/haproxy -f {tmp_path}/bad.cfg "$@"\n')
    wrapper.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started = place.run(*place.words(mode), environment=path)
    refused(place, started, 70, "unknown keyword 'nonsense' in 'global' section")


def test_a_host_without_haproxy_is_reported(place: Place) -> None:
    hide = 'mount --bind /dev/null /usr/sbin/haproxy && exec "$@"'
    program = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", hide, "sh", PROGRAM]
    started = place.run(*place.words(), program=program, environment={"PATH": "/usr/bin:/bin"})
    refused(place, started, 71, "there is no haproxy on PATH")


_AS_NOBODY = (
    "/usr/bin/setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
    # The program for an account that cannot read the script's shebang line's place.
    sys.executable,
    "-c",
    "import sys; from imdsproxy.app.namespace_proxy import main; sys.exit(main())",
)


@pytest.mark.parametrize("status", [71, 77], ids=["read-only", "not root's"])
def test_a_state_path_that_cannot_be_written_is_refused(place: Place, status: int) -> None:
    script = f'mount --bind {place.state} {place.state} && mount -o remount,bind,ro {place.state} && exec "$@"'
    read_only = ("/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "sh", PROGRAM)
    started = place.run(*place.words(), program=_AS_NOBODY if status == 77 else read_only)
    refused(place, started, status, f"cannot create the directory {place.state}/ns-metadata-proxy")


def test_another_account_than_root_is_served_where_it_may(place: Place) -> None:
    place.state.chmod(0o777)
    words = place.words("--metadata_proxy_user=nobody", port=8080)
    started = place.run(*words, program=_AS_NOBODY)
    place.state.chmod(0o755)
    assert started == Started(0, "", "")
    assert process_status(place.pid())["Uid"] == [str(_NOBODY.pw_uid)] * 4


# The log


def test_a_request_is_logged_with_the_uuid_in_the_tag(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        path = place.state / "log"
        log.bind(str(path))
        path.chmod(0o666)
        log.settimeout(10)
        # A /dev of its own: the machine's is not ours to change.
        script = (
            "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && ln -s /proc/self/fd /dev/fd && "
            f'mkdir /dev/shm && ln -s {path} /dev/log && exec "$@"'
        )
        program = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "sh", PROGRAM]
        words = place.words("--metadata_proxy_user=nobody", "--syslog-log-facility=LOG_LOCAL3")
        assert place.run(*words, program=program) == Started(0, "", "")
        place.guest.ask("/latest/meta-data/")
        line = ""
        while "GET" not in line:
            line = log.recv(4096).decode()
    # Facility 19, severity 6.
    assert line.startswith("<158>")
    assert f"haproxy-metadata-proxy-{NETWORK}[" in line
    assert "GET /latest/meta-data/ HTTP/1.1" in line
    assert "10.0.0.5" in line


# What listens


def test_the_proxy_listens_in_the_namespace_that_it_was_started_in_and_nowhere_else(
    place: Place,
) -> None:
    place.start("--metadata_proxy_user=nobody", port=9697)

    def reaches() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", 9697)) == 0

    assert inside(place.network, reaches)
    assert not inside(place.lab.host, reaches)
