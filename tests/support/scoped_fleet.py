"""A hub over a real etcd, with the records of two projects, and an attacker with certificates of one of them.

What only the other project has begins with `red`; nothing begins with `nil`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from imdsproxy.errors import ImdsproxyError
from imdsproxy.hub.hosts import in_force
from support.etcd_lab import etcd_lab
from support.hub_api import Hub, HubClient, open_hub

RED_MAC: Final = "52:54:00:00:ed:01"
GRANT: Final = {
    "hosts": ["a", "c"],
    "addresses": [
        {"network": "public", "cidr": "10.9.0.64/26"},
        {"network": "public", "cidr": "fe80::5054:ff:fe5a:0/112"},
    ],
}


@dataclass(frozen=True)
class ScopedFleet:
    """Projects `red-project` and `shop`; the attacker has certificates of `shop`.

    Each project has a network of its own, and `red-project` an instance in the shared network `public`.
    """

    hub: Hub

    @property
    def anna(self) -> HubClient:
        """The operator of all projects."""
        return self.hub.client

    def shop(self, role: str = "operator") -> HubClient:
        return replace(self.hub.client, role=role, scope="shop")

    def refusal(self, method: str, path: str, body: object = None) -> ImdsproxyError:
        """Why the attacker's request is refused."""
        with pytest.raises(ImdsproxyError) as refused:
            self.shop().request(method, path, body=body)
        return refused.value


def network(name: str, project: str | None, bridge: str | None = None) -> dict[str, Any]:
    record = {"id": name, "listener": {"bridge": bridge or f"br-{name}"}}
    return record if project is None else {**record, "project": project}


def instance(
    name: str, project: str | None, *ports: dict[str, Any], hosts: tuple[str, ...] = ("a",)
) -> dict[str, Any]:
    record = {"id": name, "name": name, "ports": ports, "hosts": hosts}
    return record if project is None else {**record, "project": project}


def port(network: str, address: str, **more: str) -> dict[str, Any]:
    return {"network": network, "addresses": [address], **more}


RECORDS: Final = {
    "networks": [
        {**network("rednet", "red-project"), "name": "red-name"},
        network("shopnet", "shop"),
        network("public", None),
    ],
    "instances": [
        instance("red-web", "red-project", port("rednet", "10.0.0.5", mac=RED_MAC)),
        instance("red-pub", "red-project", port("public", "10.9.0.70", mac="52:54:00:5a:00:01")),
        {**instance("red-far", "red-project", hosts=("red-host",)), "name": "red-name"},
        instance("shop-web", "shop", port("shopnet", "10.0.0.5")),
    ],
}


@contextlib.contextmanager
def open_scoped_fleet() -> Iterator[ScopedFleet]:
    """The fleet; its hosts a, b and c are connected."""
    with etcd_lab(1, tls=False) as lab, pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_force, "_ABSENT_S", 0.3)
        with open_hub(lab) as hub:
            for host in ("a", "b", "c", "red-host"):
                hub.enrol(host)
                hub.connect(host)
            made = ScopedFleet(hub)
            made.anna.request("POST", "/v1/records", body=RECORDS)
            made.anna.request("PUT", "/v1/grants/shop", body=GRANT)
            yield made
