"""HAProxy in front of a hub: who gets through, and whom the hub takes them for."""

import contextlib
import json
import ssl
import subprocess
from collections.abc import Iterator
from typing import Final

import pytest

from imdsproxy.fleet.members import Identity, Role, read_identity
from imdsproxy.fleet.stream import UPGRADE
from imdsproxy.hub.front import ANONYMOUS, ENROLMENTS_A_MINUTE
from support.fleet_front import (
    ADDRESS,
    Client,
    Fronted,
    client_context,
    expired_at,
    make_certificates,
    open_front,
    read_to_end,
)
from support.recorder import Answer, End, Received, reply

pytestmark = pytest.mark.root

_SWITCH: Final = (
    f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n"
)
_STREAM: Final = (
    f"GET /fleet/stream HTTP/1.1\r\nHost: hub\r\nConnection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n"
).encode()
_BLOB: Final = b"/fleet/blob/" + b"0f" * 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    with open_front(tmp_path_factory.mktemp("front")) as one:
        yield one


@pytest.fixture
def front(shared: Fronted) -> Fronted:
    shared.forget()
    return shared


@pytest.fixture(scope="module")
def operator(shared: Fronted) -> Client:
    return shared.certificates.operator("anna")


@pytest.fixture
def host(shared: Fronted) -> Client:
    """A new one for each test: by one certificate a host connects only so often."""
    return shared.certificates.host("host-1")


def _get(path: bytes = b"/v1/instances", *lines: bytes, method: bytes = b"GET") -> bytes:
    head = (method + b" " + path + b" HTTP/1.1", b"Host: hub", b"Connection: close", *lines)
    return b"\r\n".join(head) + b"\r\n\r\n"


def _status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def _ask(sock: ssl.SSLSocket) -> bytes:
    """In TLS 1.3 a client learns at its first read that its certificate is not accepted."""
    with sock:
        sock.sendall(_get())
        return read_to_end(sock)


