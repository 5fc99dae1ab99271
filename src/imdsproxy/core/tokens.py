"""Session tokens, as HAProxy makes and checks them: `KID.EXPIRY.MAC`, bound to network, instance and epoch.

A token holds no data and is stored nowhere: any process that has the key can verify it. So it outlives reloads and
restarts, and works on every host that has the key. (AWS, "Use the Instance Metadata Service to access instance
metadata"; the form of a token is nowhere prescribed.)
"""

import base64
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

TOKEN_HEADER: Final = "x-aws-ec2-metadata-token"  # noqa: S105 - a header's name
TTL_HEADER: Final = "x-aws-ec2-metadata-token-ttl-seconds"
"""In a request for a token, and in the answers to one: how long it is valid."""

TTL_LIMIT_S: Final = 21_600
"""Six hours, EC2's own limit."""

KEY_BYTES: Final = 32
"""As long as the MAC: longer adds nothing (RFC 2104 §3)."""

KEPT_KEYS: Final = 3
"""The one in force and the two before it. A token made just before a change lives six hours longer."""

CURRENT: Final = "@current"
"""The key map's name for the kid that new tokens have; no kid begins so."""

TOKEN_PATTERN: Final = r"^[0-9a-f]{8}\.[0-9]{10}\.[A-Za-z0-9_-]{43}$"  # noqa: S105 - what one looks like

_LINE: Final = re.compile(r"[A-Za-z0-9+/]{43}=")


class TokenKeysUnreadable(ValueError):
    """A key file holds something else than keys; says where, without a word of it."""


@dataclass(frozen=True, slots=True)
class TokenKey:
    """What signs tokens.

    Attributes:
        secret: `KEY_BYTES` random bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @property
    def kid(self) -> str:
        """Eight hexadecimal digits that name the key: of its own bytes, so that hosts that share it agree."""
        return hashlib.sha256(b"imdsproxy kid" + self.secret).hexdigest()[:8]

    @property
    def text(self) -> str:
        """Base64, as key file and key map have it."""
        return base64.b64encode(self.secret).decode("ascii")


def parse_token_keys(text: str) -> tuple[TokenKey, ...]:
    """The keys of a file: one a line in base64, the one in force first; blank lines and `#` comments are skipped.

    Raises:
        TokenKeysUnreadable: A line is no key, a key is there twice, or there is none.
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
            raise TokenKeysUnreadable(f"line {number} has a key that is there already")
        keys.append(key)
    if not keys:
        raise TokenKeysUnreadable("there is no key in it")
    return tuple(keys)


def render_token_keys(keys: Iterable[TokenKey]) -> str:
    """The reverse of `parse_token_keys`."""
    head = "# imdsproxy: keys of session tokens, the one in force first; a reader of this file can make tokens\n"
    return head + "".join(f"{key.text}\n" for key in keys)


def rotate_token_keys(keys: Iterable[TokenKey], fresh: TokenKey) -> tuple[TokenKey, ...]:
    """`fresh` in force; those before it go on being believed, the oldest no longer."""
    return (fresh, *(key for key in keys if key != fresh))[:KEPT_KEYS]


def render_key_map(keys: Iterable[TokenKey]) -> dict[str, str]:
    """What HAProxy looks up: the kid in force, and each kid's key."""
    each = tuple(keys)
    return {CURRENT: each[0].kid, **{key.kid: key.text for key in each}}
