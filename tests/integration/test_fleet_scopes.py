"""A captured certificate of a project's operator or mover against a hub over a real etcd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from imdsproxy.errors import AccessDenied, AlreadyExists, ImdsproxyError, NotFound, SourceRefused
from support.hub_api import HubClient
from support.scoped_fleet import (
    GRANT,
    RED_MAC,
    ScopedFleet,
    instance,
    network,
    open_scoped_fleet,
    port,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def fleet() -> Iterator[ScopedFleet]:
    with open_scoped_fleet() as made:
        yield made


@pytest.fixture(autouse=True)
def _is_as_before(fleet: ScopedFleet) -> Iterator[None]:
    """No attack changes a record, or keeps the owner from moving the instance."""

    def records() -> list[object]:
        found = [*fleet.anna.get("/v1/networks"), *fleet.anna.get("/v1/instances")]
        placed = [(one["record"], one["hosts"]) for one in found]
        return [*placed, *((one["project"], one["grant"]) for one in fleet.anna.get("/v1/grants"))]

    before = records()
    yield
    assert records() == before
    for host in ("b", "a"):
        body = {"to": host, "now": True}
        moved = fleet.anna.request("POST", "/v1/instances/red-web/move", body=body)
        assert (moved["applied"], moved["serving"]) == (True, [host])


_THIRD: Final = [
    {"namespace": "qrouter-red"},
    {"interface": "br-rednet"},
    {"bridge": "br-shopnet"},
    {"bridge": "br-nobodys"},
]


@pytest.mark.parametrize("listener", [{"bridge": "br-rednet"}, *_THIRD])
def test_a_project_makes_networks_on_no_listener_that_it_was_not_given(
    fleet: ScopedFleet, listener: dict[str, str]
) -> None:
    record = {**network("shopred", "shop"), "listener": listener}
    for method, path, body in (
        ("POST", "/v1/networks", record),
        ("PUT", "/v1/networks/shopred", record),
        ("POST", "/v1/records", {"networks": [record]}),
    ):
        refused = fleet.refusal(method, path, body)
        assert isinstance(refused, AccessDenied), refused
        assert "may not create a network with the listener" in refused.message


def test_a_project_changes_its_network_but_not_to_a_listener_that_it_was_not_given(
    fleet: ScopedFleet,
) -> None:
    assert isinstance(
        fleet.refusal("PATCH", "/v1/networks/shopnet", {"listener": {"bridge": "br-rednet"}}),
        AccessDenied,
    )
    # A merge of listeners is none.
    fleet.refusal(
        "PATCH", "/v1/networks/shopnet", {"listener": {"bridge": None, "interface": "br-rednet"}}
    )
    for change in ({"mtu": 1400}, {"mtu": None}):
        assert fleet.shop().request("PATCH", "/v1/networks/shopnet", body=change)["applied"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (instance("x", "shop", port("rednet", "10.0.0.66")), "there is no network rednet"),
        (instance("x", "shop", port("rednet", "10.0.0.5", mac=RED_MAC)), "no network rednet"),
        # In a shared network addresses and MACs are given, or anybody could be served in another's place.
        (instance("x", "shop", port("public", "10.9.0.5")), "may not use 10.9.0.5 in the shared"),
        (
            instance("x", "shop", port("public", "10.9.0.71", mac=RED_MAC)),
            f"may not use {RED_MAC} in the shared network public",
        ),
        (instance("x", "shop", port("public", "2001:db8::1")), "may not use 2001:db8::1"),
        (
            instance("x", "shop", port("public", "10.9.0.70")),
            "10.9.0.70 in network public is taken",
        ),
        (instance("x", "shop", port("shopnet", "10.0.0.6"), hosts=("b",)), "has no host b"),
        (instance("x", "shop", port("shopnet", "10.0.0.6"), hosts=("a", "b")), "has no host b"),
        (instance("x", "shop", port("shopnet", "10.0.0.6"), hosts=("none",)), "has no host none"),
    ],
)
def test_a_project_has_instances_only_where_it_was_given_network_address_and_host(
    fleet: ScopedFleet, record: dict[str, Any], reason: str
) -> None:
    for method, path, body in (
        ("POST", "/v1/instances", record),
        ("PUT", "/v1/instances/x", record),
        ("POST", "/v1/records", {"instances": [record]}),
        ("PATCH", "/v1/instances/shop-web", {"ports": record["ports"], "hosts": record["hosts"]}),
    ):
        refused = fleet.refusal(method, path, body)
        assert isinstance(refused, SourceRefused), refused
        (problem,) = refused.problems
        assert reason in problem.reason


def test_a_port_is_of_no_other_project(fleet: ScopedFleet) -> None:
    foreign = port("shopnet", "10.0.0.6", project="red-project")
    record = instance("x", "shop", foreign)
    # Nova would answer with what it has of an instance of the port's project.
    nova = {"name": "x", "project": "shop", "upstream": "nova", "ports": [foreign]}
    attempts: list[tuple[str, str, object]] = [
        ("POST", "/v1/instances", record),
        ("PUT", "/v1/instances/shop-web", nova),
        ("POST", "/v1/records", {"instances": [record]}),
        ("PATCH", "/v1/instances/shop-web", {"ports": [foreign]}),
        ("PATCH", "/v1/instances/shop-web", {"project": "red-project"}),
        ("PATCH", "/v1/networks/shopnet", {"project": "red-project"}),
        ("PATCH", "/v1/networks/shopnet", {"project": None}),
        ("POST", "/v1/instances", {**record, "project": "red-project"}),
        ("POST", "/v1/instances", {**record, "project": None}),
    ]
    for attempt in attempts:
        refused = fleet.refusal(*attempt)
        assert isinstance(refused, AccessDenied), refused
        assert "does not belong to project shop" in refused.message


def test_a_project_chooses_neither_audiences_nor_claims_of_its_guests(fleet: ScopedFleet) -> None:
    for rules in ({"audiences": ["vault"]}, {"identity_tags": ["role"]}):
        policy = {"policy": rules}
        attempts: list[tuple[str, str, object]] = [
            ("POST", "/v1/instances", {**instance("x", "shop"), **policy}),
            ("PATCH", "/v1/instances/shop-web", policy),
            ("PATCH", "/v1/networks/shopnet", policy),
        ]
        for attempt in attempts:
            refused = fleet.refusal(*attempt)
            assert isinstance(refused, AccessDenied), refused
            assert "may not change audiences" in refused.message


def test_an_import_is_held_to_the_same_rules(fleet: ScopedFleet) -> None:
    many = [
        instance(f"x{number}", "shop", port("shopnet", f"10.0.1.{number}"))
        for number in range(1, 60)
    ]
    for bad in (
        instance("bad", "shop", port("rednet", "10.0.0.6")),
        instance("bad", "shop", port("shopnet", "10.0.0.6"), hosts=("b",)),
        instance("bad", "shop", port("shopnet", "10.0.0.6", project="red-project")),
        instance("red-web", "shop", port("shopnet", "10.0.0.6")),
    ):
        with pytest.raises(ImdsproxyError):
            _send(fleet.shop(), [*many, bad])


def _send(client: HubClient, instances: list[dict[str, Any]]) -> dict[str, Any]:
    answer = client.request("POST", "/v1/records", body={"instances": instances})
    while "importing" in answer:
        answer = client.get(f"/v1/imports/{answer['importing']}")
    return dict(answer)


@pytest.mark.parametrize("role", ["operator", "mover"])
def test_an_instance_moves_only_to_hosts_that_its_project_was_given(
    fleet: ScopedFleet, role: str
) -> None:
    client = fleet.shop(role)
    for body in ({"to": "b"}, {"to": "b", "now": True}):
        with pytest.raises(SourceRefused, match="has no host b"):
            client.request("POST", "/v1/instances/shop-web/move", body=body)
    for host in ("c", "a"):
        moved = client.request(
            "POST", "/v1/instances/shop-web/move", body={"to": host, "now": True}
        )
        assert moved["serving"] == [host]


def test_what_an_operator_of_all_projects_has_placed_stays_as_the_rest_is_changed(
    fleet: ScopedFleet,
) -> None:
    placed = instance("lent", "shop", port("rednet", "10.0.0.77"), hosts=("b",))
    fleet.anna.request("POST", "/v1/instances", body=placed)
    changed = fleet.shop().request("PATCH", "/v1/instances/lent", body={"hostname": "www"})
    assert changed["hosts"] == ["b"]
    more = [*placed["ports"], port("rednet", "10.0.0.78")]
    refused = fleet.refusal("PATCH", "/v1/instances/lent", {"ports": more})
    assert [one.reason for one in refused.problems] == ["there is no network rednet"]
    fleet.shop().request("DELETE", "/v1/instances/lent")


def test_a_host_has_a_listener_for_the_project_that_may_need_it_though_another_one_comes_first(
    fleet: ScopedFleet,
) -> None:
    # By mistake, or since it is the other project's on other hosts.
    given = {**GRANT, "listeners": [{"bridge": "br-rednet"}]}
    fleet.anna.request("PUT", "/v1/grants/shop", body=given)
    shop = fleet.shop()
    shop.request("POST", "/v1/networks", body=network("shopred", "shop", "br-rednet"))
    record = instance("squat", "shop", port("shopred", "10.0.0.5"), hosts=("c",))
    refused = fleet.refusal("POST", "/v1/instances", record)
    assert [one.reason for one in refused.problems] == [
        "network shopred has the same listener on host c as another network"
    ]
    # The project is on other hosts only, as an operator of all projects says.
    fleet.anna.request("PUT", "/v1/grants/red-project", body={"hosts": ["a", "b"]})
    assert shop.request("POST", "/v1/instances", body=record)["applied"]
    for path in ("instances/squat", "networks/shopred"):
        shop.request("DELETE", f"/v1/{path}")
    fleet.anna.request("DELETE", "/v1/grants/red-project")
    fleet.anna.request("PUT", "/v1/grants/shop", body=GRANT)


def test_an_id_that_another_project_has_or_had_is_taken(fleet: ScopedFleet) -> None:
    fleet.anna.request(
        "POST",
        "/v1/instances",
        body=instance("red-gone", "red-project", port("rednet", "10.0.0.9")),
    )
    fleet.anna.request("POST", "/v1/instances/red-gone/revoke-tokens")
    fleet.anna.request("DELETE", "/v1/instances/red-gone")
    for name in ("red-web", "red-gone"):
        record = instance(name, "shop", port("shopnet", "10.0.0.6"))
        for attempt in (
            ("POST", "/v1/instances", record),
            ("PUT", f"/v1/instances/{name}", record),
            ("POST", "/v1/records", {"instances": [record]}),
        ):
            refused = fleet.refusal(*attempt)
            assert (type(refused), refused.message) == (AlreadyExists, f"the id {name} is taken")
        for what in ("revoke-tokens", "reopen"):
            assert isinstance(fleet.refusal("POST", f"/v1/instances/{name}/{what}"), NotFound)
    # Who may not use any address at all learns not even that.
    record = instance("red-web", "shop", port("rednet", "10.0.0.6"))
    assert isinstance(fleet.refusal("POST", "/v1/instances", record), SourceRefused)
    fleet.anna.request("PUT", "/v1/grants/shop", body={"listeners": [{"bridge": "br-new"}]})
    for name in ("rednet", "public"):
        refused = fleet.refusal("POST", "/v1/networks", network(name, "shop", "br-new"))
        assert (type(refused), refused.message) == (AlreadyExists, f"the id {name} is taken")
    fleet.anna.request("PUT", "/v1/grants/shop", body=GRANT)


def test_a_project_gives_itself_nothing(fleet: ScopedFleet) -> None:
    for attempt in (
        ("PUT", "/v1/grants/shop", {"hosts": ["*"]}),
        ("DELETE", "/v1/grants/shop", None),
        ("PATCH", "/v1/policies/fleet", {"tokens": "off"}),
        ("PATCH", "/v1/policies/host/a", {"tokens": "off"}),
        ("PATCH", "/v1/policies/project/red-project", {"tokens": "off"}),
        ("DELETE", "/v1/policies/project/red-project", None),
    ):
        assert isinstance(fleet.refusal(*attempt), AccessDenied)
    assert fleet.shop("reader").get("/v1/grants/shop")["grant"] == GRANT
    assert [one["project"] for one in fleet.shop().get("/v1/grants")] == ["shop"]
    with pytest.raises(NotFound):
        fleet.shop().get("/v1/grants/red-project")


def test_a_grant_is_of_hosts_and_shared_networks_that_are_there_and_what_was_made_stays(
    fleet: ScopedFleet,
) -> None:
    bad = {
        "hosts": ["none"],
        "addresses": [
            {"network": "none", "cidr": "10.0.0.0/8"},
            {"network": "rednet", "cidr": "10.0.0.0/8"},
        ],
    }
    with pytest.raises(SourceRefused) as refused:
        fleet.anna.request("PUT", "/v1/grants/shop", body=bad)
    assert [one.field for one in refused.value.problems] == [
        "hosts",
        "addresses[0].network",
        "addresses[1].network",
    ]
    shop = fleet.shop()
    record = instance("kept", "shop", port("public", "10.9.0.80", mac="52:54:00:5a:00:02"))
    shop.request("POST", "/v1/instances", body=record)
    fleet.anna.request("DELETE", "/v1/grants/shop")
    for word in ("one", "two"):
        assert shop.request("PATCH", "/v1/instances/kept", body={"name": word})["applied"]
    refusal = fleet.refusal("POST", "/v1/instances", instance("x", "shop", hosts=("a",)))
    assert [one.reason for one in refusal.problems] == ["project shop has no host a"]
    shop.request("DELETE", "/v1/instances/kept")
    fleet.anna.request("PUT", "/v1/grants/shop", body={"hosts": ["*"]})
    record = instance("x", "shop", port("shopnet", "10.0.0.6"), hosts=("b",))
    assert shop.request("POST", "/v1/instances", body=record)["applied"]
    shop.request("DELETE", "/v1/instances/x")
    fleet.anna.request("PUT", "/v1/grants/shop", body=GRANT)