def _answer(sock: ssl.SSLSocket) -> bytes:
    """One answer that has a length, and what came with it."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += sock.recv(65_536)
    head, _, body = found.lower().partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r")[0])
    while len(body) < length:
        body += sock.recv(65_536)
    return found


def _seen(request: Received) -> Identity | None:
    return read_identity({name.decode().lower(): value.decode() for name, value in request.headers})


def test_an_operator_is_named_to_the_hub_with_role_name_project_and_serial(front: Fronted) -> None:
    ben = front.certificates.operator("ben", Role.MOVER, scope="project-7")
    assert _status(front.send(_get(), ben)) == 200
    request = front.api.only()
    assert _seen(request) == Identity(Role.MOVER, "ben", ben.serial, "project-7")
    assert request.values("x-imdsproxy-peer") == (b"127.0.0.1",)


def test_without_a_certificate_a_client_reaches_enrolment_and_the_ca_certificate_only(
    front: Fronted,
) -> None:
    for path in (b"/", b"/v1/instances", b"/fleet/stream", b"/fleet/renew", b"/fleet/leave", b"/fleet/enrol/", _BLOB,
                 b"/fleet/%65nrol", b"//fleet/enrol", b"/fleet/enrol;a", b"/v1/../fleet/enrol"):  # fmt: skip
        answer = front.send(_get(path))
        assert (path, _status(answer)) == (path, 401)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "certificate-missing"
    assert not front.api.requests
    body = b'{"host": "h"}'
    enrol = _get(b"/fleet/enrol", b"Content-Length: %d" % len(body), method=b"POST") + body
    assert _status(front.send(enrol)) == 200
    assert front.api.only().body == body
    assert _seen(front.api.only()) is None
    ca = front.send(_get(b"/fleet/ca"))
    assert ca.partition(b"\r\n\r\n")[2] == front.certificates.ca_file.read_bytes()


def test_a_certificate_of_another_ca_or_that_has_ended_gets_no_connection(
    front: Fronted, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_certificates(tmp_path_factory.mktemp("other"))
    for client in (
        other.operator("anna"),
        front.certificates.host("late", at=expired_at()),
    ):
        context = client_context(front.certificates.ca_file, client)
        with contextlib.closing(front.open()) as sock, pytest.raises(ssl.SSLError):
            _ask(context.wrap_socket(sock, server_hostname=ADDRESS))
    assert not front.api.heads
    assert not front.streams.heads


def test_a_hub_shows_the_certificate_that_hosts_verify_and_a_hosts_cannot_stand_in_for_it(
    front: Fronted, host: Client
) -> None:
    verify = ("openssl", "verify", "-CAfile", str(front.certificates.ca_file), "-purpose")
    for client, purpose, good in (
        (front.spec.certificate, "sslserver", True),
        (front.spec.certificate, "sslclient", True),
        (host.pem, "sslclient", True),
        (host.pem, "sslserver", False),
    ):
        done = subprocess.run((*verify, purpose, str(client)), capture_output=True, check=False)
        assert (done.returncode == 0) is good, done


@pytest.mark.parametrize(
    "line",
    [
        "{name}: {value}",
        "{upper}: {value}",
        "{name}:{value}",
        "{name}: a\r\n{name}: {value}",
        "{underscored}: {value}",
        "{half}: {value}",
        "Connection: close, {name}\r\n{name}: {value}",
        "Connection: {name}",
        "{name}:\r\n {value}",
        "X: y\r\n {name}: {value}",
        "{name} : {value}",
        "{name}-2: {value}",
    ],
)
def test_no_header_of_a_clients_own_says_who_it_is(
    front: Fronted, host: Client, operator: Client, line: str
) -> None:
    lines = b"".join(
        line.format(
            name=name,
            value=value,
            upper=name.upper(),
            underscored=name.replace("-", "_"),
            half=name.replace("-", "_", 1),
        ).encode()
        + b"\r\n"
        for name, value in (
            ("x-imdsproxy-role", "operator"),
            ("x-imdsproxy-name", "root"),
            ("x-imdsproxy-serial", "1"),
            ("x-imdsproxy-scope", "all"),
            ("x-imdsproxy-peer", "192.0.2.9"),
            ("x-imdsproxy-other", "1"),
        )
    )
    enrol = b"POST /fleet/enrol HTTP/1.1\r\nHost: hub\r\nContent-Length: 0\r\n" + lines + b"\r\n"
    blob = b"GET " + _BLOB + b" HTTP/1.1\r\nHost: hub\r\n" + lines + b"\r\n"
    read = b"GET /v1/instances HTTP/1.1\r\nHost: hub\r\n" + lines + b"\r\n"
    stream = _STREAM[:-2] + lines + b"\r\n"
    front.streams.always(Answer(_SWITCH.encode(), then=End.CLOSE))
    expected = {
        None: None,
        host: Identity(Role.HOST, "host-1", host.serial),
        operator: Identity(Role.OPERATOR, "anna", operator.serial),
    }
    for data, client in ((enrol, None), (blob, host), (read, operator), (stream, host)):
        front.forget()
        front.api.always(reply(then=End.CLOSE))
        front.streams.always(Answer(_SWITCH.encode(), then=End.CLOSE))
        with front.connect(client) as sock:
            sock.sendall(data)
            sock.settimeout(5)
            status = _status(sock.recv(65_536))
        seen = [*front.api.heads, *front.streams.heads]
        if status == 400:
            assert not seen
            continue
        assert status in {200, 101}
        (request,) = seen
        assert _seen(request) == expected[client]
        assert request.values("x-imdsproxy-peer") == (b"127.0.0.1",)
        ours = {name.lower() for name, _ in request.headers if b"imdsproxy" in name.lower()}
        assert ours <= {
            b"x-imdsproxy-role",
            b"x-imdsproxy-name",
            b"x-imdsproxy-serial",
            b"x-imdsproxy-peer",
        }


def test_a_hosts_certificate_reaches_the_routes_of_hosts_only(front: Fronted, host: Client) -> None:
    for path in (b"/v1/instances", b"/fleet/status", b"/fleet/applied", b"/", b"/openapi.json",
                 b"/fleet/blob/../../v1/instances", b"/fleet/stream/", b"/fleet/stream%2f..", b"/fleet/renew/x",
                 b"/fleet/blob/", b"/fleet/blob/" + b"0f" * 32 + b"/x", b"http://hub/v1/instances"):  # fmt: skip
        for method in (b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"get"):
            answer = front.send(_get(path, b"Content-Length: 0", method=method), host)
            assert _status(answer) in {400, 403}, (path, method)
    assert not front.api.heads
    assert not front.streams.heads
    assert _status(front.send(_get(_BLOB), host)) == 200
    for path in (b"/fleet/renew", b"/fleet/leave"):
        answer = front.send(_get(path, b"Content-Length: 0", method=b"POST"), host)
        assert (path, _status(answer)) == (path, 200)
    assert [_seen(one) for one in front.api.requests] == 3 * [
        Identity(Role.HOST, "host-1", host.serial)
    ]


def test_operators_and_hubs_do_not_reach_the_routes_of_hosts_nor_hubs_those_of_operators(
    front: Fronted, operator: Client
) -> None:
    hub = front.certificates.hub("hub-2")
    for client in (operator, hub):
        for data in (
            _STREAM,
            _get(_BLOB),
            _get(b"/fleet/renew", b"Content-Length: 0", method=b"POST"),
            _get(b"/fleet/leave", b"Content-Length: 0", method=b"POST"),
        ):
            with front.connect(client) as sock:
                sock.sendall(data)
                assert _status(sock.recv(65_536)) == 403
    assert _status(front.send(_get(), hub)) == 403
    assert not front.api.heads
    assert _status(front.send(_get(b"/fleet/applied"), hub)) == 200
    assert _seen(front.api.only()) == Identity(Role.HUB, "hub-2", hub.serial)


def test_a_host_gets_a_stream_in_both_directions_by_an_upgrade(
    front: Fronted, host: Client
) -> None:
    front.streams.answer(Answer(_SWITCH.encode() + b'{"ping":1}\n', then=End.HANG))
    with front.connect(host) as sock:
        sock.sendall(_STREAM)
        found = b""
        while not found.endswith(b"}\n"):
            found += sock.recv(65_536)
        head, _, rest = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert rest == b'{"ping":1}\n'
        request = front.streams.only()
        assert request.values("upgrade") == (UPGRADE.encode(),)
        assert _seen(request) == Identity(Role.HOST, "host-1", host.serial)
    assert not front.api.heads


def test_only_the_stream_route_becomes_a_tunnel(
    front: Fronted, host: Client, operator: Client
) -> None:
    switch = (b"Connection: Upgrade", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    forged = b"GET /v1/instances HTTP/1.1\r\nHost: hub\r\nConnection: close\r\nx-imdsproxy-role: operator\r\n\r\n"
    tunnel = Answer(_SWITCH.replace(UPGRADE, "websocket").encode(), then=End.CLOSE)
    for client, path in ((operator, b"/v1/instances"), (host, _BLOB)):
        for protocol in (b"websocket", b"h2c", UPGRADE.encode(), b"TLS/1.0"):
            front.forget()
            front.api.always(tunnel)
            lines = b"\r\n".join((*switch, b"Upgrade: " + protocol))
            data = b"GET " + path + b" HTTP/1.1\r\nHost: hub\r\n" + lines + b"\r\n\r\n"
            with front.connect(client) as sock:
                sock.sendall(data + forged)
                answer = read_to_end(sock)
            assert _status(answer) == 502, answer
            (request, *more) = front.api.heads
            assert not request.values("upgrade")
            assert b"upgrade" not in b"".join(request.values("connection")).lower()
            for one in more:
                assert _seen(one) != Identity(Role.OPERATOR, "root", "1")
    for data in (
        _STREAM.replace(UPGRADE.encode(), b"websocket"),
        _STREAM.replace(UPGRADE.encode(), UPGRADE.encode() + b", websocket"),
        _STREAM[:-2] + b"Upgrade: websocket\r\n\r\n",
        _STREAM.replace(b"Connection:", b"Upgrade: websocket\r\nConnection:"),
        _STREAM.replace(b"GET", b"POST"),
        _STREAM.replace(b"GET", b"CONNECT"),
        _STREAM[:-2] + b"Content-Length: 5\r\n\r\nhello",
        _STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ):
        with front.connect(host) as sock:
            sock.sendall(data)
            assert _status(sock.recv(65_536)) in {400, 405}, data
    assert not front.streams.heads


def test_no_request_is_smuggled_in_a_body(front: Fronted, host: Client) -> None:
    forged = b"x-imdsproxy-role: operator\r\nx-imdsproxy-name: a\r\nx-imdsproxy-serial: 1\r\n\r\n"
    inner = b"GET /v1/instances HTTP/1.1\r\nHost: hub\r\n" + forged
    length = b"Content-Length: %d" % len(inner)
    chunks = b"Transfer-Encoding: chunked"
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
    for lines, body in (
        ((length,), inner),
        ((b"Content-Length: 4", chunks), b"0\r\n\r\n" + inner),
        ((chunks, b"Content-Length: 4"), b"0\r\n\r\n" + inner),
        ((chunks, b"Transfer-Encoding: identity"), whole),
        ((b"Transfer-Encoding: xchunked", length), inner),
        ((b"Transfer_Encoding: chunked", length), inner),
        ((b"Transfer-Encoding:\x0bchunked", length), inner),
        ((b"Content-Length: 0", length), inner),
        ((b"Content-Length: +0",), inner),
        ((b"Content-Length: 0, %d" % len(inner),), inner),
        ((chunks,), b"0\r\n" + forged),
        ((chunks,), whole),
        ((b"Content-Length: 0",), inner),
        ((b"Expect: 100-continue", length), inner),
    ):  # fmt: skip
        front.forget()
        head = (b"POST /fleet/renew HTTP/1.1", b"Host: hub", *lines)
        with front.connect(host) as sock:
            sock.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)
            sock.settimeout(5)
            with contextlib.suppress(TimeoutError, OSError):
                sock.recv(65_536)
        for request in front.api.requests:
            assert request.target == b"/fleet/renew", (lines, request)
            assert _seen(request) == Identity(Role.HOST, "host-1", host.serial)
        assert not front.api.fragments, lines


def test_a_body_whose_size_is_not_known_is_taken_from_operators_only(
    front: Fronted, host: Client, operator: Client
) -> None:
    chunks, body = b"Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n"
    for client, path, status in (
        (operator, b"/v1/records", 200),
        (host, b"/fleet/renew", 400),
        (host, b"/fleet/leave", 400),
        (None, b"/fleet/enrol", 400),
    ):
        answer = front.send(_get(path, chunks, method=b"POST") + body, client)
        assert (path, _status(answer)) == (path, status)
    assert front.api.only().body == b"{}"
    assert _seen(front.api.only()) == Identity(Role.OPERATOR, "anna", operator.serial)


def test_one_address_can_try_some_tokens_a_minute_and_send_no_large_request(
    front: Fronted,
) -> None:
    context = client_context(front.certificates.ca_file)
    enrol = b"POST /fleet/enrol HTTP/1.1\r\nHost: hub\r\nContent-Length: %d\r\n\r\n"
    with context.wrap_socket(front.open("127.0.0.9"), server_hostname=ADDRESS) as sock:
        statuses: list[int] = []
        while len(statuses) < ENROLMENTS_A_MINUTE + 1:
            sock.sendall(enrol % 0)
            statuses.append(_status(_answer(sock)))
    assert statuses == [*[200] * ENROLMENTS_A_MINUTE, 429]
    assert len(front.api.requests) == ENROLMENTS_A_MINUTE
    with context.wrap_socket(front.open("127.0.0.10"), server_hostname=ADDRESS) as sock:
        sock.sendall(enrol % 0)
        assert _status(sock.recv(65_536)) == 200
    with context.wrap_socket(front.open("127.0.0.11"), server_hostname=ADDRESS) as sock:
        sock.sendall(enrol % 100_000)
        assert _status(sock.recv(65_536)) == 413


def test_one_address_has_few_connections_without_a_certificate_and_more_with_an_operators(
    front: Fronted, operator: Client
) -> None:
    with contextlib.ExitStack() as stack:
        answers: dict[Client | None, list[bytes]] = {}
        for client in (None, operator):
            context = client_context(front.certificates.ca_file, client)
            socks = [
                stack.enter_context(
                    context.wrap_socket(front.open("127.0.0.12"), server_hostname=ADDRESS)
                )
                for _ in range(ANONYMOUS + 1)
            ]
            answers[client] = []
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.sendall(b"GET /fleet/ca HTTP/1.1\r\nHost: hub\r\n\r\n")
                    answers[client].append(sock.recv(12))
        assert [len([one for one in found if one]) for found in answers.values()] == [
            ANONYMOUS,
            ANONYMOUS + 1,
        ]


def test_a_certificate_whose_names_are_ambiguous_or_could_end_a_header_is_refused(
    front: Fronted,
) -> None:
    for role, name, more in (
        ("operator", "a\nx-imdsproxy-scope: b", ()),
        ("operator", "a\r\n", ()),
        ("operator", "a\n", ()),
        ("operator", "", ()),
        ("root", "anna", ()),
        ("operator", "anna", (("OU", "host"),)),
        ("host", "anna", (("OU", "operator"),)),
        ("host", "host-1", (("CN", "host-2"),)),
        ("reader", "anna", (("O", "one"), ("O", "two"))),
        ("reader", "anna", (("O", "one\r\nx: y"),)),
    ):
        client = front.certificates.odd(("OU", role), *([("CN", name)] if name else []), *more)
        answers = [
            _status(front.send(_get(path), client))
            for path in (b"/v1/instances", b"/fleet/stream", b"/fleet/applied")
        ]
        assert answers == [401, 401, 401], (role, name, more)
    assert not front.api.heads


def test_a_session_is_not_resumed_so_that_a_certificate_is_verified_each_time(
    front: Fronted, operator: Client
) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client_context(front.certificates.ca_file, operator)
        context.maximum_version = version
        with front.connect(context=context) as first:
            first.sendall(_get())
            read_to_end(first)
            session = first.session
        with context.wrap_socket(front.open(), server_hostname=ADDRESS, session=session) as second:
            second.sendall(_get())
            read_to_end(second)
            assert not second.session_reused


def test_tls_is_1_2_or_later(front: Fronted) -> None:
    for version, good in (("1_1", False), ("1_2", True), ("1_3", True)):
        client = ("openssl", "s_client", f"-tls{version}", "-cipher", "ALL@SECLEVEL=0", "-connect")
        done = subprocess.run(
            (*client, f"{ADDRESS}:{front.port}"), input=b"", capture_output=True, check=False
        )
        assert (done.returncode == 0) is good, done
