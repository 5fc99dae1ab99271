"""A network's own proxy: its life as agents start and end it, every way not to start, and what it makes of requests."""

import contextlib
import grp
import gzip
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import pytest

from support.daemon import alive
from support.forgeries import FORGERIES, IDENTITY_HEADERS, TARGETS, Forgery
from support.guest import IPV4, IPV6, Lost
from support.lab import until
from support.namespace_proxy import (
    NETWORK,
    PROGRAM,
    Place,
    Started,
    command_line,
    open_place,
    process_status,
)
from support.recorder import CLOSED, GARBAGE, RESET, Answer, End, Received, half, reply

pytestmark = pytest.mark.root

_MODES: Final = ("--daemonize", "--nodaemonize")
_COMMAND: Final = (sys.executable, "-m", "imdsproxy", "namespace-proxy")
_NOBODY: Final = str(pwd.getpwnam("nobody").pw_uid)
_NOGROUP: Final = str(grp.getgrnam("nogroup").gr_gid)


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    with open_place() as place:
        yield place


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    """A network without a proxy."""
    yield shared
    shared.clear()


def test_a_proxy_is_what_the_settings_and_the_environment_say(place: Place) -> None:
    file = place.state / "imdsproxy.yaml"
    file.write_text(
        f"namespace_proxy:\n  state_path: {place.state}\n  metadata_port: 81\n"
        "  metadata_proxy_user: nobody\n  metadata_proxy_group: nogroup\n"
    )
    named = ("--config", str(file))
    words = (f"--network-id={NETWORK}", f"--pid-file={place.pid_file}")
    variables = {"IMDSPROXY_NAMESPACE_PROXY__METADATA_PORT": "80"}
    # The program's own option stands before the command.
    program = (*_COMMAND[:-1], *named, _COMMAND[-1])
    started = place.run(*words, program=program, environment=variables)
    assert (started.status, started.errors) == (0, "")
    assert place.guest.ask("/").status == 200
    assert process_status(place.pid())["Uid"] == [_NOBODY] * 4
    os.kill(place.pid(), signal.SIGTERM)
    until(lambda: place.proxies() == [])
    assert place.run(*named, "cleanup", NETWORK, program=_COMMAND).status == 64
    assert place.run("cleanup", NETWORK, *named) == Started(0, "", "")
    assert not place.config.exists()


# In the background, and in the foreground


def test_haproxy_is_a_daemon_that_holds_nothing_of_who_started_it(place: Place) -> None:
    read, write = os.pipe()
    pipe = f"pipe:[{os.fstat(write).st_ino}]"
    os.set_inheritable(write, True)
    tag = f"haproxy-{NETWORK}"
    try:
        subprocess.run(
            place.inside(PROGRAM, *place.words()),
            check=True,
            pass_fds=(write,),
            timeout=30,
            umask=0o077,
            env={**os.environ, "PROCESS_TAG": tag},
        )
    finally:
        os.close(read)
        os.close(write)
    pid = place.pid()
    assert place.proxies() == [pid]
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (place.pid_file, place.config)]
    assert modes == [0o644, 0o640]
    assert command_line(pid)[1:3] == ["-f", str(place.config)]
    assert place.guest.ask("/a").body == b"/a"
    # Of the last request one may close meanwhile.
    links = dict[int, str]()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links[int(path.name)] = str(path.readlink())
    assert {links[number] for number in range(3)} == {"/dev/null"}
    assert pipe not in links.values()
    assert str(Path(f"/proc/{pid}/cwd").readlink()) == "/"
    status = process_status(pid)
    assert status["Umask"] == ["0027"]
    # What was its session ended with its first process.
    assert os.getsid(pid) != os.getsid(0)
    assert int(status["PPid"][0]) != os.getpid()
    # By this agents find it.
    assert f"PROCESS_TAG={tag}\0" in Path(f"/proc/{pid}/environ").read_text()


def test_in_the_foreground_the_program_becomes_haproxy_with_its_pid(place: Place) -> None:
    process = place.open()
    # `ip netns exec` becomes what it runs, and so does that.
    assert place.proxies() == [process.pid]
    assert place.pid() == process.pid
    assert command_line(process.pid)[1:] == ["-f", str(place.config)]
    assert place.guest.ask("/a").body == b"/a"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("mode", "user", "group", "gid"),
    [
        ("--daemonize", "nobody", "nogroup", _NOGROUP),
        ("--nodaemonize", _NOBODY, _NOGROUP, _NOGROUP),
        # Without a group it keeps the agent's, and no other.
        ("--daemonize", "nobody", "", "4"),
        ("--nodaemonize", "nobody", "", "4"),
    ],
)
def test_the_account_is_taken_with_none_of_roots_groups(
    place: Place, user: str, group: str, gid: str, mode: str
) -> None:
    words = (f"--metadata_proxy_user={user}", f"--metadata_proxy_group={group}")
    who = ("/usr/bin/setpriv", "--regid", "4", "--groups", f"0,{_NOGROUP},12", PROGRAM)
    if mode == "--daemonize":
        assert place.run(*place.words(*words), program=who).status == 0
    else:
        place.open(*words, program=who)
    status = process_status(place.pid())
    assert (status["Uid"], status["Gid"], status["Groups"]) == ([_NOBODY] * 4, [gid] * 4, [])
    assert status["CapEff"] == ["0" * 16]
    # A port below 1024 was bound before.
    assert place.guest.ask("/").status == 200


