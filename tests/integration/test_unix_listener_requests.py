"""Requests on the socket of the listener `unix`: whose they are, and which are refused.

HAProxy's rules alone decide: no daemon is there, as for every guest that is known.
"""

from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.model.addresses import normalise_address
from imdsproxy.model.entities import InstanceId, IpAddress
from imdsproxy.model.wire import NovaRecord, render_map_value
from support.agent_socket import NETWORK, OVN, ROUTER
from support.guest import Reply
from support.haproxy_alone import Alone, open_alone
from support.nova_world import INSTANCES

pytestmark = pytest.mark.root

_FROM: Final = "X-Forwarded-For: 10.0.0.5"
_RED: Final = f"{NETWORK}: red"
_WHO: Final = (
    b"exactly one of X-Neutron-Network-ID, X-Neutron-Router-ID and X-OVN-Network-ID is needed"
)
_WHENCE: Final = b"exactly one X-Forwarded-For with one address is needed"
_ADDRESSES: Final = ("10.0.0.5", "2001:db8::5", "fe80::f816:3eff:fe00:5")


def _value(network: str) -> str:
    return render_map_value(NovaRecord("default", InstanceId(f"i-{network}"), "p", ("a" * 64,)))


@pytest.fixture(scope="module")
def opened() -> Iterator[Alone]:
    with open_alone(nova=True) as alone:
        for network in INSTANCES:
            for address in _ADDRESSES:
                entry = f"{network}/{address} {_value(network)}"
                alone.command(f"add map {alone.directory}/base.map {entry}")
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.documents.heads = []
    return opened


def _ask(alone: Alone, *lines: str, target: str = "/openstack", method: str = "GET") -> Reply:
    with alone.connect(way="agents") as connection:
        return connection.request(target, method=method, headers=lines)


def _seen(alone: Alone) -> list[tuple[str, str]]:
    """Instance and address of each request that was let through."""
    found = []
    for head in alone.documents.heads:
        lines = dict(one.partition(": ")[::2] for one in head.decode().lower().split("\r\n"))
        found.append((lines["x-instance-id"], lines["x-forwarded-for"]))
    return found


def _refused(alone: Alone, answer: Reply, why: bytes, lines: object = "") -> None:
    assert (answer.status, answer.body) == (400, why), lines
    assert answer.headers["content-type"] == "text/plain"
    assert not answer.closes
    assert alone.documents.heads == []


# Whose network


@pytest.mark.parametrize("kind", [NETWORK, ROUTER, OVN, NETWORK.lower(), OVN.upper()])
@pytest.mark.parametrize("network", sorted(INSTANCES))
def test_each_of_the_three_ids_names_the_network(alone: Alone, network: str, kind: str) -> None:
    # A spelling with underscores is deleted and counts for nothing.
    forged = ("X_Neutron_Network_ID: blue", "X_OVN_Network_ID: blue", "X_Forwarded_For: 10.0.0.6")
    assert _ask(alone, f"{kind}: {network}", _FROM, *forged).status == 200
    assert _seen(alone) == [(f"i-{network}", "10.0.0.5")]


def test_anything_but_exactly_one_id_is_400(alone: Alone) -> None:
    for lines in (
        (),
        (_RED, _RED),
        (_RED, f"{NETWORK}: green"),
        (_RED, f"{ROUTER}: red"),
        (_RED, f"{OVN}: red"),
        (f"{OVN}: green", f"{OVN}: red"),
        (f"{ROUTER}: green", f"{OVN}: red"),
        (_RED, f"{ROUTER}: red", f"{OVN}: red"),
        (f"{NETWORK}:", _RED),
        (f"{NETWORK.replace('-', '_')}: red",),
        ("X-Instance-ID: red",),
        *(
            (f"{NETWORK}: {value}",)
            for value in (
                *("", "red, green", "red,", "red green", "../red", "red/10.0.0.5", ".red"),
                *("r\xe4d", "red%00", "a" * 65, "a" * 8000),
            )
        ),
    ):
        _refused(alone, _ask(alone, *lines, _FROM), _WHO, lines)


# Whose address


