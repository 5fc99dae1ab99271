"""HAProxy in front of a hub: how much of it anonymous, hosts and operators can take."""

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.hub import front as module
from imdsproxy.hub.front import (
    CONNECTIONS_OF_HOST,
    SHARE_OF_ANONYMOUS,
    SHARE_OF_HOSTS,
    SHARE_OF_UNVERIFIED,
    UNVERIFIED,
)
from support.fleet_front import (
    ADDRESS,
    Certificates,
    Client,
    Fronted,
    client_context,
    make_certificates,
    open_front,
)
from support.guest import inside
from support.lab import Lab, ip, until
from support.patience import patience

pytestmark = pytest.mark.root

_FEW: Final = 200
"""Connections of the front whose shares are filled."""

_CA: Final = b"GET /fleet/ca HTTP/1.1\r\nHost: hub\r\n\r\n"
_BLOB: Final = b"GET /fleet/blob/" + b"0f" * 32 + b" HTTP/1.1\r\nHost: hub\r\n\r\n"
_STATUS: Final = b"GET /fleet/status HTTP/1.1\r\nHost: hub\r\n\r\n"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates") / "fleet")


@pytest.fixture
def few(certificates: Certificates, tmp_path: Path) -> Iterator[Fronted]:
    """A front that takes few connections."""
    with open_front(tmp_path, certificates, maxconn=_FEW) as one:
        yield one


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as one:
        yield one


def _silent(
    stack: contextlib.ExitStack, connect: Callable[[], socket.socket], count: int
) -> list[socket.socket]:
    """Connections that never begin TLS, but for those that are refused at once."""
    opened = []
    for _ in range(count):
        with contextlib.suppress(ConnectionResetError):
            opened.append(stack.enter_context(contextlib.closing(connect())))
    return opened


def _held(socks: Sequence[socket.socket]) -> int:
    """How many of these connections the front has not closed."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLIN | select.POLLHUP)
    return len(socks) - len(poll.poll(0))


def _until_held(socks: Sequence[socket.socket], count: int) -> None:
    until(lambda: _held(socks) == count, what=f"{count} connections that stay")


def _served(
    front: Fronted,
    stack: contextlib.ExitStack,
    source: str,
    client: Client | None,
    request: bytes,
) -> bool:
    """Whether a new connection from an address gets an answer; then it stays open."""
    context = client_context(front.certificates.ca_file, client)
    with contextlib.suppress(OSError):
        sock = stack.enter_context(contextlib.closing(front.open(source)))
        tls = stack.enter_context(context.wrap_socket(sock, server_hostname=ADDRESS))
        tls.sendall(request)
        return tls.recv(65_536).startswith(b"HTTP/1.1 200")
    return False


def test_one_address_holds_few_connections_that_never_begin_tls(
    certificates: Certificates, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with open_front(tmp_path, certificates) as front:
        socks = _silent(stack, lambda: front.open("127.0.0.20"), UNVERIFIED + 50)
        _until_held(socks, UNVERIFIED)
        assert not _served(front, stack, "127.0.0.20", certificates.host("host-1"), _BLOB)
        assert _served(front, stack, "127.0.0.21", certificates.host("host-1"), _BLOB)
        # From where a certificate came before, there may be a NAT with hosts behind it.
        _until_held(
            _silent(stack, lambda: front.open("127.0.0.21"), UNVERIFIED + 50), UNVERIFIED + 50
        )


def test_one_prefix_of_ipv6_counts_like_one_address_of_ipv4(
    certificates: Certificates, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    lab = Lab()
    stack.callback(lab.close)
    sources = [f"2001:db8:0:1::{number}" for number in range(1, 5)]
    for address in (*sources, "2001:db8:0:2::1", "2001:db8::1"):
        ip("-n", lab.host, "address", "add", f"{address}/128", "dev", "lo")
    front = stack.enter_context(open_front(tmp_path, certificates, namespace=lab.host))

    def connect(source: str, count: int) -> list[socket.socket]:
        def one() -> socket.socket:
            return socket.create_connection(("2001:db8::1", front.port), source_address=(source, 0))

        return inside(lab.host, lambda: _silent(stack, one, count))

    _until_held([sock for source in sources for sock in connect(source, 80)], UNVERIFIED)
    _until_held(connect("2001:db8:0:2::1", 5), 5)


def test_strangers_leave_connections_to_members_and_hosts_leave_some_to_operators(
    few: Fronted, certificates: Certificates, stack: contextlib.ExitStack
) -> None:
    host, operator = certificates.host("host-1"), certificates.operator("anna")
    assert _served(few, stack, "127.0.0.31", host, _BLOB)
    assert _served(few, stack, "127.0.0.32", operator, _STATUS)
    anonymous = _silent(stack, lambda: few.open("127.0.0.40"), _FEW)
    _until_held(anonymous, int(_FEW * SHARE_OF_ANONYMOUS))
    assert not _served(few, stack, "127.0.0.41", None, _CA)
    assert _served(few, stack, "127.0.0.31", host, _BLOB)
    assert _served(few, stack, "127.0.0.32", operator, _STATUS)
    # Captured hosts do the same, from where their certificates came.
    of_host = _silent(stack, lambda: few.open("127.0.0.31"), _FEW)
    _until_held([*anonymous, *of_host], int(_FEW * SHARE_OF_UNVERIFIED))
    assert not _served(few, stack, "127.0.0.31", host, _BLOB)
    assert _served(few, stack, "127.0.0.32", operator, _STATUS)


def test_hosts_with_their_certificates_leave_connections_to_operators(
    few: Fronted, certificates: Certificates, stack: contextlib.ExitStack
) -> None:
    most = int(_FEW * SHARE_OF_HOSTS)
    hosts = [certificates.host(f"host-{number}") for number in range(most // 10 + 1)]
    served = [
        _served(few, stack, f"127.0.1.{number}", host, _BLOB)
        for number, host in enumerate(hosts, 1)
        for _ in range(10)
    ]
    assert served == [True] * most + [False] * (len(served) - most)
    assert _served(few, stack, "127.0.0.32", certificates.operator("anna"), _STATUS)


def test_one_certificate_of_a_host_has_few_connections_and_the_next_of_its_address_others(
    few: Fronted, certificates: Certificates, stack: contextlib.ExitStack
) -> None:
    captured, other = certificates.host("captured"), certificates.host("other")
    served = [
        _served(few, stack, "127.0.0.50", captured, _BLOB) for _ in range(CONNECTIONS_OF_HOST + 4)
    ]
    assert served == [True] * CONNECTIONS_OF_HOST + [False] * 4
    assert _served(few, stack, "127.0.0.50", other, _BLOB)


def test_of_many_clients_of_one_prefix_some_are_admitted_however_often_they_come(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection does not count, so hosts behind one NAT that try again and again come in one by one."""
    monkeypatch.setattr(module, "CONNECTS", 5)
    host = certificates.host("host-1")

    def is_served() -> bool:
        with contextlib.ExitStack() as short:
            return _served(front, short, "127.0.0.60", host, _BLOB)

    with open_front(tmp_path, certificates) as front:
        until(lambda: not is_served(), what="the limit")
        # Each of them tries far more often than the limit allows.
        for _ in range(3):
            until(is_served, within_s=20, what="a connection that is admitted")


