"""Issuer of a fleet's identity tokens, as a hub runs it: keys from etcd, signatures from the signer beside the hub.

The hub decides who gets a token, and holds no key. The signer has the keys, and no connection but the hub's.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, StoredIssuer, parse_issuer, render_issuer
from imdsproxy.host.clock import Clock
from imdsproxy.hub.hosts.subjects import find_subject
from imdsproxy.hub.store.etcd_messages import unchanged
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.transactions import Transaction, refuse_suspect
from imdsproxy.hub.store.writes import Writes
from imdsproxy.issuer.claims import Placement, Refusal
from imdsproxy.issuer.documents import render_documents
from imdsproxy.issuer.exchange import (
    Token,
    TokenRequest,
    parse_answer,
    parse_documents,
    render_document_request,
    render_request,
)
from imdsproxy.issuer.local_signer import SignerClient
from imdsproxy.issuer.ring import KeyRing
from imdsproxy.model.entities import InstanceId, NetworkId

_EVERY_S: Final = 2.0
_HINT: Final = "journalctl -u imdsproxy-hub-signer"
_log: Final = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Asked:
    """Request of a host for a token of one of its guests."""

    instance: InstanceId
    network: NetworkId
    audience: str
    nonce: str | None = None


@dataclass(slots=True)
class FleetIssuer:
    """Issuer of a fleet.

    Attributes:
        problem: Reason why no token can be signed; `None` if tokens can be signed.
    """

    url: str
    signer: SignerClient
    state: FleetState
    clock: Clock
    problem: str | None = "the signer was not asked yet"
    _loaded: int | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def sign(self, host: HostId, asked: Sequence[Asked]) -> list[Token | Refusal]:
        """Return a token, or the reason why there is none, for each request of a host.

        Raises:
            SourceUnavailable: The signer does not answer, or has no key.
            SourceCorrupt: A record or policy is not readable.
        """
        await self._load()
        found: list[Token | Refusal | None] = []
        lines: list[bytes] = []
        for one in asked:
            subject = find_subject(self.state, host, one.instance, one.network)
            if subject is None:
                found.append(Refusal.SUBJECT)
                continue
            found.append(None)
            request = TokenRequest(subject, one.audience, one.nonce, Placement.FLEET)
            lines.append(render_request(request))
        answers = iter(await self.signer.send(lines) if lines else ())
        return [_read(next(answers)) if one is None else one for one in found]

    async def sign_document(
        self, host: HostId, instance: InstanceId, network: NetworkId
    ) -> dict[str, str] | Refusal:
        """Return the document of an instance on a host, with its signatures; raise as `sign`."""
        await self._load()
        subject = find_subject(self.state, host, instance, network)
        if subject is None:
            return Refusal.SUBJECT
        (line,) = await self.signer.send([render_document_request(subject)])
        try:
            return parse_documents(json.loads(line))
        except ValueError as error:
            raise SourceUnavailable("the signer cannot sign", hint=_HINT) from error

    def stored(self) -> tuple[StoredIssuer, int] | None:
        """Return the keys in etcd with their revision; `None` while there are none."""
        found = self.state.value(layout.ISSUER)
        return None if found is None else (parse_issuer(found[0]), found[1])

    def documents(self) -> Mapping[str, tuple[str, str]]:
        """Return the issuer's documents, by path below the issuer; empty while there are no keys."""
        found = self.stored()
        if found is None:
            return {}
        ids = [entry["id"] for entry in found[0].ring["keys"]]
        keys = [dict(found[0].keys[one]) for one in ids]
        return render_documents(self.url, keys, found[0].ring["sequence"])

    async def _load(self) -> None:
        """Bring the newest keys to the signer, which loses them when it is started anew."""
        async with self._turn:
            found = self.stored()
            if found is None:
                raise SourceUnavailable("the fleet's issuer has no key yet", hint=_HINT)
            stored, revision = found
            if self._loaded == revision and self.signer.is_open:
                return
            await self._ask({"load": {"ring": stored.ring, "sealed": dict(stored.sealed)}})
            self._loaded = revision

    async def _ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        answer = json.loads((await self.signer.send([json.dumps(question).encode() + b"\n"]))[0])
        if "problem" in answer:
            raise SourceUnavailable(answer["problem"], hint=answer.get("hint", _HINT))
        if not isinstance(answer, dict) or "refused" in answer:
            raise SourceUnavailable("the signer refuses this hub's requests", hint=_HINT)
        return answer

    async def run(self, writes: Writes) -> None:
        """Keep the signer supplied, and make the fleet's first key; run until cancelled."""
        while True:
            try:
                if self.stored() is None:
                    await self._make_first(writes)
                await self._load()
            except SourceUnavailable as error:
                if self.problem != error.message:
                    _log.error("no identity token can be signed", reason=error.message)
                self.problem = error.message
            else:
                if self.problem is not None:
                    _log.info("identity tokens can be signed")
                self.problem = None
            await asyncio.sleep(_EVERY_S)

    async def _make_first(self, writes: Writes) -> None:
        made = await self._ask({"make": True})
        ring = KeyRing().add(made["id"], int(self.clock.now().timestamp()))
        value = render_issuer(
            StoredIssuer(
                json.loads(ring.render()), {made["id"]: made["jwk"]}, {made["id"]: made["sealed"]}
            )
        )

        def plan(view: layout.View) -> Transaction:
            unsuspected = refuse_suspect(view)
            if view(layout.ISSUER) is not None:
                return Transaction()
            return Transaction((unsuspected, unchanged(layout.ISSUER, 0)), {layout.ISSUER: value})

        await writes.write(plan)
        _log.info("the first key of identity tokens was made", key=made["id"])


def _read(line: bytes) -> Token | Refusal:
    try:
        return parse_answer(line)
    except ValueError as error:
        raise SourceUnavailable("the signer cannot sign", hint=_HINT) from error
