"""Requests over HTTP: one whole answer with a limit of its size, and one error for every way to get none."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import httpcore

_OF_JSON: Final = (("content-type", "application/json"),)
_REASONS: Final[dict[type[Exception], str]] = {
    httpcore.ConnectTimeout: "no connection in time",
    httpcore.ReadTimeout: "no answer in time",
    httpcore.WriteTimeout: "it takes no request",
}


class Unanswered(Exception):
    """No whole answer came.

    Attributes:
        sent: Whether the server may have received the request.
        silent: Whether no answer came in time.
    """

    def __init__(self, reason: str, *, sent: bool = True, silent: bool = False) -> None:
        super().__init__(reason)
        self.sent, self.silent = sent, silent


@contextmanager
def answering() -> Iterator[None]:
    """Convert errors of connections to `Unanswered`."""
    try:
        yield
    except (
        httpcore.NetworkError,
        httpcore.TimeoutException,
        httpcore.ProtocolError,
        OSError,  # of TLS: a certificate is refused when the request was sent already
    ) as error:
        reason = str(error) or _REASONS.get(type(error), type(error).__name__)
        sent = not isinstance(error, httpcore.ConnectError | httpcore.ConnectTimeout)
        silent = isinstance(error, httpcore.ReadTimeout)
        raise Unanswered(reason, sent=sent, silent=silent) from error


async def ask(
    pool: httpcore.AsyncConnectionPool,
    method: str,
    url: str,
    limits: Mapping[str, float],
    *,
    body: bytes | None = None,
    headers: Sequence[tuple[str, str]] | None = None,
    most: float = math.inf,
) -> tuple[int, bytes]:
    """Send one request and return the status and body of the answer.

    Raises `Unanswered` if no answer came, or the answer has over `most` bytes.

    Args:
        limits: Longest times in seconds to `connect`, `write`, `read`, and to wait for the `pool`.
        headers: `None` names JSON as the type of a body.
    """
    parts, size = list[bytes](), 0
    extensions = {"timeout": dict(limits)}
    fields = headers if headers is not None else (_OF_JSON if body else ())
    with answering():
        async with pool.stream(
            method, url, headers=list(fields), content=body, extensions=extensions
        ) as answer:
            async for part in answer.aiter_stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise Unanswered(f"its answer has more than {most} bytes")
            return answer.status, b"".join(parts)
