"""What HAProxy makes of a guest's request and keeps of its answer: identity, methods, odd requests, conditions, cache.

By its real rules and no daemon, but for the last test. What is malformed is in test_hostile_guests.py and
test_nova_endpoints.py.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Final

import pytest

from imdsproxy.model.policy import Policy, TokenMode
from imdsproxy.model.wire import ONE_IN
from support.access_table import META, USER_DATA
from support.guest import IPV6, with_token
from support.haproxy_alone import Alone, Document, open_alone
from support.world import World

pytestmark = pytest.mark.root

_LEAF: Final = "/latest/meta-data/instance-id"
_PAST_THE_CACHE: Final = ("Cache-Control: no-cache",)
"""HAProxy's cache does not answer that: what is answered without the document server is kept beside it."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Alone]:
    with open_alone() as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    opened.documents.document = Document(b"OWN")
    return opened


# Who asks, and for what


def _forgeries(other: str) -> Iterator[Sequence[str]]:
    for name in ("instance", "network", "address", "revision", "turn"):
        value = {"instance": other, "network": "green", "address": "10.0.0.6"}.get(name, "x")
        yield (f"X-Imdsproxy-{name}: {value}",)
        yield (f"x-imdsproxy-{name}: {value}", f"X-IMDSPROXY-{name.upper()}: {value}")
        yield (f"X_Imdsproxy_{name.title()}: {value}",)
        yield (f"Connection: close, X-Imdsproxy-{name}", f"X-Imdsproxy-{name}: {value}")
    yield (f"X-Instance-ID: {other}", "X-Tenant-ID: p", "X-Instance-ID-Signature: 0")
    yield ("X-Forwarded-For: 10.0.0.6", "Forwarded: for=10.0.0.6", "X-Real-IP: 10.0.0.6")
    yield ("X-Metadata-Provider: x", "X-Neutron-Network-ID: green")
    yield ("Via: 1.1 x", "TE: trailers", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    yield ("Cookie: c", "Authorization: a", "If-None-Match: x", f"X_Instance_ID: {other}")


def test_no_header_changes_who_a_guest_is_and_only_known_ones_go_on(alone: Alone) -> None:
    alone.documents.document = Document(b"OWN", lifetime=False)
    allowed = {"accept": "a/b", "user-agent": "me", "range": "bytes=0-1"}
    lines = [f"{name}: {value}" for name, value in allowed.items()]
    record = alone.records["red"]
    identity = {
        "x-imdsproxy-address": "127.0.0.1",
        "x-imdsproxy-instance": "i-red",
        "x-imdsproxy-network": "red",
        "x-imdsproxy-revision": record.partition("|")[2],
    }
    for forged in _forgeries("i-green"):
        for target in (f"{META}?a=b", f"http://169.254.169.254{META}", META):
            assert alone.ask(target, headers=(*forged, *lines)).text == "i-red", forged
            first, *rest = alone.documents.heads[-1].decode().split("\r\n")
            assert first == f"GET {META} HTTP/1.1"
            fields = [line.partition(": ")[::2] for line in rest]
            assert len(fields) == len(dict(fields))
            named = dict(fields)
            # Whose turn it is does not depend on the request.
            assert named.pop("x-imdsproxy-turn") in {"0", "1"}
            assert {**allowed, **identity, "host": record} == named, forged


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND", "get", "X"])
def test_other_methods_are_refused(alone: Alone, method: str) -> None:
    target = "10.0.0.1:80" if method == "CONNECT" else USER_DATA
    for _ in range(2):
        # HAProxy itself refuses a CONNECT whose Host is another one.
        reply = alone.ask(target, method=method, host="10.0.0.1:80", kept=False)
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        # Once more by way of the resolver.
        alone.forget()


@pytest.mark.parametrize(
    "data",
    [
        b"GET /latest/user-data HTTP/1.0\r\n\r\n",
        b"GET /latest/user-data HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET http://elsewhere/latest/user-data HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
        b"GET http://elsewhere/latest/user-data HTTP/1.0\r\n\r\n",
        b"GET /latest/user-data?a=b&c=%2f HTTP/1.1\r\nHost: [fe80::a9fe:a9fe]\r\n\r\n",
        b"\r\nGET /latest/user-data HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /latest/user-data HTTP/1.1\r\nHost: x\r\n\r\n" * 5,
    ],
)
def test_an_unusual_request_reads_the_same_and_so_do_many_at_once(
    alone: Alone, data: bytes
) -> None:
    for _ in range(2):
        with alone.connect() as connection:
            connection.send(data)
            for _ in range(data.count(b"GET ")):
                assert connection.read().text == "i-red"
    assert alone.documents.asked == [USER_DATA]


_CONDITIONS: Final = (
    ("If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT",),
    ("If-None-Match: *",),
    ('if-none-match: "a", W/"b"', "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT"),
    ("If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT",),
    ('If-Match: "a"',),
    ('If-Range: "a"', "Range: bytes=0-1"),
)
_VALIDATORS: Final = {"etag", "last-modified", "age", "cache-control", "expires"}


@pytest.mark.parametrize("mode", TokenMode)
def test_no_condition_of_a_read_changes_its_answer(alone: Alone, mode: TokenMode) -> None:
    """A client that asks whether its copy still holds gets what holds now (ADR 39)."""
    token = with_token(alone.token(expires_at=int(time.time()) + 600))
    alone.have(Policy(tokens=mode))
    # Kept beside the cache, cached, and neither.
    documents = (Document(b"OWN"), Document(b"x" * 600), Document(b"OWN", lifetime=False))
    for number, document in enumerate(documents):
        alone.documents.document = document
        for path, method in product(
            (f"/latest/{number}", f"/openstack/{number}?x"), ("GET", "HEAD")
        ):
            plain = alone.ask(path, method=method, headers=token)
            assert (plain.status, bool(plain.body)) == (200, method == "GET")
            for condition in (*_CONDITIONS, ()) * 2:
                reply = alone.ask(path, method=method, headers=(*token, *condition))
                assert (reply.status, reply.body) == (200, plain.body), (path, method, condition)
                assert reply.headers["content-length"] == plain.headers["content-length"]
                assert not _VALIDATORS & reply.headers.keys(), (path, method, condition)


@pytest.mark.parametrize(
    "body",
    [b"", b"a\r\nb\rc\n\n", bytes(range(256)) * 40, bytes(range(256)) * (1 << 13), bytes(range(256)) * (1 << 16)],
    ids=["nothing", "line ends", "every byte", "more than is cached", "16 MiB"],
)  # fmt: skip
def test_a_document_comes_byte_for_byte(alone: Alone, body: bytes) -> None:
    alone.documents.document = Document(body, content_type="application/octet-stream")
    for _ in range(2):
        reply = alone.ask(USER_DATA, kept=False)
        assert (reply.status, reply.body) == (200, body)
        assert reply.headers["content-length"] == str(len(body))


# Whose answer


def test_no_request_reads_what_another_instance_left_in_the_cache(alone: Alone) -> None:
    hosts = ["169.254.169.254", "anything", *alone.records.values()]
    asked = [
        (f"{start}{target}", host)
        for host in hosts
        for start in ("", f"http://{host}", f"https://{host}")
        for target in (USER_DATA, f"{USER_DATA}?x=1", f"/{USER_DATA}")
    ]
    asked += [
        (f"{start}/{record}{USER_DATA}", "169.254.169.254")
        for record in alone.records.values()
        for start in ("", f"http://{record}")
    ]
    # The same of what is kept beside the cache.
    record = alone.records["red"]
    short = (f"{_LEAF}|{record}", f"{_LEAF}|{record}|", f"{_LEAF}?|{record}", "0", "/0", "/12")
    asked += [(path, "169.254.169.254") for path in (_LEAF, *short)]
    for _ in range(2):
        for target, host in asked:
            for network in alone.records:
                reply = alone.ask(target, network, host=host, kept=False)
                # Where target and Host differ HAProxy refuses; `|` is no part of a host's name.
                refused = reply.status == 400 and ("|" in f"{host}{target}" or target == "0")
                assert refused or reply.text == f"i-{network}", (target, host)
    assert alone.ask(f"http://elsewhere{USER_DATA}", host="x", kept=False).status == 400


@pytest.mark.parametrize("word", ["", "+1-ooo---::0:64|"], ids=["no policy", "tokens off"])
def test_a_guest_is_told_nothing_of_our_cache(word: str) -> None:
    # Some are chosen to be counted, and go another way.
    with open_alone(count_reads=ONE_IN) as alone:
        alone.renew()
        alone.write("red", f"{word}{alone.records['red']}")
        for path in (USER_DATA, _LEAF) * 100:
            reply = alone.ask(path)
            assert reply.status == 200
            assert not {"cache-control", "age"} & set(reply.headers)
            assert "imdsproxy" not in reply.head.decode().lower()


# Short documents, which HAProxy keeps beside its cache


def _kept(alone: Alone, path: str) -> bool:
    """Whether the second read is answered, past the cache, without the document server."""
    alone.ask(path, kept=False)
    before = len(alone.documents.asked)
    alone.ask(path, headers=_PAST_THE_CACHE, kept=False)
    return len(alone.documents.asked) == before


def test_a_short_line_below_latest_is_kept_and_comes_as_it_came_at_first(alone: Alone) -> None:
    first = alone.ask(_LEAF)
    assert _kept(alone, _LEAF)
    again = alone.ask(_LEAF, headers=_PAST_THE_CACHE)
    assert (again.status, again.body) == (first.status, first.body) == (200, b"i-red")
    expected = {"content-type": Document().content_type, "content-length": "5"}
    assert again.headers == first.headers == expected
    head = alone.ask(_LEAF, method="HEAD", headers=_PAST_THE_CACHE)
    assert (head.headers, head.body) == (first.headers, b"")
    assert alone.documents.asked.count(_LEAF) == 1


@pytest.mark.parametrize(
    ("document", "path"),
    [
        # HAProxy could not give it back as it was.
        (Document(lifetime=False), _LEAF),
        (Document(status="404 Not Found"), _LEAF),
        (Document(content_type="application/octet-stream"), _LEAF),
        *((Document(body), _LEAF) for body in (b"", b"two\nlines", b"its end\n", b"\xc3\xa4", b"nul\0", b"x" * 257)),
        # Only one spelling is kept.
        *((Document(), path) for path in ("/2009-04-04/meta-data/instance-id", "/latest//meta-data",
                                          "/latest/meta-data/", "/latest/%61", "/latest/../x")),
    ],
    ids=str,
)  # fmt: skip
def test_no_other_document_and_no_other_spelling_is_kept(
    alone: Alone, document: Document, path: str
) -> None:
    alone.documents.document = document
    assert not _kept(alone, path)


def test_other_methods_and_tokens_are_not_answered_by_what_is_kept(alone: Alone) -> None:
    assert _kept(alone, _LEAF)
    before, record = len(alone.documents.asked), alone.records["red"]
    assert alone.ask(_LEAF, headers=with_token("x")).status == 401
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        alone.ask(_LEAF, method=method)
    assert len(alone.documents.asked) == before + 4
    for word, status in (
        ("+1trrr--b:::64|", 401),
        ("+0tooo---:::64|", 403),
        ("+1tooog--:::64|", 403),
    ):
        alone.write("red", f"{word}{record}")
        assert alone.ask(_LEAF, headers=("Via: 1.1 x",)).status == status
    alone.write("red", "!")
    assert alone.ask(_LEAF).status == 503


@pytest.mark.parametrize("word", ["", "+1tooo---::0:64|", "+1-ooo---::0:64|"])
def test_a_kept_connection_gets_what_is_kept_for_whom_it_is_now(alone: Alone, word: str) -> None:
    revision = f"r{len(word)}{word[2:3]}"
    with alone.connect() as connection:
        for number in range(6):
            name = f"i-{number % 2}"
            alone.write("red", f"{word}{name}|{revision}")
            for _ in range(3):
                assert connection.request(_LEAF).text == name
    assert alone.documents.asked.count(_LEAF) == 2
    alone.documents.document = Document(b"new")
    alone.write("red", f"{word}i-1|{revision}2")
    assert alone.ask(_LEAF).text == "new"


def test_a_body_on_a_read_is_not_taken_for_the_next_request(alone: Alone) -> None:
    assert _kept(alone, _LEAF)
    before = len(alone.documents.asked)
    with alone.connect() as connection:
        connection.request(_LEAF, body=b"GET /latest/smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.request(_LEAF).text == "i-red"
        connection.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert connection.socket.recv(1) == b""
    assert len(alone.documents.asked) == before


def test_what_is_kept_has_bounds_however_much_is_read(alone: Alone) -> None:
    with alone.connect() as connection:
        for number in range(1500):
            assert connection.request(f"/latest/x{number}").status == 200
    lines = alone.command(f"show map {alone.directory}/short.map").split()[1::3]
    documents = [line for line in lines if line.startswith("/")]
    assert 128 < len(documents) <= 256
    assert len(lines) <= 512


# With a daemon


def test_repeated_reads_never_reach_python_and_meta_data_json_always_does(world: World) -> None:
    world.settled()
    targets = (
        *(USER_DATA, "/latest/meta-data/", _LEAF, "/nocloud/meta-data"),
        *("/openstack/latest/network_data.json", "/openstack/latest/user_data"),
    )
    first = {(guest, target): guest.ask(target) for guest in world.everybody for target in targets}
    seeds = {json.loads(world.red.ask(META).body)["random_seed"] for _ in range(5)}
    assert len(seeds) == 5
    pids = world.pids()
    for pid in (pids.controller, pids.documents, *pids.document_workers):
        os.kill(pid, signal.SIGSTOP)
    for (guest, target), before in first.items():
        for to in ("169.254.169.254", IPV6):
            after = guest.ask(target, to=to)
            assert (after.status, after.body) == (200, before.body), target
        assert guest.ask(target, method="HEAD").status == 200
