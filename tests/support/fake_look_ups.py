"""A source that is asked for addresses, as far as who asks it needs one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imdsproxy.core.model import InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey
from imdsproxy.sources.api import (
    Confirmation,
    LookUp,
    Origin,
    PortFound,
    PortMissing,
    Publish,
)


@dataclass(slots=True)
class FakeLookUps:
    """Answers what `answers` has, and else that nobody has the address.

    Attributes:
        asked: Every question.
    """

    answers: dict[tuple[Scope, NetworkId, IpAddress], LookUp] = field(default_factory=dict)
    asked: list[tuple[Scope, NetworkId, IpAddress]] = field(default_factory=list)
    routed: dict[AddressKey, PortFound] = field(default_factory=dict)
    confirmed: Confirmation | None = None
    name: str = "neutron"

    async def run(self, publish: Publish) -> None:
        del publish

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        del instance, number
        return None

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        self.asked.append((scope, network, address))
        answer = self.answers.get((scope, network, address), PortMissing())
        if isinstance(answer, PortFound) and scope is Scope.ROUTER:
            self.routed[network, address] = answer
        return answer

    def routes(self) -> Mapping[AddressKey, PortFound]:
        return dict(self.routed)

    def confirmation(self, network: NetworkId, address: IpAddress) -> Confirmation | None:
        del network, address
        return self.confirmed
