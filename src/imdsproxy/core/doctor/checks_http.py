"""How answers come, EC2's listings, and session tokens: what every client depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import (
    GOOGLE,
    ODD_LEAF,
    TOKEN,
    TTL_HEADER,
    Answer,
    Crawl,
    Framing,
    Unanswered,
)
from imdsproxy.core.doctor.finding import TEXTS, Finding, Severity, found, seen, with_status
from imdsproxy.core.model import Dialect

_FINE_S: Final = 0.3
_BAD_S: Final = 1.0
_LARGE: Final = 1 << 20
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_NOT_FOUND: Final = 404
_UNAUTHORIZED: Final = (401, 403)
_SERVER_ERROR: Final = 500
_OLD: Final = "2009-04-04"
_TAG: Final = re.compile(r"(?!(?:\.|\.\.|_index)$)[A-Za-z0-9+\-=.,_:@]+")
_TAGS: Final = "/tags/instance/"
_KEYS: Final = "/public-keys/"


def check_transport(crawl: Crawl) -> Iterator[Finding]:
    """Whether answers come at all, in time, whole, and in a form that every client reads."""
    yield from _unanswered(crawl)
    yield from _slow(crawl)
    old = crawl.where(lambda one: one.version == "1.0")
    closed = crawl.where(lambda one: one.framing is Framing.UNTIL_CLOSE)
    how = "HTTP/1.0" if old else "no length: the connection's end is the body's"
    yield from seen("close-delimited", closed or old, how=how)
    yield from seen("cut-off", crawl.where(lambda one: one.cut))
    yield from seen("redirect", crawl.where(lambda one: one.status in _REDIRECTS))
    listed = {path for children in crawl.listed.values() for path in children}
    broken = crawl.where(lambda one: one.status >= _SERVER_ERROR)
    yield from seen("server-error", (path for path in broken if path not in listed))
    large = crawl.where(lambda one: len(one.body) > _LARGE)
    size = max((len(one.body) for one in large.values()), default=0) / _LARGE
    yield from seen("large", large, size=size)


def _unanswered(crawl: Crawl) -> Iterator[Finding]:
    silent = [
        (ask.path, answered)
        for ask, answered in crawl.asked.items()
        if isinstance(answered, Unanswered)
    ]
    if silent and len(silent) == len(crawl.asked):
        yield found("unreachable", why=silent[0][1].why)
    elif silent:
        odd = all(path == f"{crawl.base}{ODD_LEAF}" for path, _ in silent)
        yield found(
            "no-answer",
            *(path for path, _ in silent),
            severity=Severity.WARNING if odd else None,
            case="timed-out" if any(one.timed_out for _, one in silent) else "",
            count=len(silent),
            all=len(crawl.asked),
            why=silent[0][1].why,
        )


def _slow(crawl: Crawl) -> Iterator[Finding]:
    slow = crawl.where(lambda one: (one.first_byte_s or 0) > _FINE_S)
    times = {path: answer.first_byte_s or 0 for path, answer in slow.items()}
    worst = max(times.values(), default=0.0)
    late = [name for seconds, name in TEXTS["slow"]["timeouts"] if seconds < worst]
    yield from seen(
        "slow",
        sorted(times, key=lambda path: -times[path]),
        severity=Severity.ERROR if worst >= _BAD_S else None,
        clients=late or None,
        count="1 answer" if len(times) == 1 else f"{len(times)} answers",
        fine=_FINE_S,
        worst=worst,
    )


def check_listings(crawl: Crawl) -> Iterator[Finding]:
    """The EC2 tree: what it lists, what is behind the names, and the other ways to write their paths."""
    if crawl.base is None:
        return
    children = [child for children in crawl.listed.values() for child in children]
    leaves = (one for one in children if not one.endswith("/") and _KEYS not in one)
    tags = [
        (path, one) for path in crawl.listed if path.endswith(_TAGS) for one in crawl.listed[path]
    ]
    yield from seen("listed-missing", with_status(crawl.where(lambda one: not one.ok, children)))
    yield from seen("listing-newline", crawl.where(_ends_in_newline, crawl.listed))
    yield from seen("leaf-newline", crawl.where(_ends_in_newline, leaves))
    yield from seen("empty-directory", (one for one, names in crawl.listed.items() if not names))
    yield from seen(
        "tag-characters", (tag for path, tag in tags if not _TAG.fullmatch(tag, len(path)))
    )
    yield from _keys(crawl)
    yield from _spellings(crawl, crawl.base)
    yield from _region(crawl)
    yield from _versions(crawl)


def _ends_in_newline(answer: Answer) -> bool:
    return answer.ok and answer.body.endswith(b"\n")


def _keys(crawl: Crawl) -> Iterator[Finding]:
    where = [one for one in crawl.listed if one.endswith(_KEYS)] or [
        f"/{_OLD}/meta-data/public-keys"
    ]
    listing = crawl.good(where[0])
    if listing is None or not listing.body.strip():
        return
    lines = listing.text.splitlines()
    odd = [line for line in lines if line.count("=") > 1 and line.split("=")[0].isdecimal()]
    if odd:
        yield found("key-name-equals", *where, line=odd[0])
    if any(not re.match(r"\d+=", line) for line in lines):
        yield found("key-listing-form", *where)


def _spellings(crawl: Crawl, base: str) -> Iterator[Finding]:
    zone = f"{base}/meta-data/placement/availability-zone"
    for code, path, spelling, clients in (
        ("trailing-slash", f"{base}/user-data", f"{base}/user-data/", ["Facter, Ohai"]),
        ("trailing-slash", f"{base}/meta-data/", f"{base}/meta-data", ["AsyncAws, google-auth and others"]),
        ("trailing-slash", zone, f"{zone}/", ["botocore and the AWS CLI, which then know no region"]),
        ("double-slash", f"{base}/meta-data/instance-id", f"{base}//meta-data/instance-id", None),
    ):  # fmt: skip
        one, other = crawl.good(path), crawl.answer(spelling)
        if one and other and other.body != one.body:
            yield found(code, spelling, clients=clients, status=other.status)


def _region(crawl: Crawl) -> Iterator[Finding]:
    placement = f"{crawl.base}/meta-data/placement"
    zone, region = crawl.good(f"{placement}/availability-zone"), crawl.good(f"{placement}/region")
    if zone and region and zone.text[:-1] != region.text:
        yield found(
            "region-of-zone", f"{placement}/region", region=region.text, derived=zone.text[:-1]
        )


def _versions(crawl: Crawl) -> Iterator[Finding]:
    root = crawl.answer("/")
    if root is None:
        return
    if not root.ok or _OLD not in root.text.split():
        yield found("root-versions", "/", old=_OLD, status=root.status)
    path = f"/{_OLD}/meta-data/instance-id"
    old = crawl.answer(path)
    if old and not old.ok:
        yield found("old-version-missing", path, old=_OLD, status=old.status)


def check_tokens(crawl: Crawl) -> Iterator[Finding]:
    """Session tokens (IMDSv2), and answers that make a client believe in another cloud."""
    answer = crawl.answer(TOKEN)
    if answer is not None and (crawl.serves(Dialect.EC2) or answer.status != _NOT_FOUND):
        yield from _granted(answer) if answer.ok else _refused(answer)
    openstack = crawl.answer("/openstack")
    if openstack is not None and openstack.status in _UNAUTHORIZED:
        yield found("openstack-refused", "/openstack", status=openstack.status)
    if crawl.token:
        yield found("token-required")
    google = crawl.answer(GOOGLE)
    if google is not None and (google.header("metadata-flavor") or "").lower() == "google":
        yield found("google-flavor", GOOGLE.path)
    for prefix, cloud, clients in (
        ("/computeMetadata/", "Google's", "google-auth, gcp-metadata"),
        ("/metadata/instance", "Azure's", "Azure SDKs"),
    ):
        there = (path for path in crawl.where(lambda one: one.ok) if path.startswith(prefix))
        yield from seen("foreign-cloud", there, clients=[clients], cloud=cloud)


def _granted(answer: Answer) -> Iterator[Finding]:
    token = answer.text
    if not token.strip():
        yield found("token-empty", TOKEN.path)
        return
    if not token.isprintable() or " " in token:
        yield found("token-form", TOKEN.path)
    if answer.header(TTL_HEADER) is None:
        yield found("token-ttl-missing", TOKEN.path, header=TTL_HEADER)


def _refused(answer: Answer) -> Iterator[Finding]:
    if answer.status != _NOT_FOUND:
        yield found("token-refused", TOKEN.path, case=str(answer.status), status=answer.status)
    elif "\n" in answer.text.strip("\n") or answer.body.endswith(b"\n"):
        yield found("token-error-body", TOKEN.path)
