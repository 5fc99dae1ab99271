"""Whether the guest asks at all, for what is served."""

from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.doctor import Severity, Surroundings, crawl
from imdsproxy.core.doctor.checks_documents import check_gate
from support.metadata_server import MetadataServer

PLAIN = Surroundings(dmi={"sys_vendor": "QEMU", "product_name": "Standard PC"})
OPENSTACK = replace(PLAIN, dmi={"product_name": "OpenStack Nova"})


def codes(around: Surroundings, *, direct: bool = True, only: str = "") -> list[tuple[str, str]]:
    server = MetadataServer()
    if only:
        server.replies = {path: one for path, one in server.replies.items() if only in path}
    done = crawl(server.fetch, direct=direct)
    return [(one.code, one.severity.value) for one in check_gate(done, around)]


@pytest.mark.parametrize(
    "around",
    [
        OPENSTACK,
        replace(PLAIN, kernel="ds=nocloud;s=http://169.254.169.254/nocloud/"),
        replace(PLAIN, sources=("OpenStack", "None")),
        replace(PLAIN, environment={"product_name": "OpenStack Nova"}, container=True),
    ],
)
def test_a_guest_that_asks_for_what_is_served_is_fine(around: Surroundings) -> None:
    assert codes(around) == []


@pytest.mark.parametrize(
    "around",
    [
        PLAIN,
        replace(OPENSTACK, container=True),
        replace(OPENSTACK, kernel="ds=None"),
        replace(OPENSTACK, sources=()),
        Surroundings(dmi={}),
    ],
)
def test_a_guest_that_asks_nobody_is_an_error(around: Surroundings) -> None:
    assert codes(around) == [("gate-shut", "error")]


def test_a_guest_that_asks_for_what_is_not_served_is_an_error() -> None:
    assert codes(OPENSTACK, only="/nocloud") == [("gate-shut", "error")]


def test_a_serial_number_that_may_not_be_read_leaves_it_open() -> None:
    assert codes(replace(PLAIN, dmi_complete=False)) == [("gate-unseen", "note")]


def test_the_host_is_told_how_to_open_it() -> None:
    done = crawl(MetadataServer().fetch, direct=False)

    (finding,) = check_gate(done, Surroundings(instance="web-1"))
    assert finding.severity is Severity.NOTE
    assert "imdsproxy snippet web-1 --for" in finding.change
    assert codes(Surroundings()) == []
