"""Secrets as they are in etcd: sealed with a key that only hubs have (AES-256-GCM).

A sealed value is bound to its key in etcd: in another place it does not open. It names the key that opens it, so that
keys can be replaced one after the other.
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

from imdsproxy.core.fleet.layout import Unreadable
from imdsproxy.core.fleet.values import Sealing
from imdsproxy.errors import SecretUnreadable, SourceCorrupt

COPY_KEY: Final = "copy envelope.key from a hub that has it, and restart this one"
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_LINE: Final = re.compile(r"([a-z0-9-]{1,32}) ([A-Za-z0-9+/]{43}=)")


def _nothing() -> None:
    """Answer as an etcd that names no key."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The keys, by their names.

    Args:
        keys: In the order of the file.
        chosen: What etcd says of the one that seals: `None` for the first; raises `Unreadable`.
    """

    keys: Mapping[str, bytes]
    chosen: Callable[[], Sealing | None] = _nothing

    def __repr__(self) -> str:
        return f"Envelope({', '.join(self.keys)})"

    @property
    def sealing(self) -> str | None:
        """The name of the key that seals; `None` where etcd's choice cannot be read."""
        try:
            chosen = self.chosen()
        except Unreadable:
            return None
        return next(iter(self.keys)) if chosen is None else chosen.key

    def missing(self) -> str | None:
        """Say that this hub does not have the key that seals; `None` where it has, and where that cannot be read."""
        try:
            chosen = self.chosen()
        except Unreadable:
            return None
        if chosen is None or self.fingerprint(chosen.key) == chosen.sha256:
            return None
        return f"the fleet seals secrets with the key {chosen.key}, which this hub does not have"

    def fingerprint(self, name: str) -> str | None:
        """SHA-256 of a key, hexadecimal; `None` where this hub has none of that name."""
        key = self.keys.get(name)
        return None if key is None else hashlib.sha256(key).hexdigest()

    def report(self) -> dict[str, Any]:
        """For other hubs: `sealing`, and `keys`, by whose fingerprints two hubs see that they have the same."""
        keys = {name: self.fingerprint(name) for name in self.keys}
        return {"sealing": self.sealing, "keys": keys}

    def seal(self, place: str, secret: bytes) -> bytes:
        """A secret as it may be written to the key `place` of etcd; `SourceCorrupt` where this hub lacks the key."""
        if (missing := self.missing()) is not None:
            raise SourceCorrupt(missing, hint=COPY_KEY)
        if (name := self.sealing) is None:
            raise SourceCorrupt(
                "which key seals secrets is not readable in etcd",
                hint="`imdsproxy fleet reseal` writes it anew",
            )
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.keys[name]).encrypt(nonce, secret, place.encode())
        return name.encode() + b"\0" + nonce + sealed

    def open(self, place: str, sealed: bytes) -> bytes:
        """The reverse of `seal`.

        Raises:
            SourceCorrupt: No key opens it here: it was changed, moved from another place, or sealed by another fleet.
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
    """Of the key that opens a sealed value."""
    return sealed.partition(b"\0")[0].decode("latin-1")


def add_key(text: bytes, where: str) -> tuple[bytes, str]:
    """The text of a file with one more key, which does not seal yet, and its name; raises as `parse_envelope`."""
    known = parse_envelope(text, where).keys
    # Never one that a key had before: backups name it.
    name = str(1 + max((int(one) for one in known if one.isdecimal()), default=0))
    return text.rstrip() + b"\n" + make_envelope(name), name


def make_envelope(name: str = "1") -> bytes:
    """The text of a file with one new key."""
    key = base64.b64encode(os.urandom(_KEY_BYTES)).decode()
    return f"{name} {key}\n".encode()


def parse_envelope(text: bytes, where: str) -> Envelope:
    """Keys out of a file: a line each, `NAME BASE64`.

    Raises:
        SecretUnreadable: A line is none; `where` names the file. The message has nothing of its content.
    """
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.decode("latin-1").splitlines(), 1):
        found = _LINE.fullmatch(line)
        if found is None or found[1] in keys:
            raise SecretUnreadable(
                f"line {number} of {where} is no key",
                hint="each line is a name of its own and 32 bytes in base64",
            )
        keys[found[1]] = base64.b64decode(found[2])
    if not keys:
        raise SecretUnreadable(f"{where} has no key", hint="imdsproxy fleet init makes one")
    return Envelope(keys)
