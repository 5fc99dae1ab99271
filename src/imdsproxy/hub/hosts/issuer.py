"""Issuer of a fleet's identity tokens, as a hub runs it: keys from etcd, signatures from the signer beside the hub.

The hub decides who gets a token, and holds no key. The signer has the keys, and no connection but the hub's.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import structlog

from imdsproxy.errors import SourceCorrupt, SourceError, SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.codec import Json, attempt
from imdsproxy.fleet.layout import HostId, StoredIssuer, View, parse_issuer, render_issuer
from imdsproxy.host.clock import Clock
from imdsproxy.hub.hosts.cloud import CloudGuests
from imdsproxy.hub.hosts.subjects import find_subject, is_recorded, subject_of
from imdsproxy.hub.store.etcd_messages import unchanged
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.transactions import Transaction, refuse_suspect
from imdsproxy.hub.store.writes import Writes
from imdsproxy.issuer.claims import Placement, Refusal, fits
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
from imdsproxy.issuer.ring import KeyRing, parse_ring
from imdsproxy.issuer.rotation import IssuerKeys, Pace, describe_keys, plan_rotation
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, Port
from imdsproxy.model.subject import Subject

_EVERY_S: Final = 2.0
_LONGEST_QUEUE: Final = 16
"""Requests of one host that wait for the signer; a host that is well sends four at once."""

_HINT: Final = "journalctl -u imdsproxy-hub-signer"
_log: Final = structlog.get_logger()

_Guest: TypeAlias = tuple[InstanceId, NetworkId, str | None]
"""Instance, network, and project by the host's word."""


