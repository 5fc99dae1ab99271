"""The doctor on genuine guests: of a daemon, of a Nova, and against cloud-init's genuine ds-identify."""

import hashlib
import hmac
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.cli.doctor import parse_url
from imdsproxy.model.entities import Dialect
from imdsproxy.tools.doctor import Severity, Surroundings, crawl
from imdsproxy.tools.doctor.checks_documents import asked_by, examine
from support.daemon import instance
from support.ds_identify import Machine, identify
from support.guest import IPV4, IPV6, inside
from support.lab import until, within
from support.openstack.lab import OpenStack
from support.world import World

_EVERYTHING: Final = {
    "ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ a=b/c", "ssh-ed25519 AAAA second"],
    "tags": {"role": "web", "a key": "x"},
    "vendor_data": "#cloud-config\n{}\n",
    "availability_zone": "az-1a",
    "instance_type": "m1",
}


@pytest.mark.root
@pytest.mark.parametrize("fields", [{}, _EVERYTHING], ids=["plain", "everything"])
def test_neither_a_guest_nor_the_daemon_finds_anything_wrong(
    world: World, fields: dict[str, object]
) -> None:
    world.daemon.put([], [instance("red-5", "red", 5, fields=fields)])
    # The last request from an address may be one that another test forged.
    world.wait_all_right()
    around = Surroundings(macs=frozenset({world.red.mac}))
    for url in (f"http://{IPV4}", f"http://[{IPV6}%25{world.red.device}]"):
        done = inside(world.red.namespace, lambda url=url: crawl(parse_url(url), direct=True))  # type: ignore[misc] # mypy cannot see the default's type
        assert (done.given_up, examine(done, around)) == ("", ())
        assert all(dialect in done.served for dialect in Dialect)
    for guest in world.everybody:
        words = ("--network", guest.network, "--from", guest.addresses[0], "--json")
        ran = world.daemon.command("doctor", *words)
        reported = json.loads(ran.out)
        assert ran.status == 0, reported
        assert [one["code"] for one in reported["findings"]] == ["smbios-unknown"]
        assert set(reported["served"]) == set(Dialect)
        assert f"{guest.network}-5" in reported["subject"]


@pytest.mark.root
def test_a_wrong_mac_in_the_record_is_found_in_the_guest(world: World) -> None:
    world.daemon.put([], [instance("red-5", "red", 5, mac="fa:16:3e:ff:ff:ff")])
    until(lambda: world.red.ask("/openstack").status == 403)
    doctor = (sys.executable, "-m", "imdsproxy", "doctor", f"http://{IPV4}", "--json")
    ran = subprocess.run(
        (*within(world.red.namespace), *doctor),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    codes = {one["code"] for one in json.loads(ran.stdout)["findings"]}
    # Whether the machine of the tests looks like a cloud is its own business.
    assert (ran.returncode, codes - {"smbios-mismatch"}) == (1, {"refused"})


def test_novas_own_faults_are_found(openstack: OpenStack) -> None:
    one = next(iter(openstack.instances.values()))
    signature = hmac.new(openstack.secret.encode(), one.uuid.encode(), hashlib.sha256)
    headers = [
        f"X-Instance-ID: {one.uuid}",
        f"X-Tenant-ID: {one.project_id}",
        f"X-Instance-ID-Signature: {signature.hexdigest()}",
        "X-Forwarded-For: 10.0.0.5",
    ]
    done = crawl(parse_url(openstack.nova_url, headers), direct=True)
    assert {Dialect.OPENSTACK, Dialect.EC2} <= set(done.served)
    findings = {one.code: one for one in examine(done, Surroundings())}
    # An error page is no token, and a path below a leaf is an exception in Nova. Its first answer may be slow.
    odd = findings.pop("no-answer", None) or findings.pop("server-error")
    assert odd.paths == ("/latest/meta-data/instance-id/x",)
    assert findings.pop("token-error-body").severity is Severity.WARNING
    assert set(findings) <= {"slow"}


_UUIDS: Final = (
    "5f0b1c52-90ab-4c1d-8e7f-001122334455",
    "ec2e1916-9099-4caf-8d21-012345abcdef",
    "45E12AEC-DCD1-B213-94ED-012345ABCDEF",
)
_DMI: Final[tuple[dict[str, str], ...]] = (
    {},
    *({"product_name": name} for name in ("OpenStack Nova", "OpenStack Compute", "OpenStack")),
    *({"chassis_asset_tag": tag} for tag in ("OpenStack Nova", "HUAWEICLOUD", "x.zstack.io")),
    {"sys_vendor": "e24cloud"},
    {"sys_vendor": "3DS Outscale", "product_name": "3DS Outscale VM"},
    {"product_serial": "srv-1.gb1.brightbox.com"},
    {"product_serial": "ds=nocloud;s=http://169.254.169.254/nocloud/"},
    {"product_serial": "A1 ds=nocloud-net;s=http://x/"},
    {"product_serial": "xds=nocloud"},
    {"product_serial": "ds=nocloud", "product_name": "OpenStack Nova", "sys_vendor": "e24cloud"},
)
_KERNELS: Final = (
    *(
        "root=/dev/vda1",
        "root=/dev/vda1 ds=nocloud;s=http://x/ quiet",
        "ds=nocloud-net",
        "ds=Azure",
    ),
    *("ci.ds=OpenStack", "ci.datasource=Ec2 x", "ds=Ec2 ds=OpenStack"),
)


@pytest.mark.parametrize("container", [False, True], ids=["machine", "container"])
@pytest.mark.parametrize("kernel", _KERNELS)
def test_the_doctor_and_ds_identify_say_the_same_of_who_is_asked(
    kernel: str, *, container: bool, tmp_path: Path
) -> None:
    machines = list(itertools.product(_DMI, _UUIDS)) if kernel == _KERNELS[0] else [({}, _UUIDS[0])]
    for number, (fields, uuid) in enumerate(machines):
        for product in ("", "OpenStack Nova"):
            dmi = {"product_uuid": uuid, **fields}
            environment = {"product_name": product} if product else {}
            machine = Machine(
                dmi,
                virtualization="container:lxc" if container else "vm:kvm",
                kernel=kernel,
                init=("/sbin/init", *kernel.split()),
                environment=environment,
            )
            truth = identify(machine, tmp_path / f"{number}-{product}")
            around = Surroundings(
                dmi=dmi, kernel=kernel, environment=environment, container=container
            )
            names = {one.lower().removesuffix("-net") for one in truth} & set(Dialect)
            assert {one.value for one in asked_by(around)} == names, (fields, uuid, product, truth)
