"""Whether changes are in force on hosts that are connected to other hubs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, Meta
from imdsproxy.host.clock import Clock
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.hosts.streams import HostStream, Streams
from imdsproxy.hub.store.state import Change, FleetState

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


async def test_a_hub_that_has_not_seen_that_a_restore_was_accepted_confirms_nothing_by_its_revisions() -> (
    None
):
    state = FleetState()
    state.apply(90, [Change(layout.META, layout.render_meta(Meta("f", 1)), 90)])
    streams = Streams(state, Clock(), lambda _host, _serial: True)
    host = HostId("a")
    streams.hosts[host] = stream = HostStream(streams)
    stream.acked = 90
    in_force = InForce(streams, Peers(state, "this", Clock()))
    assert await in_force.here([host], 40, None, 0, 1) == {host: ""}
    assert await in_force.here([host], 40, None, 0, 2) == {host: "not received"}
