"""Databases with everybody in them, made once by genuine Nova and Neutron and copied for every lab."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from support.openstack.install import INSIDE, Environments, Made, made_once, stamp_of
from support.openstack.neutron_rest import NeutronClient
from support.openstack.processes import Place, neutron_server
from support.openstack.servers import free_port
from support.openstack.table import (
    BLUE,
    INSTANCES,
    NETWORKS,
    PORTS,
    PUBLIC_KEY,
    ROUTERS,
    Port,
    PortPlan,
    Seed,
)

_SEED: Final = "seed.json"


def _template(environments: Environments) -> Made:
    """The directory with the databases and the seed, for these environments and this table."""
    here = Path(__file__)
    files = (
        *(here.with_name(f"{name}.py") for name in ("template", "table", "settings", "processes")),
        *(INSIDE / f"{name}.py" for name in ("make_nova", "make_neutron", "seed_nova")),
    )
    stamp = stamp_of(files, environments.made.path.name)
    return made_once("template", stamp, lambda path: _make(path, environments))


def fill(place: Place) -> Seed:
    """Makes a lab's directory what a lab begins with, where there is none; with the ids that Neutron chose."""
    place.prepare()
    if not (place.path / _SEED).exists():
        made = _template(place.environments)
        try:
            shutil.rmtree(place.path / "db")
            shutil.copytree(made.path / "db", place.path / "db")
            shutil.copy(made.path / _SEED, place.path)
        finally:
            made.release()
    return _parse(json.loads((place.path / _SEED).read_text()))


def _make(path: Path, environments: Environments) -> None:
    place = Place(path, environments)
    place.prepare()
    with free_port() as holder, ThreadPoolExecutor() as pool:
        port = holder.getsockname()[1]
        settings = str(place.write_nova("nova", neutron_port=port, secret="none", cache_s=0))
        nova = pool.submit(place.run_inside, "nova", "make_nova.py", settings)
        place.run_inside("neutron", "make_neutron.py", str(place.etc / "neutron.conf"))
        server = neutron_server(place, port=port)
        try:
            server.start()
            seed = _sow(NeutronClient(f"http://127.0.0.1:{port}"))
            nova.result()
            instances = json.dumps(_instances())
            place.run_inside("nova", "seed_nova.py", settings, stdin=instances)
        finally:
            server.stop()
    (path / _SEED).write_text(json.dumps(dataclasses.asdict(seed), indent=1))


def _sow(rest: NeutronClient) -> Seed:
    networks, subnets = _sow_networks(rest)
    routers = _sow_routers(rest, networks, subnets)
    # Neutron makes it when somebody first lists groups. Two who do at once lock SQLite, and Nova answers 500.
    rest.list("security_group")
    groups = {"web": rest.create("security_group", name="web", project_id=BLUE)["id"]}
    ports = tuple(_sow_port(rest, plan, networks, subnets, groups) for plan in PORTS)
    rest.create(
        "floatingip",
        floating_network_id=networks["net-ext"],
        port_id=ports[0].id,
        project_id=BLUE,
    )
    return Seed(networks=networks, routers=routers, ports=ports)


def _sow_networks(rest: NeutronClient) -> tuple[dict[str, str], dict[str, str]]:
    networks: dict[str, str] = {}
    subnets: dict[str, str] = {}
    for plan in NETWORKS:
        common = {"project_id": plan.project_id}
        made = rest.create("network", name=plan.name, router__external=plan.external, **common)
        networks[plan.name] = made["id"]
        common["network_id"] = made["id"]
        name = f"{plan.name}-v4"
        four = {"ip_version": 4, "cidr": plan.cidr4, "dns_nameservers": ["192.0.2.53"]}
        subnets[name] = rest.create("subnet", name=name, **common, **four)["id"]
        if plan.cidr6 is not None:
            name = f"{plan.name}-v6"
            mode = "dhcpv6-stateful"
            six = {"ip_version": 6, "cidr": plan.cidr6}
            modes = {"ipv6_ra_mode": mode, "ipv6_address_mode": mode}
            subnets[name] = rest.create("subnet", name=name, **common, **six, **modes)["id"]
    return networks, subnets


def _sow_routers(
    rest: NeutronClient, networks: dict[str, str], subnets: dict[str, str]
) -> dict[str, str]:
    routers = {}
    for plan in ROUTERS:
        made = rest.create(
            "router",
            name=plan.name,
            project_id=plan.project_id,
            external_gateway_info={"network_id": networks["net-ext"]},
        )
        routers[plan.name] = made["id"]
        for network in plan.networks:
            path = f"/routers/{made['id']}/add_router_interface"
            rest.send("PUT", path, {"subnet_id": subnets[f"{network}-v4"]})
    return routers


def _sow_port(
    rest: NeutronClient,
    plan: PortPlan,
    networks: dict[str, str],
    subnets: dict[str, str],
    groups: dict[str, str],
) -> Port:
    network_id = networks[plan.network]
    device_id = plan.device_id.format(network_id=network_id)
    attributes: dict[str, object] = {
        "network_id": network_id,
        "project_id": plan.project_id,
        "mac_address": plan.mac,
        "fixed_ips": [
            {
                "ip_address": address,
                "subnet_id": subnets[f"{plan.network}-v{6 if ':' in address else 4}"],
            }
            for address in plan.addresses
        ],
    }
    if device_id:
        attributes |= {
            "device_id": device_id,
            "device_owner": plan.device_owner,
            "binding:host_id": "lab",
        }
    if plan.groups is not None:
        attributes["security_groups"] = [groups[name] for name in plan.groups]
    made = rest.create("port", **attributes)
    return Port(id=made["id"], network_id=network_id, device_id=device_id, plan=plan)


def _instances() -> list[dict[str, object]]:
    """What `inside/seed_nova.py` reads."""
    plans: list[dict[str, object]] = []
    for one in INSTANCES:
        ports = [plan for plan in PORTS if _belongs(plan, one.uuid, one.project_id)]
        data = one.user_data
        plans.append(
            {
                "name": one.name,
                "uuid": one.uuid,
                "project_id": one.project_id,
                "user_data": None if data is None else base64.b64encode(data).decode(),
                "metadata": dict(one.metadata),
                "public_key": PUBLIC_KEY if one.keyed else None,
                "tagged_mac": ports[0].mac if one.tagged else None,
                "ports": len(ports),
            }
        )
    return plans


def _belongs(plan: PortPlan, uuid: str, project_id: str) -> bool:
    return (plan.device_id, plan.project_id) == (uuid, project_id)


def _parse(shape: dict[str, Any]) -> Seed:
    ports = tuple(
        Port(id=one["id"], network_id=one["network_id"], device_id=one["device_id"], plan=plan)
        for one, plan in zip(shape["ports"], PORTS, strict=True)
    )
    return Seed(networks=shape["networks"], routers=shape["routers"], ports=ports)
