"""How a daemon reaches Nova: over TLS, by IPv6 or a name, with a secret that is being replaced; and no forgery does."""

import contextlib
import itertools
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, cast

import pytest

from imdsproxy.config.nova import NovaSettings
from support.certificates import Authority, make_authority, server_context
from support.forgeries import FORGERIES, IDENTITY_HEADERS, TARGETS, TOKEN, Forgery, Seen, request
from support.guest import IPV6, Connection, Lost
from support.lab import until
from support.nova_world import PROJECTS, SECRET, NovaWorld, open_nova_world
from support.patience import patience
from support.recorder import CLOSED, HANGS, RESET, Received, Recorder, reply

pytestmark = pytest.mark.root

_PASSWORD: Final = "/openstack/2013-04-04/password"
_NEXT_SECRET: Final = "the secret of tomorrow"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NovaWorld]:
    hosts = tmp_path_factory.mktemp("etc") / "hosts"
    hosts.write_text("127.0.0.1 localhost nova.test\n::1 nova.test\n")
    with open_nova_world(novas=2, hosts=hosts) as one:
        yield one


@pytest.fixture
def nova(world: NovaWorld) -> Recorder:
    """The one that there is."""
    _use(world, world.novas[:1])
    until(lambda: _answered(world), what="its answer")
    world.forget()
    return world.novas[0]


def _use(
    world: NovaWorld,
    novas: Sequence[Recorder],
    fields: Mapping[str, object] | None = None,
    *,
    name: str | None = None,
    secrets: Sequence[str] = ("current", "current"),
    times: Mapping[str, object] | None = None,
) -> None:
    """Have the daemon ask these.

    Args:
        fields: More of the endpoint set's settings.
        name: What they are called, in place of their address.
        secrets: Which secret each of them has.
        times: How they are checked.
    """
    world.forget()
    endpoints: list[Mapping[str, object]] = []
    for nova, secret in zip(novas, secrets, strict=False):
        scheme = nova.url.partition(":")[0]
        url = nova.url if name is None else f"{scheme}://{name}:{nova.port}"
        endpoints.append({"url": url, "secret": secret})
    written = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in (fields or {}).items()
    }
    world.daemon.reconfigure(world.settings(endpoints, fields=written, times=times))


def _answered(world: NovaWorld, by: Recorder | None = None) -> bool:
    """Whether a guest gets an answer, and this Nova has given one since it forgot."""
    return world.red.ask("/openstack").status == 200 and (by is None or bool(by.requests))


# TLS


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """The right one and a wrong one."""
    directory = tmp_path_factory.mktemp("certificates")
    return make_authority(directory, "right"), make_authority(directory, "wrong")


@pytest.fixture(scope="module")
def context(authorities: tuple[Authority, Authority]) -> ssl.SSLContext:
    """Of a server that is `localhost` and speaks to no client that asks for another."""

    def by_name(_: object, name: str | None, __: object) -> int | None:
        return None if name == "localhost" else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    made = server_context(authorities[0].issue("server", names=["DNS:localhost"]))
    made.sni_callback = by_name
    return made


def _never_answered(world: NovaWorld, nova: Recorder) -> None:
    for _ in range(3):
        assert world.red.ask("/openstack").is_to_come_again
    # Its handshakes fail: connections come, and nothing else.
    until(lambda: nova.connections > 0, what="a try")
    assert not nova.heads


@pytest.mark.slow
def test_certificates_are_shown_and_checked_as_settings_say(
    world: NovaWorld, authorities: tuple[Authority, Authority], context: ssl.SSLContext
) -> None:
    right, wrong = authorities
    client, stranger = right.issue("client"), wrong.issue("stranger")
    elsewhere = ["DNS:elsewhere.example"]
    ours = {"ca_file": right.ca_file, "server_name": "localhost"}
    strict = server_context(right.issue("strict", names=["DNS:localhost"]), clients=right)
    for own, fields, answered in (
        (context, ours, True),
        (context, {"server_name": "localhost"}, False),
        (context, {**ours, "server_name": "elsewhere.example"}, False),
        (server_context(right.issue("foreign", names=elsewhere)), ours, False),
        (server_context(wrong.issue("any", names=elsewhere)), {"verify": False}, True),
        # It wants a certificate of ours.
        (strict, ours, False),
        (strict, {**ours, "client_cert_file": stranger.bundle}, False),
        (strict, {**ours, "client_cert_file": client.bundle}, True),
        (strict, {**ours, "client_cert_file": client.certificate, "client_key_file": client.key}, True),
    ):  # fmt: skip
        with Recorder(namespace=world.lab.host, secret=SECRET, tls=own) as nova:
            _use(world, [nova], fields, times={"health_check": "http"})
            if answered:
                # Checks name the host as requests do: as many as would take it down are answered.
                until(lambda nova=nova: len(nova.requests) > 3, what="checks")  # type: ignore[misc]
                nova.always(reply(b"\xff" * 1_000_000))
                assert world.red.ask("/openstack").body == b"\xff" * 1_000_000
                seen = next(one for one in reversed(nova.requests) if one.target != b"/")
                host = {b"host": nova.authority.encode()}
                assert dict(seen.headers) == {**host, **world.identity("red")}
            else:
                _never_answered(world, nova)


