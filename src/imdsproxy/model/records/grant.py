"""Schema of a grant: hosts, listeners and addresses that operators limited to a project may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from imdsproxy.model.entities import (
    ID_PATTERN,
    InterfaceListener,
    IpAddress,
    IpNetwork,
    Listener,
    NamespaceListener,
    NetworkId,
)
from imdsproxy.model.records import values
from imdsproxy.model.records.network import LISTENER
from imdsproxy.model.records.schema import Key, Kind, Table, list_of, refuse_repeated

EVERY_HOST: Final = "*"
_HOST: Final = re.compile(rf"\*|{ID_PATTERN}")


@dataclass(frozen=True, slots=True)
class SharedRange:
    """Addresses of a shared network, which is a network without a project."""

    network: NetworkId
    cidr: IpNetwork


@dataclass(frozen=True, slots=True)
class Grant:
    """Grant of a fleet to a project; empty unless an operator of all projects has written one.

    Attributes:
        hosts: Hosts on which the project's operators may place instances; `EVERY_HOST` for all.
        listeners: Listeners of networks that the operators may make.
        addresses: Addresses that the project's instances may have in shared networks.
    """

    hosts: tuple[str, ...] = ()
    listeners: tuple[Listener, ...] = ()
    addresses: tuple[SharedRange, ...] = ()

    def has_host(self, host: str) -> bool:
        return EVERY_HOST in self.hosts or host in self.hosts

    def has_listener(self, listener: Listener) -> bool:
        return any(_covers(one, listener) for one in self.listeners)

    def has_network(self, network: str) -> bool:
        return any(one.network == network for one in self.addresses)

    def has_address(self, network: str, address: IpAddress) -> bool:
        return any(one.network == network and address in one.cidr for one in self.addresses)


NO_GRANT: Final = Grant()


def _covers(granted: Listener, listener: Listener) -> bool:
    if not isinstance(granted, NamespaceListener) or not isinstance(listener, NamespaceListener):
        return granted == listener
    device = granted.device
    return granted.namespace == listener.namespace and device in {None, listener.device}


def spell_listener(listener: Listener) -> str:
    """Return a listener in the words of a record, as `bridge br0`."""
    match listener:
        case NamespaceListener(namespace, device):
            return f"namespace {namespace}" if device is None else f"device {device} in {namespace}"
        case InterfaceListener(device):
            return f"interface {device}"
        case _:
            return f"bridge {listener.bridge}"


_GRANTED_HOST: Final = Kind(
    lambda field: field.matched(_HOST, "a host's name, or * for every host"),
    {"type": "string", "pattern": rf"^\*$|{ID_PATTERN}"},
)
_RANGE: Final = Table(
    "SharedRangeRecord",
    SharedRange,
    "Addresses of a shared network.",
    Key("network", values.NETWORK_ID, "The id of a network without a project.", required=True),
    Key(
        "cidr",
        values.CIDR,
        "A range of addresses. A MAC counts as its link-local address: `fe80::/64` has every MAC.",
        required=True,
    ),
)


GRANT: Final = Table(
    "GrantRecord",
    Grant,
    "Hosts, listeners and addresses that operators limited to a project may use.",
    Key(
        "hosts",
        list_of(_GRANTED_HOST, refuse_repeated),
        "Hosts on which they may place instances; `*` is every host.",
    ),
    Key(
        "listeners",
        list_of(LISTENER, refuse_repeated),
        "Listeners of networks that they may make. A namespace without a device stands for all of its devices.",
    ),
    Key(
        "addresses",
        list_of(_RANGE.kind, refuse_repeated),
        "Addresses that their instances may have in shared networks.",
    ),
)
