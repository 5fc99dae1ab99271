"""Which rows of Port_Binding are in force on this host, and the records that they make."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from imdsproxy.model.entities import InstanceId, NamespaceListener, Upstream
from imdsproxy.sources.ovn.ports import OvnKnown, PortBinding
from support.ovn_rows import HERE, IDS, METADATA, NETWORK, PORT, known, view


def served(found: OvnKnown) -> Iterable[str]:
    return sorted(found.instances)


def test_a_bound_port_is_an_instance_of_nova_in_its_network() -> None:
    found = known(PORT, METADATA)
    instance = found.instances[InstanceId("vm-1")]
    (port,) = instance.ports
    assert (instance.upstream, instance.project) == (Upstream.NOVA, "p1")
    assert port.network == NETWORK
    assert port.mac == "fa:16:3e:00:00:05"
    assert port.addresses == (ip_address("10.0.0.5"), ip_address("fd00::5"))
    network = found.networks[NETWORK]
    assert network.listener == NamespaceListener(f"ovnmeta-{NETWORK}", "tap11111111-01")
    assert network.project == "p1"


@pytest.mark.parametrize(
    ("row", "is_served"),
    [
        (PORT, True),
        (replace(PORT, kind="external"), True),
        (replace(PORT, chassis="c2", additional=frozenset({HERE})), True),
        (replace(PORT, chassis="c2"), False),
        (replace(PORT, chassis=""), False),
        (replace(PORT, kind="patch"), False),
        (replace(PORT, kind="virtual"), False),
        (replace(PORT, external_ids={}), False),
        (replace(PORT, external_ids={**IDS, "neutron:device_owner": "network:dhcp"}), False),
        (replace(PORT, external_ids={**IDS, "neutron:device_id": ""}), False),
        (METADATA, False),
    ],
)
def test_only_ports_of_instances_that_are_bound_here_or_about_to_be_are_served(
    row: PortBinding, *, is_served: bool
) -> None:
    assert served(known(row)) == (["vm-1"] if is_served else [])


@pytest.mark.parametrize("macs", [("unknown",), (), ("fa:16:3e:00:00:05", "unknown")])
def test_a_port_without_port_security_has_the_addresses_that_neutron_gave_it(
    macs: tuple[str, ...],
) -> None:
    (port,) = known(replace(PORT, macs=macs)).instances[InstanceId("vm-1")].ports
    assert port.addresses == (ip_address("10.0.0.5"), ip_address("fd00::5"))
    assert port.mac == ("fa:16:3e:00:00:05" if len(macs) > 1 else None)


def test_an_id_that_nova_could_not_know_is_refused_and_reported() -> None:
    found = known(replace(PORT, external_ids={**IDS, "neutron:device_id": "../x"}))
    assert not found.instances
    (problem,) = found.problems
    assert "device_id" in problem.field


def test_ports_without_neutrons_keys_are_one_problem_that_counts_them() -> None:
    foreign = [replace(PORT, port=f"pod-{number}", external_ids={}) for number in range(3)]
    older = {key: value for key, value in IDS.items() if key != "neutron:device_id"}
    found = known(*foreign, replace(PORT, port="old", external_ids=older), PORT, METADATA)
    assert served(found) == ["vm-1"]
    (problem,) = found.problems
    assert problem.reason.startswith("4 ports bound here are not served, for example old: ")
    assert "Queens" in problem.hint


@pytest.mark.parametrize(
    "row",
    [
        replace(PORT, external_ids={**IDS, "neutron:device_id": ""}),
        replace(PORT, kind="patch", external_ids={}),
        replace(PORT, kind="localport", external_ids={}),
        replace(PORT, chassis="c2", external_ids={}),
        replace(PORT, chassis="", external_ids={}),
    ],
)
def test_ports_of_neutron_without_an_instance_and_those_of_no_guest_are_no_problem(
    row: PortBinding,
) -> None:
    assert known(row).problems == ()


def test_addresses_that_every_host_has_are_no_guests() -> None:
    ids = {**IDS, "neutron:cidrs": "127.0.0.1/8 0.0.0.0/0 224.0.0.1/4 nonsense 10.0.0.5/24"}
    (port,) = known(replace(PORT, external_ids=ids)).instances[InstanceId("vm-1")].ports
    assert port.addresses == (ip_address("10.0.0.5"),)


def test_each_port_keeps_its_own_project_whatever_instance_its_owner_writes_on_it() -> None:
    other = replace(
        PORT,
        port="port-2",
        external_ids={**IDS, "neutron:project_id": "thief", "neutron:cidrs": "10.0.0.6/24"},
    )
    first, second = known(PORT, other).instances[InstanceId("vm-1")].ports
    assert (first.project, second.project) == (None, "thief")


def test_a_change_reports_what_changed_and_nothing_else() -> None:
    second = replace(
        PORT,
        port="port-2",
        macs=("fa:16:3e:00:00:06 10.0.0.6",),
        external_ids={**IDS, "neutron:device_id": "vm-2", "neutron:cidrs": "10.0.0.6/24"},
    )
    found = known(PORT, METADATA)
    changes = found.update(view(PORT, second, METADATA))
    assert sorted(changes.instances) == ["vm-2"]
    assert not changes.networks
    changes = found.update(view(second, METADATA))
    assert list(changes.instances_removed) == ["vm-1"]
    assert not found.update(view(second, METADATA)).has_records


def test_a_port_of_a_chassis_whose_row_is_gone_is_kept_while_that_is_asked_for() -> None:
    found = known(PORT, METADATA)
    found.update(view(replace(PORT, chassis=""), chassis=None), keep_unclaimed=True)
    assert served(found) == ["vm-1"]
    assert NETWORK in found.metadata_ports
    found.update(view(chassis=None), keep_absent=True)
    assert served(found) == ["vm-1"]
    found.update(view(chassis=None))
    assert served(found) == []


@pytest.mark.parametrize(
    ("row", "is_kept"),
    [
        (replace(PORT, chassis=""), True),
        (replace(PORT, chassis="", requested=()), True),
        (replace(PORT, chassis="", requested=("host-2",)), False),
        (replace(PORT, chassis="c9"), False),
    ],
)
def test_a_port_stays_that_the_new_row_of_the_chassis_has_not_claimed_yet(
    row: PortBinding, *, is_kept: bool
) -> None:
    found = known(PORT)
    found.update(view(row, chassis="new"), keep_absent=True, keep_unclaimed=True)
    assert served(found) == (["vm-1"] if is_kept else [])


def test_a_port_that_was_claimed_again_and_is_then_unbound_goes_at_once() -> None:
    found = known(PORT)
    found.update(view(replace(PORT, chassis=""), chassis="new"), keep_unclaimed=True)
    found.update(view(replace(PORT, chassis="new"), chassis="new"), keep_unclaimed=True)
    assert served(found) == ["vm-1"]
    found.update(view(replace(PORT, chassis=""), chassis="new"), keep_unclaimed=True)
    assert served(found) == []
