"""Who may use the console: one link that works once, then one session; and which requests are the session's own.

Everything here decides by what it is given. The reasons are in docs/adr/0050-the-console-is-no-new-way-in.md.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Final

LINK_S: Final = 300.0
"""For so long the link can be opened."""

IDLE_S: Final = 3600.0
"""After so long without a request the session ends, and the command with it."""

COOKIE: Final = "imdsproxy-console"
TOKEN: Final = "token"  # noqa: S105 - the name of a form's field
TOKEN_HEADER: Final = "x-console-token"  # noqa: S105 - a header's name
_HOST: Final = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
_SAFE: Final = frozenset({"GET", "HEAD"})


def _secret() -> str:
    return secrets.token_urlsafe(24)


@dataclass(slots=True)
class Access:
    """The link and the session of one run of the command.

    Attributes:
        now: A monotonic clock, in seconds.
        place: The first step of every path. A cookie goes to all ports of an address: this one goes only to paths
            that begin so, which no other server of 127.0.0.1 knows.
        key: In the link; it works once.
        cookie: Of the browser that opened the link.
        token: In each form and request that changes or reveals something.
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
        """Whether this key opens the session now; it does so once."""
        if self.opened or self.is_over() or not compare_digest(key.encode(), self.key.encode()):
            return False
        self.opened = True
        self.see()
        return True

    def see(self) -> None:
        """Note that the session is in use."""
        self._seen_at = self.now()

    def is_over(self) -> bool:
        """Whether the link was not opened in time, or the session not used for long."""
        return self.now() - self._seen_at > (IDLE_S if self.opened else LINK_S)

    def has_session(self, cookie: str | None) -> bool:
        """Whether this is the cookie of the open session."""
        known = cookie is not None and compare_digest(cookie.encode(), self.cookie.encode())
        return known and self.opened and not self.is_over()

    def has_token(self, token: str) -> bool:
        """Whether a form is one of this session's."""
        return compare_digest(token.encode(), self.token.encode())


def refuse_foreign(method: str, headers: Mapping[str, str], *, opens: bool) -> str | None:
    """Why a request is none that a page of ours sends, or the operator; `None` where it may be.

    Args:
        method: Of the request.
        headers: By names in lower case.
        opens: It is for the link, which may be followed from anywhere.
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
