"""Keys that sign tokens, and a server of their public halves: an issuer's part, for tests of verifiers."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from support.certificates import Authority, make_authority, server_context
from support.recorder import Answer, Received, Recorder, reply

_LIFE_S: Final = 600
_JSON: Final = ("Content-Type: application/json",)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """RSA key with an id."""

    kid: str = field(default_factory=lambda: uuid.uuid4().hex)
    private: rsa.RSAPrivateKey = field(
        default_factory=lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
        repr=False,
    )

    @property
    def jwk(self) -> dict[str, Any]:
        """The public half, as a key set has it."""
        public = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {**public, "kid": self.kid, "alg": "RS256", "use": "sig"}

    def sign(self, **claims: object) -> str:
        """Sign a token of ten minutes with these claims, which may replace the registered ones."""
        now = int(time.time()) - 30
        registered = {"iat": now, "nbf": now, "exp": now + _LIFE_S, "jti": str(uuid.uuid4())}
        return jwt.encode({**registered, **claims}, self.private, "RS256", {"kid": self.kid})


@dataclass(frozen=True, slots=True)
class Issuer:
    """Issuer as verifiers are configured for it.

    Attributes:
        url: The claim `iss` of its tokens.
        bundle_url: Where its trust domain's keys are, as SPIFFE has them.
        ca_file: PEM file of the authority that has signed the certificate of the keys' server.
    """

    url: str
    jwks_url: str
    bundle_url: str
    ca_file: Path


@dataclass(slots=True)
class KeySet:
    """Server of an issuer's key set, as a context manager.

    Args:
        directory: For its certificates.
        namespace: Where the server listens.
        keys: What it publishes from now on.
        address: That the server listens at.
    """

    directory: Path
    namespace: str
    keys: Sequence[SigningKey]
    address: str = "127.0.0.1"
    _authority: Authority = field(init=False)
    _server: Recorder = field(init=False)

    def __enter__(self) -> Self:
        self._authority = make_authority(self.directory, "issuer-ca")
        own = self._authority.issue("issuer", names=[f"IP:{self.address}"])
        self._server = Recorder(
            namespace=self.namespace,
            address=self.address,
            tls=server_context(own),
            default=self._answer,
        )
        self._server.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()

    @property
    def issuer(self) -> Issuer:
        url = f"https://{self._server.authority}"
        return Issuer(url, f"{url}/jwks", f"{url}/bundle", self._authority.ca_file)

    def _answer(self, request: Received) -> Answer:
        keys = [key.jwk for key in self.keys]
        match request.target:
            case b"/jwks":
                body: dict[str, object] = {"keys": keys}
            case b"/bundle":
                own = [{**key, "use": "jwt-svid"} for key in keys]
                body = {"keys": own, "spiffe_sequence": 1, "spiffe_refresh_hint": 300}
            case _:
                return reply(status=404)
        return reply(json.dumps(body).encode(), headers=_JSON)
