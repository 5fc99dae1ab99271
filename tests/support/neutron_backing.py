"""A genuine Neutron as what a source reads: the suite's records, written as ports."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from imdsproxy.core.model import (
    Instance,
    MacAddress,
    Network,
    NetworkId,
    Port,
    Upstream,
)
from imdsproxy.errors import Problem
from imdsproxy.host.clock import SystemClock
from imdsproxy.sources.neutron.client import NeutronRest, connect_endpoint
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery
from imdsproxy.sources.neutron.source import NeutronSource
from imdsproxy.sources.settings import NeutronSourceSettings
from support.openstack.lab import OpenStack
from support.openstack.neutron_rest import Refused

_PROJECT: Final = "blue"
_CIDR: Final = "10.0.0.0/24"


class NeutronBacking:
    """Ports on a host of their own, listed every second.

    The suite's names of networks, and its ports without a MAC, are put in for Neutron's ids, and for the MACs that
    Neutron makes up, on the way between Neutron and the source.
    """

    def __init__(self, openstack: OpenStack, directory: Path) -> None:
        self._url = openstack.neutron_url
        self._rest = openstack.rest
        self._host = f"suite-{secrets.token_hex(4)}"
        self._kept = directory / "neutron.sqlite"
        self._networks: dict[str, str] = {}
        self._ports: dict[str, dict[str, Any]] = {}
        self._made_up: set[MacAddress] = set()

    def source(self) -> NeutronSource:
        return NeutronSource(
            _InTheSuitesWords(self._url, self._networks, self._made_up),
            self._kept,
            NeutronSourceSettings(list_every_s=1.0, list_host=self._host, page_size=2),
            clock=SystemClock(),
            random=lambda: 0.0,
        )

    def seen(self, instance: Instance) -> Instance:
        return Instance(
            id=instance.id,
            name=instance.id,
            hostname=instance.id,
            project=_PROJECT,
            ports=instance.ports,
            upstream=Upstream.NOVA,
        )

    def seen_network(self, network: Network) -> Network:
        return network

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        return await asyncio.to_thread(self._put, tuple(networks), tuple(instances))

    async def remove_network(self, network_id: str) -> None:
        await asyncio.to_thread(self._rest.delete, "network", self._networks.pop(network_id))

    async def remove_instance(self, instance_id: str) -> None:
        made = self._ports.pop(instance_id)
        await asyncio.to_thread(self._rest.delete, "port", made["id"])

    async def spoil(self, instance_id: str) -> str:
        made = self._ports.get(instance_id)
        if made is None:
            made = await asyncio.to_thread(self._create, instance_id, Port(NetworkId("n1")))
        await asyncio.to_thread(self._rest.update, "port", made["id"], device_id=f"{instance_id}|")
        made["device_id"] = f"{instance_id}|"
        return "ports"

    async def claim_twice(self, victim: Instance, thief_id: str) -> tuple[Problem, ...]:
        # With a MAC of its own: else Neutron refuses it for that, and says nothing of the address.
        port = replace(victim.ports[0], mac=None)
        return await asyncio.to_thread(self._put_instance, thief_id, port)

    async def close(self) -> None:
        for instance_id in tuple(self._ports):
            await self.remove_instance(instance_id)
        for network_id in tuple(self._networks):
            await self.remove_network(network_id)

    def _put(
        self, networks: tuple[Network, ...], instances: tuple[Instance, ...]
    ) -> tuple[Problem, ...]:
        for network in networks:
            self._network(network.id)
        moving = [each for each in instances if each.id in self._ports]
        if len(moving) > 1:
            # Neutron changes one port at a time: addresses are let go of first.
            for each in moving:
                made = self._ports[each.id]
                spare = MacAddress(f"fa:16:3e:{secrets.token_bytes(3).hex(':')}")
                self._update(each.id, made, Port(NetworkId("n1"), spare))
                self._made_up.add(spare)
        problems: list[Problem] = []
        for each in instances:
            problems += self._put_instance(each.id, each.ports[0])
        return tuple(problems)

    def _put_instance(self, instance_id: str, port: Port) -> tuple[Problem, ...]:
        made = self._ports.get(instance_id)
        try:
            if made is not None and made["network_id"] != self._network(port.network):
                self._rest.delete("port", self._ports.pop(instance_id)["id"])
                made = None
            if made is None:
                self._create(instance_id, port)
            else:
                self._update(instance_id, made, port)
        except Refused as refused:
            return (Problem(f"instances.{instance_id}", str(refused)),)
        return ()

    def _create(self, instance_id: str, port: Port) -> dict[str, Any]:
        made = self._rest.create(
            "port",
            network_id=self._network(port.network),
            device_id=instance_id,
            device_owner="compute:nova",
            project_id=_PROJECT,
            binding__host_id=self._host,
            **_wanted(port),
        )
        self._remember(instance_id, made, port)
        return made

    def _update(self, instance_id: str, made: dict[str, Any], port: Port) -> None:
        wanted = _wanted(port)
        has = {str(each["ip_address"]) for each in made["fixed_ips"]}
        if has == {each["ip_address"] for each in wanted["fixed_ips"]}:
            del wanted["fixed_ips"]
        if made["mac_address"] == wanted.get("mac_address"):
            del wanted["mac_address"]
        if made["device_id"] != instance_id:
            wanted["device_id"] = instance_id
        # One at a time: of a MAC and addresses together Neutron makes a 500.
        for name, value in wanted.items():
            made = self._rest.update("port", made["id"], **{name: value})
        self._remember(instance_id, made, port)

    def _remember(self, instance_id: str, made: dict[str, Any], port: Port) -> None:
        self._ports[instance_id] = made
        mac = MacAddress(str(made["mac_address"]))
        (self._made_up.add if port.mac is None else self._made_up.discard)(mac)

    def _network(self, name: str) -> str:
        if name not in self._networks:
            made = self._rest.create("network", name=name, project_id=_PROJECT)
            self._networks[name] = made["id"]
            self._rest.create(
                "subnet", network_id=made["id"], cidr=_CIDR, ip_version=4, project_id=_PROJECT
            )
        return self._networks[name]


def _wanted(port: Port) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "fixed_ips": [{"ip_address": str(address)} for address in port.addresses]
    }
    if port.mac is not None:
        wanted["mac_address"] = port.mac
    return wanted


class _InTheSuitesWords:
    """Neutron's own client, with the suite's names for Neutron's."""

    def __init__(self, url: str, networks: dict[str, str], made_up: set[MacAddress]) -> None:
        self._client = NeutronRest(lambda: connect_endpoint(url, 10), timeout_s=10, max_queries=4)
        self._networks = networks
        self._made_up = made_up

    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        names = {ident: NetworkId(name) for name, ident in self._networks.items()}
        return tuple(
            replace(
                port,
                network=names.get(port.network, port.network),
                mac=None if port.mac in self._made_up else port.mac,
                # The suite's records do not say when they were made.
                created_at=None,
            )
            for port in await self._client.ports(query)
        )

    async def close(self) -> None:
        await self._client.close()
