"""Networks and instances in one line each, for tests of records, the inventory and the sources."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

from imdsproxy.model.entities import (
    BridgeListener,
    Instance,
    InstanceId,
    MacAddress,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.model.observation import AddressKey, Observation


def network(
    name: str, *, bridge: str = "br0", mtu: int | None = None, mac_check: bool = True
) -> Network:
    return Network(NetworkId(name), BridgeListener(bridge), mtu=mtu, mac_check=mac_check)


def port(network_id: str = "n1", *addresses: str, mac: str | None = None) -> Port:
    return Port(
        NetworkId(network_id),
        None if mac is None else MacAddress(mac),
        tuple(ip_address(address) for address in addresses),
    )


def instance(
    name: str, *addresses: str, mac: str | None = None, ports: Iterable[Port] = (), text: str = ""
) -> Instance:
    """An instance with one port in network `n1`, if it has an address or a MAC, and `ports`."""
    own = (port("n1", *addresses, mac=mac),) if addresses or mac else ()
    made = Instance(InstanceId(name), name, name, ports=(*own, *ports))
    return replace(made, user_data=text.encode()) if text else made


def key(network_id: str, address: str) -> AddressKey:
    return NetworkId(network_id), ip_address(address)


def full(
    source: str, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
) -> Observation:
    return Observation(
        source,
        full=True,
        networks={each.id: each for each in networks},
        instances={each.id: each for each in instances},
    )