def test_a_renewed_certificate_is_taken_over_though_no_setting_has_changed(
    world: NovaWorld, authorities: tuple[Authority, Authority], context: ssl.SSLContext
) -> None:
    right, wrong = (one.ca_file.read_bytes() for one in authorities)
    with Recorder(namespace=world.lab.host, secret=SECRET, tls=context) as nova:
        file = world.daemon.directory / "authorities.pem"
        file.write_bytes(wrong)
        _use(world, [nova], {"ca_file": file, "server_name": "localhost"})
        _never_answered(world, nova)
        file.write_bytes(right)
        done = world.daemon.command("reload")
        assert done.status == 0
        assert "HAProxy was reloaded." in done.out
        until(lambda: _answered(world, nova), what="an answer over TLS")


# Addresses and names


def test_nova_is_reached_by_ipv6(world: NovaWorld) -> None:
    with Recorder(namespace=world.lab.host, address="::1", secret=SECRET) as nova:
        for fields, host in (
            ({}, f"[::1]:{nova.port}"),
            ({"host": "nova.example"}, "nova.example"),
        ):
            _use(world, [nova], fields)
            until(lambda: _answered(world, nova), what="an answer over IPv6")
            assert nova.requests[-1].values("host") == (host.encode(),)


def test_a_name_is_each_of_its_addresses(world: NovaWorld) -> None:
    with (
        Recorder(namespace=world.lab.host, address="127.0.0.1", secret=SECRET) as v4,
        Recorder(namespace=world.lab.host, address="::1", secret=SECRET, port=v4.port) as v6,
    ):
        _use(world, [v4], name="nova.test")
        until(lambda: _answered(world, v4) and _answered(world, v6), what="both being asked")
        for nova in (v4, v6):
            hosts = {one.values("host") for one in nova.requests}
            assert hosts == {(f"nova.test:{v4.port}".encode(),)}
        for victim, heir in ((v4, v6), (v6, v4)):
            heir.forget()
            victim.kill()
            assert all(_answered(world, heir) for _ in range(4))
            victim.listen()
            victim.forget()
            until(partial(_answered, world, victim), what="its being up again")


@pytest.mark.parametrize("by", ["networks", "projects"])
def test_requests_of_two_cells_do_not_cross(world: NovaWorld, by: str) -> None:
    """An endpoint set each, with a secret of its own; one's failure is not the other's."""
    first, second = world.novas
    settings = world.settings([{"url": first.url}])
    sets: dict[str, object] = {
        "cell2": {
            "endpoints": [{"url": second.url}],
            "secret_file": str(world.daemon.write_secret("cell2", _NEXT_SECRET)),
            by: ["green" if by == "networks" else PROJECTS["green"]],
        },
        **cast("Mapping[str, object]", settings["nova"]["endpoint_sets"]),
    }
    second.secret = _NEXT_SECRET
    try:
        world.forget()
        world.daemon.reconfigure({**settings, "nova": {**settings["nova"], "endpoint_sets": sets}})
        until(lambda: {one.ask("/openstack").status for one in (world.red, world.green)} == {200})
        world.forget()
        with world.red.connect() as red, world.green.connect() as green:
            for _ in range(20):
                assert red.request("/openstack").status == 200
                assert green.request("/openstack").status == 200
        for nova, network, secret in ((first, "red", SECRET), (second, "green", _NEXT_SECRET)):
            assert len(nova.requests) == 20
            for received in nova.requests:
                assert world.identity(network, secret).items() <= dict(received.headers).items()
        second.always(CLOSED)
        assert world.green.ask("/openstack").status == 503
        assert world.red.ask("/openstack").status == 200
    finally:
        second.secret = SECRET
        world.forget()


