"""No document is ever answered 304: a client that asks whether its copy still holds gets what holds now (ADR 39)."""

from __future__ import annotations

from itertools import product
from typing import Final

import pytest

from support.daemon import instance
from support.guest import Reply
from support.world import World

pytestmark = pytest.mark.root

_FUTURE: Final = "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT"
_CONDITIONS: Final = (
    (_FUTURE,),
    ("If-None-Match: *",),
    ('if-none-match: "a", W/"b"',),
    ('If-None-Match: "a"', _FUTURE),
    ("If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT",),
    ('If-Match: "a"',),
    ('If-Range: "a"', "Range: bytes=0-1"),
)
_PATHS: Final = (
    "/",
    "/latest/meta-data/hostname",
    "/latest/meta-data/",
    "/2009-04-04/meta-data/hostname",
    "/latest/meta-data/hostname?x",
    "/latest/user-data",
    "/openstack",
    "/openstack/2012-08-10/meta_data.json",
    "/openstack/latest/meta_data.json",
    "/openstack/latest/network_data.json",
    "/openstack/latest/password",
    "/nocloud/meta-data",
    "/nocloud/user-data",
)
"""Short ones, cached ones, ones that are never cached; each dialect."""

_VALIDATORS: Final = {"etag", "last-modified", "age", "cache-control", "expires"}


@pytest.mark.parametrize(
    "policy", [None, {"tokens": "required"}, {"tokens": "off"}], ids=["none", "required", "off"]
)
def test_no_condition_of_a_read_changes_its_answer(
    world: World, policy: dict[str, str] | None
) -> None:
    fields = {} if policy is None else {"policy": policy}
    world.daemon.put([], [instance("red-5", "red", fields=fields)])
    token = _token(world) if policy == {"tokens": "required"} else ()
    with world.red.connect() as connection:
        for path, method in product(_PATHS, ("GET", "HEAD")):
            plain = connection.request(path, method=method, headers=token)
            assert plain.status == 200, path
            for condition in (*_CONDITIONS, ()) * 2:
                reply = connection.request(path, method=method, headers=(*token, *condition))
                assert _told(reply, path) == _told(plain, path), (path, method, condition)
                assert not _VALIDATORS & reply.headers.keys(), (path, method, condition)


def _token(world: World) -> tuple[str, ...]:
    ttl = ("X-aws-ec2-metadata-token-ttl-seconds: 60",)
    return (
        f"X-aws-ec2-metadata-token: {world.red.ask('/latest/api/token', method='PUT', headers=ttl).text}",
    )


def _told(reply: Reply, path: str) -> tuple[int, str | None, bytes]:
    # `random_seed` is another one in each answer.
    body = b"" if path == "/openstack/latest/meta_data.json" else reply.body
    return reply.status, reply.headers.get("content-length"), body
