from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from imdsproxy.core.compiled import compiled_path
from imdsproxy.host.files import MAX_LOG_BYTES
from imdsproxy.host.process import read_rests
from support.daemon import alive
from support.document_server import DEADLINE_S, Server, ask, connect, pss_kib, wait_for
from support.guest import Connection, Guest, Load, Lost, Reply
from support.guest_records import GUEST, guest
from support.patience import patience
from support.record_files import write_record

PASSWORD = "/openstack/latest/password"
INSTANCE = f"X-Imdsproxy-Instance: {GUEST.id}"
USER_DATA = f"GET /latest/user-data HTTP/1.1\r\nHost: x\r\n{INSTANCE}\r\n\r\n".encode()


@pytest.fixture
def make() -> Iterator[Callable[..., Server]]:
    # Not below pytest's own directory, which is closed to the workers' account.
    directory = Path(tempfile.mkdtemp(prefix="imdst-"))
    directory.chmod(0o755)
    servers: list[Server] = []

    def build(**keywords: object) -> Server:
        servers.append(Server(directory, **keywords))  # type: ignore[arg-type] # each test names real options
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
        return super().request(target, headers=[INSTANCE])


@dataclass
class _Client:
    """Asks one worker as HAProxy does."""

    path: Path
    name: str = "haproxy"

    def connect(self) -> Connection:
        try:
            return _Asking(connect(self.path).socket)
        except OSError as error:
            raise Lost(f"connecting: {error}") from error


def load(path: Path) -> Load:
    """Asks one socket again and again, each time on a new connection."""

    def judge(_: Guest, reply: Reply) -> str | None:
        return None if reply.body == GUEST.ec2_id.encode() else repr(reply)

    client = cast("Guest", _Client(path))
    target = "/latest/meta-data/instance-id"
    return Load([client], target, judge, keep_alive=False, pause_s=0)


def test_every_worker_answers_on_its_own_socket(server: Server) -> None:
    length = str(len(GUEST.ec2_id))
    for path in server.sockets:
        reply = ask(path, "/latest/meta-data/instance-id")
        assert (reply.status, reply.body) == (200, GUEST.ec2_id.encode())
        # And nothing about the server.
        assert reply.headers == {
            "content-type": "text/plain; charset=utf-8",
            "content-length": length,
        }
    assert len(server.running.pids) == 3
    assert len(set(server.running.pids)) == 3


