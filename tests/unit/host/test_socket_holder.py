from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from imdsproxy.host.socket_file import SocketHolder, find_socket_holder


def test_who_listens_is_found_without_connecting(tmp_path: Path) -> None:
    path = tmp_path / "with blank.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert find_socket_holder(path) is None, "bound and not listening yet"
        listener.listen()

        found = find_socket_holder(path)

        assert found is not None
        assert found.pid == os.getpid()
        assert found.command[0] == sys.orig_argv[0]
        listener.settimeout(0)
        try:
            listener.accept()
        except BlockingIOError:
            pass
        else:
            raise AssertionError("somebody connected")
    assert path.exists()
    assert find_socket_holder(path) is None, "only the file is left"


def test_a_listener_of_a_process_that_cannot_be_seen_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/unix").write_text(
        "Num RefCount Protocol Flags Type St Inode Path\n"
        "0: 00000002 00000000 00010000 0001 01 77 /run/a.sock\n"
        "0: 00000002 00000000 00000000 0001 03 78 /run/b.sock\n"
        "0: 00000002 00000000 00010000 0001 01 79\n"
    )

    assert find_socket_holder(Path("/run/a.sock"), tmp_path) == SocketHolder()
    assert find_socket_holder(Path("/run/b.sock"), tmp_path) is None
    assert find_socket_holder(Path("/run/a.sock"), tmp_path / "none") is None


def test_a_haproxy_is_found_by_the_name_that_it_bound_unless_another_has_taken_the_place(
    tmp_path: Path,
) -> None:
    path, bound = tmp_path / "a.sock", tmp_path / "a.sock.7.tmp"
    with (
        socket.socket(socket.AF_UNIX) as haproxys,
        socket.socket(socket.AF_UNIX) as agents,
        socket.socket(socket.AF_UNIX) as others,
    ):
        haproxys.bind(str(bound))
        haproxys.listen()
        bound.rename(path)
        found = find_socket_holder(path)
        assert found is not None
        assert found.pid == os.getpid()

        path.unlink()
        agents.bind(str(path))
        agents.listen()
        haproxys.close()
        assert find_socket_holder(path) is not None
        agents.close()

        others.bind(str(tmp_path / "a.sock.7.tmpx"))
        others.listen()
        assert find_socket_holder(path) is None


def test_an_agent_whose_socket_haproxy_has_replaced_is_not_who_is_reached(tmp_path: Path) -> None:
    path, bound = tmp_path / "a.sock", tmp_path / "a.sock.7.tmp"
    program = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); print(); input()"
    with (
        subprocess.Popen(
            (sys.executable, "-c", program), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as agent,
        socket.socket(socket.AF_UNIX) as haproxys,
    ):
        assert agent.stdout is not None
        agent.stdout.readline()
        found = find_socket_holder(path)
        assert found is not None
        assert found.pid == agent.pid

        haproxys.bind(str(bound))
        haproxys.listen()
        bound.rename(path)
        found = find_socket_holder(path)
        assert found is not None
        assert found.pid == os.getpid()
        agent.communicate()
