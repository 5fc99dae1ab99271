"""The audit log opens nothing to who reads it, whatever guests send and wherever they put it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from imdsproxy.core.tokens import parse_token_keys
from support.audit_log import AuditLog
from support.guest import Lost
from support.hostile import Harm, harms
from support.lab import until
from support.nova_world import INSTANCES, SECRET, NovaWorld, open_nova_world
from support.recorder import signature_of

pytestmark = pytest.mark.root

_QUERY: Final = "q7hQwAlphaOmega"
_TTL: Final = ("X-aws-ec2-metadata-token-ttl-seconds: 600",)
_ODD: Final = st.binary(max_size=60).map(lambda said: said.translate(None, b"\0\r\n"))


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


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(harm=harms(), odd=_ODD)
def test_every_line_is_json_whatever_a_guest_sends(
    world: NovaWorld, harm: Harm, odd: bytes
) -> None:
    guest = world.guests["red"]
    for data in (
        harm.data_with("t"),
        b"GET /" + odd.replace(b" ", b"") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /odd HTTP/1.1\r\nHost: x\r\nUser-Agent: " + odd + b"\r\n\r\n",
    ):
        with contextlib.suppress(Lost), guest.connect(timeout_s=0.5) as connection:
            connection.send(data)
            connection.read()


def test_every_one_of_those_lines_was_json(world: NovaWorld) -> None:
    log = _settled(world, "all-asked")
    lines = log.lines()
    assert all(one.keys() == lines[0].keys() for one in lines if "left_out" not in one)
    until(lambda: world.daemon.status()["audit"]["written"] >= len(lines) - 5)
