"""A source that is asked for addresses, as far as who asks it needs one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imdsproxy.core.model import IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey, StrandedPort
from imdsproxy.errors import Problem
from imdsproxy.sources.api import (
    LookUp,
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
    freshness: str | None = None
    name: str = "neutron"

    async def run(self, publish: Publish) -> None:
        del publish

    def explain_stranded(self, port: StrandedPort) -> Problem:
        return port.problem()

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        self.asked.append((scope, network, address))
        answer = self.answers.get((scope, network, address), PortMissing())
        if isinstance(answer, PortFound) and scope is Scope.ROUTER:
            self.routed[network, address] = answer
        return answer

    def routes(self) -> Mapping[AddressKey, PortFound]:
        return dict(self.routed)

    def explain_freshness(self, network: NetworkId, address: IpAddress) -> str | None:
        del network, address
        return self.freshness
