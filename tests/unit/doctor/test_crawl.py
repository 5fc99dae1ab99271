"""What the doctor asks, each path once, in the clients' order, and not for ever; and whether the guest asks at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.doctor import Surroundings
from imdsproxy.core.doctor.checks_documents import check_gate
from imdsproxy.core.doctor.crawl import GOOGLE, TOKEN, Answer, Ask, crawl
from imdsproxy.core.model import Dialect
from support.metadata_server import MetadataServer, Reply


def test_nothing_is_asked_twice() -> None:
    server = MetadataServer()
    done = crawl(server.fetch, direct=True)

    asked = [(method, path, tuple(headers.items())) for method, path, headers in server.asked]
    assert len(asked) == len(set(asked)) == len(done.asked)
    assert done.served == list(Dialect)
    assert ("PUT", TOKEN.path, dict(TOKEN.headers)) in server.asked
    assert ("GET", "/", dict(GOOGLE.headers)) in server.asked


def test_the_daemon_is_asked_only_what_it_can_say() -> None:
    server = MetadataServer()
    crawl(server.fetch, direct=False)

    assert {method for method, _, _ in server.asked} == {"GET"}
    assert all(not headers for _, _, headers in server.asked)
    assert not any("computeMetadata" in path for _, path, _ in server.asked)


def test_cloud_inits_newest_version_is_taken() -> None:
    server = MetadataServer()
    server.replies["/openstack"] = Reply(b"2013-04-04\n2012-08-10\n2099-01-01\nlatest")

    assert crawl(server.fetch, direct=False).version == "2013-04-04"


def test_every_listed_leaf_is_read_and_no_credentials() -> None:
    server = MetadataServer()
    server.replies["/latest/meta-data"] = Reply(b"a/\nb\niam/")
    server.replies["/latest/meta-data/a"] = Reply(b"c")
    crawl(server.fetch, direct=False)

    paths = [path for _, path, _ in server.asked]
    assert "/latest/meta-data/a/c" in paths
    assert "/latest/meta-data/b" in paths
    assert not any("iam" in path for path in paths)


def test_a_server_without_the_latest_tree_is_crawled_by_its_old_one() -> None:
    server = MetadataServer()
    for path in [path for path in server.replies if path.startswith("/latest")]:
        del server.replies[path]

    assert crawl(server.fetch, direct=False).base == "/2009-04-04"


def test_a_server_that_is_not_there_is_not_asked_for_long() -> None:
    asked: list[Ask] = []

    def refuse(ask: Ask) -> Answer:
        asked.append(ask)
        return Answer(why="Connection refused")

    done = crawl(refuse, direct=True)
    assert (len(asked), done.given_up) == (3, "Connection refused")


def test_a_tree_without_end_is_left() -> None:
    asked: list[Ask] = []

    def endless(ask: Ask) -> Answer:
        asked.append(ask)
        return Answer(200, body=b"a/\nb/\nc/\nd/")

    done = crawl(endless, direct=False)
    assert len(asked) <= 600
    assert done.given_up


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
        (replace(OPENSTACK, kernel="ds=OpenStack ds=None"), ("gate-shut", "error")),
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
