"""Client of the signer of this machine, on one connection that stays open."""

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imdsproxy.errors import SourceUnavailable
from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.exchange import (
    LONGEST_LINE,
    Token,
    TokenRequest,
    parse_answer,
    parse_documents,
    render_document_request,
    render_request,
)
from imdsproxy.issuer.holder import Wanted
from imdsproxy.model.subject import Subject

_PATIENCE_S: Final = 5.0
_HINT: Final = "journalctl -u imdsproxy-signer"


@dataclass(slots=True)
class SignerClient:
    """Connection to the signer; requests wait for each other.

    Args:
        resends: Whether a request is sent once more if the signer was started anew. A hub must bring keys first.
    """

    path: Path
    resends: bool = False
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the signer that got the last request still runs."""
        return self._streams is not None and not self._streams[0].at_eof()

    async def send(self, lines: Sequence[bytes]) -> list[bytes]:
        """Send lines, and return the line that answers each.

        Raises:
            SourceUnavailable: The signer does not answer.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    if self.resends and self._streams is not None:
                        with contextlib.suppress(OSError, EOFError):
                            return await self._exchange(lines)
                        self.close()
                    return await self._exchange(lines)
            except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
                self.close()
                raise SourceUnavailable(
                    f"the signer does not answer: {error}", hint=_HINT
                ) from error
            except asyncio.CancelledError:
                # The rest of the answers would be taken for those of the next request.
                self.close()
                raise

    async def _exchange(self, lines: Sequence[bytes]) -> list[bytes]:
        if not self.is_open:
            # The signer was started anew.
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(str(self.path), limit=LONGEST_LINE)
        reader, writer = self._streams
        writer.write(b"".join(lines))
        return [await reader.readuntil(b"\n") for _ in lines]

    def close(self) -> None:
        if self._streams is not None:
            with contextlib.suppress(OSError):
                self._streams[1].close()
            self._streams = None


@dataclass(frozen=True, slots=True)
class LocalSigner:
    """Source of tokens on a host without a fleet."""

    client: SignerClient

    async def request(self, wanted: Sequence[Wanted]) -> list[Token | Refusal]:
        """Return a token, or the reason why there is none, for each; see `holder.TokenSource`."""
        lines = [render_request(TokenRequest(one.id, one.audience, one.nonce)) for one in wanted]
        try:
            return [parse_answer(line) for line in await self.client.send(lines)]
        except ValueError as error:
            raise SourceUnavailable(f"the signer cannot sign: {error}", hint=_HINT) from error

    async def document(self, name: str, _subject: Subject) -> dict[str, str] | Refusal:
        """Return the document of a subject with its signatures, or why there is none; see `holder.TokenSource`."""
        try:
            (line,) = await self.client.send([render_document_request(name)])
            return parse_documents(json.loads(line))
        except ValueError as error:
            raise SourceUnavailable(f"the signer cannot sign: {error}", hint=_HINT) from error
