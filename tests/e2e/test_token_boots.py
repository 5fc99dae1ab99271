"""cloud-init's real boot stages where EC2's tree requires tokens: a guest like Amazon's has them, others need none."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from demo.boot import boot, judge_boot
from demo.cloudinit import download, unpack
from demo.reading import Dialect
from demo.roster import Guest, guests, records
from support.demonstration import REPOSITORY
from support.world import World, open_world

pytestmark = [pytest.mark.root, pytest.mark.slow]

_AWS_MACHINE: Final = {
    # What cloud-init asks where the kernel shows it no SMBIOS; a machine at Amazon has a UUID that begins so.
    "usr/sbin/dmidecode": """#!/bin/sh
case $2 in
    system-uuid | system-serial-number) echo ec200000-1234-4567-89ab-000000000001 ;;
esac
""",
    # In a container it would not ask.
    "usr/bin/systemd-detect-virt": "#!/bin/sh\nexit 1\n",
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    policy = {"host": {"tokens": "required"}}
    with open_world({"policy": policy}) as made:
        yield made


@pytest.fixture(scope="module")
def guest(world: World) -> Guest:
    """The demonstration's first guest, in this world's lab."""
    first = guests("required")[0]
    cable = world.lab.guest(first.network, 11)
    assert cable.mac == first.mac
    told = records("required")["instances"]
    assert isinstance(told, list)
    assert isinstance(told[0], Mapping)
    world.daemon.put(instances=[{**told[0], "user_data": first.user_data.decode()}])
    assert cable.ask("/latest/user-data").status == 401
    assert cable.ask("/openstack/latest/user_data").body == first.user_data
    return replace(first, netns=cable.namespace)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cloud-init") / "unpacked"
    unpack(download(REPOSITORY / ".cache", say=print), target)
    return target


def test_a_machine_with_amazons_firmware_boots_by_ec2_with_tokens(
    guest: Guest, unpacked: Path, tmp_path: Path
) -> None:
    for name, text in _AWS_MACHINE.items():
        file = tmp_path / "layer" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    done = boot(guest, Dialect.EC2, unpacked=unpacked, directory=tmp_path)
    assert judge_boot(guest, Dialect.EC2, done) == []


@pytest.mark.parametrize("dialect", [Dialect.OPENSTACK, Dialect.NOCLOUD])
def test_sources_that_know_no_tokens_boot_as_before(
    guest: Guest, unpacked: Path, tmp_path: Path, dialect: Dialect
) -> None:
    done = boot(guest, dialect, unpacked=unpacked, directory=tmp_path)
    assert judge_boot(guest, dialect, done) == []
