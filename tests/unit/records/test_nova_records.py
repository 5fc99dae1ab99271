from __future__ import annotations

import pytest

from imdsproxy.core.model import Instance, Network, Scope, Upstream
from imdsproxy.core.records import parse_instance, parse_network
from imdsproxy.core.records.fields import Refused

_GOOD: dict[str, object] = {"id": "i", "name": "vm", "project": "p1", "upstream": "nova"}


def _problems(found: object) -> list[str]:
    assert isinstance(found, Refused)
    return [str(problem) for problem in found.problems]


def test_an_instance_of_nova_is_its_id_project_and_ports() -> None:
    instance = parse_instance({**_GOOD, "ports": [{"network": "n", "project": "p2"}]})
    assert isinstance(instance, Instance)
    assert (instance.upstream, instance.project) == (Upstream.NOVA, "p1")
    assert instance.ports[0].project == "p2"


def test_an_instance_of_nova_needs_its_project() -> None:
    record = {key: value for key, value in _GOOD.items() if key != "project"}
    assert _problems(parse_instance(record)) == [
        "upstream: needs project (Nova has to know whose instance it is)"
    ]


@pytest.mark.parametrize("project", ["a|b", "a b", "", "a\n", "-x", "x" * 65])
def test_a_project_that_is_no_id_is_refused_where_it_becomes_a_header(project: str) -> None:
    (problem,) = _problems(parse_instance({**_GOOD, "project": project}))
    assert problem.startswith("project: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user_data", "#!/bin/sh"),
        ("ssh_keys", ["ssh-ed25519 AAAA"]),
        ("tags", {"a": "b"}),
        ("vendor_data", "{}"),
        ("availability_zone", "z"),
        ("instance_type", "t"),
        ("dialects", {"ec2": False}),
    ],
)
def test_what_nova_has_itself_is_refused_instead_of_left_unread(key: str, value: object) -> None:
    assert f"{key}: does not go with upstream: nova (Nova has it)" in _problems(
        parse_instance({**_GOOD, key: value})
    )


def test_an_unknown_upstream_or_scope_names_those_that_there_are() -> None:
    (problem,) = _problems(parse_instance({**_GOOD, "upstream": "novaa"}))
    assert "one of embedded, nova" in problem
    network = {"id": "n", "listener": {"bridge": "br0"}, "scope": "subnet"}
    (problem,) = _problems(parse_network(network))
    assert "one of network, router" in problem


def test_a_router_is_a_network_of_another_scope() -> None:
    network = parse_network({"id": "r", "listener": {"namespace": "qrouter-r"}, "scope": "router"})
    assert isinstance(network, Network)
    assert network.scope is Scope.ROUTER
