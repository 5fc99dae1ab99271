"""Instances a page at a time, and those that match a text."""

import pytest

from imdsproxy.errors import NotFound, RequestRefused
from support.admin_server import AdminServer
from support.record_builders import instance

_NETWORKS = ({"id": "red", "name": "the-red-one", "listener": {"namespace": "red"}},)
_INSTANCES = (
    {
        "id": "db-1",
        "name": "Orders",
        "hostname": "orders.example",
        "project": "shop",
        "tags": {"role": "Database"},
        "user_data": "secret",
        "ports": [{"network": "red", "mac": "52:54:00:aa:bb:cc", "addresses": ["2001:db8::7"]}],
    },
    {"id": "db-2", "name": "spare", "ports": [{"network": "red", "addresses": ["10.0.0.7"]}]},
    {"id": "db-3", "name": "idle"},
)


@pytest.fixture
def filled(server: AdminServer) -> AdminServer:
    """Beside web-1 in blue, three more."""
    body = {"networks": _NETWORKS, "instances": _INSTANCES}
    server.client.request("POST", "/v1/records", body=body)
    return server


def _found(server: AdminServer, **query: str) -> list[str]:
    page = server.client.get("/v1/search/instances", query)
    return [one["record"]["id"] for one in page["instances"]]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", ["db-1", "db-2", "db-3", "web-1"]),
        ("DB-", ["db-1", "db-2", "db-3"]),
        ("orders", ["db-1"]),
        ("orders.example", ["db-1"]),
        ("shop", ["db-1"]),
        ("role=data", ["db-1"]),
        ("aa:bb", ["db-1"]),
        ("2001:db8::7", ["db-1"]),
        ("10.0.0.", ["db-2", "web-1"]),
        ("db 10.0.0.7", ["db-2"]),
        ("secret", []),
    ],
)
def test_each_word_must_be_in_what_names_an_instance(
    filled: AdminServer, text: str, ids: list[str]
) -> None:
    assert _found(filled, text=text) == ids


def test_a_search_in_a_network_finds_those_with_a_port_in_it(filled: AdminServer) -> None:
    assert _found(filled, network="the-red-one") == ["db-1", "db-2"]
    assert _found(filled, network="red", text="spare") == ["db-2"]


def test_pages_follow_one_another_and_say_how_many_match_in_all(filled: AdminServer) -> None:
    first = filled.client.get("/v1/search/instances", {"text": "db", "limit": "2"})
    assert (first["found"], first["next"]) == (3, "db-2")
    # The page behind is found although its beginning is gone.
    filled.client.request("DELETE", "/v1/instances/db-2")
    after = {"text": "db", "limit": "2", "after": first["next"]}
    last = filled.client.get("/v1/search/instances", after)
    assert [one["record"]["id"] for one in last["instances"]] == ["db-3"]
    assert (last["found"], last["next"]) == (2, None)


def test_a_page_has_what_a_list_has_and_no_payloads(filled: AdminServer) -> None:
    page = filled.client.get("/v1/search/instances", {"text": "orders"})
    listed = [one for one in filled.client.get("/v1/instances") if one["record"]["id"] == "db-1"]
    assert page["instances"] == listed
    assert listed[0]["user_data_bytes"] == len("secret")
    assert "user_data" not in listed[0]["record"]


def test_a_contested_instance_is_found(filled: AdminServer) -> None:
    filled.claim_twice(instance("db-3", "10.0.0.9"))
    page = filled.client.get("/v1/search/instances", {"text": "db-3"})
    assert page["instances"][0]["conflicts"]


@pytest.mark.parametrize("limit", ["0", "501", "many"])
def test_a_page_of_no_size_is_refused(server: AdminServer, limit: str) -> None:
    with pytest.raises(RequestRefused):
        server.client.get("/v1/search/instances", {"limit": limit})


def test_a_search_in_no_network_finds_none(server: AdminServer) -> None:
    assert _found(server, network="gone") == []


def test_the_usage_of_no_instance_is_not_found(server: AdminServer) -> None:
    with pytest.raises(NotFound):
        server.client.get("/v1/instances/gone/usage")