def test_a_guest_that_asks_over_ipv6_is_the_same_instance(world: NovaWorld, nova: Recorder) -> None:
    for source in ("2001:db8::5", world.red.link_local):
        nova.forget()
        assert world.red.ask("/openstack", to=IPV6, source=source).status == 200
        expected = {**world.identity("red"), b"x-forwarded-for": source.encode()}
        expected[b"host"] = nova.authority.encode()
        assert sorted(nova.only().headers) == sorted(expected.items())


# Health


@pytest.mark.slow
def test_unless_settings_say_otherwise_a_nova_that_hangs_is_down_and_its_guests_come_again(
    world: NovaWorld, nova: Recorder
) -> None:
    def is_up() -> bool:
        return bool(world.daemon.status()["nova"][0]["up"])

    endpoints = [{"url": nova.url}]
    nova.secret = None
    default = NovaSettings().health_check
    world.daemon.reconfigure(world.settings(endpoints, times={"health_check": default}))
    until(lambda: len(nova.requests) >= 2, what="two checks")
    assert {(one.method, one.target) for one in nova.requests} == {("GET", b"/")}
    assert not {name for one in nova.requests for name, _ in one.headers} - {b"host", b"connection"}
    nova.always(HANGS)
    until(lambda: not is_up(), what="its hanging to be known")
    start = time.monotonic()
    assert world.red.ask("/openstack").status == 503
    assert time.monotonic() - start < 0.5 * patience()
    until(lambda: "no endpoint answers" in str(world.daemon.status()), what="the problem")
    for status, seen in ((404, True), (500, False), (200, True)):
        nova.always(reply(status=status))
        until(lambda seen=seen: is_up() is seen, what=f"{seen} after {status}")  # type: ignore[misc]
    nova.secret = SECRET


def test_status_lists_each_endpoint_once_and_readiness_names_the_set_that_is_down(
    world: NovaWorld,
) -> None:
    _use(world, world.novas)
    # A refused signature of an earlier test is a reason too, until an answer shows that it is over.
    until(lambda: _answered(world) and world.daemon.status()["readiness"]["ready"], what="ready")
    world.forget()
    for nova in world.novas:
        nova.kill()
    until(lambda: not world.daemon.status()["readiness"]["ready"], what="not being ready")
    status = world.daemon.status()
    listed = [(one["endpoint_set"], one["endpoint"]) for one in status["nova"]]
    assert sorted(listed) == sorted(("default", f"127.0.0.1:{nova.port}") for nova in world.novas)
    (reason,) = status["readiness"]["reasons"]
    assert reason.startswith("nova.endpoint_sets.default.endpoints: no endpoint answers")
    for nova in world.novas:
        nova.listen()
    world.daemon.wait_ready()
    # Its checks leave nothing there.
    assert not [one for nova in world.novas for one in (*nova.heads, *nova.fragments)]


# A secret that is being replaced


@pytest.fixture
def rotating(world: NovaWorld) -> Iterator[NovaWorld]:
    """The second Nova has the next secret already, and both answer."""
    world.novas[1].secret = _NEXT_SECRET
    _use(world, world.novas, _next(world), secrets=("current", "next"))
    until(lambda: _statuses(world) == {200}, what="both signatures")
    world.forget()
    yield world
    world.forget()
    for nova in world.novas:
        nova.secret = SECRET
        nova.kill()
        nova.listen()


def _next(world: NovaWorld) -> Mapping[str, object]:
    return {"next_secret_file": world.daemon.write_secret("next", _NEXT_SECRET)}


def _statuses(world: NovaWorld) -> set[int]:
    """What GETs and POSTs get, enough of them that each Nova has some of both."""
    asked = [("GET", b""), ("GET", b""), ("POST", b"abc"), ("POST", b"abc")] * 2
    return {world.red.ask(_PASSWORD, method=method, body=body).status for method, body in asked}


def test_each_nova_gets_the_signature_of_its_own_secret_after_a_reset_too(
    rotating: NovaWorld,
) -> None:
    assert _statuses(rotating) == {200}
    first, second = rotating.novas
    for nova, secret in ((first, SECRET), (second, _NEXT_SECRET)):
        assert {one.method for one in nova.requests} == {"GET", "POST"}
        for one in nova.requests:
            expected = {
                b"host": first.authority.encode(),
                **rotating.identity("red", secret),
                **({b"content-length": b"3"} if one.body else {}),
            }
            assert sorted(one.headers) == sorted(expected.items())
    # What one resets is signed anew for the other.
    for ill, well in (rotating.novas, reversed(rotating.novas)):
        rotating.forget()
        ill.always(RESET)
        assert {rotating.red.ask("/openstack").status for _ in range(6)} == {200}
        assert len(well.requests) == 6
        assert ill.requests


