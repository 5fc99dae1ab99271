"""What is in force is a function of what the sources say now, never of how they came to say it."""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from imdsproxy.model.entities import (
    BridgeListener,
    Instance,
    InstanceId,
    MacAddress,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Affected, Observation

SOURCES = ("file", "sqlite")
_K = TypeVar("_K")
_addresses = st.sampled_from(
    [ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "fe80::5054:ff:fe00:1")]
)
_macs = st.sampled_from([MacAddress("52:54:00:00:00:01"), MacAddress("52:54:00:00:00:02")])
_network_ids = st.sampled_from([NetworkId("a"), NetworkId("b"), NetworkId("c")])
_networks = st.builds(
    Network,
    _network_ids,
    st.sampled_from([BridgeListener("br0"), BridgeListener("br1")]),
    mtu=st.sampled_from([None, 1400]),
)
_ports = st.builds(
    Port, _network_ids, st.none() | _macs, st.lists(_addresses, max_size=2, unique=True).map(tuple)
)
_instances = st.builds(
    Instance,
    id=st.sampled_from([InstanceId(f"i{number}") for number in range(4)]),
    name=st.just("name"),
    hostname=st.just("name"),
    ports=st.lists(_ports, max_size=2).map(tuple),
    user_data=st.sampled_from([None, b"x"]),
    created_at=st.sampled_from([None, 1, 2]),
)


def _visible(inventory: Inventory) -> dict[str, object]:
    """Everything that somebody outside can see."""
    return {
        "networks": dict(inventory.networks),
        "instances": dict(inventory.instances),
        "addresses": dict(inventory.addresses()),
        "members": {name: inventory.instances_in(NetworkId(name)) for name in "abc"},
        "macs": {name for name in "abc" if inventory.carries_macs(NetworkId(name))},
        "conflicts": inventory.conflicts(),
        "problems": {name: one.problems for name, one in inventory.reports.items()},
        "stranded": tuple(inventory.stranded()),
        "in_sync": inventory.in_sync,
    }


def _documents(inventory: Inventory) -> dict[InstanceId, object]:
    return {
        key: (instance, tuple(inventory.networks.get(port.network) for port in instance.ports))
        for key, instance in inventory.instances.items()
    }


def _served(inventory: Inventory) -> dict[AddressKey, object]:
    """What the guest at each address gets: the documents of an instance, or 503."""
    documents = _documents(inventory)
    return {
        key: documents[owner] if isinstance(owner, str) else "conflict"
        for key, owner in inventory.addresses()
    }


def _differ(before: Mapping[_K, object], after: Mapping[_K, object]) -> set[_K]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


class Sources(RuleBasedStateMachine):
    """Two sources that report anything, and one inventory that follows change by change."""

    @initialize()
    def begin(self) -> None:
        self.inventory = Inventory(SOURCES)
        self.networks: dict[str, dict[NetworkId, Network]] = {name: {} for name in SOURCES}
        self.instances: dict[str, dict[InstanceId, Instance]] = {name: {} for name in SOURCES}
        self.heard: set[str] = set()

    def observe(self, observation: Observation) -> None:
        served, documents = _served(self.inventory), _documents(self.inventory)
        networks, in_sync = dict(self.inventory.networks), self.inventory.in_sync
        affected: Affected = self.inventory.observe(observation)
        self.heard.add(observation.source)
        assert _differ(served, _served(self.inventory)) <= affected.addresses
        assert _differ(documents, _documents(self.inventory)) <= affected.instances
        assert _differ(networks, self.inventory.networks) <= affected.networks
        assert affected.in_sync == (self.inventory.in_sync != in_sync)

    @rule(source=st.sampled_from(SOURCES), instance=_instances, again=st.booleans())
    def put_instance(self, source: str, instance: Instance, *, again: bool) -> None:
        self.instances[source][instance.id] = instance
        for _ in range(2 if again else 1):
            self.observe(Observation(source, instances={instance.id: instance}))

    @rule(source=st.sampled_from(SOURCES), network=_networks)
    def put_network(self, source: str, network: Network) -> None:
        self.networks[source][network.id] = network
        self.observe(Observation(source, networks={network.id: network}))

    @rule(source=st.sampled_from(SOURCES), number=st.integers(0, 3))
    def remove_instance(self, source: str, number: int) -> None:
        gone = InstanceId(f"i{number}")
        self.instances[source].pop(gone, None)
        self.observe(Observation(source, instances_removed=[gone]))

    @rule(source=st.sampled_from(SOURCES), network=_network_ids)
    def remove_network(self, source: str, network: NetworkId) -> None:
        self.networks[source].pop(network, None)
        self.observe(Observation(source, networks_removed=[network]))

    @rule(
        source=st.sampled_from(SOURCES),
        networks=st.lists(_networks, max_size=3),
        instances=st.lists(_instances, max_size=4),
    )
    def replace_all(self, source: str, networks: list[Network], instances: list[Instance]) -> None:
        self.networks[source] = {network.id: network for network in networks}
        self.instances[source] = {instance.id: instance for instance in instances}
        self.observe(
            Observation(
                source, full=True, networks=self.networks[source], instances=self.instances[source]
            )
        )

    @invariant()
    def equals_a_fresh_full_load(self) -> None:
        for order in (SOURCES, SOURCES[::-1]):
            fresh = Inventory(SOURCES)
            for name in order:
                if name in self.heard:
                    fresh.observe(
                        Observation(
                            name,
                            full=True,
                            networks=self.networks[name],
                            instances=self.instances[name],
                        )
                    )
            assert _visible(fresh) == _visible(self.inventory)


TestSources = Sources.TestCase
TestSources.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
