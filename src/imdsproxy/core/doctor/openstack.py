"""The OpenStack documents."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Final

from imdsproxy.core.doctor.crawl import CLOUD_INIT_OPENSTACK, Crawl
from imdsproxy.core.doctor.exchange import Answer, json_of
from imdsproxy.core.doctor.finding import Finding, Severity

_NOT_FOUND: Final = 404
_ONCE: Final = "cloud-init, which looks at /openstack once"
_REFUSED: Final = (401, 403)
_RETRIED: Final = 503


def check_openstack(crawl: Crawl) -> Iterator[Finding]:
    """The listing, meta_data.json, the other files, what they lead to, and the password."""
    listing = crawl.said("/openstack")
    if listing is None:
        return
    yield from _listing(listing)
    if crawl.version is None:
        return
    yield from _meta_data(crawl)
    yield from _objects(crawl)
    yield from _contents(crawl)
    yield from _password(crawl)


def _listing(listing: Answer) -> Iterator[Finding]:
    if listing.status == _RETRIED:
        yield Finding(
            "openstack-not-ready",
            Severity.WARNING,
            "/openstack is answered 503",
            "let it be 200 in the end: cloud-init waits for ever",
            ("cloud-init",),
            ("/openstack",),
        )
    elif not listing.ok and listing.status != _NOT_FOUND and listing.status not in _REFUSED:
        yield Finding(
            "openstack-probe",
            Severity.ERROR,
            f"/openstack is answered {listing.status}",
            "answer 200, or 503 with Retry-After while not ready: nothing else is waited for",
            (_ONCE,),
            ("/openstack",),
        )
    elif listing.ok and not set(CLOUD_INIT_OPENSTACK) & set(listing.text.split()):
        yield Finding(
            "openstack-versions",
            Severity.WARNING,
            "/openstack lists no version that cloud-init knows",
            f"list {CLOUD_INIT_OPENSTACK[-1]}, one version a line; without one it asks `latest`",
            ("cloud-init", "heat-cfntools"),
            ("/openstack",),
        )


def _meta_data(crawl: Crawl) -> Iterator[Finding]:
    path = f"/openstack/{crawl.version}/meta_data.json"
    answer = crawl.said(path)
    document = json_of(answer)
    if not isinstance(document, Mapping):
        status = "no answer" if answer is None else f"status {answer.status}"
        yield Finding(
            "meta-data-unreadable",
            Severity.ERROR,
            f"meta_data.json is no JSON object ({status})",
            "serve a JSON object with uuid and hostname",
            ("cloud-init", "cloudbase-init", "heat-cfntools"),
            (path,),
        )
        return
    missing = [name for name in ("uuid", "hostname") if not isinstance(document.get(name), str)]
    if missing:
        yield Finding(
            "meta-data-incomplete",
            Severity.ERROR,
            f"meta_data.json says no {' and no '.join(missing)}",
            "say both: cloud-init takes a document without uuid for none",
            ("cloud-init", "cloudbase-init"),
            (path,),
        )
    yield from _members(document, path)


def _members(document: Mapping[str, object], path: str) -> Iterator[Finding]:
    seed = document.get("random_seed")
    if seed is not None and not _is_base64(seed):
        yield Finding(
            "random-seed",
            Severity.ERROR,
            "random_seed is not base64",
            "leave it out, or encode it",
            ("cloud-init, which then takes the whole document for bad",),
            (path,),
        )
    for name, kind, what in (("public_keys", Mapping, "an object"), ("keys", list, "a list")):
        value = document.get(name)
        if value is not None and not isinstance(value, kind):
            yield Finding(
                "meta-data-member",
                Severity.ERROR,
                f"{name} is not {what}",
                f"make it {what}, or leave it out",
                ("cloud-init", "cloudbase-init"),
                (path,),
            )


def _is_base64(value: object) -> bool:
    try:
        base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError):
        return False
    return isinstance(value, str)


def _objects(crawl: Crawl) -> Iterator[Finding]:
    odd = []
    for name in ("vendor_data.json", "vendor_data2.json", "network_data.json"):
        path = f"/openstack/{crawl.version}/{name}"
        answer = crawl.said(path)
        if answer is not None and answer.ok and json_of(answer) is None:
            odd.append(path)
    if odd:
        yield Finding(
            "json-unreadable",
            Severity.ERROR,
            "a document with .json in its name is no JSON",
            "serve JSON, or 404 when there is nothing to say",
            ("cloud-init, which then gives up the OpenStack documents",),
            tuple(odd),
        )


def _contents(crawl: Crawl) -> Iterator[Finding]:
    gone = [
        f"{ask.path} ({answer.status})"
        for ask, answer in crawl.answers()
        if ask.path.startswith("/openstack/content/") and not answer.ok
    ]
    if gone:
        yield Finding(
            "content-unreadable",
            Severity.ERROR,
            "a file that meta_data.json names cannot be read",
            "serve what `files` names by content_path, or leave it out",
            ("cloud-init", "cloudbase-init"),
            tuple(gone),
        )


def _password(crawl: Crawl) -> Iterator[Finding]:
    path = "/openstack/2013-04-04/password"
    answer = crawl.said(path)
    if answer is not None and not answer.ok:
        yield Finding(
            "password",
            Severity.WARNING,
            f"the password's place is answered {answer.status}",
            "answer GET with 200, and with nothing as long as none was posted",
            ("cloudbase-init, which cannot hand over its generated password",),
            (path,),
        )