_SPELLED: Final = {
    "10.0.0.5": (
        *("10.0.0.5", " \t10.0.0.5 ", "::ffff:10.0.0.5", "::FFFF:10.0.0.5", "::FFFF:a00:5"),
        *("::ffff:0a00:0005", "0:0:0:0:0:ffff:a00:5", "0:0::0:ffff:a00:5"),
        *("0000:0000:0000:0000:0000:FFFF:0A00:0005", "0::ffff:10.0.0.5"),
    ),
    "2001:db8::5": (
        *("2001:db8::5", "2001:DB8::5", "2001:0db8:0000:0000:0000:0000:0000:0005"),
        "2001:db8:0:0::0.0.0.5",
    ),
    "fe80::f816:3eff:fe00:5": ("FE80:0:0:0:F816:3EFF:FE00:5",),
}


@pytest.mark.parametrize("address", _SPELLED)
def test_an_address_is_one_however_a_proxy_spells_it(alone: Alone, address: str) -> None:
    for spelled in _SPELLED[address]:
        assert _ask(alone, _RED, f"X-Forwarded-For: {spelled}").status == 200, spelled
    assert _seen(alone) == [("i-red", address)] * len(_SPELLED[address])


def test_anything_but_exactly_one_address_is_400(alone: Alone) -> None:
    for lines in (
        (),
        (_FROM, _FROM),
        (_FROM, "X-Forwarded-For: 10.0.0.6"),
        ("X-Forwarded-For:", _FROM),
        ("X-Forwarded-For:",),
        *(
            (f"X-Forwarded-For: {value}",)
            for value in (
                *("10.0.0.5, 10.0.0.6", "10.0.0.5,10.0.0.6", "10.0.0.5,", ",10.0.0.5", "10.0.0.5;"),
                *("10.0.0.5 x", "10.0.0.5:80", "10.0.0.5/32", '"10.0.0.5"', "[10.0.0.5]"),
                *("10.0.0", "10.0.0.5.", "10.0.0.5.6", "010.0.0.5", "10.0.0.05", "10.0.0.256"),
                *("0x0a.0.0.5", "167772165", "10..0.5", "-10.0.0.5", "+10.0.0.5", "*", "-"),
                *("localhost", "unknown", "_hidden", "for=10.0.0.5", "10.0.0.5%eth0", "\xb9"),
                *("[2001:db8::5]", "[2001:db8::5]:80", "2001:db8::5%eth0", "2001:db8::5%25eth0"),
                *("2001:db8::5:", "2001:db8::5/128", "2001:db8::5, 10.0.0.5", "2001:db8:::5"),
                *("2001:db8::5::", "2001:db8::10.0.0.256", "fe80::1%2", "12345::", "1:2:3:4:5:6:7"),
                # These are addresses of IPv6, and HAProxy would take them for IPv4's.
                *("::10.0.0.5", "::a00:5", "0:0:0:0:0:0:a00:5", "::", "::1"),
                *("::ffff:10.0.0.05", "::ffff:10.0.0.256", "::ffff:10.0.0.5:80", "a" * 4000),
            )
        ),
    ):
        _refused(alone, _ask(alone, _RED, *lines), _WHENCE, lines)


_FORMS: Final = (
    *("{}", "0{}", "::{}", "0::ffff:{}", "::FFFF:{}", "::ffff:0:{}", "1::ffff:{}", "64:ff9b::{}"),
    *("0:0:0:0:0:0:{}", "{}.", "{}:80", "[{}]", "{}%1", "2002:{}", "{}, 10.0.0.5"),
)
_ODD: Final = st.text("0123456789abfF:.,/% []", max_size=30)


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(
    st.one_of(st.ip_addresses(), st.ip_addresses(v=4)),
    st.one_of(st.just("{}"), st.sampled_from(_FORMS), _ODD),
    st.sampled_from([str, lambda address: address.exploded.upper()]),
)
def test_every_address_is_read_as_what_it_is_or_refused(
    opened: Alone, address: IpAddress, form: str, spell: Callable[[IpAddress], str]
) -> None:
    opened.documents.heads = []
    text = form.format(spell(address)) if form in _FORMS else form
    try:
        found = None if "%" in text else normalise_address(ip_address(text.strip()))
    except ValueError:
        found = None
    for known in {str(address), str(found or address)}:
        opened.command(f"add map {opened.directory}/base.map red/{known} {_value('red')}")
    status = _ask(opened, _RED, f"X-Forwarded-For: {text}").status
    if found is None or (found.version == 6 and not int(found) >> 32):
        # Of the latter HAProxy would make addresses of IPv4.
        assert (status, _seen(opened)) == (400, [])
    elif text.strip().startswith("2002:") and status == 503:
        # Left as it is spelled, for the resolver.
        assert _seen(opened) == []
    else:
        assert (status, _seen(opened)) == (200, [("i-red", str(found))])