def explain_unsigned(reason: str) -> str:
    """Return the problem of a hub that signs no identity token."""
    return (
        f"it signs no identity token: {reason}; systemctl status imdsproxy-hub-signer on this hub"
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """Request of a host for a token of one of its guests."""

    instance: InstanceId
    network: NetworkId
    audience: str
    nonce: str | None = None
    project: str | None = None
    """Project by the host's word."""

    @property
    def guest(self) -> _Guest:
        return self.instance, self.network, self.project


@dataclass(slots=True)
class _Queue:
    """Requests of one host for the signer."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0


@dataclass(slots=True)
class FleetIssuer:
    """Issuer of a fleet.

    Args:
        pace: Times of a rotation of keys.
        cloud: OpenStack of the fleet's guests of Nova; `None` without one.
        doubt_clock: Returns the reason why this hub's clock may be wrong.

    Attributes:
        problem: Reason why no token can be signed; `None` if tokens can be signed.
        answered: Number of tokens and refusals by outcome: `signed`, or the reason of the refusal.
        answers: Number of requests of hosts that were answered, and their seconds.
        waits: Reason why a step of a rotation that is due is not carried out.
    """

    url: str
    signer: SignerClient
    state: FleetState
    clock: Clock
    pace: Pace
    doubt_clock: Callable[[], Awaitable[str | None]]
    cloud: CloudGuests | None = None
    waits: str | None = None
    problem: str | None = "the signer was not asked yet"
    answered: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    answered_s: float = 0.0
    _loaded: int | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _queues: dict[HostId, _Queue] = field(default_factory=dict)

    async def sign(self, host: HostId, asked: Sequence[Asked]) -> list[Token | Refusal]:
        """Return a token, or the reason why there is none, for each request of a host.

        Raises:
            SourceUnavailable: The signer does not answer, or has no key; or no place is known without OpenStack.
            SourceCorrupt: No record or policy of the guests is readable.
        """
        begun = self.clock.monotonic()
        found = await self._sign(host, asked)
        self.answers += 1
        self.answered_s += self.clock.monotonic() - begun
        self.answered.update(one.value if isinstance(one, Refusal) else "signed" for one in found)
        return found

    async def _sign(self, host: HostId, asked: Sequence[Asked]) -> list[Token | Refusal]:
        await self._load()
        subjects = await self._place_all(host, {one.guest for one in asked})
        found: list[Token | Refusal | None] = []
        lines: list[bytes] = []
        for one in asked:
            place = subjects.get(one.guest)
            subject, placement = place or (None, Placement.HOST)
            if subject is None:
                found.append(Refusal.UNREADABLE if place is None else Refusal.SUBJECT)
                continue
            if not fits(subject):
                # The signer would end the connection at so long a line, and with it the requests for other guests.
                found.append(Refusal.TAGS)
                continue
            found.append(None)
            request = TokenRequest(subject, one.audience, one.nonce, placement)
            lines.append(render_request(request))
        answers = iter(await self._send(host, lines) if lines else ())
        return [_read(next(answers)) if one is None else one for one in found]

    async def sign_document(
        self, host: HostId, instance: InstanceId, network: NetworkId
    ) -> dict[str, str] | Refusal:
        """Return the document of an instance on a host, with its signatures; raise as `sign`."""
        await self._load()
        subject, placement = await self._place(host, instance, network)
        if subject is None or placement is Placement.HOST:
            # A document has no claim that says on whose word it is.
            return Refusal.SUBJECT
        (line,) = await self._send(host, [render_document_request(subject)])
        try:
            return parse_documents(json.loads(line))
        except ValueError as error:
            raise SourceUnavailable("the signer cannot sign", hint=_HINT) from error

    async def _send(self, host: HostId, lines: Sequence[bytes]) -> list[bytes]:
        """Send a host's lines to the signer after its earlier ones: hosts take turns, whatever one of them requests."""
        queue = self._queues.setdefault(host, _Queue())
        if queue.length >= _LONGEST_QUEUE:
            raise SourceUnavailable("the host has requested too much at once", hint="request later")
        queue.length += 1
        try:
            async with queue.turn:
                return await self.signer.send(lines)
        finally:
            queue.length -= 1
            if not queue.length:
                del self._queues[host]

    async def _place_all(
        self, host: HostId, guests: Collection[_Guest]
    ) -> dict[_Guest, tuple[Subject | None, Placement]]:
        """Return the places of guests; a guest whose place cannot be read now has none, and harms no other guest.

        Most hosts request several audiences of a guest at once. If no place can be read, raise as `sign`.
        """
        found: dict[_Guest, tuple[Subject | None, Placement]] = {}
        failure: SourceError | None = None
        # Guests that need OpenStack come last: after one that has waited in vain, none waits again.
        for guest in sorted(guests, key=lambda one: not is_recorded(self.state, one[0])):
            try:
                found[guest] = await self._place(host, *guest)
            except (SourceCorrupt, SourceUnavailable) as error:
                failure = error
                _log.error("no identity token", host=host, instance=guest[0], reason=error.message)
                if isinstance(error, SourceUnavailable):
                    break
        if failure is not None and not found:
            raise failure
        return found

    async def _place(
        self, host: HostId, instance: InstanceId, network: NetworkId, project: str | None = None
    ) -> tuple[Subject | None, Placement]:
        """Return the subject of an instance on a host, and the proof that it is there; see `sign` for errors."""
        if is_recorded(self.state, instance):
            return find_subject(self.state, host, instance, network), Placement.FLEET
        if self.cloud is not None:
            found = await self.cloud.find(host, instance)
            subject = None if found is None else subject_of(self.state, host, found, network)
            return subject, Placement.NOVA
        told = Instance(instance, instance, instance, project, (Port(network),))
        return subject_of(self.state, host, told, network), Placement.HOST

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

    def problems(self) -> dict[str, str]:
        found = {
            "keys of identity tokens": self.waits,
            "placement of Nova's guests": None if self.cloud is None else self.cloud.failure,
        }
        return {name: why for name, why in found.items() if why is not None}

    def describe(self) -> IssuerKeys:
        """Describe the keys in etcd; raise `SourceUnavailable` while there are none."""
        found = self.stored()
        if found is None:
            raise SourceUnavailable("the fleet's issuer has no key yet", hint=_HINT)
        return self._describe(found[0])

    def _describe(self, stored: StoredIssuer) -> IssuerKeys:
        ring = _ring_of(stored)
        jwks = [stored.keys[entry.id] for entry in ring.entries]
        return describe_keys(self.url, ring, jwks, self.pace)

    async def run(self, writes: Writes) -> None:
        """Keep the signer supplied, make the fleet's first key, and rotate keys; run until cancelled."""
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
            await self._take_due_steps(writes)
            await asyncio.sleep(_EVERY_S)

    async def _make_first(self, writes: Writes) -> None:
        made = await self._make()
        await self._change(writes, lambda found, now: made.first(now) if found is None else found)
        _log.info("the first key of identity tokens was made", key=made.id)

    async def _take_due_steps(self, writes: Writes) -> None:
        """Carry out the steps of a rotation that are due, unless this hub's clock may be wrong."""
        found = self.stored()
        if found is None or plan_steps(found[0], self.pace, self._now()) == found[0]:
            self.waits = None
            return
        if (doubt := await self.doubt_clock()) is not None:
            # A key that signs too early is unknown to verifiers, and each token is refused.
            self.waits = f"the rotation waits: {doubt}"
            return

        def step(stored: StoredIssuer | None, now: int) -> StoredIssuer | None:
            return None if stored is None else plan_steps(stored, self.pace, now)

        await self._change(writes, step)
        self.waits = None
        _log.info("keys of identity tokens rotated")

    async def rotate(self, writes: Writes, *, compromised: bool) -> IssuerKeys:
        """Publish the next key; or, if a key is compromised, replace all keys. Return the keys after it.

        Raises:
            SourceUnavailable: The signer or etcd does not answer.
            RestoreSuspected: Hubs write nothing.
        """
        made = await self._make()

        def change(stored: StoredIssuer | None, now: int) -> StoredIssuer:
            if stored is None:
                return made.first(now)
            return made.in_place(stored, now) if compromised else made.beside(stored, now)

        stored = await self._change(writes, change)
        _log.warning("identity: all keys replaced" if compromised else "identity: next key made")
        return self._describe(stored or made.first(self._now()))

    async def _change(
        self,
        writes: Writes,
        change: Callable[[StoredIssuer | None, int], StoredIssuer | None],
    ) -> StoredIssuer | None:
        """Write the keys as changed, unless nothing changes; return the keys after it."""
        changed: StoredIssuer | None = None

        def plan(view: View) -> Transaction:
            nonlocal changed
            unsuspected = refuse_suspect(view)
            found = view(layout.ISSUER)
            # Another program's value counts for nothing: the last good one stays in force.
            known = None if found is None else attempt(parse_issuer, found[0])
            if known is None and found is not None:
                known = None if (last := self.stored()) is None else last[0]
            changed = change(known, self._now())
            if changed is None or changed == known:
                return Transaction()
            unchanged_since = unchanged(layout.ISSUER, 0 if found is None else found[1])
            return Transaction(
                (unsuspected, unchanged_since), {layout.ISSUER: render_issuer(changed)}
            )

        await writes.write(plan)
        return changed

    async def _make(self) -> "_Made":
        made = await self._ask({"make": True})
        return _Made(made["id"], made["jwk"], made["sealed"])

    def _now(self) -> int:
        return int(self.clock.now().timestamp())


@dataclass(frozen=True, slots=True)
class _Made:
    """Key that the signer has made: its id, public key, and sealed private key."""

    id: str
    jwk: Json
    sealed: str

    def first(self, now: int) -> StoredIssuer:
        return self._join(KeyRing().add(self.id, now), StoredIssuer({}, {}, {}))

    def beside(self, stored: StoredIssuer, now: int) -> StoredIssuer:
        return self._join(_ring_of(stored).add(self.id, now), stored)

    def in_place(self, stored: StoredIssuer, now: int) -> StoredIssuer:
        ring = _ring_of(stored).add(self.id, now).promote(self.id, now)
        ring = ring.drop([one.id for one in ring.entries])
        return replace(self._join(ring, stored), replaced=stored.replaced + 1)

    def _join(self, ring: KeyRing, stored: StoredIssuer) -> StoredIssuer:
        keys, sealed = {**stored.keys, self.id: self.jwk}, {**stored.sealed, self.id: self.sealed}
        return _store(ring, replace(stored, keys=keys, sealed=sealed))


def plan_steps(stored: StoredIssuer, pace: Pace, now: int) -> StoredIssuer:
    """Return the keys after the steps of a rotation that are due; equal keys if there are none."""
    return _store(plan_rotation(_ring_of(stored), pace, now), stored)


def _ring_of(stored: StoredIssuer) -> KeyRing:
    return parse_ring(json.dumps(stored.ring).encode())


def _store(ring: KeyRing, stored: StoredIssuer) -> StoredIssuer:
    """Return the stored keys that are in the ring."""
    ids = [one.id for one in ring.entries]
    return replace(
        stored,
        ring=json.loads(ring.render()),
        keys={one: stored.keys[one] for one in ids},
        sealed={one: stored.sealed[one] for one in ids},
    )


def _read(line: bytes) -> Token | Refusal:
    try:
        return parse_answer(line)
    except ValueError as error:
        raise SourceUnavailable("the signer cannot sign", hint=_HINT) from error
