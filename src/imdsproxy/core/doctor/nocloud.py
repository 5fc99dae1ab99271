"""The NoCloud files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import NOCLOUD_FILES, Crawl
from imdsproxy.core.doctor.finding import Finding, Severity
from imdsproxy.core.model import Dialect

_ID: Final = re.compile(r"""^(?:instance-id|"instance-id"|'instance-id')\s*:\s*\S""", re.MULTILINE)


def check_nocloud(crawl: Crawl) -> Iterator[Finding]:
    """All four are there, and meta-data says who this is."""
    if not crawl.serves(Dialect.NOCLOUD):
        return
    gone = []
    for name in NOCLOUD_FILES:
        answer = crawl.said(f"/nocloud/{name}")
        if answer is not None and not answer.ok:
            gone.append(f"/nocloud/{name} ({answer.status})")
    if gone:
        lost = any(path.startswith("/nocloud/user-data") for path in gone)
        yield Finding(
            "nocloud-missing",
            Severity.ERROR if lost else Severity.WARNING,
            "a file of NoCloud's is not there",
            "answer all four with 200, if need be with nothing in it: each that is missing costs ten seconds",
            ("cloud-init's NoCloud",),
            tuple(gone),
        )
    meta_data = crawl.said("/nocloud/meta-data")
    if meta_data is not None and not _ID.search(meta_data.text):
        yield Finding(
            "nocloud-instance-id",
            Severity.ERROR,
            "meta-data says no instance-id",
            "say it, as a line `instance-id: …` of YAML",
            ("cloud-init's NoCloud, for which every boot is then the same instance",),
            ("/nocloud/meta-data",),
        )
