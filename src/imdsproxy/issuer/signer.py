"""Signer: the process that has the keys. It builds the claims itself, and signs nothing else."""

import asyncio
import json
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import jwt
import structlog

from imdsproxy.errors import ClockWrong, HostRefused, SecretUnreadable, refusing
from imdsproxy.host.clock import Clock
from imdsproxy.issuer import exchange
from imdsproxy.issuer.aws import sign_document
from imdsproxy.issuer.claims import IssuerRules, Placement, Refusal, plan_claims
from imdsproxy.issuer.exchange import Token, TokenRequest
from imdsproxy.issuer.key_store import KeyStore
from imdsproxy.issuer.ring import SET_CLOCK
from imdsproxy.issuer.sealed_keys import SealedKeys
from imdsproxy.model.subject import ID_PATTERN, Subject, parse_subject

_SUBJECT_ID: Final = re.compile(ID_PATTERN)
_CREDENTIALS: Final = struct.Struct("3i")
_MOST_CONNECTIONS: Final = 32
"""Connections of one account: a captured process keeps the controller, which replaces keys, from none."""

_log: Final = structlog.get_logger()


@dataclass(slots=True)
class Signer:
    """Answers of the signer's socket.

    Args:
        store: Keys of this host alone, or those of a fleet, which the hub brings.
        subjects: Directory of subjects (`controller.subjects`). `None` on a hub, which sends the subject itself.
        managers: Accounts that may manage the keys.
        token_id: Returns a new value for the claim `jti`.
    """

    store: KeyStore | SealedKeys
    rules: IssuerRules
    clock: Clock
    subjects: Path | None
    managers: frozenset[int]
    token_id: Callable[[], str]
    _open: Counter[int] = field(default_factory=Counter)

    def sign(self, request: TokenRequest) -> Token | Refusal:
        subject, placement = request.subject, request.placement
        if self.subjects is not None:
            found = self._read_subject(subject)
            placement = Placement.LOCAL
        else:
            found = subject if isinstance(subject, Subject) else None
        if found is None:
            return Refusal.SUBJECT
        now = int(self.clock.now().timestamp())
        # Hosts of a fleet compare their clocks with the hub's.
        early = None if self.subjects is None else self.store.ring.explain_early(now)
        if early is not None:
            raise ClockWrong(early, hint=SET_CLOCK)
        claims = plan_claims(
            found,
            request.audience,
            request.nonce,
            self.rules,
            placement,
            now=now,
            token_id=self.token_id(),
        )
        if isinstance(claims, Refusal):
            return claims
        key = self.store.signing
        text = jwt.encode(claims, key.private, key.algorithm, headers={"kid": key.id})
        return Token(text, claims["jti"], claims["exp"], claims["exp"] - now)

    def sign_document(self, name: str | Subject) -> dict[str, str] | Refusal:
        """Return a subject's document with its signatures, or why there is none."""
        subject = name if isinstance(name, Subject) else self._read_subject(name)
        if subject is None or (self.subjects is not None and isinstance(name, Subject)):
            return Refusal.SUBJECT
        signed = None
        if subject.document is not None:
            signed = sign_document(subject.document, self.store.signing)
        return Refusal.DOCUMENT if signed is None else signed

    def _read_subject(self, name: str | Subject) -> Subject | None:
        if self.subjects is None or not isinstance(name, str) or not _SUBJECT_ID.fullmatch(name):
            return None
        path = self.subjects / name
        with refusing(f"read the subject {path}"):
            if not path.exists():
                return None
            content = path.read_bytes()
        try:
            return parse_subject(content)
        except ValueError as error:
            raise HostRefused(f"{path} is damaged: {error}") from error

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection until it ends; close it at once if its account has too many."""
        user = _user_of(writer)
        self._open[user] += 1
        try:
            if self._open[user] > _MOST_CONNECTIONS:
                _log.warning("too many connections to the signer", user=user)
                return
            while line := await reader.readline():
                writer.write(self._reply(line, user))
                await writer.drain()
        except (ConnectionError, ValueError) as error:
            # A line beyond the limit is a `ValueError` of `readline`.
            _log.warning("a connection to the signer ended", reason=str(error))
        finally:
            self._open[user] -= 1
            writer.close()

    def _reply(self, line: bytes, user: int) -> bytes:
        try:
            shape = json.loads(line)
            if not isinstance(shape, dict):
                raise TypeError("no object")  # noqa: TRY301 - reported below like any other wrong line
            if "sign" in shape:
                return exchange.render_answer(self.sign(exchange.parse_request(shape)))
            if "document" in shape:
                name = exchange.parse_document_request(shape)
                return exchange.render_documents(self.sign_document(name))
            return self._manage(shape, user)
        except (ValueError, TypeError, RecursionError) as error:
            _log.warning("a wrong request", reason=str(error))
            return exchange.render_answer(Refusal.REQUEST)
        except (ClockWrong, HostRefused, SecretUnreadable) as error:
            _log.error("no token can be signed", reason=error.message, hint=error.hint)
            return json.dumps(exchange.render_problem(error)).encode() + b"\n"

    def _manage(self, shape: Mapping[str, Any], user: int) -> bytes:
        """Change the keys, and return the ring with the public keys."""
        if isinstance(self.store, SealedKeys):
            if user not in self.managers:
                raise ValueError(f"user {user} is no hub")
            return json.dumps(self.store.manage(shape)).encode() + b"\n"
        now = int(self.clock.now().timestamp())
        if (change := shape.get("change")) is not None:
            if user not in self.managers:
                raise ValueError(f"user {user} may not change the keys")
            ring = self.store.ring
            match change:
                case "add":
                    self.store.add()
                case {"promote": str(key)}:
                    self.store.keep(ring.promote(key, now))
                case {"drop": [*keys]}:
                    self.store.keep(ring.drop(keys))
                case "replace":
                    added = self.store.add()
                    promoted = self.store.ring.promote(added, now)
                    self.store.keep(promoted.drop([one.id for one in promoted.entries]))
                case _:
                    raise ValueError("an unknown change of keys")
        ring = self.store.ring
        keys = [self.store.keys[entry.id].jwk() for entry in ring.entries]
        return json.dumps({"ring": json.loads(ring.render()), "keys": keys}).encode() + b"\n"


def _user_of(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket")
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])
