"""Session tokens as HAProxy makes and checks them: `KID.EXPIRY.MAC`, bound to network, instance and epoch.

A token holds no data and is stored nowhere: any process that has the key can verify it. A token therefore survives
reloads and restarts, and is valid on every host that has the key. (AWS, "Use the Instance Metadata Service to access
instance metadata"; no standard prescribes the form of a token.)
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

from imdsproxy.model.entities import InstanceId

TOKEN_HEADER: Final = "x-aws-ec2-metadata-token"  # noqa: S105 - a header's name
TTL_HEADER: Final = "x-aws-ec2-metadata-token-ttl-seconds"
"""Lifetime of a token, in a token request and in its answer."""

TTL_LIMIT_S: Final = 21_600
"""Six hours, EC2's own limit."""

KEY_BYTES: Final = 32
"""As long as the MAC: longer adds nothing (RFC 2104 §3)."""

KEPT_KEYS: Final = 3
"""The key in force and the two before it. A token made just before a rotation is valid for six more hours."""

CURRENT: Final = "@current"
"""Name of the kid for new tokens in the key map; no kid begins so."""

_OF_INSTANCE: Final = b"imdsproxy instance key|"

TOKEN_PATTERN: Final = r"^[0-9a-f]{8}\.[0-9]{10}\.[A-Za-z0-9_-]{43}$"  # noqa: S105 - what one looks like

_LINE: Final = re.compile(r"[A-Za-z0-9+/]{43}=")


class TokenKeysUnreadable(ValueError):
    """A key file holds something other than keys. The message names the line and shows no content."""


@dataclass(frozen=True, slots=True)
class TokenKey:
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @property
    def kid(self) -> str:
        """Eight hexadecimal digits that identify the key, derived from its bytes: hosts with the same key agree."""
        return hashlib.sha256(b"imdsproxy kid" + self.secret).hexdigest()[:8]

    @property
    def text(self) -> str:
        return base64.b64encode(self.secret).decode("ascii")


def parse_token_keys(text: str) -> tuple[TokenKey, ...]:
    """Parse a key file: one key per line in base64, the key in force first; blank lines and `#` comments are skipped.

    Raises `TokenKeysUnreadable` if a line is not a key, a key occurs twice, or the file has no key.
    """
    keys: list[TokenKey] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if not _LINE.fullmatch(line):
            raise TokenKeysUnreadable(f"line {number} is not {KEY_BYTES} bytes in base64")
        key = TokenKey(base64.b64decode(line))
        if key in keys:
            raise TokenKeysUnreadable(f"line {number} repeats an earlier key")
        keys.append(key)
    if not keys:
        raise TokenKeysUnreadable("the file has no key")
    return tuple(keys)


def render_token_keys(keys: Iterable[TokenKey]) -> str:
    head = "# imdsproxy: keys of session tokens, the key in force first; a reader of this file can make tokens\n"
    return head + "".join(f"{key.text}\n" for key in keys)


def rotate_token_keys(keys: Iterable[TokenKey], fresh: TokenKey) -> tuple[TokenKey, ...]:
    """Put `fresh` in force; earlier keys stay valid, except the oldest."""
    return (fresh, *(key for key in keys if key != fresh))[:KEPT_KEYS]


InstanceKeys: TypeAlias = Mapping[InstanceId, tuple[TokenKey, ...]]
"""Token keys of a fleet's instances; for each instance the key in force comes first."""

_NONE: Final[InstanceKeys] = MappingProxyType({})


def instance_key(fleet_key: TokenKey, instance: str) -> TokenKey:
    """Derive the key that signs tokens of one fleet instance, on any host.

    HMAC-SHA256 of the instance's id with the fleet's key: a process that has the result can compute neither the fleet's
    key nor another instance's.
    """
    message = _OF_INSTANCE + instance.encode()
    return TokenKey(hmac.digest(fleet_key.secret, message, hashlib.sha256))


def render_key_map(keys: Iterable[TokenKey], of_instances: InstanceKeys = _NONE) -> dict[str, str]:
    """Render HAProxy's key map: the key of each kid, then the kid in force, which refers to one of them.

    The host's own keys, the key in force first, sign no tokens for instances that have keys, under `…|INSTANCE`.
    """
    entries = _entries(tuple(keys), "")
    for instance, own in of_instances.items():
        entries |= _entries(own, f"|{instance}")
    return entries


def _entries(keys: tuple[TokenKey, ...], whose: str) -> dict[str, str]:
    entries = {f"{key.kid}{whose}": key.text for key in keys}
    return entries | ({f"{CURRENT}{whose}": keys[0].kid} if keys else {})


def parse_key_map(entries: Mapping[str, str]) -> dict[InstanceId, tuple[TokenKey, ...]]:
    found: dict[InstanceId, list[TokenKey]] = {}
    for name, text in entries.items():
        kid, _, instance = name.partition("|")
        if instance and kid != CURRENT:
            key = TokenKey(base64.b64decode(text))
            own = found.setdefault(InstanceId(instance), [])
            own.insert(0 if entries.get(f"{CURRENT}|{instance}") == kid else len(own), key)
    return {instance: tuple(own) for instance, own in found.items()}
