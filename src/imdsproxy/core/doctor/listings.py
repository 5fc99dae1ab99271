"""The EC2 tree: what it lists, and what is behind the names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity

_OLD: Final = "2009-04-04"
_TAG: Final = re.compile(r"[A-Za-z0-9+\-=.,_:@]+")
_TAGS: Final = "/tags/instance/"
_KEYS: Final = "/public-keys/"
_CRAWLERS: Final = (
    "cloud-init: five more tries a second apart, then none of the EC2 documents",
    "os-collect-config: nothing is collected",
    "Ansible's ec2_metadata_facts",
)


def check_listings(crawl: Crawl) -> Iterator[Finding]:
    """Listings, leaves, and the other ways to write their paths."""
    if crawl.base is None:
        return
    yield from _missing(crawl)
    yield from _newlines(crawl)
    yield from _empty(crawl)
    yield from _keys(crawl)
    yield from _tags(crawl)
    yield from _spellings(crawl)
    yield from _region(crawl)
    yield from _root(crawl)


def _missing(crawl: Crawl) -> Iterator[Finding]:
    gone = []
    for children in crawl.listed.values():
        for child in children:
            answer = crawl.said(child)
            if answer is not None and not answer.ok:
                gone.append(f"{child} ({answer.status})")
    if gone:
        yield Finding(
            "listed-missing",
            Severity.ERROR,
            "what a listing names is not there",
            "leave out of a listing what is not answered with 200",
            _CRAWLERS,
            tuple(gone),
        )


def _newlines(crawl: Crawl) -> Iterator[Finding]:
    listings = [path for path in crawl.listed if _ends_in_newline(crawl, path)]
    if listings:
        yield Finding(
            "listing-newline",
            Severity.ERROR,
            "a listing ends in a newline",
            "join names by newlines, with none after the last",
            (
                "os-collect-config (crashes)",
                "awscrt, object_store, opendal, AsyncAws, s3cmd (take an empty name)",
            ),
            tuple(listings),
        )
    leaves = [
        child
        for children in crawl.listed.values()
        for child in children
        if not child.endswith("/") and _ends_in_newline(crawl, child)
    ]
    values = [path for path in leaves if _KEYS not in path]
    if values:
        yield Finding(
            "leaf-newline",
            Severity.ERROR,
            "a value ends in a newline",
            "send values without a newline at the end",
            ("12 of 29 clients, whose instance id or host name is then wrong",),
            tuple(values),
        )


def _ends_in_newline(crawl: Crawl, path: str) -> bool:
    answer = crawl.said(path)
    return answer is not None and answer.ok and answer.body.endswith(b"\n")


def _empty(crawl: Crawl) -> Iterator[Finding]:
    empty = [path for path, children in crawl.listed.items() if not children]
    if empty:
        yield Finding(
            "empty-directory",
            Severity.ERROR,
            "a listed directory is empty",
            "leave an empty directory out of its parent's listing",
            ("os-collect-config (crashes)",),
            tuple(empty),
        )


def _keys(crawl: Crawl) -> Iterator[Finding]:
    paths = [path for path in crawl.listed if path.endswith(_KEYS)]
    plain = crawl.said(f"/{_OLD}/meta-data/public-keys")
    listing = crawl.said(paths[0]) if paths else plain
    if listing is None or not listing.ok or not listing.body.strip():
        return
    where = tuple(paths) or (f"/{_OLD}/meta-data/public-keys",)
    lines = listing.text.splitlines()
    odd = [line for line in lines if line.count("=") > 1 and line.split("=")[0].isdecimal()]
    if odd:
        yield Finding(
            "key-name-equals",
            Severity.ERROR,
            f"a key's name holds an equals sign: {odd[0]}",
            "name keys without =; clients split the line at every one",
            ("cloudbase-init", "Afterburn"),
            where,
        )
    if any(not re.match(r"\d+=", line) for line in lines):
        yield Finding(
            "key-listing-form",
            Severity.ERROR,
            "public-keys does not list 0=NAME lines",
            "list each key as N=NAME, and serve it as public-keys/N/openssh-key",
            ("cloud-init", "cloudbase-init", "Afterburn", "ec2metadata"),
            where,
        )


def _tags(crawl: Crawl) -> Iterator[Finding]:
    odd = [
        child
        for path, children in crawl.listed.items()
        if path.endswith(_TAGS)
        for child in children
        if not _TAG.fullmatch(child.removeprefix(path))
        or child.removeprefix(path) in {".", "..", "_index"}
    ]
    if odd:
        yield Finding(
            "tag-characters",
            Severity.WARNING,
            "a tag's name has characters that Amazon does not permit in metadata",
            "use letters, digits and +-=.,_:@ only, or do not list it",
            (
                "cloud-init, whose crawl then fails on the tag's path",
                "Ansible's ec2_metadata_facts",
            ),
            tuple(odd),
        )


def _spellings(crawl: Crawl) -> Iterator[Finding]:
    base = crawl.base or ""
    pairs = [
        (f"{base}/user-data", f"{base}/user-data/", "Facter, Ohai"),
        (f"{base}/meta-data/", f"{base}/meta-data", "AsyncAws, google-auth and others"),
        (
            f"{base}/meta-data/placement/availability-zone",
            f"{base}/meta-data/placement/availability-zone/",
            "botocore and the AWS CLI, which then know no region",
        ),
    ]
    for path, spelling, clients in pairs:
        one, other = crawl.said(path), crawl.said(spelling)
        if one is not None and one.ok and other is not None and other.body != one.body:
            yield Finding(
                "trailing-slash",
                Severity.ERROR,
                f"a slash at the end changes the answer (to {other.status})",
                "answer a path with and without a slash at its end alike",
                (clients,),
                (spelling,),
            )
    one = crawl.said(f"{base}/meta-data/instance-id")
    double = crawl.said(f"{base}//meta-data/instance-id")
    if one is not None and double is not None and one.ok and one.body != double.body:
        yield Finding(
            "double-slash",
            Severity.WARNING,
            f"two slashes in a path change the answer (to {double.status})",
            "take several slashes for one",
            ("amazon-ec2-utils", "CloudStack images"),
            (f"{base}//meta-data/instance-id",),
        )


def _region(crawl: Crawl) -> Iterator[Finding]:
    path = f"{crawl.base}/meta-data/placement/region"
    zone, region = (
        crawl.said(f"{crawl.base}/meta-data/placement/availability-zone"),
        crawl.said(path),
    )
    if zone is None or region is None or not (zone.ok and region.ok):
        return
    if zone.text[:-1] != region.text:
        yield Finding(
            "region-of-zone",
            Severity.NOTE,
            f"the region is {region.text}, and who makes it of the zone takes {zone.text[:-1]}",
            "name the zone by its region and one letter, as red-1a, or set AWS_DEFAULT_REGION in the guest",
            ("botocore and the AWS CLI",),
            (path,),
        )


def _root(crawl: Crawl) -> Iterator[Finding]:
    answer = crawl.said("/")
    if answer is None:
        return
    if not answer.ok or _OLD not in answer.text.split():
        yield Finding(
            "root-versions",
            Severity.WARNING,
            f"/ does not list {_OLD} (status {answer.status})",
            f"list the versions at /, one a line, {_OLD} among them",
            ("Ohai (ec2 and openstack)",),
            ("/",),
        )
    old = crawl.said(f"/{_OLD}/meta-data/instance-id")
    if old is not None and not old.ok:
        yield Finding(
            "old-version-missing",
            Severity.ERROR,
            f"version {_OLD} is not there ({old.status})",
            f"serve /{_OLD} as well: it is the one that clients of EC2's look-alikes ask",
            ("cloud-init's Ec2 on a guest that is not Amazon's", "cloudbase-init", "ec2metadata"),
            (f"/{_OLD}/meta-data/instance-id",),
        )