def test_what_comes_on_a_connection_is_answered_each_by_itself(server: Server) -> None:
    with connect(server.sockets[0]) as connection:
        for _ in range(100):
            reply = connection.request("/latest", headers=[INSTANCE])
            assert reply.body == b"dynamic\nmeta-data\nuser-data"
    ours = f"Host: x\r\n{INSTANCE}".encode()
    for sent, answer in (
        (b"garbage", b"HTTP/1.1 400 "),
        (b"GET / HTTP/9.9", b"HTTP/1.1 400 "),
        (b"GET  ", b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x00\xa5", b"HTTP/1.1 400 "),
        # Without a length, as some clients send it.
        (
            b"PUT /latest/api/token HTTP/1.1\r\n" + ours,
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        ),
    ):
        with connect(server.sockets[0]) as connection:
            connection.send(sent + b"\r\n\r\n")
            assert connection.socket.recv(4096).startswith(answer)


def test_a_chunked_password_is_kept_and_read_by_the_other_worker(server: Server) -> None:
    first, second = server.sockets
    assert ask(first, PASSWORD).body == b""
    head = f"POST {PASSWORD} HTTP/1.1\r\nHost: x\r\n{INSTANCE}\r\nTransfer-Encoding: chunked"
    with connect(first) as connection:
        connection.send(f"{head}\r\n\r\n4\r\nc2Vj\r\n4\r\ncmV0\r\n0\r\n\r\n".encode())
        assert connection.read().status == 200
    assert ask(second, PASSWORD).body == b"c2VjcmV0"
    assert ask(second, PASSWORD, "POST", body=b"other").status == 409
    assert ask(first, PASSWORD, "POST", body=b"x" * 1021).status == 409
    assert ask(first, PASSWORD, "POST", body=b"x" * 100_000).status == 413


def test_16_mib_of_binary_user_data_are_exact_not_held_and_hold_up_no_other(
    server: Server,
) -> None:
    data = os.urandom(16 << 20)
    write_record(server.records, guest(user_data=data))
    assert ask(server.sockets[0], "/latest/user-data").body == data
    worker = server.running.workers[0]
    before = pss_kib(worker)
    for target in ("/openstack/latest/user_data", "/nocloud/user-data", "/latest/user-data/"):
        assert ask(server.sockets[0], target).body == data
    assert pss_kib(worker) - before < 8 * 1024
    # Clients that read slowly, or leave.
    slow = [connect(server.sockets[0]) for _ in range(8)]
    for connection in slow:
        connection.send(USER_DATA)
    assert ask(server.sockets[0], "/latest/meta-data/instance-id").status == 200
    assert pss_kib(worker) - before < 16 * 1024
    for connection in slow[1:]:
        connection.close()
    assert slow[0].read().body == data
    slow[0].close()
    wait_for("the files are closed", lambda: not open_records(server, worker))


def open_records(server: Server, pid: int) -> list[Path]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(entry.readlink())
    return [path for path in found if path.is_relative_to(server.records)]


def test_a_killed_worker_comes_back_and_no_connection_is_refused(server: Server) -> None:
    with load(server.sockets[0]) as killed, load(server.sockets[1]) as other:
        killed.wait_answers(50)
        victim = server.running.workers[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(
            "a new worker",
            lambda: len(server.running.workers) == 2 and victim not in server.running.workers,
        )
        killed.wait_answers(50)
        other.wait_answers(50)
    assert other.report.lost == []
    # What the dead worker had accepted is lost; whoever comes after it waits for the next one.
    assert len(killed.report.lost) <= 1
    assert "SIGKILL" in server.text()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_workers_that_hang_are_replaced_within_five_seconds(server: Server, count: int) -> None:
    parent, hung = server.running.parent, server.running.workers[:count]
    began = time.monotonic()
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    wait_for(
        "others", lambda: server.is_up(parent or 0) and not set(hung) & set(server.running.workers)
    )
    assert time.monotonic() - began < 5 * patience()
    assert not any(map(alive, hung))
    assert server.text().count("a worker does not answer: ending it") == count
    assert server.running.restarts == count


@pytest.mark.slow
def test_one_that_is_stopped_for_a_while_goes_on_as_before(server: Server) -> None:
    before = server.running
    parent = before.parent or 0
    os.kill(parent, signal.SIGSTOP)
    stopped = time.monotonic()
    # Longer than it waits for a signal.
    wait_for("two seconds", lambda: time.monotonic() > stopped + 2)
    os.kill(parent, signal.SIGCONT)
    rests = read_rests(parent) or 0
    wait_for("two looks, or its end", lambda: (read_rests(parent) or rests + 2) >= rests + 2)
    assert server.running == before
    assert all(ask(path, "/livez", instance=None).status == 200 for path in server.sockets)


@pytest.mark.slow
def test_a_worker_that_is_only_idle_or_slow_is_left_alone(server: Server) -> None:
    workers = server.running.workers
    connections = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for connection in connections:
        connection.connect(str(server.sockets[0]))
    parent = server.running.parent or 0
    before = read_rests(parent) or 0
    wait_for("five looks", lambda: (read_rests(parent) or 0) >= before + 5)
    assert server.running.workers == workers
    for connection in connections:
        connection.close()


def test_its_log_is_kept_short_and_goes_on(server: Server) -> None:
    with server.log.open("ab") as log:
        log.write(b"x" * (MAX_LOG_BYTES + 1))
    wait_for("a short log", lambda: server.log.stat().st_size < MAX_LOG_BYTES)
    assert server.log.with_name("documents.log.1").stat().st_size == MAX_LOG_BYTES
    os.kill(server.running.workers[0], signal.SIGKILL)
    wait_for("a line", lambda: "a worker ended" in server.text())


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
    wait_for("the old workers' end", lambda: not any(map(alive, old)))
    wait_for("it answers", lambda: all(ask_quietly(path) == 200 for path in server.sockets))
    assert len(server.running.workers) == 2


def test_one_whose_pid_file_is_removed_ends_with_its_workers(make: Callable[..., Server]) -> None:
    server = make()
    parent = server.start()
    workers = server.running.workers
    server.pid_file.unlink()
    assert parent.wait(timeout=DEADLINE_S) == 0
    assert not any(map(alive, workers))
    assert "the pid file was removed, or is another document server's: ending" in server.text()


def test_one_whose_files_are_anothers_ends_and_leaves_those_alone(
    make: Callable[..., Server],
) -> None:
    server = make()
    first = server.start()
    for path in (server.pid_file, *server.sockets):
        path.unlink()
    second = server.start()
    first.wait(timeout=DEADLINE_S)
    assert server.is_up(second.pid)
    assert "was taken away" not in server.text()


def ask_quietly(path: Path) -> int:
    try:
        return ask(path, "/livez", instance=None).status
    except (OSError, Lost):
        return 0


def test_sigterm_removes_the_sockets_finishes_what_has_begun_and_ends_all(
    make: Callable[..., Server],
) -> None:
    server = make()
    parent = server.start()
    workers, data = server.running.workers, os.urandom(16 << 20)
    write_record(server.records, guest(user_data=data))
    with connect(server.sockets[0]) as connection:
        connection.send(USER_DATA)
        assert connection.socket.recv(1, socket.MSG_PEEK)
        parent.terminate()
        wait_for("it listens no more", lambda: not any(path.exists() for path in server.sockets))
        assert connection.read().body == data
    assert parent.wait(timeout=60) == 0
    assert not any(map(alive, workers))
    assert server.running.pids == ()


def test_a_second_one_is_refused_in_one_line_and_harms_nothing(server: Server) -> None:
    log = server.directory / "second.log"
    second = server.spawn(log=log)
    assert second.wait(timeout=60) == 71
    assert (
        log.read_text()
        == f"error: a document server runs here already (pid {server.running.parent})\n"
    )
    assert ask(server.sockets[0], "/latest").status == 200


@pytest.mark.slow
def test_workers_that_never_come_up_are_an_error_with_their_reason_and_end_no_others(
    make: Callable[..., Server],
) -> None:
    server = make()
    assert server.spawn(fault="no such luck").wait(timeout=60) == 71
    assert "no such luck" in server.text()
    assert server.text().endswith("error: the document server's workers do not come up\n")
    assert server.running.pids == ()
    server.start().kill()
    orphans = server.running.workers
    wait_for("orphans", lambda: server.running.parent is None)
    assert server.spawn(fault="no such luck").wait(timeout=60) == 71
    assert all(map(alive, orphans))
    assert all(ask_quietly(path) == 200 for path in server.sockets)
    for pid in orphans:
        os.kill(pid, signal.SIGTERM)
    wait_for("their end", lambda: not any(map(alive, orphans)))


def test_clients_of_a_server_that_starts_wait_for_its_workers(make: Callable[..., Server]) -> None:
    server = make()
    server.spawn(fault="slow")
    wait_for("the sockets", lambda: all(path.exists() for path in server.sockets))
    connections = [connect(path) for path in server.sockets]
    assert "a worker answers" not in server.text()
    for connection in connections:
        with connection:
            assert connection.request("/livez").status == 200


@pytest.mark.parametrize("known", [True, False])
def test_workers_outlive_a_killed_parent_until_the_next_one_takes_over(
    make: Callable[..., Server], *, known: bool
) -> None:
    server = make()
    first = server.start()
    orphans = server.running.workers
    with load(server.sockets[0]) as one, load(server.sockets[1]) as two:
        one.wait_answers(50)
        first.kill()
        first.wait()
        one.wait_answers(50)
        assert server.running.parent is None
        assert server.running.workers == orphans
        if not known:
            # They end by themselves when they see that clients come to other sockets.
            server.pid_file.unlink()
        server.start()
        wait_for("the orphans end", lambda: not any(map(alive, orphans)))
        one.wait_answers(50)
        two.wait_answers(50)
    assert one.report.lost == []
    assert two.report.lost == []


@pytest.mark.slow
def test_sighup_takes_up_new_code_without_losing_a_request(make: Callable[..., Server]) -> None:
    server = make()
    parent = server.start()
    with load(server.sockets[0]) as one, load(server.sockets[1]) as two:
        for _ in range(3):
            one.wait_answers(50)
            old = set(server.running.workers)
            with connect(server.sockets[0]) as kept:
                kept.request("/latest", headers=[INSTANCE])
                parent.send_signal(signal.SIGHUP)
                while not kept.request("/latest", headers=[INSTANCE]).closes:
                    pass
            wait_for("new workers, and no old ones", lambda old=old: renewed(server, old))  # type: ignore[misc] # mypy cannot see the default's type
        two.wait_answers(50)
    assert one.report.lost == []
    assert two.report.lost == []
    assert server.running.parent == parent.pid
    assert "parent is gone" not in server.text()
    assert "was taken away" not in server.text()


@pytest.mark.parametrize("fault", ["no program", "no room"])
def test_a_program_that_cannot_be_executed_or_listen_leaves_everything_as_it_is(
    make: Callable[..., Server], fault: str
) -> None:
    server = make()
    parent = server.start(fault=fault)
    workers = server.running.workers
    parent.send_signal(signal.SIGHUP)
    wait_for("it says so", lambda: "cannot be replaced" in server.text())
    assert server.running.workers == workers
    assert all(ask_quietly(path) == 200 for path in server.sockets)
    parent.terminate()
    assert parent.wait(timeout=60) == 0


def renewed(server: Server, old: set[int]) -> bool:
    workers = set(server.running.workers)
    return len(workers) == 2 and not workers & old


def test_the_service_manager_is_told_when_all_workers_answer(
    make: Callable[..., Server], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        server = make(notify=str(tmp_path / "notify"))
        server.spawn()
        assert manager.recv(4096).startswith(b"READY=1\n")
        assert all(ask_quietly(path) == 200 for path in server.sockets)


@pytest.mark.alone
def test_an_idle_server_sleeps(server: Server) -> None:
    def ticks() -> int:
        total = 0
        for pid in server.running.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total

    def switches() -> int:
        total = 0
        for pid in server.running.pids:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
        return total

    before, woken = ticks(), switches()
    assert not threading.Event().wait(1.0)
    assert ticks() - before <= 1
    # Once a second the parent looks, and asks each worker on a new connection.
    assert switches() - woken <= 12


@pytest.mark.root
def test_as_root_the_workers_are_unprivileged_and_can_keep_passwords(
    make: Callable[..., Server],
) -> None:
    server = make(user="nobody")
    nobody = pwd.getpwnam("nobody")
    write_record(server.records, guest(hostname="x"), group=nobody.pw_gid)
    server.start()
    for pid in server.running.workers:
        status = Path(f"/proc/{pid}/status").read_text()
        assert (
            f"Uid:\t{nobody.pw_uid}\t{nobody.pw_uid}\t{nobody.pw_uid}\t{nobody.pw_uid}\n" in status
        )
        assert "Groups:\t \n" in status
        assert "CapEff:\t0000000000000000" in status
    os.chown((server.records / compiled_path(GUEST.id)).parent, -1, nobody.pw_gid)
    assert ask(server.sockets[0], "/latest/meta-data/hostname").body == b"x"
    assert ask(server.sockets[0], PASSWORD, "POST", body=b"c2VjcmV0").status == 200
    socket_status = server.sockets[0].stat()
    assert stat.S_IMODE(socket_status.st_mode) == 0o660
    assert socket_status.st_gid == nobody.pw_gid


def test_a_socket_that_somebody_removed_is_made_again(server: Server) -> None:
    old = set(server.running.workers)
    for path in server.sockets:
        path.unlink()
    wait_for("both answer again", lambda: all(ask_quietly(path) == 200 for path in server.sockets))
    wait_for("the old workers end", lambda: renewed(server, old))
    assert server.text().count("was taken away") == 2
    assert "a worker ended; starting another" in server.text()
