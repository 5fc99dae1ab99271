import os
import pwd
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from imdsproxy.documents.compiled import compiled_path
from imdsproxy.host.files import MAX_LOG_BYTES
from imdsproxy.host.process import read_rests
from support.daemon import alive
from support.document_server import Server, ask, pss_kib
from support.guest import Connection, Guest, Load, Reply, connect_unix
from support.guest_records import GUEST, guest
from support.lab import until
from support.patience import patience
from support.record_files import write_record

_LEAF = "/latest/meta-data/instance-id"
_LINE = f"X-Imdsproxy-Instance: {GUEST.id}"
_USER_DATA = f"GET /latest/user-data HTTP/1.1\r\nHost: x\r\n{_LINE}\r\n\r\n".encode()


@pytest.fixture
def make() -> Iterator[Callable[..., Server]]:
    # Not below pytest's own directory, which is closed to the workers' account.
    directory = Path(tempfile.mkdtemp(prefix="imdst-"))
    directory.chmod(0o755)
    servers: list[Server] = []

    def build(*, user: str = "") -> Server:
        servers.append(Server(directory, user=user))
        write_record(servers[-1].records, GUEST)
        return servers[-1]

    yield build
    for server in servers:
        server.close()
    shutil.rmtree(directory)


@pytest.fixture
def server(make: Callable[..., Server]) -> Server:
    made = make()
    made.start()
    return made


class _Asking(Connection):
    def request(self, target: str, **_: object) -> Reply:
        return super().request(target, headers=[_LINE])


@dataclass
class _Client:
    """Asks one worker as HAProxy does."""

    path: Path
    name: str = "haproxy"

    def connect(self, *, to: str) -> Connection:
        del to
        return _Asking(connect_unix(self.path).socket)


def _load(path: Path) -> Load:
    """Asks one socket again and again, each time on a new connection."""

    def judge(_: Guest, reply: Reply) -> str | None:
        return None if reply.body == GUEST.ec2_id.encode() else repr(reply)

    return Load([cast("Guest", _Client(path))], _LEAF, judge, keep_alive=False, pause_s=0)


def _renewed(server: Server, old: set[int]) -> bool:
    workers = set(server.running.workers)
    return len(workers) == 2 and not workers & old


def _wait_gone(*pids: int) -> None:
    until(lambda: not any(map(alive, pids)), within_s=20, what="their end")


# Answers


def test_every_worker_answers_on_its_own_socket_each_request_by_itself(server: Server) -> None:
    expected = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(GUEST.ec2_id)),
    }
    for path in server.sockets:
        with connect_unix(path) as connection:
            for _ in range(50):
                reply = connection.request(_LEAF, headers=[_LINE])
                # And nothing about the server.
                assert (reply.body, reply.headers) == (GUEST.ec2_id.encode(), expected)
    assert len(set(server.running.pids)) == 3
    for sent in (b"garbage", b"GET / HTTP/9.9", b"GET  ", b"\x16\x03\x01\x00\xa5"):
        with connect_unix(server.sockets[0]) as connection:
            connection.send(sent + b"\r\n\r\n")
            assert connection.socket.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_16_mib_of_binary_user_data_are_exact_not_held_and_hold_up_no_other(server: Server) -> None:
    data = os.urandom(16 << 20)
    write_record(server.records, guest(user_data=data))
    assert ask(server.sockets[0], "/latest/user-data").body == data
    worker = server.running.workers[0]
    before = pss_kib(worker)
    for target in ("/openstack/latest/user_data", "/nocloud/user-data", "/latest/user-data/"):
        assert ask(server.sockets[0], target).body == data
    assert pss_kib(worker) - before < 8 * 1024
    # Clients that read slowly, or leave.
    slow = [connect_unix(server.sockets[0]) for _ in range(8)]
    for connection in slow:
        connection.send(_USER_DATA)
    assert ask(server.sockets[0], _LEAF).status == 200
    assert pss_kib(worker) - before < 16 * 1024
    for connection in slow[1:]:
        connection.close()
    assert slow[0].read().body == data
    slow[0].close()
    until(lambda: not _open_records(server, worker), what="the files are closed")


def _open_records(server: Server, pid: int) -> list[Path]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(entry.readlink())
    return [path for path in found if path.is_relative_to(server.records)]


