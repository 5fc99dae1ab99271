"""Whether the guest asks at all, for what is served."""

from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.doctor.checks_documents import check_gate
from imdsproxy.core.doctor.crawl import crawl
from imdsproxy.core.doctor.finding import Surroundings
from support.metadata_server import MetadataServer

PLAIN = Surroundings(dmi={"sys_vendor": "QEMU", "product_name": "Standard PC"})
OPENSTACK = replace(PLAIN, dmi={"product_name": "OpenStack Nova"})


@pytest.mark.parametrize(
    ("around", "found"),
    [
        (OPENSTACK, None),
        (replace(PLAIN, kernel="ds=nocloud;s=http://169.254.169.254/nocloud/"), None),
        (replace(PLAIN, sources=("OpenStack", "None")), None),
        (replace(PLAIN, environment={"product_name": "OpenStack Nova"}, container=True), None),
        (Surroundings(), None),
        (PLAIN, ("gate-shut", "error")),
        (replace(OPENSTACK, container=True), ("gate-shut", "error")),
        (replace(OPENSTACK, kernel="ds=None"), ("gate-shut", "error")),
        (replace(OPENSTACK, sources=()), ("gate-shut", "error")),
        (Surroundings(dmi={}), ("gate-shut", "error")),
        # A serial number that may not be read leaves it open.
        (replace(PLAIN, dmi_complete=False), ("gate-unseen", "note")),
    ],
)
def test_a_guest_asks_for_what_is_served_or_that_is_an_error(
    around: Surroundings, found: tuple[str, str] | None
) -> None:
    done = crawl(MetadataServer().fetch, direct=True)
    findings = [(one.code, one.severity.value) for one in check_gate(done, around)]
    assert findings == ([found] if found else [])


def test_a_guest_that_asks_for_what_is_not_served_is_an_error() -> None:
    server = MetadataServer()
    server.replies = {path: one for path, one in server.replies.items() if "/nocloud" in path}
    (finding,) = check_gate(crawl(server.fetch, direct=True), OPENSTACK)
    assert finding.code == "gate-shut"


def test_on_the_host_the_note_says_how_to_open_it() -> None:
    done = crawl(MetadataServer().fetch, direct=False)
    (finding,) = check_gate(done, Surroundings(instance="web-1"))
    assert (finding.code, finding.severity.value) == ("gate", "note")
    assert "imdsproxy snippet web-1 --for" in finding.change
