"""Access to the console: a link that works once, the session it opens, and checks of the session's requests.

The module does no I/O. The reasons are in docs/adr/0050-the-console-is-no-new-way-in.md.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Final

LINK_S: Final = 300.0
"""Lifetime of the link in seconds."""

IDLE_S: Final = 3600.0
"""Idle timeout in seconds, after which the session and the command end."""

COOKIE: Final = "imdsproxy-console"
TOKEN: Final = "token"  # noqa: S105 - the name of a form's field
TOKEN_HEADER: Final = "x-console-token"  # noqa: S105 - a header's name
_HOST: Final = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
_SAFE: Final = frozenset({"GET", "HEAD"})


def _secret() -> str:
    return secrets.token_urlsafe(24)


@dataclass(slots=True)
class Access:
    """Link and session of one run of the command.

    Attributes:
        place: First segment of every path. Browsers send a cookie to all ports of an address; the cookie is limited to
            paths with this segment, which no other server on 127.0.0.1 knows.
        key: Key in the link; it works once.
        token: Token in each form and request that changes or reveals something.
    """

    now: Callable[[], float]
    place: str = field(default_factory=_secret)
    key: str = field(default_factory=_secret)
    cookie: str = field(default_factory=_secret)
    token: str = field(default_factory=_secret)
    opened: bool = False
    _seen_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._seen_at = self.now()

    def open(self, key: str) -> bool:
        """Open the session if the key is right and unused; return whether the session was opened."""
        if self.opened or self.is_over() or not compare_digest(key.encode(), self.key.encode()):
            return False
        self.opened = True
        self.see()
        return True

    def see(self) -> None:
        self._seen_at = self.now()

    def is_over(self) -> bool:
        return self.now() - self._seen_at > (IDLE_S if self.opened else LINK_S)

    def has_session(self, cookie: str | None) -> bool:
        known = cookie is not None and compare_digest(cookie.encode(), self.cookie.encode())
        return known and self.opened and not self.is_over()

    def has_token(self, token: str) -> bool:
        return compare_digest(token.encode(), self.token.encode())


def refuse_foreign(method: str, headers: Mapping[str, str], *, opens: bool) -> str | None:
    """Return why a request comes neither from the console's pages nor from the operator; `None` if acceptable.

    Args:
        opens: The request is for the link, which any page may contain.
    """
    host = headers.get("host", "")
    if not _HOST.fullmatch(host):
        return "the Host header names another host than 127.0.0.1 or localhost"
    if "prefetch" in headers.get("sec-purpose", ""):
        return "a page that is only fetched ahead opens nothing"
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"} and not opens:
        return "another site's page sent this request"
    if method not in _SAFE and headers.get("origin") != f"http://{host}":
        return "the Origin header is not that of the console"
    return None
