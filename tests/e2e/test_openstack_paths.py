"""Every instance of genuine Nova and Neutron, by every way, gets byte for byte what Nova says when asked directly.

The table of truth (`support.openstack.table`) says who has which address in which network and behind which router:
the same addresses in several networks, two addresses on one port, an instance with ports in two networks, IPv6 and
link-local addresses, and ports that must get nothing. What a guest is told is compared with what Nova tells an
agent that signs rightly: status, headers, bytes. Only `random_seed` is left out, which is new in every answer.
"""

from collections.abc import Iterator
from typing import Final

import pytest

from support.openstack.lab import OpenStack
from support.openstack.oracle import Oracle, Request, crawl, said_to_guest
from support.openstack.table import INSTANCES, LOOKUP_NAMES, PORTS, Instance
from support.openstack.ways import WAYS, Way, Ways, goes, open_ways

pytestmark = [pytest.mark.root, pytest.mark.slow]

ROWS: Final = [
    pytest.param(way, name, id=f"{way}: {name}")
    for way in WAYS
    for name in LOOKUP_NAMES
    if goes(way, name.partition(" ")[0])
]
LATEST: Final = ("/latest/", "/openstack/latest/")
FORBIDDEN: Final = (
    "/latest/user-data",
    "/latest/meta-data/hostname",
    "/openstack/latest/meta_data.json",
)
ASKED: Final = frozenset(one.device_id for one in PORTS if one.device_owner == "compute:nova")
ODD: Final = (
    Request("/latest"),
    Request("/latest/meta-data"),
    Request("/openstack"),
    Request("/ec2/latest/meta-data/hostname"),
    Request("/latest/user-data/"),
    Request("//latest//meta-data/"),
    Request("/%6catest/meta-data/"),
    Request("/latest/meta-data/hostname?query=kept&query=twice"),
    Request("/latest/nonsense"),
    Request("/nonsense"),
    Request("/openstack/2010-01-01/meta_data.json"),
    Request("/latest/user-data", "HEAD"),
    Request("/openstack/latest/meta_data.json", "HEAD"),
    Request("/latest/nonsense", "HEAD"),
    Request("/latest/meta-data/", "OPTIONS"),
    Request("/latest/user-data", headers=("Range: bytes=0-3",)),
    Request("/latest/user-data", headers=("Range: bytes=99999999-",)),
    Request("/latest/user-data", headers=("If-None-Match: *",)),
    Request("/latest/user-data", headers=("If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT",)),
    Request("/latest/meta-data/", headers=("Accept: application/json", "Accept-Encoding: gzip")),
    Request("/latest/nonsense", "PUT", headers=("X-aws-ec2-metadata-token-ttl-seconds: 60",)),
    Request("/latest/meta-data/hostname", "POST", body=b"nobody wants this"),
    Request("/latest/meta-data/hostname", "DELETE"),
)


@pytest.fixture(scope="module")
def ways(openstack: OpenStack) -> Iterator[Ways]:
    with open_ways(openstack) as opened:
        yield opened


@pytest.fixture(scope="module")
def oracle(openstack: OpenStack) -> Oracle:
    return Oracle(openstack)


@pytest.mark.always
@pytest.mark.parametrize(("way", "name"), ROWS)
def test_each_address_gets_what_nova_says_of_its_instance_and_nobody_elses(
    ways: Ways, oracle: Oracle, way: Way, name: str
) -> None:
    row = ways.openstack.lookup(name)
    if row.instance is None:
        for path in FORBIDDEN:
            with ways.connect(way, row.scope, row.address) as connection:
                got = said_to_guest(connection.request(path))
            assert got.status == 404, path
            # Where a port names what could be an instance, it is Nova's own 404.
            if row.device_id in ASKED:
                assert got == oracle.says(row.device_id, row.project_id, Request(path))
            assert not [one for one in INSTANCES if one.name.encode() in got.body]
        return
    paths = oracle.documents(row.instance)
    requests = [Request(path) for path in paths if path.startswith(LATEST)]
    who = (row.instance.uuid, row.instance.project_id)

    assert len(requests) > 25
    assert not crawl(oracle, lambda: ways.connect(way, row.scope, row.address), who, requests)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("one", INSTANCES, ids=lambda one: one.name)
def test_each_instance_gets_every_document_of_every_version_as_nova_says_it(
    ways: Ways, oracle: Oracle, way: Way, one: Instance
) -> None:
    row = next(row for row in ways.openstack.lookups if row.instance is one and row.network_id)
    requests = [*(Request(path) for path in oracle.documents(one)), *ODD]
    who = (one.uuid, one.project_id)

    assert len(requests) > 200
    assert not crawl(oracle, lambda: ways.connect(way, row.scope, row.address), who, requests)
