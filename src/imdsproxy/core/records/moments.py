"""Points in time, as records and other people's interfaces write them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from imdsproxy.core.records.fields import Field

__all__ = ["LAST_SECOND", "parse_moment", "unix_time_of"]

LAST_SECOND: Final = 9_999_999_999
"""Ten digits of Unix time, the year 2286."""

# RFC 3339 §5.6; Python's own reader takes much more (weeks, no zone, no colons).
_TEXT: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?P<part>\.[0-9]{1,30})?"
    r"(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_WANTED: Final = 'Unix time, or a time with its zone: "2026-11-26T12:00:00Z"'


def unix_time_of(text: str) -> int | None:
    """The whole seconds of Unix time, rounded down, of a time as RFC 3339 writes it.

    Returns:
        `None` where it is no such text, is no time that there is, or is not of 1970 to 2286.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    start, end = match.span("part")
    whole = text if start < 0 else text[:start] + text[end:]
    try:
        seconds = int(datetime.fromisoformat(whole.upper()).timestamp())
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds <= LAST_SECOND else None


def parse_moment(field: Field) -> int | None:
    """A point in time as Unix time: a number, or text (`unix_time_of`)."""
    if not isinstance(field.value, str):
        return field.whole_number(0, LAST_SECOND)
    seconds = unix_time_of(field.value)
    if seconds is None:
        field.refuse("is no point in time", _WANTED)
    return seconds
