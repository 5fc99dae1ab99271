from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.documents.dialects import ec2, openstack
from imdsproxy.model.entities import Dialect, Instance, MacAddress, Port
from support.guest_records import BARE, BLUE, Guest
from support.record_strategies import embedded_instances, texts

MACS = st.integers(0, 3).map(lambda number: MacAddress(f"fa:16:3e:00:00:0{number}"))
_TEXTS = ["10.0.0.7", "10.0.0.8", "192.0.2.1", "2001:db8::7", "2001:db8:9::1", "fe80::7"]
PORTS = st.builds(
    Port,
    network=st.sampled_from([BLUE.id, BARE.id]),
    mac=st.none() | MACS,
    addresses=st.lists(st.sampled_from(_TEXTS).map(ip_address), max_size=3, unique=True).map(tuple),
)
INSTANCES = st.builds(
    replace,
    embedded_instances,
    ports=st.lists(PORTS, max_size=3).map(tuple),
    tags=st.dictionaries(texts | st.sampled_from(["0=x", "..", "a/b"]), texts, max_size=4).map(
        lambda tags: tuple(sorted(tags.items()))
    ),
    vendor_data=st.none() | st.binary(max_size=50) | st.just(b'{"cloud-init": ["a"]}'),
    availability_zone=st.none() | texts | st.just("us-east-1a"),
)


_DIRECTORIES = {*ec2.VERSIONS, "openstack", "nocloud", "meta-data", "dynamic"}


def listed(asked: Guest, path: str) -> Iterator[str]:
    """The paths below `path` that its listing names, as a client reads it."""
    for line in asked.lines(path):
        name = line
        if path.rstrip("/").endswith("/public-keys"):
            name = line.split("=", 1)[0]
        yield f"{path.rstrip('/')}/{quote(name)}"


def is_directory(asked: Guest, path: str) -> bool:
    parts = [part for part in path.split("/") if part]
    if path.endswith("/") or not parts:
        return True
    if len(parts) <= 2 and parts[-1] in _DIRECTORIES:
        return parts[0] != "nocloud" or len(parts) == 1
    return len(parts) > 1 and parts[-2] == "public-keys" and "openssh-key" in asked.text(path)


def walk(asked: Guest, path: str) -> Iterator[str]:
    """`path` and everything that is listed below it."""
    assert asked.status(path) == 200, path
    yield path
    if is_directory(asked, path):
        for child in listed(asked, path):
            yield from walk(asked, child)


def roots(instance: Instance) -> list[str]:
    found = []
    if Dialect.EC2 in instance.dialects:
        found += [f"/{version}" for version in (*ec2.VERSIONS[::5], "latest")]
    if Dialect.OPENSTACK in instance.dialects:
        found += ["/openstack", *(f"/openstack/{version}/" for version in openstack.VERSIONS[::3])]
    if Dialect.NOCLOUD in instance.dialects:
        found.append("/nocloud/")
    return found


_ONE_LINE = {
    *("instance-id", "ami-id", "mac", "local-ipv4", "reservation-id", "openssh-key", "local-ipv4s")
}


@pytest.mark.slow
@settings(max_examples=settings().max_examples * 3 // 2, deadline=None)
@given(INSTANCES)
def test_what_is_listed_is_served_and_what_is_off_is_not_listed(instance: Instance) -> None:
    asked = Guest(instance)
    for root in roots(instance):
        paths = list(walk(asked, root))
        assert len(paths) > 1 or root == "/openstack"
        for path in paths:
            directory = is_directory(asked, path)
            if directory or path.rsplit("/", 1)[-1] in _ONE_LINE:
                assert not asked.text(path).endswith("\n"), path
            if directory:
                assert all(asked.lines(path)), path
                assert len(set(asked.lines(path))) == len(asked.lines(path))
    listed_at_root = set(asked.lines("/") if instance.dialects else ())
    if instance.dialects:
        list(walk(asked, "/"))
    for dialect, path, names in (
        (Dialect.EC2, "/latest", set(ec2.VERSIONS)),
        (Dialect.OPENSTACK, "/openstack", {"openstack/"}),
        (Dialect.NOCLOUD, "/nocloud", {"nocloud/"}),
    ):
        if dialect not in instance.dialects:
            assert asked.status(path) == 404
            assert not names & listed_at_root


@settings(max_examples=60, deadline=None)
@given(INSTANCES, st.data())
def test_slashes_never_change_an_answer(instance: Instance, data: st.DataObject) -> None:
    asked = Guest(instance)
    paths = [path for root in roots(instance) for path in walk(asked, root)] or ["/", "/latest"]
    path = data.draw(st.sampled_from(paths))
    plain = asked.ask(path)
    others = (f"{path}/", path.rstrip("/"), path.replace("/", "//"), f"{path}//", f"/.{path}/.")
    for other in filter(None, others):
        assert asked.ask(other) == plain


_PARTS = [b"", *b".. . %2e%2e user-data meta-data latest openstack nocloud".split()]
_OFF = {b"latest": Dialect.EC2, b"openstack": Dialect.OPENSTACK, b"nocloud": Dialect.NOCLOUD}


_PATHS = st.lists(st.sampled_from(_PARTS), max_size=7).map(lambda parts: b"/" + b"/".join(parts))


@settings(max_examples=settings().max_examples * 5, deadline=None)
@given(
    INSTANCES,
    _PATHS | st.binary(max_size=60),
    st.sampled_from(["GET", "GET", "HEAD", "PUT", "POST", "x"]),
    st.binary(max_size=20),
)
def test_any_request_gets_an_answer_that_is_no_redirect_and_dots_reach_nothing_but_their_own_tree(
    instance: Instance, path: bytes, method: str, body: bytes
) -> None:
    response = Guest(instance).ask(path, method, body)
    assert response.status in {200, 400, 404, 405}
    if response.status != 200:
        assert response.body == b""
        assert not response.cacheable
    first = next((part for part in path.split(b"/") if part not in {b"", b"."}), b"")
    if first in _OFF and _OFF[first] not in instance.dialects:
        assert response.status in {400, 404}
