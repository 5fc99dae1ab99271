"""Keys of a fleet's issuer, as its signers share them: in etcd, sealed with a key that only signers have.

The hub passes sealed keys on, and can open none of them. A signer opens them, and makes new ones.
"""

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imdsproxy.errors import SecretUnreadable, refusing
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import write_atomic
from imdsproxy.issuer.keys import Algorithm, SigningKey, make_key, parse_key
from imdsproxy.issuer.ring import KeyRing, parse_ring

SEAL_FILE: Final = "seal.key"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_COPY: Final = f"copy {SEAL_FILE} from the signer of another hub, and restart this signer"


@dataclass(slots=True)
class SealedKeys:
    """Keys of a fleet's issuer in the signer's memory.

    Args:
        directory: Directory of the key that seals; made at the first start.
    """

    directory: Path
    algorithm: Algorithm
    issuer: str
    clock: Clock
    ring: KeyRing = field(default_factory=KeyRing)
    keys: dict[str, SigningKey] = field(default_factory=dict)
    _seal: AESGCM | None = None

    def open(self) -> None:
        """Read the key that seals, or make it.

        Raises:
            SecretUnreadable: The file holds something else.
            HostRefused: The file cannot be read or written.
        """
        path = self.directory / SEAL_FILE
        with refusing(f"read {SEAL_FILE}"):
            text = path.read_bytes() if path.exists() else None
        if text is None:
            text = base64.b64encode(os.urandom(_KEY_BYTES)) + b"\n"
            write_atomic(path, text, mode=0o600, durable=True)
        try:
            secret = base64.b64decode(text, validate=False)
        except ValueError:
            secret = b""
        if len(secret) != _KEY_BYTES:
            raise SecretUnreadable(f"{SEAL_FILE} holds no key of {_KEY_BYTES} bytes", hint=_COPY)
        self._seal = AESGCM(secret)

    @property
    def signing(self) -> SigningKey:
        """Key that signs; `SecretUnreadable` before the hub has brought the keys."""
        key = self.keys.get(self.ring.signing or "")
        if key is None:
            raise SecretUnreadable("the hub has brought no key yet", hint="the hub's log")
        return key

    def manage(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a request of the hub: `load` the keys of etcd, or `make` one.

        Raises:
            ValueError: The request has another form.
            SecretUnreadable: Another key has sealed the keys.
        """
        match shape:
            case {"load": {"ring": dict(ring), "sealed": dict(sealed)}}:
                return self._load(parse_ring(json.dumps(ring).encode()), sealed)
            case {"make": True}:
                return self._make()
            case _:
                raise ValueError("an unknown request of a hub")

    def _load(self, ring: KeyRing, sealed: Mapping[str, str]) -> dict[str, Any]:
        keys = {entry.id: self._open_key(entry.id, sealed.get(entry.id)) for entry in ring.entries}
        self.ring, self.keys = ring, keys
        return {"loaded": ring.sequence}

    def _open_key(self, name: str, sealed: str | None) -> SigningKey:
        known = self.keys.get(name)
        if known is not None:
            return known
        data = base64.b64decode(sealed or "", validate=True)
        try:
            text = self._sealing.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], name.encode())
        except InvalidTag as error:
            raise SecretUnreadable(
                "the fleet's keys are sealed with another key", hint=_COPY
            ) from error
        key = parse_key(text, "a key of the fleet")
        if key.id != name:
            raise ValueError("a key has another id")
        return key

    def _make(self) -> dict[str, Any]:
        key = make_key(self.algorithm, self.issuer, self.clock.now())
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._sealing.encrypt(nonce, key.render(), key.id.encode())
        return {"id": key.id, "jwk": key.jwk(), "sealed": base64.b64encode(sealed).decode()}

    @property
    def _sealing(self) -> AESGCM:
        if self._seal is None:
            raise SecretUnreadable(f"{SEAL_FILE} was not read")
        return self._seal
