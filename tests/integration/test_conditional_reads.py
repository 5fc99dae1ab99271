"""No document is ever answered 304: a client that asks whether its copy still holds gets what holds now (ADR 39)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Final

import pytest

from support.daemon import instance
from support.guest import Reply
from support.lab import within
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


def test_curl_never_keeps_a_hostname_that_was_taken_back(world: World, tmp_path: Path) -> None:
    """`curl -z` asks by the time of its copy, `--etag-compare` by what came with it."""
    etag, copy = tmp_path / "etag", tmp_path / "copy"
    dated = ("--time-cond", str(copy), "--output", str(copy))
    tagged = ("--etag-compare", str(etag), "--etag-save", str(etag), "--output", str(copy))
    for path in ("/latest/meta-data/hostname", "/2009-04-04/meta-data/hostname", "/nocloud/meta-data"):  # fmt: skip
        for options in (dated, tagged):
            copy.unlink(missing_ok=True)
            etag.unlink(missing_ok=True)
            # Both are read, so that both are cached, and all of it within one second.
            for name in ("a", "b", "a", "b", "a"):
                record = instance("red-5", "red", fields={"hostname": f"{name}.example"})
                world.daemon.put([], [record])
                _curl(world, path, *options)
                assert f"{name}.example" in copy.read_text(), (path, options)
            world.reload()
            _curl(world, path, *options)
            assert "a.example" in copy.read_text()


def _curl(world: World, path: str, *options: str) -> None:
    command: Sequence[str] = (
        *within(world.red.namespace), "/usr/bin/curl", "--silent", "--show-error", "--max-time", "8", *options,
        f"http://169.254.169.254{path}",
    )  # fmt: skip
    subprocess.run(command, check=True)
