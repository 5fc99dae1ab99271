"""Questions and answers as values; the caller fetches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

_OK: Final = 200


class Framing(StrEnum):
    """How the end of an answer is marked."""

    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until-close"
    """By closing the connection."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request without a body."""

    path: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came.

    Attributes:
        headers: With lower-case names, in their order.
        first_byte_s: Seconds from the request to the answer's first byte; `None` where it was not measured.
        framing: `None` where it is not known.
        version: Of HTTP.
        cut: The body is shorter than its length says.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    first_byte_s: float | None = None
    framing: Framing | None = None
    version: str = "1.1"
    cut: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is 200."""
        return self.status == _OK

    @property
    def text(self) -> str:
        """The body as text, whatever it is."""
        return self.body.decode("utf-8", "replace")

    def header(self, name: str) -> str | None:
        """The first header of a lower-case name."""
        return next((value for one, value in self.headers if one == name), None)


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No answer: refused, cut off, or not in time.

    Attributes:
        why: In one line.
        timed_out: The server took the request and did not answer.
    """

    why: str
    timed_out: bool = False


Answered: TypeAlias = Answer | Unanswered


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and what became of it."""

    ask: Ask
    answered: Answered

    @property
    def answer(self) -> Answer | None:
        """The answer, if there was one."""
        return self.answered if isinstance(self.answered, Answer) else None


def json_of(answer: Answer | None) -> object:
    """A body read as JSON; `None` where it is none, or null."""
    if answer is None or not answer.ok:
        return None
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
