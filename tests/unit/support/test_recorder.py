"""The stand-in for Nova keeps what comes, byte for byte, and fails in every way it is told to."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.certificates import make_authority, server_context
from support.guest import Connection
from support.lab import until
from support.recorder import (
    Answer,
    Recorder,
    Stage,
    reply,
    reset,
    signature_of,
)

_GET: Final = b"GET /a%2Fb?c HTTP/1.1\r\nHost: x\r\n\r\n"
_POST: Final = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as one:
        yield one


def _connect(recorder: Recorder, timeout_s: float = 10) -> Connection:
    return Connection(socket.create_connection((recorder.address, recorder.port), timeout_s))


def _sent(recorder: Recorder, data: bytes) -> bytes:
    """What comes back until the connection ends."""
    with _connect(recorder) as connection:
        connection.send(data)
        return connection.everything()


def test_a_request_is_kept_as_it_came(recorder: Recorder) -> None:
    head = b"POST  /\xff%2F?  HTTP/1.1\r\nhOsT: x\r\nB:\t \xe4 \r\nA:\r\nB: 2\r\n folded\r\nContent-Length: 3\r\n"
    with _connect(recorder) as connection:
        connection.send(head + b"\r\na\0b")
        assert connection.read().status == 200
    seen = recorder.only()
    assert seen.head == head
    assert seen.lines == (
        b"hOsT: x",
        b"B:\t \xe4 ",
        b"A:",
        b"B: 2",
        b" folded",
        b"Content-Length: 3",
    )
    assert seen.headers[:3] == ((b"hOsT", b"x"), (b"B", b"\xe4"), (b"A", b""))
    assert seen.values("b") == (b"\xe4", b"2")
    assert (seen.method, seen.body, seen.raw_body) == ("POST", b"a\0b", b"a\0b")
    assert not seen.chunked


def test_chunks_and_trailers_are_kept(recorder: Recorder) -> None:
    raw = b"3;x=y\r\nabc\r\n02\r\nde\r\n0\r\nX-Instance-ID: x\r\nY:z\r\n\r\n"
    with _connect(recorder) as connection:
        connection.send(b"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n" + raw)
        assert connection.read().status == 200
    seen = recorder.only()
    assert seen.chunked
    assert (seen.raw_body, seen.body) == (raw, b"abcde")
    assert seen.trailers == (b"X-Instance-ID: x", b"Y:z")


def test_half_a_request_is_a_fragment(recorder: Recorder) -> None:
    with _connect(recorder) as connection:
        connection.send(b"GET / HT")
    until(lambda: recorder.fragments == [b"GET / HT"])
    assert not recorder.heads


def test_a_body_that_never_comes_leaves_a_head(recorder: Recorder) -> None:
    with _connect(recorder) as connection:
        connection.send(_POST + b"ab")
    until(lambda: len(recorder.heads) == 1)
    assert not recorder.requests


def test_answers_are_sent_as_written(recorder: Recorder) -> None:
    body = bytes(range(256)) * 4096
    recorder.answer(
        reply(body, headers=["Content-Encoding: gzip", "X-Ä: ö"]),
        reply(b"", status=204, with_length=False),
        reply(b"abcd", chunked=True),
        Answer(b"HTTP/1.1 404 Nope\r\ncontent-length: 0\r\n\r\n"),
    )
    with _connect(recorder) as connection:
        connection.send(_GET * 5)
        first = connection.read()
        assert first.body == body
        assert first.head == (
            f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nX-Ä: ö\r\nContent-Length: {len(body)}"
        ).encode("latin-1")
        assert connection.read().status == 204
        assert connection.read().body == b"abcd"
        assert connection.read().head == b"HTTP/1.1 404 Nope\r\ncontent-length: 0"
        assert connection.read().body == b"/a%2Fb?c"


@pytest.mark.parametrize("at", list(Stage))
def test_it_resets_before_or_after_it_has_read_the_body(recorder: Recorder, at: Stage) -> None:
    recorder.answer(reset(at=at))
    with _connect(recorder) as connection:
        connection.send(_POST + (b"abcd" if at is Stage.REQUEST else b""))
        with pytest.raises(ConnectionResetError):
            connection.socket.recv(1)
    assert len(recorder.heads) == 1
    assert len(recorder.requests) == (1 if at is Stage.REQUEST else 0)


def _signed(secret: str, *more: str, accept: str = "*/*") -> bytes:
    instance = "11111111-1111-4111-8111-111111111111"
    lines = [f"Accept: {accept}", f"X-Instance-ID: {instance}"]
    lines += [f"X-Instance-ID-Signature: {signature_of(secret, instance)}", *more]
    return ("\r\n".join(["GET / HTTP/1.1", *lines]) + "\r\n\r\n").encode()


def test_several_of_them_have_secrets_of_their_own() -> None:
    with Recorder(secret="one") as first, Recorder(secret="two") as second:
        for recorder, right, wrong in ((first, "one", "two"), (second, "two", "one")):
            with _connect(recorder) as connection:
                connection.send(_signed(right) + _signed(wrong))
                assert connection.read().status == 200
                refused = connection.read()
                assert refused.status == 403
                assert refused.headers["content-type"] == "text/html; charset=UTF-8"
                assert len(refused.body) == 154
                assert b"Invalid proxy request signature." in refused.body


def test_two_instances_or_signatures_in_one_request_are_no_signature() -> None:
    good = signature_of("one", "11111111-1111-4111-8111-111111111111")
    with Recorder(secret="one") as recorder, _connect(recorder) as connection:
        connection.send(_signed("one", "X-Instance-ID: x"))
        assert connection.read().status == 403
        connection.send(_signed("one", f"x-instance-id-signature: {good}"))
        assert connection.read().status == 403


def test_it_speaks_tls_and_asks_clients_for_a_certificate(tmp_path: Path) -> None:
    authority = make_authority(tmp_path, "authority")
    server = authority.issue("server", names=["IP:127.0.0.1"])
    client = authority.issue("client")
    with Recorder(tls=server_context(server, clients=authority)) as recorder:
        assert recorder.url == f"https://127.0.0.1:{recorder.port}"
        context = ssl.create_default_context(cafile=str(authority.ca_file))
        assert _is_refused(recorder, context)
        context.load_cert_chain(client.bundle)
        assert b" 200 OK" in _ask_by_tls(recorder, context)
        assert recorder.only().target == b"/a%2Fb?c"


def _is_refused(recorder: Recorder, context: ssl.SSLContext) -> bool:
    # In TLS 1.3 a client learns of it after its handshake: by an alert, or by nothing but the end.
    try:
        return _ask_by_tls(recorder, context) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def _ask_by_tls(recorder: Recorder, context: ssl.SSLContext) -> bytes:
    address = (recorder.address, recorder.port)
    with (
        socket.create_connection(address, 10) as plain,
        context.wrap_socket(plain, server_hostname=recorder.address) as wrapped,
    ):
        wrapped.sendall(_GET)
        return wrapped.recv(1000)