def test_one_certificate_of_a_host_connects_and_writes_only_so_often(
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CONNECTS_OF_HOST", 10)
    monkeypatch.setattr(module, "WRITES_OF_HOST", 5)
    monkeypatch.setattr(module, "REQUESTS_OF_HOST", 20)
    captured, other = certificates.host("captured"), certificates.host("other")
    with open_front(tmp_path, certificates) as front:
        renew = b"POST /fleet/renew HTTP/1.1\r\nHost: hub\r\nContent-Length: 0\r\n\r\n"
        for client, request, most in ((captured, renew, 5), (other, _BLOB, 20)):
            with front.connect(client) as sock:
                statuses = []
                for _ in range(most + 1):
                    sock.sendall(request)
                    statuses.append(int(sock.recv(65_536)[9:12]))
            assert statuses == [200] * most + [429]
        third = certificates.host("third")
        served = []
        for _ in range(11):
            with contextlib.ExitStack() as short:
                served.append(_served(front, short, ADDRESS, third, _BLOB))
        assert served == [True] * 10 + [False]


def test_a_connection_that_does_not_begin_tls_is_ended(
    certificates: Certificates,
    tmp_path: Path,
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 1)
    with open_front(tmp_path, certificates, maxconn=_FEW) as front:
        begin = time.monotonic()
        _until_held(_silent(stack, front.open, 3), 0)
        assert time.monotonic() - begin < 5 * patience()


def test_a_client_that_begins_with_http_2_gets_no_http_2(
    few: Fronted, certificates: Certificates
) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
    for protocols in ([], ["http/1.1"], ["h2", "http/1.1"]):
        context = client_context(certificates.ca_file, certificates.operator("anna"))
        if protocols:
            context.set_alpn_protocols(protocols)
        with few.connect(context=context) as sock:
            assert sock.selected_alpn_protocol() in {None, "http/1.1"}
            sock.sendall(preface)
            found = b""
            with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):
                while chunk := sock.recv(65_536):
                    found += chunk
        assert found.startswith(b"HTTP/1.1 400 ")
    assert not few.api.heads
