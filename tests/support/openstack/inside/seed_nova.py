"""Sows instances by Nova's own objects; runs in Nova's environment, in the lab's directory, while Neutron answers.

Standard input is a JSON list of objects with name, uuid, project_id, user_data (base64 or null), metadata,
public_key (or null), tagged_mac (or null) and ports (how many Neutron has).
"""

import datetime as dt
import hashlib
import json
import sys
from typing import Any

from nova import config, context, objects
from nova.network import model, neutron
from nova.objects import virt_device_metadata

IMAGE = "11111111-2222-4333-8444-555555555555"


def main(config_file: str) -> None:
    config.parse_args(["seed", "--config-file", config_file], default_config_files=[])
    objects.register_all()
    admin = context.get_admin_context()
    cell = next(one for one in objects.CellMappingList.get_all(admin) if one.name == "cell1")
    with context.target_cell(admin, cell) as in_cell:
        node = make_host(in_cell)
    objects.HostMapping(admin, host="lab", cell_mapping=cell).create()
    flavor = make_flavor(admin)
    for index, plan in enumerate(json.load(sys.stdin)):
        user_id = hashlib.sha256(plan["project_id"].encode()).hexdigest()[:32]
        keys = make_keys(admin, plan, user_id, index)
        objects.InstanceMapping(
            admin,
            instance_uuid=plan["uuid"],
            cell_mapping=cell,
            project_id=plan["project_id"],
            user_id=user_id,
            queued_for_delete=False,
        ).create()
        with context.target_cell(admin, cell) as in_cell:
            make_instance(in_cell, plan, user_id=user_id, keys=keys, flavor=flavor, node=node)


def make_host(admin: Any) -> Any:
    objects.Service(
        admin, host="lab", binary="nova-compute", topic="compute", report_count=1
    ).create()
    node = objects.ComputeNode(
        admin,
        host="lab",
        hypervisor_hostname="lab",
        uuid="99999999-0001-4000-8000-000000000001",
        vcpus=64,
        memory_mb=262144,
        local_gb=1000,
        vcpus_used=0,
        memory_mb_used=0,
        local_gb_used=0,
        hypervisor_type="QEMU",
        hypervisor_version=8000000,
        cpu_info="{}",
    )
    node.create()
    return node


def make_flavor(admin: Any) -> Any:
    flavor = objects.Flavor(
        admin,
        name="m1.lab",
        flavorid="lab",
        memory_mb=2048,
        vcpus=2,
        root_gb=20,
        ephemeral_gb=0,
        swap=0,
        rxtx_factor=1.0,
        vcpu_weight=0,
        disabled=False,
        is_public=True,
        extra_specs={},
        projects=[],
    )
    flavor.create()
    return flavor


def make_keys(admin: Any, plan: dict[str, Any], user_id: str, index: int) -> list[Any]:
    if plan["public_key"] is None:
        return []
    key = objects.KeyPair(
        admin,
        user_id=user_id,
        name=f"key-{plan['name']}",
        type="ssh",
        public_key=plan["public_key"],
        fingerprint="00:" * 15 + f"{index:02x}",
    )
    key.create()
    return [key]


def make_instance(
    admin: Any, plan: dict[str, Any], *, user_id: str, keys: list[Any], flavor: Any, node: Any
) -> None:
    instance = objects.Instance(
        admin,
        uuid=plan["uuid"],
        project_id=plan["project_id"],
        user_id=user_id,
        host="lab",
        node="lab",
        compute_id=node.id,
        hostname=plan["name"],
        display_name=plan["name"].upper().replace("-", " "),
        availability_zone="az-1",
        launch_index=0,
        reservation_id=f"r-{plan['name']}",
        vm_state="active",
        power_state=1,
        memory_mb=flavor.memory_mb,
        vcpus=flavor.vcpus,
        root_gb=flavor.root_gb,
        ephemeral_gb=0,
        image_ref=IMAGE,
        kernel_id="",
        ramdisk_id="",
        instance_type_id=flavor.id,
        launched_at=dt.datetime.now(dt.UTC),
        root_device_name="/dev/vda",
        config_drive="",
        key_name=keys[0].name if keys else None,
        key_data=plan["public_key"],
        user_data=plan["user_data"],
        metadata=plan["metadata"],
        system_metadata={"image_base_image_ref": IMAGE, "image_disk_format": "qcow2"},
        keypairs=objects.KeyPairList(objects=keys),
        flavor=flavor,
        old_flavor=None,
        new_flavor=None,
        info_cache=objects.InstanceInfoCache(
            admin, instance_uuid=plan["uuid"], network_info=model.NetworkInfo([])
        ),
        numa_topology=None,
        pci_requests=objects.InstancePCIRequests(requests=[]),
    )
    if plan["tagged_mac"] is not None:
        device = virt_device_metadata.NetworkInterfaceMetadata(
            mac=plan["tagged_mac"],
            vlan=1000,
            bus=virt_device_metadata.PCIDeviceBus(address="0000:00:03.0"),
            tags=["nfvfunc"],
        )
        instance.device_metadata = objects.InstanceDeviceMetadata(devices=[device])
    instance.create()
    objects.BlockDeviceMapping(
        admin,
        instance_uuid=plan["uuid"],
        source_type="image",
        destination_type="local",
        device_type="disk",
        boot_index=0,
        device_name="/dev/vda",
        delete_on_termination=True,
        no_device=False,
        image_id=IMAGE,
        volume_size=20,
    ).create()
    # Nova itself asks Neutron for the ports, and keeps what it makes of the answer.
    found = neutron.API().get_instance_nw_info(admin, instance, force_refresh=True)
    if len(found) != plan["ports"]:
        sys.exit(f"Nova found {len(found)} ports of {plan['name']}, not {plan['ports']}")


if __name__ == "__main__":
    main(sys.argv[1])
