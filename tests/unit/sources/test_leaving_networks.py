"""A network stays for a while when its last instance has left the host."""

from imdsproxy.model.entities import BridgeListener, InstanceId, Network, NetworkId
from imdsproxy.model.observation import Observation
from imdsproxy.sources.fleet.known import LeavingNetworks

_BLUE, _RED, _GREEN = (NetworkId(one) for one in ("blue", "red", "green"))
_WEB = InstanceId("web")


def _gone(*networks: NetworkId) -> Observation:
    return Observation(networks_removed=networks)


def _come(*networks: NetworkId) -> Observation:
    found = {one: Network(one, BridgeListener(f"br-{one}")) for one in networks}
    return Observation(networks=found)


def test_a_network_is_removed_when_its_time_is_over_and_once() -> None:
    leaving = LeavingNetworks(60)
    assert leaving.delay(_gone(_BLUE), 0) == _gone()
    assert leaving.delay(_gone(_RED), 30) == _gone()
    assert leaving.due(59) == _gone()
    assert leaving.due(60) == _gone(_BLUE)
    assert leaving.due(100) == _gone(_RED)
    assert leaving.due(200) == _gone()


def test_where_a_network_comes_the_others_go_at_once_but_for_one_that_comes_back() -> None:
    leaving = LeavingNetworks(60)
    leaving.delay(_gone(_BLUE, _RED), 0)
    come = leaving.delay(_come(_GREEN, _BLUE), 1)
    assert set(come.networks) == {_GREEN, _BLUE}
    assert come.networks_removed == (_RED,)
    assert leaving.due(100) == _gone()


def test_changes_of_instances_are_not_delayed() -> None:
    changes = Observation(networks_removed=(_BLUE,), instances_removed=(_WEB,), moves=True)
    assert LeavingNetworks(60).delay(changes, 0) == Observation(
        instances_removed=(_WEB,), moves=True
    )