def test_a_post_is_sent_once_between_two_secrets_and_in_chunks_too(rotating: NovaWorld) -> None:
    head = f"POST {_PASSWORD} HTTP/1.1\r\nHost: x\r\n".encode()
    for body in (
        b"Content-Length: 3\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ):
        for fault in (HANGS, RESET, CLOSED):
            rotating.forget()
            rotating.always(fault)
            assert rotating.red.raw(head + body, method="POST").is_to_come_again
            assert sum(len(nova.heads) for nova in rotating.novas) == 1


@contextlib.contextmanager
def _kept_connections(world: NovaWorld) -> Iterator[None]:
    """Guests that have asked before something is done, and ask again on the same connections after it."""
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(world.red.connect()) for _ in range(4)]
        assert {one.request("/openstack").status for one in kept} == {200}
        yield
        # HAProxy's worker of before answers them, with what there was then.
        assert {one.request("/openstack").status for one in kept} == {200}


def test_a_secret_is_replaced_without_a_guest_noticing(world: NovaWorld) -> None:
    def both_asked() -> bool:
        return _answered(world) and all(nova.requests for nova in world.novas)

    def loopbacks() -> set[Path]:
        return {*(world.daemon.runtime / "jail").glob("hop-*")}

    first, second = world.novas
    _use(world, world.novas)
    until(lambda: _statuses(world) == {200}, what="the secret of now")
    before = loopbacks()
    try:
        for nova, secrets in ((first, ("next", "current")), (second, ("next", "next"))):
            # An operator takes a Nova out, gives it the next secret, tells the daemon, and takes it in again.
            nova.kill()
            nova.secret = _NEXT_SECRET
            with _kept_connections(world):
                _use(world, world.novas, _next(world), secrets=secrets)
            assert all(_answered(world) for _ in range(8))
            # A POST that meets the one that is away, before a check has seen it, is to come again.
            until(lambda: _statuses(world) == {200}, what="its being known to be down")
            world.forget()
            nova.listen()
            until(both_asked, what="both Novas' being up")
            assert _statuses(world) == {200}
        with _kept_connections(world):
            _use(
                world, world.novas, {"secret_file": world.daemon.write_secret("next", _NEXT_SECRET)}
            )
        assert _statuses(world) == {200}
        assert _statuses(world) == {200}
        # The sockets by which HAProxy spoke to itself meanwhile are gone.
        assert loopbacks() == before
    finally:
        first.secret = second.secret = SECRET


# Whatever a guest sends, Nova is told who it is by us, and asked for what it asked for


def _statuses_of(world: NovaWorld, data: bytes, answers: int = 1) -> list[int]:
    """What a guest gets for something; fewer than `answers` where the connection ends before."""
    world.forget()

    def read(connection: Connection) -> Iterator[int]:
        with contextlib.suppress(Lost):
            while True:
                status = connection.read().status
                # Not an answer yet, but leave to go on.
                if status != 100:
                    yield status

    with world.red.connect() as connection:
        connection.send(data)
        return list(itertools.islice(read(connection), answers))


def _wrong(world: NovaWorld, request: Received, seen: Seen) -> list[str]:
    """How a request that Nova received differs from what it must receive."""
    expected = [
        (b"host", world.novas[0].authority.encode()),
        *world.identity("red").items(),
        *seen.headers,
    ]
    if seen.body:
        expected.append((b"content-length", str(len(seen.body)).encode()))
    found = sorted(request.headers)
    wrong = []
    # A length of nothing says nothing.
    if found not in (sorted(expected), sorted([*expected, (b"content-length", b"0")])):
        wrong.append(f"headers {found}")
    if (request.method, request.target) != (seen.method, seen.target):
        wrong.append(f"{request.method} {request.target!r}")
    if request.body != seen.body or request.raw_body != seen.body or request.trailers:
        wrong.append(f"body {request.raw_body!r}")
    return wrong


def _outcome(world: NovaWorld, forgery: Forgery, statuses: list[int]) -> list[str]:
    nova = world.novas[0]
    received = list(nova.requests)
    wrong = [f"fragments {nova.fragments}"] if nova.fragments else []
    if forgery.seen:
        if statuses != [200] * len(forgery.seen):
            wrong.append(f"answers {statuses}")
    elif len(statuses) != 1 or not 400 <= statuses[0] < 500:
        wrong.append(f"no refusal but {statuses}")
    if len(received) != len(forgery.seen):
        wrong.append(f"received {[one.request_line for one in received]}")
    for one, seen in zip(received, forgery.seen, strict=False):
        wrong += _wrong(world, one, seen)
    return wrong


