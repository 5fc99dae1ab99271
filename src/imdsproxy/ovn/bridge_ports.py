"""Writes the ports of OVN's networks into Open vSwitch's database; called in its connection's thread."""

from collections.abc import Collection, Mapping

from imdsproxy.host.ovsdb import Row, Table, Transaction
from imdsproxy.ovn.plan import MetadataPlace
from imdsproxy.sources.ovn.chassis import NETWORK_KEY
from imdsproxy.sources.ovn.ports import namespace_of


def write_ports(
    places: Collection[MetadataPlace],
    unplug: Collection[str],
    tables: Mapping[str, Table],
    transaction: Transaction,
) -> None:
    """Have Open vSwitch's bridges as planned; in the connection's thread."""
    bridges = {row.name: row for row in tables["Bridge"].rows.values()}
    ports = {row.name: row for row in tables["Port"].rows.values()}
    interfaces = {row.name: row for row in tables["Interface"].rows.values()}
    for place in places:
        port, interface = ports.get(place.outer), interfaces.get(place.outer)
        bridge = bridges.get(place.bridge)
        if bridge is None:  # it went meanwhile: the next look shows that
            continue
        if port is None or interface is None or port.uuid not in bridge.ports:
            # On another bridge it is a new port: ovn-controller overlooks an interface that only changes its bridge.
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
    """Remove every port of ours, but for those of namespaces that stay: these are ours no more."""
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
