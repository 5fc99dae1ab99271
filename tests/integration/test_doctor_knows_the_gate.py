"""The doctor's own word on who is asked, against cloud-init's genuine ds-identify."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from imdsproxy.core.doctor import Surroundings
from imdsproxy.core.doctor.checks_documents import asked_by
from imdsproxy.core.model import Dialect
from support.ds_identify import Machine, identify

_SERVED = {one.value for one in Dialect}
_UUIDS = (
    "5f0b1c52-90ab-4c1d-8e7f-001122334455",
    "ec2e1916-9099-4caf-8d21-012345abcdef",
    "45E12AEC-DCD1-B213-94ED-012345ABCDEF",
)
_DMI: tuple[dict[str, str], ...] = (
    {},
    {"product_name": "OpenStack Nova"},
    {"product_name": "OpenStack Compute"},
    {"product_name": "OpenStack"},
    {"chassis_asset_tag": "OpenStack Nova"},
    {"chassis_asset_tag": "HUAWEICLOUD"},
    {"chassis_asset_tag": "x.zstack.io"},
    {"sys_vendor": "e24cloud"},
    {"sys_vendor": "3DS Outscale", "product_name": "3DS Outscale VM"},
    {"product_serial": "srv-1.gb1.brightbox.com"},
    {"product_serial": "ds=nocloud;s=http://169.254.169.254/nocloud/"},
    {"product_serial": "A1 ds=nocloud-net;s=http://x/"},
    {"product_serial": "xds=nocloud"},
    {"product_serial": "ds=nocloud", "product_name": "OpenStack Nova", "sys_vendor": "e24cloud"},
)
_KERNELS = (
    "root=/dev/vda1",
    "root=/dev/vda1 ds=nocloud;s=http://x/ quiet",
    "ds=nocloud-net",
    "ci.ds=OpenStack",
    "ci.datasource=Ec2 x",
    "ds=Ec2 ds=OpenStack",
    "ds=Azure",
)


@pytest.mark.parametrize("container", [False, True], ids=["machine", "container"])
@pytest.mark.parametrize("kernel", _KERNELS)
def test_the_doctor_and_ds_identify_say_the_same(
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
            names = {one.lower().removesuffix("-net") for one in truth} & _SERVED
            assert {one.value for one in asked_by(around)} == names, (fields, uuid, product, truth)
