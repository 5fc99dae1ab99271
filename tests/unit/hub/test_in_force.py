"""Whether changes are in force on hosts that are connected to other hubs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from imdsproxy.core.fleet.layout import HostId
from imdsproxy.host.clock import Clock
from imdsproxy.hub.in_force import InForce
from imdsproxy.hub.peers import Peers
from imdsproxy.hub.state import FleetState
from imdsproxy.hub.streams import Streams

_MANY = 5_000


@dataclass
class Asked(Peers):
    """Another hub, on whose hosts everything is in force."""

    targets: list[str] = field(default_factory=list)

    def urls(self) -> dict[str, str]:
        return {"other": "https://hub2.example.net:8469"}

    async def ask(
        self,
        url: str,
        path: str,
        query: Mapping[str, str],
        timeout_s: float,
        body: object = None,
    ) -> object:
        del timeout_s
        self.targets.append(f"{url}{path}{query or ''}")
        assert isinstance(body, dict)
        return dict.fromkeys(body["hosts"], "")


async def test_thousands_of_hosts_of_another_hub_are_asked_for_once_and_in_no_url() -> None:
    state = FleetState()
    streams = Streams(state, Clock(), lambda _host, _serial: True)
    peers = Asked(state, "this", Clock())
    hosts = [HostId(f"host-{number}") for number in range(_MANY)]
    assert await InForce(streams, peers).wait(hosts, 7) == {}
    assert peers.targets == ["https://hub2.example.net:8469/fleet/applied"]
