"""How answers come, EC2's listings, and session tokens: what every client depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import GOOGLE, ODD_LEAF, TOKEN, TTL_HEADER, Crawl
from imdsproxy.core.doctor.exchange import Answer, Framing, Unanswered
from imdsproxy.core.doctor.finding import Finding, Severity, found
from imdsproxy.core.model import Dialect

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
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_NOT_FOUND: Final = 404
_UNAUTHORIZED: Final = (401, 403)
_SERVER_ERROR: Final = 500
_WAITING: Final = (
    "cloudbase-init and curl tools, which wait for ever",
    "cloud-init, for ten seconds each",
)
_REFUSED: Final[dict[int, tuple[str, ...]]] = {
    400: ("botocore, AWS CLI, awscrt, the SDKs for Go, Node and Ruby: no documents at all",),
    403: (
        "cloud-init on a guest that looks like Amazon's: stays without",
        "Ansible's ec2_metadata_facts",
        "Ruby's Aws::EC2Metadata",
    ),
}
"""Clients by the status of a refused token, where they are others than usual."""

_OLD: Final = "2009-04-04"
_TAG: Final = re.compile(r"[A-Za-z0-9+\-=.,_:@]+")
_TAGS: Final = "/tags/instance/"
_KEYS: Final = "/public-keys/"


def check_transport(crawl: Crawl) -> Iterator[Finding]:
    """Whether answers come at all, in time, whole, and in a form that every client reads."""
    yield from _unanswered(crawl)
    yield from _slow(crawl)
    answers = list(crawl.answers())
    old = [ask.path for ask, answer in answers if answer.version == "1.0"]
    closed = [ask.path for ask, answer in answers if answer.framing is Framing.UNTIL_CLOSE]
    if closed or old:
        how = "HTTP/1.0" if old else "no length: the connection's end is the body's"
        yield found("close-delimited", *(closed or old), how=how)
    if cut := [ask.path for ask, answer in answers if answer.cut]:
        yield found("cut-off", *cut)
    if moved := [ask.path for ask, answer in answers if answer.status in _REDIRECTS]:
        yield found("redirect", *moved)
    listed = {path for children in crawl.listed.values() for path in children}
    broken = [ask.path for ask, answer in answers if answer.status >= _SERVER_ERROR]
    if odd := [path for path in broken if path not in listed]:
        yield found("server-error", *odd)
    if large := {
        ask.path: len(answer.body) for ask, answer in answers if len(answer.body) > _LARGE
    }:
        yield found("large", *large, size=max(large.values()) / _LARGE)


def _unanswered(crawl: Crawl) -> Iterator[Finding]:
    silent = [
        (one.ask.path, one.answered)
        for one in crawl.exchanges
        if isinstance(one.answered, Unanswered)
    ]
    count, every = len(silent), len(crawl.exchanges)
    if not silent:
        return
    why = silent[0][1].why
    if count == every:
        yield found("unreachable", why=why)
        return
    odd = all(path == f"{crawl.base}{ODD_LEAF}" for path, _ in silent)
    yield found(
        "no-answer",
        *(path for path, _ in silent),
        severity=Severity.WARNING if odd else None,
        clients=_WAITING if any(one.timed_out for _, one in silent) else None,
        count=count,
        all=every,
        why=why,
    )


def _slow(crawl: Crawl) -> Iterator[Finding]:
    times = {
        ask.path: answer.first_byte_s
        for ask, answer in crawl.answers()
        if answer.first_byte_s is not None and answer.first_byte_s > _FINE_S
    }
    if times:
        worst = max(times.values())
        count = "1 answer" if len(times) == 1 else f"{len(times)} answers"
        yield found(
            "slow",
            *sorted(times, key=lambda path: -times[path]),
            severity=Severity.ERROR if worst >= _BAD_S else None,
            clients=[name for seconds, name in _TIMEOUTS if seconds < worst]
            or ["every boot, by its sum"],
            count=count,
            fine=_FINE_S,
            worst=worst,
        )


def check_listings(crawl: Crawl) -> Iterator[Finding]:
    """The EC2 tree: what it lists, what is behind the names, and the other ways to write their paths."""
    if crawl.base is None:
        return
    children = [child for children in crawl.listed.values() for child in children]
    answers = ((child, crawl.answer(child)) for child in children)
    gone = [f"{child} ({one.status})" for child, one in answers if one is not None and not one.ok]
    if gone:
        yield found("listed-missing", *gone)
    if listings := [path for path in crawl.listed if _ends_in_newline(crawl, path)]:
        yield found("listing-newline", *listings)
    leaves = [one for one in children if not one.endswith("/") and _ends_in_newline(crawl, one)]
    if values := [path for path in leaves if _KEYS not in path]:
        yield found("leaf-newline", *values)
    if empty := [path for path, children in crawl.listed.items() if not children]:
        yield found("empty-directory", *empty)
    if tags := list(_bad_tags(crawl)):
        yield found("tag-characters", *tags)
    yield from _keys(crawl)
    yield from _spellings(crawl, crawl.base)
    yield from _region(crawl)
    yield from _versions(crawl)


def _ends_in_newline(crawl: Crawl, path: str) -> bool:
    answer = crawl.answer(path)
    return answer is not None and answer.ok and answer.body.endswith(b"\n")


def _bad_tags(crawl: Crawl) -> Iterator[str]:
    for path, children in crawl.listed.items():
        for child in children if path.endswith(_TAGS) else ():
            tag = child.removeprefix(path)
            if not _TAG.fullmatch(tag) or tag in {".", "..", "_index"}:
                yield child


def _keys(crawl: Crawl) -> Iterator[Finding]:
    paths = [path for path in crawl.listed if path.endswith(_KEYS)]
    where = paths or [f"/{_OLD}/meta-data/public-keys"]
    listing = crawl.answer(where[0])
    if listing is None or not listing.ok or not listing.body.strip():
        return
    lines = listing.text.splitlines()
    odd = [line for line in lines if line.count("=") > 1 and line.split("=")[0].isdecimal()]
    if odd:
        yield found("key-name-equals", *where, line=odd[0])
    if any(not re.match(r"\d+=", line) for line in lines):
        yield found("key-listing-form", *where)


def _spellings(crawl: Crawl, base: str) -> Iterator[Finding]:
    zone = f"{base}/meta-data/placement/availability-zone"
    for path, spelling, clients in (
        (f"{base}/user-data", f"{base}/user-data/", "Facter, Ohai"),
        (f"{base}/meta-data/", f"{base}/meta-data", "AsyncAws, google-auth and others"),
        (zone, f"{zone}/", "botocore and the AWS CLI, which then know no region"),
    ):
        one, other = crawl.answer(path), crawl.answer(spelling)
        if one is not None and one.ok and other is not None and other.body != one.body:
            yield found("trailing-slash", spelling, clients=[clients], status=other.status)
    doubled = f"{base}//meta-data/instance-id"
    one, other = crawl.answer(f"{base}/meta-data/instance-id"), crawl.answer(doubled)
    if one is not None and other is not None and one.ok and one.body != other.body:
        yield found("double-slash", doubled, status=other.status)


def _region(crawl: Crawl) -> Iterator[Finding]:
    path = f"{crawl.base}/meta-data/placement/region"
    zone, region = (
        crawl.answer(f"{crawl.base}/meta-data/placement/availability-zone"),
        crawl.answer(path),
    )
    if zone is None or region is None or not (zone.ok and region.ok):
        return
    if zone.text[:-1] != region.text:
        yield found("region-of-zone", path, region=region.text, derived=zone.text[:-1])


def _versions(crawl: Crawl) -> Iterator[Finding]:
    root = crawl.answer("/")
    if root is None:
        return
    if not root.ok or _OLD not in root.text.split():
        yield found("root-versions", "/", old=_OLD, status=root.status)
    path = f"/{_OLD}/meta-data/instance-id"
    old = crawl.answer(path)
    if old is not None and not old.ok:
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
        there = [ask.path for ask, one in crawl.answers() if ask.path.startswith(prefix) and one.ok]
        if there:
            yield found("foreign-cloud", *there, clients=[clients], cloud=cloud)


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
        clients = _REFUSED.get(answer.status)
        yield found("token-refused", TOKEN.path, clients=clients, status=answer.status)
    elif "\n" in answer.text.strip("\n") or answer.body.endswith(b"\n"):
        yield found("token-error-body", TOKEN.path)
