"""The audit log opens nothing to who reads it, whatever guests send and wherever they put it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from imdsproxy.core.tokens import parse_token_keys
from support.audit_log import AuditLog
from support.guest import Lost
from support.hostile import Harm, harms
from support.nova_world import INSTANCES, SECRET, NovaWorld, open_nova_world
from support.recorder import signature_of

pytestmark = pytest.mark.root

_QUERY: Final = "q7hQwAlphaOmega"
_TTL: Final = ("X-aws-ec2-metadata-token-ttl-seconds: 600",)
_ODD: Final = st.binary(max_size=60).map(lambda sent: sent.translate(None, b"\0\r\n"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NovaWorld]:
    path = tmp_path_factory.mktemp("audit") / "audit.log"
    with open_nova_world() as world:
        audit = {"mode": "all", "destination": os.fspath(path)}
        world.daemon.reconfigure({**world.daemon.settings, "audit": audit})
        yield world


def _log(world: NovaWorld) -> AuditLog:
    return AuditLog(world.daemon, Path(str(world.daemon.settings["audit"]["destination"])))


def _settled(world: NovaWorld, mark: str) -> AuditLog:
    """The log, once everything before is in it."""
    log = _log(world)
    world.guests["red"].ask(f"/{mark}")
    log.wait(path=f"/{mark}")
    return log


def test_no_token_signature_key_or_query_is_in_a_line_wherever_a_guest_puts_it(
    world: NovaWorld,
) -> None:
    keys = parse_token_keys((world.daemon.state / "token-keys").read_text())
    secret = [SECRET, *(one.text for one in keys)]
    secret += [signature_of(SECRET, one) for one in INSTANCES.values()]
    sent = 0
    for guest in world.guests.values():
        token = guest.ask("/latest/api/token", method="PUT", headers=_TTL).text
        secret += [token, token.rpartition(".")[2]]
        header = f"X-aws-ec2-metadata-token: {token}"
        ways: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("/latest/user-data", (header,)),
            ("/latest/user-data", (header, header)),
            ("/latest/user-data", (f"User-Agent: curl {token}",)),
            ("/latest/user-data", (f"User-Agent: {'x' * 150}{token}",)),
            ("/latest/user-data", (f"Authorization: Bearer {token}", f"Cookie: t={token}")),
            ("/latest/user-data", (f"X-aws-ec2-metadata-token-ttl-seconds: {token}",)),
            (f"/latest/api/token/{token}", ()),
            (f"/{token}", (header,)),
            (f"/latest/user-data?{_QUERY}={token}", ()),
            (f"http://{token}/latest/user-data?{_QUERY}", ()),
            (f"/latest/user-data%3f/?{_QUERY}#{_QUERY}", ()),
            (f"/??{_QUERY}?{_QUERY}", ()),
        )
        for target, headers in ways:
            with contextlib.suppress(Lost):
                guest.ask(target, headers=headers)
            sent += 1
    log = _settled(world, "tokens-asked")
    text = log.text()
    assert not [word for word in (*secret, _QUERY) if word in text]
    assert len(log.lines()) > sent
    assert log.has(path="/latest/api/token/(token)")


def test_every_line_is_json_whatever_a_guest_sends(world: NovaWorld) -> None:
    @settings(max_examples=60, deadline=None, phases=[Phase.generate])
    @given(harm=harms(), odd=_ODD)
    def send(harm: Harm, odd: bytes) -> None:
        for data in (
            harm.data_with("t"),
            b"GET /" + odd.replace(b" ", b"") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /odd HTTP/1.1\r\nHost: x\r\nUser-Agent: " + odd + b"\r\n\r\n",
        ):
            with contextlib.suppress(Lost), world.red.connect(timeout_s=0.5) as connection:
                connection.send(data)
                connection.read()

    send()
    odd = bytes(range(1, 256)).translate(None, b"\r\n")
    agents = (b'"}\\', b"a\tb", b"\xff\xfe", b"\xc3", odd, b"%[var(x)]%ST", b'\\"' * 2000, b"\x01" * 300)  # fmt: skip
    targets = (
        b'/a"b\\c', b"/" + b"a" * 8000, b"/" + b'"' * 2000, b"/" + b"\\" * 1010, b"/\xff", b"/a\tb", b"/{}|#%00%22",
        b"http://h/p?q", b"*", b"//", b"/?", b"?",
    )  # fmt: skip
    raw = [b"GET /one HTTP/1.1\r\nHost: x\r\nUser-Agent: " + agent for agent in agents]
    raw += [b"GET " + target + b" HTTP/1.1\r\nHost: x" for target in targets]
    raw += [b'A"B / HTTP/1.1\r\nHost: x', b"\x16\x03\x01\x02", b"G" * 1500 + b" / HTTP/1.1\r\nHost: x"]  # fmt: skip
    _settled(world, "first")
    for request in raw:
        with contextlib.suppress(Lost):
            world.red.raw(request + b"\r\nConnection: close\r\n\r\n")
    log = _settled(world, "last")
    lines = log.lines()
    paths = [line["path"] for line in lines]
    assert paths.index("/last") - paths.index("/first") == len(raw) + 1
    assert all(one.keys() == lines[0].keys() for one in lines)
    assert log.has(path='/a"b\\c')
    assert log.has(agent="a\tb")
    assert max(len(path) for path in paths) > 1000
    assert max(map(len, log.text().splitlines())) < 4096


def test_a_request_that_comes_back_from_the_resolver_has_one_line(world: NovaWorld) -> None:
    chunked = ("Transfer-Encoding: chunked", "User-Agent: comes-back")
    head = "\r\n".join(("POST /openstack/2013-10-17/password HTTP/1.1", "Host: x", *chunked))
    reply = world.red.raw(f"{head}\r\n\r\n1\r\na\r\n0\r\n\r\n".encode(), method="POST")
    assert "x-imdsproxy-told" not in reply.headers
    log = _settled(world, "after-it")
    (line,) = [one for one in log.lines() if one["agent"] == "comes-back"]
    assert (line["instance"], line["network"]) == (INSTANCES["red"], "red")
    assert line["by"].startswith("nova.default.once/")
