"""What HAProxy's ring says, as lines of the audit log.

HAProxy escapes what would end a JSON string. Guests may send other bytes that JSON does not take, control characters
and what is not UTF-8, and a session token where none belongs, in a path or in `User-Agent`. To look for those costs
HAProxy as much as the rest of a line, and here next to nothing.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.tokens import TTL_LIMIT_S

__all__ = ["AuditLines", "left_out_line", "read_audit"]

_PLAIN: Final = (string.digits + string.ascii_letters + string.punctuation + " \n").encode()
_CONTROL: Final = re.compile("[\0-\x1f\x7f]")
_TOKEN: Final = re.compile(rb"[0-9A-Fa-f]{0,8}\.[0-9]{10}\.[A-Za-z0-9_-]+")
_NO_TOKEN: Final = b"(token)"
_ROUGHLY_S: Final = 100_000
_LEFT_OUT: Final = re.compile(rb"(\d+) events? dropped")


@dataclass(frozen=True, slots=True)
class AuditLines:
    """Whole lines, each of them JSON.

    Attributes:
        requests: How many of them tell of a request.
        left_out: How many requests HAProxy had no room for.
    """

    text: bytes
    requests: int
    left_out: int = 0


def read_audit(said: bytes, now: float) -> AuditLines:
    """The lines of requests, valid and without tokens; of what HAProxy tells of itself, how many are missing.

    Args:
        said: Whole lines.
        now: Unix time, for the lines that stand for what is missing.
    """
    if any(begin in said for begin in _begins_of_expiries(now)):
        said = _TOKEN.sub(_NO_TOKEN, said)
    count = said.count(b"}\n")
    # The many: a loop over lines would cost the controller ten times as much.
    if (
        said.startswith(b"{")
        and said.endswith(b"}\n")
        and said.count(b"}\n{") == count - 1
        and not said.translate(None, _PLAIN)
    ):
        return AuditLines(said, count)
    lines: list[bytes] = []
    requests = left_out = 0
    for line in said.split(b"\n"):
        if line.startswith(b"{"):
            requests += 1
            lines.append(_valid(line))
        # Else HAProxy tells of itself: `Proxy guests stopped`.
        elif (told := _LEFT_OUT.search(line)) is not None:
            left_out += int(told[1])
            lines.append(left_out_line(int(told[1]), now))
    return AuditLines(b"".join(line + b"\n" for line in lines), requests, left_out)


def left_out_line(count: int, now: float) -> bytes:
    """What stands for `count` lines that are not there, without its line end."""
    return b'{"time":%.3f,"left_out":%d}' % (now, count)


def _begins_of_expiries(now: float) -> set[bytes]:
    """What every token that is still good has in its middle: to find that is ten times as fast as to match."""
    return {b".%d" % (int(second) // _ROUGHLY_S) for second in (now, now + TTL_LIMIT_S)}


def _valid(line: bytes) -> bytes:
    text = line.decode("utf-8", "replace")
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()