@pytest.mark.root
def test_as_root_the_workers_are_unprivileged_and_can_keep_passwords(
    make: Callable[..., Server],
) -> None:
    server = make(user="nobody")
    nobody = pwd.getpwnam("nobody")
    write_record(server.records, guest(hostname="x"), group=nobody.pw_gid)
    server.start()
    ids = f"\t{nobody.pw_uid}" * 4
    for pid in server.running.workers:
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"Uid:{ids}\n" in status
        assert "Groups:\t \n" in status
        assert "CapEff:\t0000000000000000" in status
    os.chown((server.records / compiled_path(GUEST.id)).parent, -1, nobody.pw_gid)
    first, second = server.sockets
    assert ask(first, "/latest/meta-data/hostname").body == b"x"
    assert ask(first, "/openstack/latest/password", body=b"c2VjcmV0").status == 200
    assert ask(second, "/openstack/latest/password").body == b"c2VjcmV0"
    assert (stat.S_IMODE(first.stat().st_mode), first.stat().st_gid) == (0o660, nobody.pw_gid)


# Workers


def test_a_killed_worker_comes_back_and_no_connection_is_refused(server: Server) -> None:
    with _load(server.sockets[0]) as killed, _load(server.sockets[1]) as other:
        killed.wait_answers(50)
        victim = server.running.workers[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in server.running.workers and server.answers())
        killed.wait_answers(50)
        other.wait_answers(50)
    assert other.report.lost == []
    # What the dead worker had accepted is lost; whoever comes after it waits for the next one.
    assert len(killed.report.lost) <= 1
    assert "SIGKILL" in server.text()


@pytest.mark.slow
def test_workers_that_hang_are_replaced_within_five_seconds(server: Server) -> None:
    hung = set(server.running.workers)
    began = time.monotonic()
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: server.answers() and _renewed(server, hung))
    assert time.monotonic() - began < 5 * patience()
    assert not any(map(alive, hung))
    assert server.text().count("a worker does not answer: ending it") == 2
    assert server.running.restarts == 2


@pytest.mark.slow
def test_workers_that_are_only_idle_and_a_parent_that_was_stopped_go_on_as_before(
    server: Server,
) -> None:
    before, parent = server.running, server.running.parent or 0
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect_unix(server.sockets[0]))
        os.kill(parent, signal.SIGSTOP)
        stopped = time.monotonic()
        # Longer than it waits for a signal.
        until(lambda: time.monotonic() > stopped + 2)
        os.kill(parent, signal.SIGCONT)
        rests = read_rests(parent) or 0
        until(lambda: (read_rests(parent) or 0) >= rests + 4, what="some looks")
    assert server.running == before
    assert server.answers()


def test_a_socket_that_somebody_removed_is_made_again(server: Server) -> None:
    old = set(server.running.workers)
    for path in server.sockets:
        path.unlink()
    until(lambda: server.answers() and _renewed(server, old), within_s=20, what="other workers")
    assert server.text().count("a socket file was removed") == 2
    assert "a worker ended; starting another" in server.text()


# The parent, and the one after it


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_hung_worker_does_not_outlive_the_program_or_the_parent_that_it_is_of(
    make: Callable[..., Server], number: signal.Signals
) -> None:
    server = make()
    first = server.start()
    old = server.running.workers
    os.kill(old[1], signal.SIGSTOP)
    first.send_signal(number)
    if number == signal.SIGKILL:
        first.wait()
        server.spawn()
    _wait_gone(*old)
    until(server.answers, what="an answer")


def test_one_whose_files_are_removed_or_anothers_ends_with_its_workers_and_leaves_those_alone(
    make: Callable[..., Server],
) -> None:
    server = make()
    first = server.start()
    workers = server.running.workers
    server.pid_file.unlink()
    assert first.wait(timeout=20) == 0
    assert not any(map(alive, workers))
    assert "ending: the pid file was removed or belongs to another document server" in server.text()
    second = server.start()
    for path in (server.pid_file, *server.sockets):
        path.unlink()
    third = server.start()
    second.wait(timeout=20)
    assert server.answers()
    assert server.running.parent == third.pid
    assert "a socket file was removed" not in server.text()


