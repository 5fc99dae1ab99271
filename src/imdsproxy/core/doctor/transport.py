"""How answers come: at all, in time, whole, and in a form that every client reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import ODD_LEAF, Crawl
from imdsproxy.core.doctor.exchange import Ask, Framing, Unanswered
from imdsproxy.core.doctor.finding import Finding, Severity

_TIMEOUTS: Final = (
    (0.4, "New Relic"),
    (0.5, "AWS SDK for Go v2"),
    (1.0, "botocore, boto3, AWS CLI"),
    (1.0, "AWS SDKs for Node, Ruby, C (awscrt)"),
    (1.0, "AsyncAws"),
    (2.0, "s3cmd, Sentry"),
    (3.0, "google-auth"),
    (5.0, "Facter, amazon-ec2-net-utils"),
    (10.0, "cloud-init, Ignition, Ohai"),
)
"""Seconds until a client with its defaults gives up."""

_FINE_S: Final = 0.3
_BAD_S: Final = 1.0
_LARGE: Final = 1 << 20
_BLOCKED: Final = (301, 302, 303, 307, 308)
_SERVER_ERROR: Final = 500
_WAITING: Final = (
    "cloudbase-init and curl tools, which wait for ever",
    "cloud-init, for ten seconds each",
)
_BROKEN: Final = ("9 of 29 clients, which do not try again",)


def check_transport(crawl: Crawl) -> Iterator[Finding]:
    """Everything that has nothing to do with what is said."""
    yield from _unanswered(crawl)
    yield from _slow(crawl)
    yield from _framing(crawl)
    yield from _redirects(crawl)
    yield from _server_errors(crawl)
    yield from _large(crawl)


def _unanswered(crawl: Crawl) -> Iterator[Finding]:
    silent = [one for one in crawl.exchanges if isinstance(one.answered, Unanswered)]
    if silent and len(silent) == len(crawl.exchanges):
        first = silent[0].answered
        why = first.why if isinstance(first, Unanswered) else ""
        yield Finding(
            "unreachable",
            Severity.ERROR,
            f"nobody answers: {why}",
            "see that the packet arrives (route, listener, firewall); `imdsproxy status` on the host says "
            "which networks are served, and `imdsproxy snippet` prints the route that a guest needs",
            ("every client",),
        )
    elif silent:
        stalled = any(
            isinstance(one.answered, Unanswered) and one.answered.timed_out for one in silent
        )
        odd = all(one.ask.path == f"{crawl.base}{ODD_LEAF}" for one in silent)
        yield Finding(
            "no-answer",
            Severity.WARNING if odd else Severity.ERROR,
            f"{len(silent)} of {len(crawl.exchanges)} questions got no answer: {_why(silent[0].answered)}",
            "answer every request: what is not there with 404, and 503 with Retry-After while not ready",
            _WAITING if stalled else _BROKEN,
            tuple(one.ask.path for one in silent),
        )


def _why(answered: object) -> str:
    return answered.why if isinstance(answered, Unanswered) else ""


def _slow(crawl: Crawl) -> Iterator[Finding]:
    times = [
        (answer.first_byte_s, ask)
        for ask, answer in crawl.answers()
        if answer.first_byte_s is not None and answer.first_byte_s > _FINE_S
    ]
    if not times:
        return
    worst = max(seconds for seconds, _ in times)
    yield Finding(
        "slow",
        Severity.ERROR if worst >= _BAD_S else Severity.WARNING,
        f"{_count(len(times), 'answer')} took longer than {_FINE_S} s, the slowest {worst:.2f} s",
        "answer within 0.3 s; a boot asks 60 questions one after the other",
        tuple(name for seconds, name in _TIMEOUTS if seconds < worst)
        or ("every boot, by its sum",),
        tuple(ask.path for _, ask in sorted(times, key=lambda one: -one[0])),
    )


def _framing(crawl: Crawl) -> Iterator[Finding]:
    closed = [ask for ask, answer in crawl.answers() if answer.framing is Framing.UNTIL_CLOSE]
    old = [ask for ask, answer in crawl.answers() if answer.version == "1.0"]
    cut = [ask for ask, answer in crawl.answers() if answer.cut]
    if closed or old:
        how = "HTTP/1.0" if old else "no length: the connection's end is the body's"
        yield Finding(
            "close-delimited",
            Severity.ERROR,
            f"answers come with {how}",
            "answer HTTP/1.1 with Content-Length, or chunked",
            ("awscrt (AWS CLI 2, CRT SDKs)",),
            _paths(closed or old),
        )
    if cut:
        yield Finding(
            "cut-off",
            Severity.ERROR,
            "a body is shorter than its Content-Length",
            "send as many bytes as Content-Length says",
            ("19 of 29 clients; 10 of them try again",),
            _paths(cut),
        )


def _redirects(crawl: Crawl) -> Iterator[Finding]:
    moved = [ask for ask, answer in crawl.answers() if answer.status in _BLOCKED]
    if moved:
        yield Finding(
            "redirect",
            Severity.WARNING,
            "the answer is a redirect",
            "answer directories without their slash with 200 as well",
            ("botocore and others that follow none",),
            _paths(moved),
        )


def _server_errors(crawl: Crawl) -> Iterator[Finding]:
    broken = [ask for ask, answer in crawl.answers() if answer.status >= _SERVER_ERROR]
    listed = {path for children in crawl.listed.values() for path in children}
    odd = [ask for ask in broken if ask.path not in listed]
    if odd:
        yield Finding(
            "server-error",
            Severity.WARNING,
            "the answer is a server error",
            "answer what is not there with 404; 503 with Retry-After only while not ready",
            (
                "cloud-init and Ignition, which try again for long or for ever",
                "heat-cfntools, which keeps the error page",
            ),
            _paths(odd),
        )


def _large(crawl: Crawl) -> Iterator[Finding]:
    large = [
        (ask, len(answer.body)) for ask, answer in crawl.answers() if len(answer.body) > _LARGE
    ]
    if large:
        most = max(size for _, size in large)
        yield Finding(
            "large",
            Severity.WARNING,
            f"a document has {most / _LARGE:.1f} MiB",
            "let user-data fetch what is large from elsewhere; Amazon's is at most 16 KiB, Nova's 48 KiB",
            ("every boot, by the time that it takes",),
            _paths([ask for ask, _ in large]),
        )


def _paths(asks: list[Ask]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ask.path for ask in asks))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
