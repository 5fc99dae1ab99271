from __future__ import annotations

import time

import pytest

from imdsproxy.core.model import Dialect, SshKey
from support.guest_records import Guest, guest, header

PASSWORD = "/openstack/2013-04-04/password"


def test_head_is_like_get_without_the_body() -> None:
    asked = Guest(guest(user_data=b"x" * 50))
    for path in (
        "/",
        "/latest/meta-data/",
        "/latest/user-data",
        "/openstack/latest/meta_data.json",
        "/openstack/latest/password",
    ):
        get, head = asked.ask(path), asked.ask(path, "HEAD")
        assert (head.status, head.headers, head.cacheable) == (
            get.status,
            get.headers,
            get.cacheable,
        )
        assert head.body == b""


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH", "OPTIONS", "get"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/latest",
        "/latest/meta-data/instance-id",
        "/openstack/latest/meta_data.json",
        "/nocloud/meta-data",
    ],
)
def test_another_method_is_405_and_says_which_are_allowed(method: str, path: str) -> None:
    response = Guest().ask(path, method)
    assert response.status == 405
    assert header(response, b"allow") == b"GET, HEAD"
    assert response.body == b""


def test_the_password_allows_post() -> None:
    response = Guest().ask(PASSWORD, "PUT")
    assert response.status == 405
    assert header(response, b"allow") == b"GET, HEAD, POST"


@pytest.mark.parametrize(
    "path",
    ["/latest/api/token", "/latest/api/%74oken", "//latest//api//token/", "/latest/api/x/../token"],
)
@pytest.mark.parametrize("method", ["PUT", "GET", "POST", "HEAD"])
@pytest.mark.parametrize("dialects", [frozenset(Dialect), frozenset({Dialect.OPENSTACK})])
def test_the_token_route_is_404_with_an_empty_body(
    path: str, method: str, dialects: frozenset[Dialect]
) -> None:
    response = Guest(guest(dialects=dialects)).ask(path, method, b"ignored")
    assert (response.status, response.body) == (404, b"")
    assert header(response, b"content-length") == b"0"


@pytest.mark.parametrize("path", [b"/%", b"/latest/meta-data/%zz"])
def test_a_broken_escape_is_400(path: bytes) -> None:
    assert Guest().status(path) == 400


def test_everything_but_seed_and_password_may_be_cached() -> None:
    asked = Guest()
    assert asked.ask("/").cacheable
    assert asked.ask("/latest/user-data").cacheable
    assert asked.ask("/openstack").cacheable
    assert asked.ask("/openstack/latest/network_data.json").cacheable
    assert asked.ask("/nocloud/meta-data").cacheable
    assert not asked.ask("/openstack/latest/meta_data.json").cacheable
    assert not asked.ask(PASSWORD).cacheable
    assert not asked.ask("/nothing").cacheable


def test_an_unset_password_is_200_and_empty() -> None:
    response = Guest().ask(PASSWORD)
    assert (response.status, response.body) == (200, b"")


def test_a_set_password_is_read_back() -> None:
    asked = Guest()
    asked.password = b"c2VjcmV0"
    assert asked.read(PASSWORD) == b"c2VjcmV0"
    assert asked.read("/openstack/latest/password") == b"c2VjcmV0"


def test_a_posted_password_is_to_be_kept() -> None:
    response = Guest().ask(PASSWORD, "POST", b"c2VjcmV0")
    assert (response.status, response.body, response.new_password) == (200, b"", b"c2VjcmV0")


def test_a_second_password_is_409() -> None:
    asked = Guest()
    asked.password = b"one"
    response = asked.ask(PASSWORD, "POST", b"two")
    assert (response.status, response.new_password) == (409, None)


@pytest.mark.parametrize(("length", "status"), [(1020, 200), (1021, 400), (5000, 400)])
def test_a_password_has_at_most_1020_bytes(length: int, status: int) -> None:
    response = Guest().ask(PASSWORD, "POST", b"x" * length)
    assert response.status == status
    assert (response.new_password is not None) is (status == 200)


def test_posting_nothing_sets_nothing() -> None:
    response = Guest().ask(PASSWORD, "POST")
    assert (response.status, response.new_password) == (200, None)


def test_the_first_version_has_no_password() -> None:
    assert Guest().status("/openstack/2012-08-10/password", "POST") == 404


def test_the_seed_and_the_password_are_asked_for_only_where_needed() -> None:
    asked = Guest()

    def refuse() -> bytes:
        raise AssertionError

    from imdsproxy.core.documents.respond import DocumentRequest, respond  # noqa: PLC0415 - shows the bare call

    for path in (b"/", b"/latest/user-data", b"/openstack/latest/vendor_data.json", b"/nothing"):
        respond(DocumentRequest("GET", path), asked.tree, random_seed=refuse, password=refuse)
    for path in (b"/openstack/latest/meta_data.json", b"/openstack/latest/password"):
        with pytest.raises(AssertionError):
            respond(DocumentRequest("GET", path), asked.tree, random_seed=refuse, password=refuse)


def seconds_per_call(asked: Guest, path: str) -> float:
    """The best of some: another thread of the same core makes any of them slower."""
    asked.ask(path)

    def a_hundred() -> float:
        started = time.process_time()
        for _ in range(100):
            asked.ask(path)
        return (time.process_time() - started) / 100

    return min(a_hundred() for _ in range(10))


def test_a_leaf_takes_well_under_100_microseconds() -> None:
    assert seconds_per_call(Guest(), "/latest/meta-data/instance-id") < 100e-6


def test_meta_data_takes_under_300_microseconds() -> None:
    many = tuple((f"tag-{number}", "x" * 200) for number in range(128))
    assert seconds_per_call(Guest(guest(tags=many)), "/openstack/latest/meta_data.json") < 300e-6


def test_half_a_surrogate_pair_spoils_no_document() -> None:
    odd = "x\ud800y"
    asked = Guest(
        guest(
            name=odd,
            hostname=odd,
            project=odd,
            availability_zone=odd,
            instance_type=odd,
            tags=((odd, odd), ("role", odd)),
            ssh_keys=(SshKey(odd, odd),),
            vendor_data=b'{"cloud-init": "\\ud800"}',
        )
    )
    assert asked.read("/latest/meta-data/hostname") == b"x?y"
    assert asked.read("/latest/meta-data/tags/instance/role") == b"x?y"
    assert asked.read("/latest/meta-data/public-keys") == b"0=x?y"
    assert asked.read("/latest/meta-data/public-keys/0/openssh-key") == b"x?y"
    for path in ("/nocloud/meta-data", "/nocloud/vendor-data", "/openstack/latest/meta_data.json"):
        assert asked.read(path)
