"""Endpoints that HAProxy can bind, networks that are not served, and sockets of other programs. Values only."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from imdsproxy.host.state import Effect, Family, ListeningSocket, NamespaceRef
from imdsproxy.model.entities import IpAddress, NetworkId

LOOPBACK = "lo"

ENSLAVING: Final = frozenset({"bridge", "bond", "team", "openvswitch"})
"""Kinds of devices that take over the packets of their ports."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address and port that HAProxy can bind now.

    Attributes:
        device: Device to bind to (`interface DEV`); always set for IPv6, whose address is link-local.
        namespace: Namespace of the bind; `None` is the host's own.
        device_index: Index of the device, 0 without a device. If another device gets the name later, the index differs,
            and a socket bound to the old device receives nothing.
    """

    network: NetworkId
    address: IpAddress
    port: int
    device: str | None
    namespace: NamespaceRef | None
    device_index: int = 0


class NotServedCode(StrEnum):
    """Reason why a network (or one of its families) is not served."""

    PENDING = "pending"
    NAMESPACE_MISSING = "namespace-missing"
    NAMESPACE_UNUSABLE = "namespace-unusable"
    DEVICE_MISSING = "device-missing"
    DEVICE_DOWN = "device-down"
    DEVICE_ENSLAVED = "device-enslaved"
    NOT_A_BRIDGE = "not-a-bridge"
    NAME_TAKEN = "name-taken"
    ADDRESS_MISSING = "address-missing"
    ADDRESS_ON_LOOPBACK = "address-on-loopback"
    ADDRESS_TENTATIVE = "address-tentative"
    ADDRESS_DUPLICATE = "address-duplicate"
    PORT_BUSY = "port-busy"
    BIND_REFUSED = "bind-refused"
    LISTENER_SHARED = "listener-shared"
    HOST_METADATA = "host-metadata"
    FOREIGN_LISTENER = "foreign-listener"
    NETWORK_CONFLICT = "network-conflict"
    HOST_REFUSED = "host-refused"

    @property
    def silent(self) -> bool:
        """Whether no event reports the end of the problem, so that it must be polled.

        There are events for namespaces, devices and addresses, and none for sockets and refusals.
        """
        return self in {
            NotServedCode.PORT_BUSY,
            NotServedCode.BIND_REFUSED,
            NotServedCode.NAMESPACE_UNUSABLE,
            NotServedCode.NAME_TAKEN,
            NotServedCode.HOST_REFUSED,
        }


@dataclass(frozen=True, slots=True)
class NotServed:
    """Network that is not served now.

    Attributes:
        family: Affected family; `None` for both.
        reason: Problem, in one sentence without a full stop.
        hint: Correction, and who can make it; empty if the problem ends by itself.
        sockets: Sockets of other programs at its address and port, as far as known.
    """

    network: NetworkId
    family: Family | None
    code: NotServedCode
    reason: str
    hint: str = ""
    sockets: tuple[ListeningSocket, ...] = ()

    def __str__(self) -> str:
        over = "" if self.family is None else f" over IPv{self.family.value}"
        alone = " by imdsproxy alone" if self.code is NotServedCode.FOREIGN_LISTENER else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"network {self.network} is not served{over}{alone}: {self.reason}{hint}"


@dataclass(frozen=True, slots=True)
class Foreign:
    """Listening socket of another program at a network's address and port."""

    network: NetworkId
    family: Family
    effect: Effect
    socket: ListeningSocket
