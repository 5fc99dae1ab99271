"""How Nova is reached: over TLS, by IPv6 or a name, and with a secret that is being replaced."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import pytest

from imdsproxy.nova.settings import NovaSettings
from support.certificates import Authority, Certificate, make_authority, server_context
from support.guest import IPV6
from support.lab import until
from support.nova_world import PROJECTS, SECRET, NovaWorld, open_nova_world
from support.patience import patience
from support.recorder import Recorder, close_without_a_byte, hang, reply, reset

pytestmark = pytest.mark.root

_PASSWORD: Final = "/openstack/2013-04-04/password"
_NEXT_SECRET: Final = "the secret of tomorrow"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NovaWorld]:
    hosts = tmp_path_factory.mktemp("etc") / "hosts"
    hosts.write_text("127.0.0.1 localhost nova.test\n::1 nova.test\n")
    with open_nova_world(novas=2, hosts=hosts) as one:
        yield one


@dataclass(frozen=True, slots=True)
class _Authorities:
    right: Authority
    wrong: Authority
    server: Certificate
    client: Certificate
    stranger: Certificate


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> _Authorities:
    directory: Path = tmp_path_factory.mktemp("certificates")
    right, wrong = (make_authority(directory, name) for name in ("right", "wrong"))
    return _Authorities(
        right,
        wrong,
        server=right.issue("server", names=["DNS:localhost", "IP:127.0.0.1"]),
        client=right.issue("client"),
        stranger=wrong.issue("stranger"),
    )


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
    endpoints: list[Mapping[str, object]] = []
    for nova, secret in zip(novas, secrets, strict=False):
        scheme = nova.url.partition(":")[0]
        url = nova.url if name is None else f"{scheme}://{name}:{nova.port}"
        endpoints.append({"url": url, "secret": secret})
    written = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in (fields or {}).items()
    }
    world.take_over(world.settings(endpoints, fields=written, times=times))


def _answered(world: NovaWorld, by: Recorder | None = None) -> bool:
    """Whether a guest gets an answer, and this Nova gave one since it was told to forget."""
    return world.red.ask("/openstack").status == 200 and (by is None or bool(by.requests))


def _never_answered(world: NovaWorld, nova: Recorder) -> None:
    for _ in range(3):
        answer = world.red.ask("/openstack")
        assert answer.status == 503
        assert answer.headers["retry-after"]
    # Its handshakes fail: connections come, and nothing else.
    until(lambda: nova.connections > 0, what="a try")
    assert not nova.heads


def test_a_check_of_https_names_the_host_as_requests_do(
    world: NovaWorld, authorities: _Authorities
) -> None:
    def by_name(_: object, name: str | None, __: object) -> int | None:
        return None if name == "localhost" else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    context = server_context(authorities.server)
    context.sni_callback = by_name
    ours = {"ca_file": authorities.right.ca_file}
    with Recorder(namespace=world.lab.host, secret=SECRET, tls=context) as nova:
        _use(world, [nova], ours, name="localhost", times={"health_check": "http"})
        # More than a check, and as many as would take it down.
        until(lambda: len(nova.requests) > 3, what="checks that are answered")
        assert {one.target for one in nova.requests} == {b"/"}
        assert _answered(world)


def test_over_tls_nova_gets_the_same_and_large_answers_come_whole(
    world: NovaWorld, authorities: _Authorities
) -> None:
    context = server_context(authorities.server)
    with Recorder(namespace=world.lab.host, secret=SECRET, tls=context) as nova:
        _use(world, [nova], {"ca_file": authorities.right.ca_file}, name="localhost")
        until(lambda: _answered(world, nova), what="an answer over TLS")
        nova.forget()
        assert _answered(world)
        host = {b"host": f"localhost:{nova.port}".encode()}
        assert dict(nova.only().headers) == {**host, **world.identity("red")}
        nova.answer(reply(b"\xff" * 1_000_000))
        assert world.red.ask("/openstack").body == b"\xff" * 1_000_000


@pytest.mark.slow
def test_certificates_are_shown_and_checked_as_settings_say(
    world: NovaWorld, authorities: _Authorities
) -> None:
    right, wrong, client = authorities.right, authorities.wrong, authorities.client
    elsewhere = ["DNS:elsewhere.example"]
    ours = {"ca_file": right.ca_file, "server_name": "localhost"}
    plain = server_context(authorities.server)
    strict = server_context(authorities.server, clients=right)
    for context, fields, answered in (
        (plain, ours, True),
        (plain, {**ours, "ca_file": wrong.ca_file}, False),
        (plain, {"server_name": "localhost"}, False),
        (plain, {**ours, "server_name": "elsewhere.example"}, False),
        (server_context(right.issue("foreign", names=elsewhere)), ours, False),
        (server_context(wrong.issue("any", names=elsewhere)), {"verify": False}, True),
        # It wants a certificate of ours.
        (strict, ours, False),
        (strict, {**ours, "client_cert_file": authorities.stranger.bundle}, False),
        (strict, {**ours, "client_cert_file": client.bundle}, True),
        (strict, {**ours, "client_cert_file": client.certificate, "client_key_file": client.key}, True),
    ):  # fmt: skip
        with Recorder(namespace=world.lab.host, secret=SECRET, tls=context) as nova:
            _use(world, [nova], fields)
            if answered:
                until(lambda nova=nova: _answered(world, nova), what="an answer over TLS")  # type: ignore[misc]
            else:
                _never_answered(world, nova)


def test_nova_is_reached_by_ipv6(world: NovaWorld) -> None:
    with Recorder(namespace=world.lab.host, address="::1", secret=SECRET) as nova:
        for fields, host in (
            ({}, f"[::1]:{nova.port}"),
            ({"host": "nova.example"}, "nova.example"),
        ):
            _use(world, [nova], fields)
            until(lambda: _answered(world, nova), what="an answer over IPv6")
            nova.forget()
            assert _answered(world)
            assert nova.only().values("host") == (host.encode(),)


def _until_asked(world: NovaWorld, nova: Recorder) -> None:
    nova.forget()
    until(lambda: _answered(world, nova), what="its being up again")


def test_a_name_is_each_of_its_addresses(world: NovaWorld) -> None:
    with (
        Recorder(namespace=world.lab.host, address="127.0.0.1", secret=SECRET) as v4,
        Recorder(namespace=world.lab.host, address="::1", secret=SECRET, port=v4.port) as v6,
    ):
        _use(world, [v4], name="nova.test")
        assert all(_answered(world) for _ in range(6))
        for nova in (v4, v6):
            assert len(nova.requests) == 3
            hosts = {one.values("host") for one in nova.requests}
            assert hosts == {(f"nova.test:{v4.port}".encode(),)}
        for victim, heir in ((v4, v6), (v6, v4)):
            heir.forget()
            victim.kill()
            assert all(_answered(world, heir) for _ in range(4))
            victim.listen()
            _until_asked(world, victim)


def test_settings_are_in_force_when_the_reload_says_so(world: NovaWorld) -> None:
    first, second = world.novas
    for number in range(4):
        now, before = (first, second) if number % 2 else (second, first)
        _use(world, [now])
        world.forget()
        assert world.red.ask("/openstack", method="POST", body=b"abc").status == 200
        assert _answered(world)
        assert len(now.requests) == 2
        assert not before.requests


def test_a_file_that_is_missing_changes_nothing_until_it_is_there(
    world: NovaWorld, authorities: _Authorities
) -> None:
    _use(world, world.novas)
    context = server_context(authorities.server)
    with Recorder(namespace=world.lab.host, secret=SECRET, tls=context) as nova:
        later = world.daemon.directory / "later.pem"
        fields = {"ca_file": str(later), "server_name": "localhost"}
        world.daemon.configure(world.settings([{"url": nova.url}], fields=fields))
        refused = world.daemon.command("reload")
        assert refused.status != 0
        assert str(later) in refused.err
        assert all(_answered(world) for _ in range(3))
        assert not nova.connections
        later.write_bytes(authorities.right.ca_file.read_bytes())
        assert world.daemon.command("reload").status == 0
        until(lambda: _answered(world, nova), what="an answer over TLS")


def test_a_renewed_certificate_is_taken_over_though_no_setting_has_changed(
    world: NovaWorld, authorities: _Authorities
) -> None:
    context = server_context(authorities.server)
    with Recorder(namespace=world.lab.host, secret=SECRET, tls=context) as nova:
        file = world.daemon.directory / "authorities.pem"
        file.write_bytes(authorities.wrong.ca_file.read_bytes())
        _use(world, [nova], {"ca_file": file, "server_name": "localhost"})
        _never_answered(world, nova)
        file.write_bytes(authorities.right.ca_file.read_bytes())
        done = world.daemon.command("reload")
        assert done.status == 0
        assert "HAProxy was reloaded." in done.out
        until(lambda: _answered(world, nova), what="an answer over TLS")


@pytest.mark.parametrize("by", ["networks", "projects"])
def test_requests_of_two_cells_do_not_cross(world: NovaWorld, by: str) -> None:
    """An endpoint set each, with a secret of its own; one's failure is not the other's."""
    first, second = world.novas
    settings = world.settings([{"url": first.url}])
    sets: dict[str, object] = {
        "cell2": {
            "endpoints": [{"url": second.url}],
            "secret_file": str(world.secret_file("cell2", _NEXT_SECRET)),
            by: ["green" if by == "networks" else PROJECTS["green"]],
        },
        **cast("Mapping[str, object]", settings["nova"]["endpoint_sets"]),
    }
    second.secret = _NEXT_SECRET
    try:
        world.take_over({**settings, "nova": {**settings["nova"], "endpoint_sets": sets}})
        until(lambda: _statuses(world) == {200} == {world.green.ask("/openstack").status})
        world.forget()
        with world.red.connect() as red, world.green.connect() as green:
            for _ in range(20):
                assert red.request("/openstack").status == 200
                assert green.request("/openstack").status == 200
        for nova, network, secret in (
            (first, "red", SECRET),
            (second, "green", _NEXT_SECRET),
        ):
            assert len(nova.requests) == 20
            for received in nova.requests:
                assert world.identity(network, secret).items() <= dict(received.headers).items()
        second.always(close_without_a_byte())
        assert world.green.ask("/openstack").status == 503
        assert _statuses(world) == {200}
    finally:
        second.secret = SECRET
        world.forget()


# What goes by the resolver, what a guest's own address is, and health


@pytest.fixture
def nova(world: NovaWorld) -> Recorder:
    """The one that there is."""
    _use(world, world.novas[:1])
    until(lambda: _answered(world), what="its answer")
    world.forget()
    return world.novas[0]


def test_a_guest_that_asks_over_ipv6_is_the_same_instance(world: NovaWorld, nova: Recorder) -> None:
    for source, seen_as in (
        ("2001:db8::5", b"2001:db8::5"),
        (world.red.link_local, world.red.link_local.encode()),
    ):
        nova.forget()
        assert world.red.ask("/openstack", to=IPV6, source=source).status == 200
        expected = {**world.identity("red"), b"x-forwarded-for": seen_as}
        expected[b"host"] = nova.authority.encode()
        assert sorted(nova.only().headers) == sorted(expected.items())


@pytest.mark.parametrize("sizes", [(10,), (1, 2, 3), (344,), (5000, 5000, 7)])
def test_a_password_in_chunks_arrives_with_its_length(
    world: NovaWorld, nova: Recorder, sizes: tuple[int, ...]
) -> None:
    parts = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    body = b"".join(parts)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    head = f"POST {_PASSWORD}?a=%2F HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: text/plain\r\nX-Instance-ID: x\r\n\r\n"
    assert world.red.raw(head.encode() + chunks, method="POST").status == 200
    seen = nova.only()
    assert (seen.method, seen.target) == ("POST", f"{_PASSWORD}?a=%2F".encode())
    assert seen.body == seen.raw_body == body
    expected = {
        b"host": nova.authority.encode(),
        **world.identity("red"),
        b"content-type": b"text/plain",
        b"content-length": str(len(body)).encode(),
    }
    assert sorted(seen.headers) == sorted(expected.items())


def test_chunks_that_come_slowly_arrive_as_one_password(world: NovaWorld, nova: Recorder) -> None:
    head = f"POST {_PASSWORD} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with world.red.connect() as connection:
        connection.send(head.encode())
        for data in (b"3\r\nab", b"c\r\n", b"2\r\nde\r\n0\r", b"\n\r\n"):
            assert not nova.requests
            connection.send(data)
        assert connection.read().status == 200
    assert nova.only().body == b"abcde"


def _row(world: NovaWorld, nova: Recorder) -> dict[str, str]:
    """What HAProxy knows of the one endpoint."""
    name = ("nova.default", nova.authority)
    return next(
        row for row in world.daemon.haproxy_rows() if (row["pxname"], row["svname"]) == name
    )


def _is(world: NovaWorld, nova: Recorder, status: str) -> bool:
    return _row(world, nova)["status"] == status


def test_health_checks_see_nova_go_and_come_and_leave_nothing_there(
    world: NovaWorld, nova: Recorder
) -> None:
    nova.kill()
    until(lambda: _is(world, nova, "DOWN"), what="its being known to be down")
    nova.listen()
    until(lambda: _is(world, nova, "UP"), what="its being known to be up")
    assert _row(world, nova)["check_status"] == "L4OK"
    assert not nova.heads
    assert not nova.fragments


@pytest.mark.slow
def test_unless_settings_say_otherwise_a_nova_that_hangs_is_down_and_its_guests_come_again(
    world: NovaWorld, nova: Recorder
) -> None:
    endpoints = [{"url": nova.url}]
    nova.secret = None
    default = NovaSettings().health_check
    world.take_over(world.settings(endpoints, times={"health_check": default}))
    until(lambda: len(nova.requests) >= 2, what="two checks")
    assert {(one.method, one.target) for one in nova.requests} == {("GET", b"/")}
    assert not {name for one in nova.requests for name, _ in one.headers} - {
        b"host",
        b"connection",
    }
    nova.always(hang())
    until(lambda: _is(world, nova, "DOWN"), what="its hanging to be known")
    start = time.monotonic()
    assert world.red.ask("/openstack").status == 503
    assert time.monotonic() - start < 0.5 * patience()
    until(lambda: "no endpoint answers" in str(world.daemon.status()), what="the problem")
    for status, seen in ((404, "UP"), (500, "DOWN"), (200, "UP")):
        nova.always(reply(status=status))
        until(partial(_is, world, nova, seen), what=f"{seen} after {status}")
    world.take_over(world.settings(endpoints))
    nova.secret = SECRET


def test_status_lists_each_endpoint_once_and_readiness_names_the_set_that_is_down(
    world: NovaWorld,
) -> None:
    _use(world, world.novas)
    listed = [(one["endpoint_set"], one["endpoint"]) for one in world.daemon.status()["nova"]]
    assert sorted(listed) == sorted(("default", f"127.0.0.1:{nova.port}") for nova in world.novas)
    for nova in world.novas:
        nova.kill()
    until(lambda: not world.daemon.status()["readiness"]["ready"], what="not being ready")
    (reason,) = world.daemon.status()["readiness"]["reasons"]
    assert reason.startswith("nova.endpoint_sets.default.endpoints: no endpoint answers")
    for nova in world.novas:
        nova.listen()


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
    return {"next_secret_file": world.secret_file("next", _NEXT_SECRET)}


def _statuses(world: NovaWorld) -> set[int]:
    """What GETs and POSTs get, enough of them that each Nova has some of both."""
    asked = [("GET", b""), ("GET", b""), ("POST", b"abc"), ("POST", b"abc")] * 2
    return {world.red.ask(_PASSWORD, method=method, body=body).status for method, body in asked}


def test_each_nova_gets_the_signature_of_its_own_secret(rotating: NovaWorld) -> None:
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


def _both_asked(world: NovaWorld) -> bool:
    assert _answered(world)
    return all(nova.requests for nova in world.novas)


def test_a_get_that_one_nova_resets_is_signed_anew_for_the_other(rotating: NovaWorld) -> None:
    for ill, well in (rotating.novas, reversed(rotating.novas)):
        rotating.forget()
        ill.always(reset())
        assert {rotating.red.ask("/openstack").status for _ in range(6)} == {200}
        assert len(well.requests) == 6
        assert ill.requests


def test_a_post_is_sent_once_between_two_secrets_and_in_chunks_too(rotating: NovaWorld) -> None:
    head = f"POST {_PASSWORD} HTTP/1.1\r\nHost: x\r\n".encode()
    for body in (
        b"Content-Length: 3\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ):
        for fault in (hang(), reset(), close_without_a_byte()):
            rotating.forget()
            for nova in rotating.novas:
                nova.always(fault)
            answer = rotating.red.raw(head + body, method="POST")
            assert answer.status == 503
            assert answer.headers["retry-after"]
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
    first, second = world.novas
    _use(world, world.novas)
    until(lambda: _statuses(world) == {200}, what="the secret of now")
    try:
        for nova, secrets in ((first, ("next", "current")), (second, ("next", "next"))):
            # An operator takes a Nova out, gives it the next secret, tells the daemon, and takes it in again.
            nova.kill()
            nova.secret = _NEXT_SECRET
            with _kept_connections(world):
                _use(world, world.novas, _next(world), secrets=secrets)
            assert all(_answered(world) for _ in range(8))
            # A POST that meets the one that is away, before a check has said so, is told to come again.
            until(lambda: _statuses(world) == {200}, what="its being known to be down")
            world.forget()
            nova.listen()
            until(lambda: _both_asked(world), what="both Novas' being up")
            assert _statuses(world) == {200}
        with _kept_connections(world):
            _use(world, world.novas, {"secret_file": world.secret_file("next", _NEXT_SECRET)})
        assert _statuses(world) == {200}
        assert _statuses(world) == {200}
        # The sockets by which HAProxy spoke to itself meanwhile are gone.
        assert not [*(world.daemon.runtime / "jail").glob("hop-*")]
    finally:
        first.secret = second.secret = SECRET
