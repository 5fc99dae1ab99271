"""Keys of a host without a fleet: in a directory, or given by the operator."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from imdsproxy.errors import SecretUnreadable, refusing
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import sweep_unfinished, write_atomic
from imdsproxy.issuer.key_file import GivenKey
from imdsproxy.issuer.keys import Algorithm, SigningKey, make_certificate, make_key, parse_key
from imdsproxy.issuer.ring import KeyRing, parse_ring

_RING: Final = "ring.json"
_ID: Final = re.compile("[A-Za-z0-9_-]{43}")
_SECRET: Final = 0o600
_RESTORE: Final = "restore the directory from a backup; or name the operator's key that it was in identity.key_file"


@dataclass(slots=True)
class KeyStore:
    """Directory with a file for each key, and the ring that gives their states.

    Args:
        algorithm: Algorithm of keys that the signer makes.
        given: Keys of the operator, the first to sign; none lets the signer make keys.
    """

    directory: Path
    algorithm: Algorithm
    issuer: str
    clock: Clock
    given: Sequence[GivenKey] = ()
    ring: KeyRing = field(default_factory=KeyRing)
    keys: dict[str, SigningKey] = field(default_factory=dict)

    def open(self) -> None:
        """Read all keys. Without a key: make the first one.

        Raises:
            SecretUnreadable: A file is damaged, or a key of the ring has no file.
            HostRefused: The directory cannot be read or written.
        """
        path = self.directory / _RING
        with refusing(f"read the signing keys in {self.directory}"):
            content = path.read_bytes() if path.exists() else None
            try:
                ring = KeyRing() if content is None else parse_ring(content)
            except ValueError as error:
                raise SecretUnreadable(
                    f"{path} is damaged: {error}", hint="restore the directory from a backup"
                ) from error
            for entry in ring.entries:
                place = self.directory / f"{entry.id}.pem"
                if place.exists():
                    self.keys[entry.id] = parse_key(place.read_bytes(), str(place))
                elif not self.given:
                    raise SecretUnreadable(f"{place} is missing", hint=_RESTORE)
            self.ring = ring
            if self.given:
                self._take_given()
            elif ring.signing is None:
                self.add()
            if content is not None:
                self._sweep()

    def _sweep(self) -> None:
        """Remove private keys outside the ring: a signer that was killed meanwhile has left them."""
        sweep_unfinished(self.directory)
        ids = {one.id for one in self.ring.entries}
        for path in self.directory.glob("*.pem"):
            if path.stem not in ids and _ID.fullmatch(path.stem):
                path.unlink()

    def _take_given(self) -> None:
        for one in self.given:
            self.keys[one.id] = SigningKey(one.private, self._certificate_of(one))
        now = int(self.clock.now().timestamp())
        ring = self.ring.prefer(self.given[0].id, self.keys, now)
        if ring != self.ring:
            self.keep(ring)

    def _certificate_of(self, key: GivenKey) -> x509.Certificate:
        """Return a given key's certificate: its own, or the one that was made at the first start with this key."""
        path = self.directory / f"{key.id}.crt"
        if key.certificate is not None:
            return key.certificate
        try:
            known = x509.load_pem_x509_certificate(path.read_bytes()) if path.exists() else None
        except ValueError:
            known = None
        if known is not None and known.public_key() == key.private.public_key():
            return known
        made = make_certificate(key.private, self.issuer, self.clock.now())
        write_atomic(path, made.public_bytes(Encoding.PEM), mode=_SECRET, durable=True)
        return made

    def add(self) -> str:
        """Make a key and return its id: it signs if it is the first, and is the next one otherwise.

        Raises:
            ValueError: The operator gives the keys.
        """
        if self.given:
            raise ValueError("the operator gives the keys")
        now = self.clock.now()
        key = make_key(self.algorithm, self.issuer, now)
        write_atomic(self.directory / f"{key.id}.pem", key.render(), mode=_SECRET, durable=True)
        self.keys[key.id] = key
        self.keep(self.ring.add(key.id, int(now.timestamp())))
        return key.id

    def keep(self, ring: KeyRing) -> None:
        """Put a ring in force, and remove the files of keys that are not in it."""
        write_atomic(self.directory / _RING, ring.render(), mode=_SECRET, durable=True)
        self.ring = ring
        for gone in self.keys.keys() - {one.id for one in ring.entries}:
            for kind in ("pem", "crt"):
                (self.directory / f"{gone}.{kind}").unlink(missing_ok=True)
            del self.keys[gone]

    @property
    def signing(self) -> SigningKey:
        return self.keys[self.ring.signing or ""]