@pytest.mark.usefixtures("nova")
def test_no_forgery_reaches_nova(world: NovaWorld) -> None:
    found = {}
    for forgery in FORGERIES:
        statuses = _statuses_of(world, forgery.data, max(1, len(forgery.seen)))
        found[forgery.data] = _outcome(world, forgery, statuses)
    assert not {data: wrong for data, wrong in found.items() if wrong}


def test_no_forgery_makes_an_unknown_guest_known(world: NovaWorld, nova: Recorder) -> None:
    stranger = world.lab.guest("red", 66)
    lines = [f"{name}: {value}" for name, value in IDENTITY_HEADERS.items()]
    assert stranger.ask("/openstack", headers=lines).status in (404, 503)
    # What came behind a body was once taken for a word of HAProxy's by who resolves.
    forged = {"X-Imdsproxy-Network": "red", "X-Imdsproxy-Address": world.red.addresses[0]}
    trailers = "".join(f"{name}: {value}\r\n" for name, value in forged.items()).encode()
    for method in (b"GET", b"POST"):
        answer = stranger.raw(
            method + b" /openstack HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\na\r\n0\r\n" + trailers + b"\r\n"
        )
        assert answer.status in (404, 503)
    assert not nova.heads


def test_a_body_that_comes_slowly_or_is_waited_with_arrives_as_one(
    world: NovaWorld, nova: Recorder
) -> None:
    head = f"POST {_PASSWORD} HTTP/1.1\r\nHost: x\r\n"
    with world.red.connect() as connection:
        connection.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for data in (b"3\r\nab", b"c\r\n", b"2\r\nde\r\n0\r", b"\n\r\n"):
            assert not nova.requests
            connection.send(data)
        assert connection.read().status == 200
        connection.send(f"{head}Expect: 100-continue\r\nContent-Length: 4\r\n\r\n".encode())
        assert connection.read().status == 100
        connection.send(b"abcd")
        assert connection.read().status == 200
    assert [one.body for one in nova.requests] == [b"abcde", b"abcd"]


# By way of the resolver: what comes in chunks, as a guest's first request does


def _resolved(world: NovaWorld, data: bytes) -> list[int]:
    """What the guest gets; asked again where the resolver has enough to do (it takes 200 a second)."""
    statuses: list[int] = []
    # In no chunks at all.
    head = b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
    chunked = data.replace(b" HTTP/1.1\r\n", head, 1) + b"0\r\n\r\n"

    def taken() -> bool:
        statuses[:] = _statuses_of(world, chunked)
        return statuses != [503]

    until(taken, what="the resolver's having time")
    return statuses


@pytest.mark.usefixtures("nova")
def test_no_forgery_reaches_nova_by_way_of_the_resolver(world: NovaWorld) -> None:
    found = {}
    for name, value in IDENTITY_HEADERS.items():
        if name != TOKEN:
            forgery = Forgery(request(f"{name}: {value}".encode()))
            found[name] = _outcome(world, forgery, _resolved(world, forgery.data))
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.usefixtures("nova")
@pytest.mark.parametrize("ask", [_statuses_of, _resolved])
def test_every_target_arrives_as_it_was_sent(
    world: NovaWorld, ask: Callable[[NovaWorld, bytes], list[int]]
) -> None:
    found = {one.data: _outcome(world, one, ask(world, one.data)) for one in TARGETS}
    assert not {data: wrong for data, wrong in found.items() if wrong}


# What an operator asks in a guest's place


@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_probe_shows_what_nova_answers_the_guest(
    world: NovaWorld, nova: Recorder, status: int
) -> None:
    nova.always(reply(b"x", status=status))
    asked = ("explain", "--network", "red", "--from", "10.0.0.5")
    assert world.red.ask("/latest/meta-data/").status == status
    explained = world.daemon.command(*asked)
    assert explained.status == 0
    assert "found, its requests go to Nova" in explained.out
    (of_the_guest,) = nova.requests
    probed = world.daemon.command(*asked, "--probe")
    assert f"GET /latest/meta-data/: {status} " in probed.out
    assert probed.status == (0 if status == 200 else 1)
    _, of_the_operator = nova.requests
    for one in (of_the_guest, of_the_operator):
        assert one.target == b"/latest/meta-data/"
        for name, value in world.identity("red").items():
            assert one.values(name.decode()) == (value,)