def test_who_is_unknown_is_asked_of_the_resolver(alone: Alone) -> None:
    # These end like an IPv4 address.
    embedded = ("::ffff:0:10.0.0.5", "64:ff9b::10.0.0.5", "1::ffff:10.0.0.5", "::fffe:10.0.0.5")
    unknown = [("red", one) for one in (*embedded, "2002:a00:5::c")]
    for network, spelled in [("a" * 64, "10.0.0.5"), *unknown]:
        # Which is not there.
        answer = _ask(alone, f"{NETWORK}: {network}", f"X-Forwarded-For: {spelled}")
        assert answer.status == 503, spelled
    assert alone.documents.heads == []


@pytest.mark.parametrize(
    ("target", "status"), [("/latest/api/token", 403), ("/latest/user-data", 400)]
)
def test_a_second_forwarded_for_is_the_guests_own(alone: Alone, target: str, status: int) -> None:
    """The proxy's is the first; a guest behind a proxy of its own gets no token (LP#1865036 is the same trick)."""
    ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60"
    answer = _ask(alone, _FROM, ttl, _RED, _FROM, target=target, method="PUT")
    assert (answer.status, ttl.partition(":")[0].lower() in answer.headers) == (status, False)


# Connections


def test_a_connection_carries_requests_of_many_guests_and_keeps_nothing_of_the_one_before(
    alone: Alone,
) -> None:
    asked = [
        ((_RED, _FROM), "red"),
        ((f"{OVN}: green", _FROM), "green"),
        ((_FROM,), None),
        ((f"{ROUTER}: red", "X-Forwarded-For: 2001:db8::5"), "red"),
        ((_RED,), None),
        ((f"{NETWORK}: green", "X-Forwarded-For: ::ffff:10.0.0.5"), "green"),
        ((f"{NETWORK}:", _FROM), None),
        ((_RED, "X-Forwarded-For: x"), None),
        ((_RED, _FROM), "red"),
    ]
    with alone.connect(way="agents") as connection:
        for lines, owner in asked:
            status = connection.request("/openstack", headers=lines).status
            assert status == (400 if owner is None else 200), lines
        # Sent without waiting, each is its own.
        for lines, _ in asked:
            head = "\r\n".join(("GET /openstack HTTP/1.1", "Host: x", *lines))
            connection.send(f"{head}\r\n\r\n".encode())
        statuses = [connection.read().status for _ in asked]
    assert statuses == [400 if owner is None else 200 for _, owner in asked]
    assert [one for one, _ in _seen(alone)] == [f"i-{owner}" for _, owner in asked if owner] * 2


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000,
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["short", "long", "chunked"],
)
def test_a_request_that_is_refused_is_read_and_answered_to_its_end(
    alone: Alone, body: bytes
) -> None:
    with alone.connect(way="agents") as connection:
        connection.send(f"POST /openstack HTTP/1.1\r\nHost: x\r\n{_FROM}\r\n".encode() + body)
        _refused(alone, connection.read(), _WHO)
        head = connection.request("/openstack", method="HEAD", headers=(_FROM,))
        assert (head.status, head.headers["content-length"]) == (400, str(len(_WHO)))
        assert connection.request("/openstack", headers=(_RED, _FROM)).status == 200


@pytest.mark.parametrize(
    ("data", "status", "closes"),
    [
        (b"GARBAGE\r\n\r\n", 400, True),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, True),
        (f"BREW /openstack HTTP/1.1\r\nHost: x\r\n{_RED}\r\n{_FROM}\r\n\r\n".encode(), 405, False),
    ],
    ids=["no HTTP", "the preface of HTTP/2", "an unknown method"],
)
def test_what_is_no_request_of_http_1_is_400_and_closed_and_an_unknown_method_405(
    alone: Alone, data: bytes, status: int, *, closes: bool
) -> None:
    with alone.connect(way="agents") as connection:
        connection.send(data)
        answer = connection.read()
    assert (answer.status, answer.closes) == (status, closes)
    assert alone.documents.heads == []
