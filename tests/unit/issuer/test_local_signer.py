"""Requests to the signer of this machine, which may be started anew at any time."""

import asyncio
from pathlib import Path

import pytest

from imdsproxy.errors import SourceUnavailable
from imdsproxy.issuer.local_signer import SignerClient


async def _ask_twice(path: Path, client: SignerClient) -> list[bytes]:
    """Ask a signer that ends as the second request arrives, and is there again at once."""
    connections = iter(range(9))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(connections)
        for first in (True, False):
            line = await reader.readline()
            if not line or (number == 0 and not first):
                break
            writer.write(b"%d " % number + line)
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        found = await client.send([b"a\n"])
        try:
            return found + await client.send([b"b\n"])
        finally:
            client.close()


def test_a_request_that_meets_the_end_of_a_signer_is_answered_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    answers = asyncio.run(_ask_twice(path, SignerClient(path, resends=True)))
    assert answers == [b"0 a\n", b"1 b\n"]


def test_a_hub_is_told_that_its_signer_ended_so_that_it_brings_the_keys_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "socket"
    with pytest.raises(SourceUnavailable, match="does not answer"):
        asyncio.run(_ask_twice(path, SignerClient(path)))