def test_a_signal_to_the_pid_in_the_file_ends_it_and_what_it_left_prevents_no_start(
    place: Place,
) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL):
        pid = place.start()
        os.kill(pid, number)
        until(lambda pid=pid: not alive(pid), what="HAProxy ends")  # type: ignore[misc]
        assert place.proxies() == []
        assert not place.guest.reaches()
    assert place.start()


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


# One at a time, and cleaned up


@pytest.mark.parametrize(
    ("mode", "with_pid_file"), [("--daemonize", True), ("--nodaemonize", True), ("--nodaemonize", False)]
)  # fmt: skip
def test_a_second_start_is_refused_and_changes_nothing(
    place: Place, mode: str, *, with_pid_file: bool
) -> None:
    pid = place.start()
    before = place.config.read_bytes()
    words = place.words(mode, "--debug", "--use-syslog", port=8080)
    started = place.run(*words, *(() if with_pid_file else ("--pid-file=",)))
    assert started.status == 71
    reported = f"already runs (pid {pid})" if with_pid_file else "is in use: its proxy runs"
    assert reported in started.lines[0]
    assert place.pid() == pid
    assert place.config.read_bytes() == before
    assert place.proxies() == [pid]


def _clean(place: Place, *words: str) -> Started:
    return place.run("cleanup", NETWORK, "--state-path", str(place.state), *words)


@pytest.mark.parametrize("mode", _MODES)
def test_what_a_proxy_left_is_cleaned_up(place: Place, mode: str) -> None:
    pid = place.start() if mode == "--daemonize" else place.open().pid
    for words in ((), ("--pid-file", str(place.pid_file))):
        cleaned = _clean(place, *words)
        assert cleaned.status == 71
        assert "in use" in cleaned.lines[0]
    assert place.config.exists()
    assert place.guest.ask("/").status == 200
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), what="HAProxy ends")
    for _ in range(2):
        assert _clean(place, "--pid-file", str(place.pid_file)) == Started(0, "", "")
        assert list(place.config.parent.iterdir()) == []
        assert not place.pid_file.exists()


# Not to start


def _refused(place: Place, started: Started, status: int, line: str) -> None:
    """A failure is a status, one line and a hint, and nothing runs or seems to run."""
    assert (started.status, started.output) == (status, ""), started.errors
    assert line in started.lines[0], started.errors
    assert started.lines[0].startswith("imdsproxy: ")
    assert [one.partition(":")[0] for one in started.lines[1:]] in ([], ["hint"])
    assert place.proxies() == []
    assert not place.pid_file.exists()


@pytest.mark.parametrize("mode", _MODES)
def test_a_port_in_use_is_refused(place: Place, mode: str) -> None:
    # By a program that would share it.
    intruder = place.lab.intrude(place.network, "169.254.169.254", reuse_port=True)
    started = place.run(*place.words(mode))
    intruder.stop()
    _refused(place, started, 71, "Address already in use")
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
    _refused(place, started, 70, "unknown keyword 'nonsense' in 'global' section")


def test_a_host_without_haproxy_is_reported(place: Place) -> None:
    hide = 'mount --bind /dev/null /usr/sbin/haproxy && exec "$@"'
    program = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", hide, "sh", PROGRAM]
    started = place.run(*place.words(), program=program, environment={"PATH": "/usr/bin:/bin"})
    _refused(place, started, 71, "there is no haproxy on PATH")


def test_another_account_than_root_is_served_where_it_may_write_the_state(place: Place) -> None:
    # Its account cannot read the place that the program's first line names.
    code = "import sys; from imdsproxy.tools.namespace_proxy import main; sys.exit(main())"
    as_nobody = ("/usr/bin/setpriv", f"--reuid={_NOBODY}", f"--regid={_NOGROUP}", "--clear-groups")
    program = (*as_nobody, sys.executable, "-c", code)
    words = place.words("--metadata_proxy_user=nobody", port=8080)
    started = place.run(*words, program=program)
    _refused(place, started, 77, f"cannot create the directory {place.state}/ns-metadata-proxy")
    place.state.chmod(0o777)
    started = place.run(*words, program=program)
    place.state.chmod(0o755)
    assert started == Started(0, "", "")
    assert process_status(place.pid())["Uid"] == [_NOBODY] * 4


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


