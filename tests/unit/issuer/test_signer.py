"""The signer at its socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from imdsproxy.host.clock import Clock
from imdsproxy.issuer.claims import IssuerRules
from imdsproxy.issuer.key_store import KeyStore
from imdsproxy.issuer.signer import Signer

_RULES: Final = IssuerRules("https://id.example", "id.example", {})
_MOST: Final = 32
_KEYS: Final = b'{"keys":null}\n'


@contextlib.asynccontextmanager
async def _signer(directory: Path) -> AsyncIterator[Path]:
    store = KeyStore(directory, "ES256", _RULES.issuer, Clock())
    store.open()
    signer = Signer(store, _RULES, Clock(), directory, frozenset(), lambda: "id")
    path = directory / "signer.sock"
    async with await asyncio.start_unix_server(signer.answer, path):
        yield path


async def _ask(path: Path) -> tuple[bytes, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(path)
    with contextlib.suppress(ConnectionError):
        writer.write(_KEYS)
        return await reader.readline(), writer
    return b"", writer


async def test_an_account_with_too_many_connections_gets_no_more_until_it_closes_some(
    tmp_path: Path,
) -> None:
    async with _signer(tmp_path) as path:
        held = [await _ask(path) for _ in range(_MOST)]
        assert all(line for line, _ in held)
        line, writer = await _ask(path)
        assert line == b""
        held.append((line, writer))
        held[0][1].close()

        async with asyncio.timeout(30):
            while line == b"":
                line, writer = await _ask(path)
                writer.close()
        for _, writer in held:
            writer.close()