def test_sigterm_removes_the_sockets_finishes_what_has_begun_and_ends_all(
    make: Callable[..., Server],
) -> None:
    server = make()
    parent = server.start()
    workers, data = server.running.workers, os.urandom(16 << 20)
    write_record(server.records, guest(user_data=data))
    with connect_unix(server.sockets[0]) as connection:
        connection.send(_USER_DATA)
        assert connection.socket.recv(1, socket.MSG_PEEK)
        parent.terminate()
        until(lambda: not any(path.exists() for path in server.sockets), what="no more sockets")
        assert connection.read().body == data
    assert parent.wait(timeout=60) == 0
    assert not any(map(alive, workers))
    assert server.running.pids == ()


def test_a_second_one_is_refused_in_one_line_and_its_log_is_kept_short(server: Server) -> None:
    with server.log.open("ab") as log:
        log.write(b"x" * (MAX_LOG_BYTES + 1))
    until(lambda: server.log.stat().st_size < MAX_LOG_BYTES, what="a short log")
    assert server.log.with_name("documents.log.1").stat().st_size == MAX_LOG_BYTES
    assert server.spawn().wait(timeout=60) == 71
    refusal = f"error: a document server is already running (pid {server.running.parent})\n"
    assert server.text().endswith(refusal)
    assert server.answers()


@pytest.mark.slow
def test_workers_that_never_come_up_are_an_error_with_their_reason_and_end_no_others(
    make: Callable[..., Server],
) -> None:
    server = make()
    assert server.spawn(fault="no such luck").wait(timeout=60) == 71
    assert "no such luck" in server.text()
    assert server.text().endswith("error: the document server's workers did not start\n")
    assert server.running.pids == ()
    server.start().kill()
    orphans = server.running.workers
    until(lambda: server.running.parent is None, what="orphans")
    assert server.spawn(fault="no such luck").wait(timeout=60) == 71
    assert all(map(alive, orphans))
    assert server.answers()


def test_clients_of_a_server_that_starts_wait_for_its_workers_and_its_manager_does(
    make: Callable[..., Server],
) -> None:
    server = make()
    server.spawn(fault="slow")
    until(lambda: all(path.exists() for path in server.sockets), what="the sockets")
    connections = [connect_unix(path) for path in server.sockets]
    assert "a worker answers" not in server.text()
    for connection in connections:
        with connection:
            assert connection.request("/livez").status == 200
    server.wait_ready()
    assert server.answers()


@pytest.mark.parametrize("known", [True, False])
def test_workers_outlive_a_killed_parent_until_the_next_one_takes_over(
    make: Callable[..., Server], *, known: bool
) -> None:
    server = make()
    first = server.start()
    orphans = server.running.workers
    with _load(server.sockets[0]) as one, _load(server.sockets[1]) as two:
        one.wait_answers(50)
        first.kill()
        first.wait()
        one.wait_answers(50)
        assert (server.running.parent, server.running.workers) == (None, orphans)
        if not known:
            # They end by themselves when they see that clients come to other sockets.
            server.pid_file.unlink()
        server.start()
        _wait_gone(*orphans)
        one.wait_answers(50)
        two.wait_answers(50)
    assert one.report.lost == two.report.lost == []


@pytest.mark.slow
def test_sighup_takes_up_new_code_without_losing_a_request(make: Callable[..., Server]) -> None:
    server = make()
    parent = server.start()
    with _load(server.sockets[0]) as one, _load(server.sockets[1]) as two:
        for _ in range(3):
            one.wait_answers(50)
            old = set(server.running.workers)
            with connect_unix(server.sockets[0]) as kept:
                kept.request("/latest", headers=[_LINE])
                parent.send_signal(signal.SIGHUP)
                while not kept.request("/latest", headers=[_LINE]).closes:
                    pass
            until(lambda old=old: _renewed(server, old), within_s=20)  # type: ignore[misc] # mypy cannot see the default's type
        two.wait_answers(50)
    assert one.report.lost == two.report.lost == []
    assert server.running.parent == parent.pid
    assert "parent is gone" not in server.text()
    assert "a socket file was removed" not in server.text()


@pytest.mark.parametrize("fault", ["no program", "no room"])
def test_a_program_that_cannot_be_executed_or_listen_leaves_everything_as_it_is(
    make: Callable[..., Server], fault: str
) -> None:
    server = make()
    parent = server.start(fault=fault)
    workers = server.running.workers
    parent.send_signal(signal.SIGHUP)
    until(lambda: "the reload failed" in server.text(), within_s=20, what="a word of it")
    assert server.running.workers == workers
    assert server.answers()
    parent.terminate()
    assert parent.wait(timeout=60) == 0
