from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest

from demo.boot import Boot, judge_boot
from demo.reading import Dialect, judge_documents
from demo.roster import Guest, guests

OWN, OTHER = guests("word")[0], guests("word")[2]


def ec2_bodies(guest: Guest) -> dict[str, bytes]:
    meta = "latest/meta-data"
    return {
        f"{meta}/instance-id": guest.instance_id.encode(),
        f"{meta}/hostname": guest.hostname.encode(),
        f"{meta}/local-ipv4": guest.ipv4.encode(),
        f"{meta}/placement/availability-zone": guest.zone.encode(),
        f"{meta}/public-keys/0/openssh-key": guest.ssh_keys[0].encode(),
        "latest/user-data": guest.user_data,
    }


def openstack_bodies(guest: Guest) -> dict[str, bytes]:
    meta = {
        "uuid": guest.uuid,
        "hostname": guest.hostname,
        "availability_zone": guest.zone,
        "public_keys": {"key": guest.ssh_keys[0]},
    }
    network = {
        "links": [{"ethernet_mac_address": guest.mac}],
        "networks": [{"ip_address": guest.ipv4}, {"ip_address": guest.ipv6}],
    }
    return {
        "openstack/latest/meta_data.json": json.dumps(meta).encode(),
        "openstack/latest/network_data.json": json.dumps(network).encode(),
        "openstack/latest/user_data": guest.user_data,
    }


def nocloud_bodies(guest: Guest) -> dict[str, bytes]:
    meta = {"instance-id": guest.uuid, "local-hostname": guest.hostname}
    network = f"macaddress: {guest.mac}\naddresses: [{guest.ipv4}/24]\n"
    return {
        "nocloud/meta-data": json.dumps(meta).encode(),
        "nocloud/network-config": network.encode(),
        "nocloud/vendor-data": b"",
        "nocloud/user-data": guest.user_data,
    }


BODIES: dict[Dialect, Callable[[Guest], dict[str, bytes]]] = {
    Dialect.EC2: ec2_bodies,
    Dialect.OPENSTACK: openstack_bodies,
    Dialect.NOCLOUD: nocloud_bodies,
}


@pytest.mark.parametrize("dialect", list(Dialect))
def test_any_document_of_the_guest_with_the_same_address_elsewhere_is_a_fault(
    dialect: Dialect,
) -> None:
    own, other = BODIES[dialect](OWN), BODIES[dialect](OTHER)
    different = [path for path in own if own[path] != other[path]]
    assert different
    for path in different:
        mixed = {**own, path: other[path]}
        assert judge_documents(OWN, dialect, mixed).faults, path


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_document_of_another_shape_is_a_fault_and_no_traceback(dialect: Dialect) -> None:
    for path in BODIES[dialect](OWN):
        for body in (b"[]", b"\xff\xfe", b"{"):
            reading = judge_documents(OWN, dialect, {**BODIES[dialect](OWN), path: body})
            if path != "nocloud/vendor-data":
                assert reading.faults, (path, body)


def good_boot(dialect: Dialect) -> Boot:
    return Boot(
        seconds=1.0,
        failure="",
        datasource={
            Dialect.EC2: "DataSourceEc2",
            Dialect.OPENSTACK: "DataSourceOpenStack [net,ver=2]",
            Dialect.NOCLOUD: "DataSourceNoCloudNet [seed=ds_config_seedfrom]",
        }[dialect],
        instance_id=OWN.instance_id if dialect is Dialect.EC2 else OWN.uuid,
        hostname=OWN.name,
        user_data_sha256=OWN.user_data_sha256,
        written=OWN.written,
        authorized_keys=f"# made by cloud-init\n{OWN.ssh_keys[0]}\n",
        network=f"[Match]\nMACAddress={OWN.mac}\n",
    )


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize(
    "change",
    [
        {"failure": "cloud-init ended with 1"},
        {"datasource": "DataSourceNone"},
        {"instance_id": OTHER.uuid},
        {"hostname": OTHER.name},
        {"user_data_sha256": OTHER.user_data_sha256},
        {"user_data_sha256": None},
        {"written": None},
        {"written": OTHER.written},
        {"authorized_keys": OTHER.ssh_keys[0]},
        {"network": ""},
    ],
    ids=str,
)
def test_a_boot_with_anything_else_is_a_fault(
    dialect: Dialect, change: dict[str, str | None]
) -> None:
    boot = dataclasses.replace(good_boot(dialect), **change)  # type: ignore[arg-type] # by name

    assert judge_boot(OWN, dialect, boot)
