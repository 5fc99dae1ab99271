"""Encryption of secrets in etcd with a key that only hubs have (AES-256-GCM).

A sealed value is bound to its key in etcd and does not open under another key of etcd. The value names its encryption
key, so that an operator can replace encryption keys one by one.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imdsproxy.errors import SecretUnreadable, SourceCorrupt
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import Sealing

COPY_KEY: Final = "copy envelope.key from a hub that has the key, and restart this hub"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_LINE: Final = re.compile(r"([a-z0-9-]{1,32}) ([A-Za-z0-9+/]{43}=)")


def _nothing() -> None:
    """Return no choice, like an etcd that names no key."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Encryption keys by name, in the order of the file.

    `chosen` returns etcd's choice of the key that seals, `None` for the first key; it raises `Unreadable`.
    """

    keys: Mapping[str, bytes]
    chosen: Callable[[], Sealing | None] = _nothing

    def __repr__(self) -> str:
        return f"Envelope({', '.join(self.keys)})"

    @property
    def sealing(self) -> str | None:
        """Name of the key that seals; `None` if etcd's choice is unreadable."""
        try:
            chosen = self.chosen()
        except Unreadable:
            return None
        return next(iter(self.keys)) if chosen is None else chosen.key

    def missing(self) -> str | None:
        """Return a message if this hub lacks the key that seals, otherwise `None`; also if the choice is unreadable."""
        try:
            chosen = self.chosen()
        except Unreadable:
            return None
        if chosen is None or self.fingerprint(chosen.key) == chosen.sha256:
            return None
        return f"the fleet seals secrets with the key {chosen.key}, which this hub does not have"

    def fingerprint(self, name: str) -> str | None:
        """Return the SHA-256 of a key in hexadecimal; `None` if this hub has no key of that name."""
        key = self.keys.get(name)
        return None if key is None else hashlib.sha256(key).hexdigest()

    def report(self) -> dict[str, Any]:
        """Return `sealing` and the fingerprints of `keys`, by which other hubs compare their keys."""
        keys = {name: self.fingerprint(name) for name in self.keys}
        return {"sealing": self.sealing, "keys": keys}

    def seal(self, place: str, secret: bytes) -> bytes:
        """Encrypt a secret for the key `place` of etcd; raise `SourceCorrupt` if this hub lacks the key that seals."""
        if (missing := self.missing()) is not None:
            raise SourceCorrupt(missing, hint=COPY_KEY)
        if (name := self.sealing) is None:
            raise SourceCorrupt(
                "the name of the key that seals secrets is not readable in etcd",
                hint="run `imdsproxy fleet reseal` to name the key again",
            )
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.keys[name]).encrypt(nonce, secret, place.encode())
        return name.encode() + b"\0" + nonce + sealed

    def open(self, place: str, sealed: bytes) -> bytes:
        """Decrypt a sealed value.

        Raises `SourceCorrupt` if the value was changed, moved from another place, or sealed with a key that this hub
        lacks.
        """
        rest = sealed.partition(b"\0")[2]
        key = self.keys.get(name_of(sealed))
        if key is None:
            raise SourceCorrupt(
                f"{place} is sealed with a key that this hub does not have",
                hint=COPY_KEY,
            )
        try:
            return AESGCM(key).decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], place.encode())
        except (InvalidTag, ValueError) as error:
            raise SourceCorrupt(f"{place} does not open: another program has changed it") from error


def name_of(sealed: bytes) -> str:
    return sealed.partition(b"\0")[0].decode("latin-1")


def add_key(text: bytes, where: str) -> tuple[bytes, str]:
    """Add a key that does not seal yet to a file's text; return text and name; raise as `parse_envelope`."""
    known = parse_envelope(text, where).keys
    # A name is never reused, since backups may refer to the old key.
    name = str(1 + max((int(one) for one in known if one.isdecimal()), default=0))
    return text.rstrip() + b"\n" + make_envelope(name), name


def make_envelope(name: str = "1") -> bytes:
    """Return the text of a file with one new key."""
    key = base64.b64encode(os.urandom(_KEY_BYTES)).decode()
    return f"{name} {key}\n".encode()


def parse_envelope(text: bytes, where: str) -> Envelope:
    """Parse the keys of a file, one line `NAME BASE64` each; raise `SecretUnreadable`, without the content."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.decode("latin-1").splitlines(), 1):
        found = _LINE.fullmatch(line)
        if found is None or found[1] in keys:
            raise SecretUnreadable(
                f"line {number} of {where} is no key",
                hint="each line has a unique name and 32 bytes in base64",
            )
        keys[found[1]] = base64.b64decode(found[2])
    if not keys:
        raise SecretUnreadable(f"{where} has no key", hint="`imdsproxy fleet init` creates a key")
    return Envelope(keys)
