"""What a guest's request is when it arrives at the agent's socket, and what the guest gets."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from support.forgeries import ENCODED_PATHS, FORGERIES, IDENTITY_HEADERS, EncodedPath, Forgery
from support.guest import IPV4, IPV6, Lost, Reply
from support.lab import until
from support.namespace_proxy import NETWORK, Place, open_place
from support.recorder import (
    Answer,
    End,
    Received,
    close_without_a_byte,
    garbage,
    half,
    reply,
    reset,
)

pytestmark = pytest.mark.root

_IDENTITY = (b"x-neutron-network-id", b"x-neutron-router-id", b"x-forwarded-for")
_FORGED = {
    b"upgrade",
    *(
        name.lower().encode()
        for name in IDENTITY_HEADERS
        if name.lower().startswith(
            ("x-instance", "x-tenant", "x-metadata", "x-ovn", "x-imdsproxy", "x-neutron-router")
        )
    ),
}
_OURS = (
    b"x-neutron-network-id: " + NETWORK.encode(),
    b"x-forwarded-for: 10.0.0.5",
    b"connection: close",
)
_BINARY = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def shared() -> Iterator[Place]:
    with open_place() as place:
        place.start("--metadata_proxy_user=nobody", "--metadata_proxy_group=nogroup")
        yield place


@pytest.fixture
def place(shared: Place) -> Place:
    """A network's proxy in the background, as an unprivileged account."""
    if shared.recorder._accepting is None:
        shared.recorder.listen()
    shared.recorder.forget()
    return shared


