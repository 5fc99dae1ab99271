"""User-data: whether anybody who gets it knows what to do with it."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity

_GZIP: Final = b"\x1f\x8b"
_HEAD: Final = 4096
_CLOUD_INIT: Final = (
    b"#cloud-config",
    b"#!",
    b"#include",
    b"#cloud-boothook",
    b"#part-handler",
    b"#upstart-job",
    b"## template:",
    b"content-type:",
)
_OTHERS: Final = (
    b"{",  # Ignition
    b"#ps1",
    b"rem cmd",
    b"<powershell>",
    b"<script>",
    b"#!ipxe",
)
_CLIENTS: Final = ("cloud-init: nothing of it is done, with a warning in its log",)


def check_user_data(crawl: Crawl) -> Iterator[Finding]:
    """The first user-data that was given, of any dialect."""
    for path in (
        f"/openstack/{crawl.version}/user_data",
        f"{crawl.base}/user-data",
        "/nocloud/user-data",
    ):
        answer = crawl.said(path)
        if answer is None or not answer.ok:
            continue
        if answer.body:
            yield from _content(answer.body, path)
            return
        # NoCloud's has to be there, even if it is empty.
        if not path.startswith("/nocloud/"):
            yield Finding(
                "user-data-empty",
                Severity.NOTE,
                "there is no user-data, and yet the answer is 200",
                "answer 404, as Amazon and Nova do; no known client minds",
                (),
                (path,),
            )


def _content(body: bytes, path: str) -> Iterator[Finding]:
    plain = _unpacked(body)
    if not is_known(plain):
        inner = _decoded(plain)
        if inner is not None and is_known(_unpacked(inner)):
            what = "user-data is base64 of something that would be understood"
            change = "store what is inside: it is sent as it is stored"
        else:
            what = f"user-data begins with nothing that clients know: {_shown(plain)}"
            change = "begin it with #cloud-config, #! and an interpreter, or another header of cloud-init's"
        yield Finding("user-data-header", Severity.WARNING, what, change, _CLIENTS, (path,))
    elif plain[:2] == b"#!" and b"\r\n" in plain[:_HEAD]:
        yield Finding(
            "user-data-crlf",
            Severity.WARNING,
            "user-data is a script with Windows' line ends",
            "end its lines with LF: the kernel takes CR for part of the interpreter's name",
            ("cloud-init: the script does not run",),
            (path,),
        )


def is_known(data: bytes) -> bool:
    """Whether somebody acts upon user-data that begins so."""
    head = data[:_HEAD].lstrip().lower()
    return head.startswith((*_CLOUD_INIT, *_OTHERS)) or b"mime-version:" in head


def _unpacked(data: bytes) -> bytes:
    if not data.startswith(_GZIP):
        return data
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, _HEAD)
    except zlib.error:
        return data


def _decoded(data: bytes) -> bytes | None:
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _shown(data: bytes) -> str:
    first = data[:40].split(b"\n")[0]
    return repr(first.decode("utf-8", "replace"))
