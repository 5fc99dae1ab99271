"""Identity tokens on a host: the order in which the signer's keys and the processes come."""

import asyncio
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from imdsproxy.controller.companion import Companion
from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.issuer_documents import IssuerDocuments, find_key_ids
from imdsproxy.haproxy.layout import Layout
from imdsproxy.host.clock import Clock
from imdsproxy.issuer.documents import render_documents
from imdsproxy.issuer.keys import SigningKey, make_key
from imdsproxy.issuer.ring import KeyRing
from imdsproxy.issuer.rotation import Pace
from support.tasks import background, until

_ISSUER = "https://id.example"


@dataclass
class _Process(Companion):
    """Process that only tells that it was started."""

    started: bool = field(default=False)

    async def run(self) -> None:
        self.started = True


@dataclass
class _Signer:
    """Signer at a socket, with a key that a test may replace."""

    key: SigningKey

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        ring = KeyRing().add(self.key.id, int(datetime.now(UTC).timestamp()))
        shape = {"ring": json.loads(ring.render()), "keys": [self.key.jwk()]}
        writer.write(json.dumps(shape).encode() + b"\n")
        writer.close()


def _process(directory: Path) -> _Process:
    return _Process(directory / "pid", directory / "log", (), {})


def _host(directory: Path, service: _Process) -> IdentityHost:
    async def forget() -> None:
        return None

    layout = Layout(directory, directory)
    documents = IssuerDocuments(_ISSUER, directory / "public", lambda: None)
    return IdentityHost(
        layout,
        None,
        documents,
        service,
        _process(directory),
        pace=Pace(3600, 600),
        clock=Clock(),
        forget=forget,
    )


async def test_no_guest_is_answered_before_the_first_keys_are_known(tmp_path: Path) -> None:
    signer = _Signer(make_key("ES256", _ISSUER, datetime.now(UTC)))
    service = _process(tmp_path)
    host = _host(tmp_path, service)
    async with background(host.run()):
        await until(lambda: host.problems()[2])
        assert not service.started
        path = host.layout.signer_socket
        async with await asyncio.start_unix_server(signer.answer, path):
            await until(lambda: service.started)
    assert find_key_ids(host.documents.current) == [signer.key.id]


async def test_guests_are_answered_at_once_if_the_last_run_left_keys(tmp_path: Path) -> None:
    service = _process(tmp_path)
    host = _host(tmp_path, service)
    host.documents.publish(render_documents(_ISSUER, [], 1))
    async with background(host.run()):
        await until(lambda: service.started)
