"""Transactions for the ports of OVN's networks in Open vSwitch's database; called in the connection's thread."""

from collections.abc import Collection, Mapping

from imdsproxy.host.ovsdb import Row, Table, Transaction
from imdsproxy.network.operations import MetadataPlace
from imdsproxy.sources.ovn.chassis import NETWORK_KEY
from imdsproxy.sources.ovn.ports import namespace_of


def write_ports(
    places: Collection[MetadataPlace],
    unplug: Collection[str],
    tables: Mapping[str, Table],
    transaction: Transaction,
) -> None:
    """Add and remove ports of Open vSwitch's bridges as planned; in the connection's thread."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    interfaces = {row.name: row for row in tables["Interface"].rows.values()}
    for place in places:
        port, interface = ports.get(place.outer), interfaces.get(place.outer)
        bridge = bridges.get(place.bridge)
        if bridge is None:  # it was removed meanwhile: the next observation shows that
            continue
        if port is None or interface is None or port.uuid not in bridge.ports:
            # Create a new port for another bridge: ovn-controller overlooks an interface that only changes its bridge.
            _remove(port, bridges)
            interface = transaction.insert(tables["Interface"])
            interface.name = place.outer
            port = transaction.insert(tables["Port"])
            port.name = place.outer
            port.interfaces = [interface.uuid]
            bridge.addvalue("ports", port.uuid)
        interface.setkey("external_ids", "iface-id", place.port)
        interface.setkey("external_ids", NETWORK_KEY, place.network)
    for name in unplug:
        _remove(ports.get(name), bridges)


def _remove(port: Row | None, bridges: Mapping[str, Row]) -> None:
    for bridge in bridges.values():
        if port is not None and port.uuid in bridge.ports:
            bridge.delvalue("ports", port.uuid)


def sweep_ports(
    staying: Collection[str], tables: Mapping[str, Table], _transaction: Transaction
) -> None:
    """Remove all our ports, except those of namespaces that stay; remove our mark from these."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    for interface in list(tables["Interface"].rows.values()):
        network = interface.external_ids.get(NETWORK_KEY)
        if network is None:
            continue
        if namespace_of(network) in staying:
            interface.delkey("external_ids", NETWORK_KEY)
        else:
            _remove(ports.get(interface.name), bridges)
