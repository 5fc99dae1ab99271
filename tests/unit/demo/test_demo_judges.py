"""The demonstration's guests, its verdicts on what they see, and its directory."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from demo.boot import Boot, judge_boot
from demo.place import prepare, unfit
from demo.processes import CommandError
from demo.reading import PATHS, Dialect, judge_documents
from demo.roster import Guest, guests, records
from imdsproxy.model.records import parse_records
from support import guest_records

OWN, _, OTHER, STRANGER = guests("word")[:4]

dialects = pytest.mark.parametrize("dialect", list(Dialect))


def test_each_network_has_the_same_addresses_and_macs_and_nothing_else_twice() -> None:
    everyone = guests("w")
    seen = [
        [(guest.ipv4, guest.ipv6, guest.mac) for guest in everyone if guest.network == network]
        for network in ("red", "green", "blue")
    ]
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    for attribute in ("name", "netns", "uuid", "instance_id", "hostname", "ssh_keys", "user_data"):
        assert len({getattr(guest, attribute) for guest in everyone}) == len(everyone)


@cache
def _bodies(guest: Guest, dialect: Dialect) -> dict[str, bytes]:
    """What the guest reads in truth."""
    known = parse_records(records("word"))
    (instance,) = (one for one in known.instances if one.id == guest.uuid)
    asker = guest_records.Guest(instance, {one.id: one for one in known.networks})
    return {path: asker.read(f"/{path}") for path in PATHS[dialect]}


_OF_THE_NETWORK: Final = {
    "latest/meta-data/local-ipv4",
    "openstack/latest/network_data.json",
    "nocloud/network-config",
}


@dialects
@pytest.mark.parametrize(("other", "alike"), [(OTHER, _OF_THE_NETWORK), (STRANGER, set())])
def test_any_document_of_another_guest_is_a_fault_be_its_address_the_same_or_not(
    dialect: Dialect, other: Guest, alike: set[str]
) -> None:
    own = _bodies(OWN, dialect)
    assert judge_documents(OWN, dialect, own).faults == ()
    for path in own.keys() - alike - {"nocloud/vendor-data"}:
        mixed = {**own, path: _bodies(other, dialect)[path]}
        assert judge_documents(OWN, dialect, mixed).faults, path


@dialects
def test_a_document_of_another_shape_is_a_fault_and_no_traceback(dialect: Dialect) -> None:
    own = _bodies(OWN, dialect)
    for path in own.keys() - {"nocloud/vendor-data"}:
        for body in (b"[]", b"\xff\xfe", b"{"):
            assert judge_documents(OWN, dialect, {**own, path: body}).faults, (path, body)


def _good_boot(dialect: Dialect) -> Boot:
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


@dialects
@pytest.mark.parametrize(
    "change",
    [
        {"failure": "cloud-init ended with 1"},
        {"datasource": "DataSourceNone"},
        {"instance_id": OTHER.uuid},
        {"hostname": OTHER.name},
        {"user_data_sha256": OTHER.user_data_sha256},
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
    assert judge_boot(OWN, dialect, _good_boot(dialect)) == []
    boot = dataclasses.replace(_good_boot(dialect), **change)  # type: ignore[arg-type] # by name
    assert judge_boot(OWN, dialect, boot)


# Its directory


def test_a_directory_that_haproxy_or_a_mount_cannot_use_is_unfit(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for name in ("/" + "d" * 80, "/srv/a:b", "/srv/a,b", "/srv/a b", "/srv/a\\b", closed / "demo"):
        assert unfit(Path(name)) is not None, name
    assert unfit(Path("/srv/imdst-demo")) is None


def test_an_earlier_runs_files_make_room_and_files_of_others_are_never_removed(
    tmp_path: Path,
) -> None:
    old = tmp_path / "demo/state/store.sqlite"
    for _ in range(2):
        prepare(tmp_path / "demo")
        assert not old.exists()
        old.parent.mkdir()
        old.touch()
    with pytest.raises(CommandError):
        prepare(tmp_path)
    assert old.exists()