# What a guest's request is when it arrives at the agent's socket, and what the guest gets


_IDENTITY: Final = (b"x-neutron-network-id", b"x-neutron-router-id", b"x-forwarded-for")
_OURS: Final = ("x-instance", "x-tenant", "x-metadata", "x-ovn", "x-imdsproxy", "x-neutron-router")
_FORGED: Final = {
    b"upgrade",
    *(one.lower().encode() for one in IDENTITY_HEADERS if one.lower().startswith(_OURS)),
}
_BINARY: Final = bytes(range(256)) * 4096


@pytest.fixture
def proxied(place: Place) -> Place:
    """A network's proxy in the background, as an unprivileged account."""
    place.start("--metadata_proxy_user=nobody", "--metadata_proxy_group=nogroup")
    return place


def _identity(request: Received) -> dict[bytes, list[bytes]]:
    """What a request says of whose it is."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        if name.lower() in _IDENTITY:
            found.setdefault(name.lower(), []).append(value)
    return found


_BLUE: Final = {b"x-neutron-network-id": [NETWORK.encode()], b"x-forwarded-for": [b"10.0.0.5"]}


def test_a_request_arrives_as_it_was_with_the_proxys_word_on_whose_it_is(proxied: Place) -> None:
    sent = ("user-agent: cloud-init/25.1", "accept: */*", "x-aws-ec2-metadata-token: t==",
            'if-none-match: "a"', "cookie: c")  # fmt: skip
    target = "/openstack/latest/meta_data.json?a=b%20c"
    found = proxied.guest.ask(target, headers=sent)
    received = proxied.recorder.only()
    assert received.request_line == f"GET {target} HTTP/1.1".encode()
    assert received.lines == (
        b"host: 169.254.169.254",
        *(line.encode() for line in sent),
        b"x-neutron-network-id: " + NETWORK.encode(),
        b"x-forwarded-for: 10.0.0.5",
        b"connection: close",
    )
    assert received.raw_body == b""
    assert (found.status, found.text) == (200, target)


def test_a_router_is_named_by_its_own_header_and_ipv4_alone_served_where_devices_get_no_ipv6(
    place: Place,
) -> None:
    sysctl = ["/usr/sbin/sysctl", "-q", "-w"]
    setting = "net.ipv6.conf.default.disable_ipv6"
    assert place.run(f"{setting}=1", program=sysctl).status == 0
    try:
        words = [word.replace("network_id", "router_id") for word in place.words()]
        assert place.run(*words).status == 0
    finally:
        place.run(f"{setting}=0", program=sysctl)
    place.guest.ask("/", headers=[f"X-Neutron-Network-ID: {NETWORK}"])
    assert _identity(place.recorder.only()) == {
        b"x-neutron-router-id": [NETWORK.encode()],
        b"x-forwarded-for": [b"10.0.0.5"],
    }
    assert not place.guest.reaches(to=IPV6)


def test_every_method_passes_with_its_body_in_chunks_too(proxied: Place) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "FROB"):
        proxied.recorder.forget()
        body = b"" if method in ("HEAD", "TRACE") else _BINARY[:5000]
        assert proxied.guest.ask("/a", method=method, body=body).status == 200
        assert (proxied.recorder.only().method, proxied.recorder.only().body) == (method, body)
    proxied.recorder.forget()
    head = b"POST /openstack/2013-04-04/password HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"one", _BINARY, b"\r\n"))
    proxied.guest.raw(head + chunks + b"0\r\n\r\n")
    received = proxied.recorder.only()
    assert received.body == b"one" + _BINARY + b"\r\n"
    assert received.values("transfer-encoding") == (b"chunked",)
    assert _identity(received) == _BLUE


def test_two_guests_behind_one_proxy_are_kept_apart_on_one_connection_each(proxied: Place) -> None:
    other = proxied.lab.guest("blue", 6)
    with proxied.guest.connect() as one, other.connect() as two:
        for _ in range(3):
            one.request("/one")
            two.request("/two")
    found = [(one.target, _identity(one)[b"x-forwarded-for"]) for one in proxied.recorder.requests]
    assert found == [(b"/one", [b"10.0.0.5"]), (b"/two", [b"10.0.0.6"])] * 3


_ANSWERS: Final = (
    reply(_BINARY, headers=["Content-Type: application/octet-stream", "X-A: b", "X-A: c", "Vary: *"]),
    reply(gzip.compress(b"user data" * 100), headers=["Content-Encoding: gzip"]),
    reply(b"\xff\xfe not UTF-8", headers=["Content-Type: text/plain; charset=utf-8", 'ETag: "a"']),
    reply(_BINARY, chunked=True),
    reply(b"until the end", with_length=False, then=End.CLOSE),
    reply(b"", status=204, headers=[], with_length=False),
    *(reply(b"its own words", status=status) for status in (201, 400, 403, 404, 409, 500, 502, 503, 504)),
)  # fmt: skip


def _lines(head: bytes) -> list[str]:
    """The status line, and header lines with names in lower case, but for what is of one connection."""
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return [first, *sorted(f"{k.lower()}:{v}" for k, _, v in pairs if k.lower() != "connection")]


def test_an_answer_passes_as_it_is(proxied: Place) -> None:
    for answer in _ANSWERS:
        proxied.recorder.answer(answer)
        found = proxied.guest.ask("/")
        head, _, sent = answer.data.partition(b"\r\n\r\n")
        assert _lines(found.head) == _lines(head)
        assert found.body == (_BINARY if b"chunked" in head else sent)


def _got_through(place: Place, forgery: Forgery) -> list[object]:
    """What of a forgery has arrived that must not, or has not arrived."""
    place.recorder.forget()
    # What is refused without a word, or waits for more, is lost: what matters is what arrived.
    with contextlib.suppress(Lost):
        place.guest.raw(forgery.data, timeout_s=10 if forgery.seen else 1)
    # The second of two requests may still be on its way, and is not to arrive in the next case.
    until(
        lambda: len(place.recorder.heads) >= len(forgery.seen),
        what=f"all requests of {forgery.data!r}",
    )
    wrong: list[object] = []
    for received in place.recorder.heads:
        names = {name.lower().replace(b"_", b"-") for name, _ in received.headers}
        wrong += names & _FORGED
        wrong += [name for name, _ in received.headers if b"_" in name]
        if _identity(received) != _BLUE:
            wrong.append(_identity(received))
        if received.values("connection") not in ((b"close",), (b"keep-alive",), ()):
            wrong.append(received.values("connection"))
    return wrong


def test_whatever_a_guest_forges_only_the_proxy_says_whose_a_request_is(proxied: Place) -> None:
    found = {forgery.data: _got_through(proxied, forgery) for forgery in FORGERIES}
    assert not {data: wrong for data, wrong in found.items() if wrong}


def test_a_target_passes_undecoded(proxied: Place) -> None:
    sent = [one for one in TARGETS if one.seen and b" " + one.seen[0].target + b" " in one.data]
    for one in sent:
        proxied.guest.raw(one.data)
    assert [one.target for one in proxied.recorder.requests] == [one.seen[0].target for one in sent]


def test_a_guest_that_asks_over_ipv6_is_known_by_that_address(proxied: Place) -> None:
    own = proxied.guest.link_local
    for to, source in ((IPV6, own), (IPV6, "2001:db8::5"), (IPV4, "10.0.0.5")):
        proxied.guest.ask("/", to=to, source=source)
    addresses = [one.values("x-forwarded-for")[0].decode() for one in proxied.recorder.requests]
    assert [*map(ip_address, addresses)] == [*map(ip_address, (own, "2001:db8::5", "10.0.0.5"))]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_agent_that_does_not_answer_is_503_and_asked_once(proxied: Place, method: str) -> None:
    body = b"b" if method == "POST" else b""
    for answer in (CLOSED, RESET, GARBAGE, half(reply(b"x"), of=12)):
        proxied.recorder.forget()
        proxied.recorder.answer(answer)
        found = proxied.guest.ask("/", method=method, body=body)
        assert (found.status, found.headers["retry-after"]) == (503, "1")
        assert len(proxied.recorder.requests) == 1
    proxied.recorder.refuse()
    found = proxied.guest.ask("/latest/meta-data/", method=method, body=body)
    proxied.recorder.listen()
    assert (found.status, found.headers["retry-after"], found.body) == (503, "1", b"")
    assert found.headers["cache-control"] == "no-store"


def test_no_tunnel_leads_past_the_rules(proxied: Place) -> None:
    refused = proxied.guest.raw(b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n")
    assert (refused.status, refused.headers["allow"][:9]) == (405, "GET, HEAD")
    switch = "Upgrade: x\r\nConnection: Upgrade"
    proxied.recorder.answer(
        Answer(f"HTTP/1.1 101 Switching Protocols\r\n{switch}\r\n\r\n".encode())
    )
    with proxied.guest.connect() as connection:
        found = connection.request("/", headers=[switch])
        assert (found.status, found.headers["retry-after"]) == (503, "1")
    assert proxied.recorder.only().values("upgrade") == ()
