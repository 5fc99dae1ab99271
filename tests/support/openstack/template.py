"""Databases with everybody in them, made once by genuine Nova and Neutron and copied for every lab."""

import base64
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from support.openstack.install import INSIDE, Environments, made_once, stamp_of
from support.openstack.neutron_rest import NeutronClient
from support.openstack.processes import Place, neutron_server
from support.openstack.servers import free_port
from support.openstack.table import (
    BLUE,
    HOSTS,
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


def _template(environments: Environments) -> Path:
    """The directory with the databases and the seed, for these environments and this table."""
    here = Path(__file__)
    files = (
        *(here.with_name(f"{name}.py") for name in ("template", "table", "settings", "processes")),
        *(INSIDE / f"{name}.py" for name in ("make_nova", "make_neutron", "seed_nova")),
    )
    stamp = stamp_of(files, environments.path.name)
    return made_once("template", stamp, lambda path: _make(path, environments))


def fill(place: Place) -> Seed:
    """Makes a lab's directory what a lab begins with, where there is none; with the ids that Neutron chose."""
    place.prepare()
    if not (place.path / _SEED).exists():
        made = _template(place.environments)
        shutil.copytree(made / "db", place.path / "db", dirs_exist_ok=True)
        shutil.copy(made / _SEED, place.path)
    return _parse(json.loads((place.path / _SEED).read_text()))


def _make(path: Path, environments: Environments) -> None:
    place = Place(path, environments)
    place.prepare()
    with free_port() as holder, ThreadPoolExecutor() as pool:
        port = holder.getsockname()[1]
        settings = str(place.write_nova(neutron_port=port, secret="none"))
        nova = pool.submit(place.run_inside, "nova", "make_nova.py", settings)
        place.run_inside("neutron", "make_neutron.py", str(place.etc / "neutron.conf"), *HOSTS)
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
    networks: dict[str, str] = {}
    subnets: dict[str, str] = {}
    routers: dict[str, str] = {}
    for net in NETWORKS:
        own = {"project_id": net.project_id}
        made = rest.create("network", name=net.name, router__external=net.external, **own)
        networks[net.name] = own["network_id"] = made["id"]
        four = {"ip_version": 4, "cidr": net.cidr4, "dns_nameservers": ["192.0.2.53"]}
        subnets[net.name] = rest.create("subnet", **own, **four)["id"]
        if net.cidr6 is not None:
            six = {"ip_version": 6, "cidr": net.cidr6}
            modes = dict.fromkeys(("ipv6_ra_mode", "ipv6_address_mode"), "dhcpv6-stateful")
            rest.create("subnet", **own, **six, **modes)
    for router in ROUTERS:
        gateway = {"network_id": networks["net-ext"]}
        own = {"name": router.name, "project_id": router.project_id}
        made = rest.create("router", external_gateway_info=gateway, **own)
        routers[router.name] = made["id"]
        for name in router.networks:
            path = f"/routers/{made['id']}/add_router_interface"
            rest.send("PUT", path, {"subnet_id": subnets[name]})
    # Neutron makes it when somebody first lists groups. Two who do at once lock SQLite, and Nova answers 500.
    rest.list("security_group")
    web = rest.create("security_group", name="web", project_id=BLUE)["id"]
    ports = tuple(_sow_port(rest, plan, networks[plan.network], web) for plan in PORTS)
    rest.create(
        "floatingip", floating_network_id=networks["net-ext"], port_id=ports[0].id, project_id=BLUE
    )
    return Seed(networks=networks, routers=routers, ports=ports)


def _sow_port(rest: NeutronClient, plan: PortPlan, network_id: str, web: str) -> Port:
    device_id = plan.device_id.format(network_id=network_id)
    made = rest.create(
        "port",
        network_id=network_id,
        project_id=plan.project_id,
        mac_address=plan.mac,
        fixed_ips=[{"ip_address": address} for address in plan.addresses],
        device_id=device_id,
        device_owner=plan.device_owner,
        binding__host_id="lab",
        **({"security_groups": [web]} if plan.web else {}),
    )
    return Port(id=made["id"], network_id=network_id, device_id=device_id, plan=plan)


def _instances() -> list[dict[str, object]]:
    """What `inside/seed_nova.py` reads."""
    plans: list[dict[str, object]] = []
    for one in INSTANCES:
        own = (one.uuid, one.project_id)
        macs = [plan.mac for plan in PORTS if (plan.device_id, plan.project_id) == own]
        data = one.user_data
        plans.append(
            {
                "name": one.name,
                "uuid": one.uuid,
                "project_id": one.project_id,
                "user_data": None if data is None else base64.b64encode(data).decode(),
                "metadata": dict(one.metadata),
                "public_key": PUBLIC_KEY if one.keyed else None,
                "tagged_mac": macs[0] if one.tagged else None,
                "ports": len(macs),
            }
        )
    return plans


def _parse(shape: dict[str, Any]) -> Seed:
    ports = tuple(
        Port(id=one["id"], network_id=one["network_id"], device_id=one["device_id"], plan=plan)
        for one, plan in zip(shape["ports"], PORTS, strict=True)
    )
    return Seed(networks=shape["networks"], routers=shape["routers"], ports=ports)
