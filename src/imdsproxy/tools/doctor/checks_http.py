"""Checks on which every client depends: transport of answers, EC2's listings, and session tokens."""

import re
from collections.abc import Iterator
from typing import Final

from imdsproxy.documents.dialects.ec2 import TAG_KEY
from imdsproxy.model.entities import Dialect
from imdsproxy.model.tokens import TTL_HEADER
from imdsproxy.tools.doctor import (
    GOOGLE,
    ODD_LEAF,
    REFUSED,
    TEXTS,
    TOKEN,
    Answer,
    Crawl,
    Finding,
    Severity,
    found,
    seen,
)

_FINE_S: Final = 0.3
_BAD_S: Final = 1.0
_LARGE: Final = 1 << 20
_HTTP_1_0: Final = 10
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_NOT_FOUND: Final = 404
_SERVER_ERROR: Final = 500
_OLD: Final = "2009-04-04"
_TAGS: Final = "/tags/instance/"
_KEYS: Final = "/public-keys/"


def check_transport(crawl: Crawl) -> Iterator[Finding]:
    """Check that answers arrive, in time, whole, and in a form that every client reads."""
    yield from _unanswered(crawl)
    yield from _slow(crawl)
    old = crawl.where(lambda one: one.version == _HTTP_1_0)
    closed = crawl.where(lambda one: one.until_close)
    how = (
        "answers use HTTP/1.0"
        if old
        else "answers have no length: the body ends with the connection"
    )
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
    silent = [(ask.path, answer) for ask, answer in crawl.asked.items() if not answer.status]
    why = next((answer.why for _, answer in silent), "")
    if silent and len(silent) == len(crawl.asked):
        yield found("unreachable", why=why)
    elif silent:
        paths = [path for path, _ in silent]
        odd = set(paths) == {f"{crawl.base}{ODD_LEAF}"}
        yield found(
            "no-answer",
            *paths,
            severity=Severity.WARNING if odd else None,
            case="timed-out" if any(one.timed_out for _, one in silent) else "",
            count=len(silent),
            all=len(crawl.asked),
            why=why,
        )


def _slow(crawl: Crawl) -> Iterator[Finding]:
    slow = crawl.where(lambda one: one.first_byte_s > _FINE_S)
    worst = max((one.first_byte_s for one in slow.values()), default=0.0)
    yield from seen(
        "slow",
        sorted(slow, key=lambda path: -slow[path].first_byte_s),
        severity=Severity.ERROR if worst >= _BAD_S else None,
        clients=[name for seconds, name in TEXTS["slow"]["timeouts"] if seconds < worst] or None,
        count="1 answer" if len(slow) == 1 else f"{len(slow)} answers",
        fine=_FINE_S,
        worst=worst,
    )


def check_listings(crawl: Crawl) -> Iterator[Finding]:
    """Check the EC2 tree: its listings, the documents behind the names, and other spellings of their paths."""
    if crawl.base is None:
        return
    children = [child for children in crawl.listed.values() for child in children]
    leaves = (one for one in children if not one.endswith("/") and _KEYS not in one)
    odd_tags = (
        tag
        for path, names in crawl.listed.items()
        if path.endswith(_TAGS)
        for tag in names
        if not TAG_KEY.fullmatch(tag, len(path))
    )
    yield from seen("listed-missing", crawl.missing(children).values())
    yield from seen("listing-newline", crawl.where(_ends_in_newline, crawl.listed))
    yield from seen("leaf-newline", crawl.where(_ends_in_newline, leaves))
    yield from seen("empty-directory", (one for one, names in crawl.listed.items() if not names))
    yield from seen("tag-characters", odd_tags)
    yield from _keys(crawl)
    yield from _spellings(crawl, crawl.base)
    yield from _placement(crawl)
    yield from _versions(crawl)


def _ends_in_newline(answer: Answer) -> bool:
    return answer.ok and answer.body.endswith(b"\n")


def _keys(crawl: Crawl) -> Iterator[Finding]:
    listings = [one for one in crawl.listed if one.endswith(_KEYS)]
    where = listings or [f"/{_OLD}/meta-data/public-keys"]
    listing = crawl.good(where[0])
    if not listing.body.strip():
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
        if one.ok and other.status and other.body != one.body:
            yield found(code, spelling, clients=clients, status=other.status)


def _placement(crawl: Crawl) -> Iterator[Finding]:
    path = f"{crawl.base}/meta-data/placement/region"
    zone = crawl.good(f"{crawl.base}/meta-data/placement/availability-zone")
    region = crawl.good(path)
    derived = zone.text[:-1]
    if zone.ok and region.ok and derived != region.text:
        yield found("region-of-zone", path, region=region.text, derived=derived)


def _versions(crawl: Crawl) -> Iterator[Finding]:
    root = crawl.answer("/")
    if not root.status:
        return
    if not root.ok or _OLD not in root.text.split():
        yield found("root-versions", "/", old=_OLD, status=root.status)
    path = f"/{_OLD}/meta-data/instance-id"
    old = crawl.answer(path)
    if old.status and not old.ok:
        yield found("old-version-missing", path, old=_OLD, status=old.status)


def check_tokens(crawl: Crawl) -> Iterator[Finding]:
    """Check session tokens (IMDSv2), and answers by which a client would detect another cloud."""
    answer = crawl.asked.get(TOKEN, Answer())
    if answer.ok:
        yield from _granted(answer)
    elif answer.status not in (0, _NOT_FOUND):
        yield found("token-refused", TOKEN.path, case=str(answer.status), status=answer.status)
    elif Dialect.EC2 in crawl.served and (
        "\n" in answer.text.strip("\n") or answer.body.endswith(b"\n")
    ):
        yield found("token-error-body", TOKEN.path)
    openstack = crawl.answer("/openstack")
    if openstack.status in REFUSED:
        yield found("openstack-refused", "/openstack", status=openstack.status)
    if crawl.token:
        yield found("token-required")
    google = crawl.asked.get(GOOGLE, Answer())
    if google.headers.get("metadata-flavor", "").lower() == "google":
        yield found("google-flavor", GOOGLE.path)
    for prefix, cloud, clients in (
        ("/computeMetadata/", "Google's", "google-auth, gcp-metadata"),
        ("/metadata/instance", "Azure's", "Azure SDKs"),
    ):
        there = (path for path in crawl.where(lambda one: one.ok) if path.startswith(prefix))
        yield from seen("foreign-cloud", there, clients=[clients], cloud=cloud)


def _granted(answer: Answer) -> Iterator[Finding]:
    if not answer.text.strip():
        yield found("token-empty", TOKEN.path)
        return
    if not answer.text.isprintable() or " " in answer.text:
        yield found("token-form", TOKEN.path)
    if TTL_HEADER not in answer.headers:
        yield found("token-ttl-missing", TOKEN.path, header=TTL_HEADER)