def identity(request: Received) -> dict[bytes, list[bytes]]:
    """What a request says of whose it is."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        if name.lower() in _IDENTITY:
            found.setdefault(name.lower(), []).append(value)
    return found


def ours(address: str = "10.0.0.5") -> dict[bytes, list[bytes]]:
    return {b"x-neutron-network-id": [NETWORK.encode()], b"x-forwarded-for": [address.encode()]}


def test_a_request_arrives_as_it_was_with_the_proxys_word_on_whose_it_is(place: Place) -> None:
    found = place.guest.ask(
        "/openstack/latest/meta_data.json?a=b%20c",
        headers=["User-Agent: cloud-init/25.1", "Accept: */*", "X-aws-ec2-metadata-token: t==",
                 'If-None-Match: "a"', "Cookie: c"],
    )  # fmt: skip
    received = place.recorder.only()
    assert received.request_line == b"GET /openstack/latest/meta_data.json?a=b%20c HTTP/1.1"
    assert received.lines == (
        b"host: 169.254.169.254",
        b"user-agent: cloud-init/25.1",
        b"accept: */*",
        b"x-aws-ec2-metadata-token: t==",
        b'if-none-match: "a"',
        b"cookie: c",
        *_OURS,
    )
    assert received.raw_body == b""
    assert (found.status, found.body) == (200, b"/openstack/latest/meta_data.json?a=b%20c")


def test_a_router_is_named_by_its_own_header() -> None:
    with open_place() as place:
        words = [word.replace("network_id", "router_id") for word in place.words()]
        assert place.run(*words).status == 0
        place.guest.ask("/", headers=[f"X-Neutron-Network-ID: {NETWORK}"])
        assert identity(place.recorder.only()) == {
            b"x-neutron-router-id": [NETWORK.encode()],
            b"x-forwarded-for": [b"10.0.0.5"],
        }


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "FROB"]
)
def test_every_method_passes_with_its_body(place: Place, method: str) -> None:
    body = b"" if method in ("HEAD", "TRACE") else _BINARY[:5000]
    found = place.guest.ask("/a", method=method, body=body)
    assert (place.recorder.only().method, place.recorder.only().body) == (method, body)
    assert found.status == 200


def test_a_body_in_chunks_passes_in_chunks(place: Place) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"one", _BINARY, b"\r\n"))
    place.guest.raw(
        b"POST /openstack/2013-04-04/password HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunks
        + b"0\r\n\r\n"
    )
    received = place.recorder.only()
    assert received.body == b"one" + _BINARY + b"\r\n"
    assert received.values("transfer-encoding") == (b"chunked",)
    assert identity(received) == ours()


def test_two_guests_behind_one_proxy_are_kept_apart_on_one_connection_each(place: Place) -> None:
    other = place.lab.guest("blue", 6)
    with place.guest.connect() as one, other.connect() as two:
        for _ in range(3):
            one.request("/one")
            two.request("/two")
    found = {
        (one.target, tuple(identity(one)[b"x-forwarded-for"])) for one in place.recorder.requests
    }
    assert found == {(b"/one", (b"10.0.0.5",)), (b"/two", (b"10.0.0.6",))}
    assert len(place.recorder.requests) == 6


@pytest.mark.parametrize(
    "answer",
    [
        reply(_BINARY, headers=["Content-Type: application/octet-stream", "X-A: b", "X-A: c", "Vary: *"]),
        reply(gzip.compress(b"user data" * 100), headers=["Content-Encoding: gzip"]),
        reply(b"\xff\xfe not UTF-8", headers=["Content-Type: text/plain; charset=utf-8", 'ETag: "a"']),
        reply(_BINARY, chunked=True),
        reply(b"until the end", with_length=False, then=End.CLOSE),
        reply(b"", status=204, headers=[], with_length=False),
        *(reply(b"its own words", status=status) for status in (201, 400, 403, 404, 409, 500, 502, 503, 504)),
    ],
    ids=lambda answer: answer.data[9:28].decode("latin-1"),
)  # fmt: skip
def test_an_answer_passes_as_it_is(place: Place, answer: Answer) -> None:
    place.recorder.answer(answer)
    found = place.guest.ask("/")
    head, _, sent = answer.data.partition(b"\r\n\r\n")
    assert found.head.split(b"\r\n")[0] == head.split(b"\r\n")[0]
    assert lines_of(found) == {
        line.partition(":")[0].lower() + line[line.index(":") :]
        for line in head.decode("latin-1").split("\r\n")[1:]
        if not line.startswith("Connection")
    }
    assert found.body == (_BINARY if b"chunked" in head else sent)


def lines_of(found: Reply) -> set[str]:
    lines = found.head.decode("latin-1").split("\r\n")[1:]
    return {line for line in lines if not line.startswith("connection:")}


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name)
def test_whatever_a_guest_forges_only_the_proxy_says_whose_a_request_is(
    place: Place, forgery: Forgery
) -> None:
    # What is refused without a word, or waits for more, is lost: what matters is what arrived.
    with contextlib.suppress(Lost):
        place.guest.raw(forgery.data, timeout_s=10 if forgery.seen else 1)
    assert place.recorder.heads or not forgery.seen
    # The second of two requests may still be on its way, and is not to arrive in the next test.
    until(lambda: len(place.recorder.heads) >= len(forgery.seen), what="all requests of it")
    for received in place.recorder.heads:
        assert identity(received) == ours()
        names = {name.lower().replace(b"_", b"-") for name, _ in received.headers}
        assert names & _FORGED == set()
        assert all(b"_" not in name for name, _ in received.headers)
        assert received.values("connection") in ((b"close",), (b"keep-alive",), ())


@pytest.mark.parametrize(
    "path", [path for path in ENCODED_PATHS if path.target == path.arrives], ids=lambda path: path.name
)  # fmt: skip
def test_a_target_passes_undecoded(place: Place, path: EncodedPath) -> None:
    place.guest.raw(path.data, method=path.method)
    assert place.recorder.only().target == path.target


def test_a_guest_that_asks_over_ipv6_is_known_by_that_address(place: Place) -> None:
    place.guest.ask("/", to=IPV6, source=place.guest.link_local)
    place.guest.ask("/", to=IPV6, source="2001:db8::5")
    place.guest.ask("/", to=IPV4)
    addresses = [one.values("x-forwarded-for")[0].decode() for one in place.recorder.requests]
    assert [ip_address(one) for one in addresses] == [
        ip_address(one) for one in (place.guest.link_local, "2001:db8::5", "10.0.0.5")
    ]


def test_a_socket_without_a_listener_is_503_with_retry_after(place: Place) -> None:
    place.recorder.refuse()
    found = place.guest.ask("/latest/meta-data/")
    assert (found.status, found.headers["retry-after"], found.body) == (503, "1", b"")
    assert found.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "answer",
    [close_without_a_byte(), reset(), garbage(), half(reply(b"x"), of=12)],
    ids=["closed", "reset", "garbage", "half a head"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_agent_that_does_not_answer_is_503_and_asked_once(
    place: Place, answer: Answer, method: str
) -> None:
    place.recorder.answer(answer)
    found = place.guest.ask("/", method=method, body=b"b" if method == "POST" else b"")
    assert (found.status, found.headers["retry-after"]) == (503, "1")
    assert len(place.recorder.requests) == 1


def test_no_tunnel_leads_past_the_rules(place: Place) -> None:
    refused = place.guest.raw(b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n")
    assert (refused.status, refused.headers["allow"][:9]) == (405, "GET, HEAD")
    place.recorder.answer(
        Answer(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
    )
    with place.guest.connect() as connection:
        found = connection.request("/", headers=["Upgrade: x", "Connection: Upgrade"])
        assert (found.status, found.headers["retry-after"]) == (503, "1")
    assert place.recorder.only().values("upgrade") == ()


def test_ipv4_alone_is_served_where_devices_get_no_ipv6() -> None:
    with open_place() as place:
        setting = "net.ipv6.conf.default.disable_ipv6=1"
        assert place.run("-q", "-w", setting, program=["/usr/sbin/sysctl"]).status == 0
        place.start()
        assert "bind 0.0.0.0:80 " in place.config.read_text()
        place.guest.ask("/")
        assert identity(place.recorder.only()) == ours()
        assert not place.guest.reaches(to=IPV6)
