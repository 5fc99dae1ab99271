"""What HAProxy can bind, what it cannot and why, and who else listens there. Values only."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from imdsproxy.core.hoststate import Effect, Family, ListeningSocket, NamespaceRef
from imdsproxy.core.model import IpAddress, NetworkId

LOOPBACK = "lo"

ENSLAVING: Final = frozenset({"bridge", "bond", "team", "openvswitch"})
"""Kinds of devices that take the packets of those that belong to them."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something that HAProxy can bind now.

    Attributes:
        device: Bind to it (`interface DEV`); always set for IPv6, whose address is link-local.
        namespace: Where; `None` is the host's own.
        device_index: The device's index, 0 without one: another device may have the name next time,
            and a socket that is bound to the old one hears nothing any more.
    """

    network: NetworkId
    address: IpAddress
    port: int
    device: str | None
    namespace: NamespaceRef | None
    device_index: int = 0


class LeftOutCode(StrEnum):
    """Why a network (or one family of it) is not served."""

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
        """No event says that it has come right: it has to be checked again and again.

        There are events for namespaces, devices and addresses, and none for sockets and refusals.
        """
        return self in {
            LeftOutCode.PORT_BUSY,
            LeftOutCode.BIND_REFUSED,
            LeftOutCode.NAMESPACE_UNUSABLE,
            LeftOutCode.NAME_TAKEN,
            LeftOutCode.HOST_REFUSED,
        }


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A network that cannot be listened on now.

    Attributes:
        family: Only this one; both when `None`.
        reason: What is wrong, in one sentence without a full stop.
        hint: Who can mend it and how; empty when it mends itself.
        sockets: Those of other programs at its address and port, as far as they are known.
    """

    network: NetworkId
    family: Family | None
    code: LeftOutCode
    reason: str
    hint: str = ""
    sockets: tuple[ListeningSocket, ...] = ()

    def __str__(self) -> str:
        over = "" if self.family is None else f" over IPv{self.family.value}"
        alone = " by imdsproxy alone" if self.code is LeftOutCode.FOREIGN_LISTENER else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"network {self.network} is not served{over}{alone}: {self.reason}{hint}"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A listening socket of another program at a network's address and port."""

    network: NetworkId
    family: Family
    effect: Effect
    socket: ListeningSocket
