from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from imdsproxy.admin import bodies
from imdsproxy.admin.api import status_of
from imdsproxy.config.policy import PolicyRulesSettings
from imdsproxy.core.model import ID_PATTERN, InstanceId, Network, NetworkId
from imdsproxy.core.path_rules import MOST_PATH_RULES
from imdsproxy.core.policy import RULES
from imdsproxy.core.records import INSTANCE as INSTANCE_TABLE
from imdsproxy.core.records import NETWORK as NETWORK_TABLE
from imdsproxy.core.records import POLICY, Refused, parse_network
from imdsproxy.core.records.network import MTU_BOUNDS
from imdsproxy.core.records.schema import Table
from imdsproxy.core.records.values import DEVICE_PATTERN, MAC_PATTERN
from imdsproxy.errors import (
    AlreadyExists,
    ConfigInvalid,
    ConfigRejected,
    ImdsproxyError,
    NotFound,
    Problem,
    RequestRefused,
    SourceRefused,
    SourceUnavailable,
)
from support.admin_server import NOW, AdminServer, admin_server

NETWORK: dict[str, object] = {"id": "blue", "listener": {"namespace": "blue"}}
INSTANCE: dict[str, object] = {
    "id": "web-1",
    "name": "web-1",
    "ports": [{"network": "blue", "mac": "52:54:00:12:34:56", "addresses": ["10.0.0.5"]}],
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    with admin_server(tmp_path) as served:
        yield served


@pytest.fixture
def filled(server: AdminServer) -> AdminServer:
    server.client.request("POST", "/v1/networks", body=NETWORK)
    server.client.request("POST", "/v1/instances", body=INSTANCE)
    return server


def _raw(
    server: AdminServer, method: str, path: str, body: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("x")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(server.socket))
    try:
        connection.request(method, path, body or None, {"content-type": "application/json"})
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()
    finally:
        connection.close()


def _problem(
    server: AdminServer, method: str, path: str, body: object = None
) -> tuple[int, dict[str, object]]:
    raw = b"" if body is None else json.dumps(body).encode()
    status, headers, answer = _raw(server, method, path, raw)
    assert headers["content-type"] == "application/problem+json"
    decoded = json.loads(answer)
    assert set(decoded) == {"status", "code", "message", "hint", "problems"}
    assert decoded["status"] == status
    return status, decoded


def _fields(decoded: dict[str, object]) -> list[str]:
    return [one["field"] for one in cast("list[dict[str, str]]", decoded["problems"])]


def test_a_network_is_added_shown_replaced_and_removed(server: AdminServer) -> None:
    status, _, answer = _raw(server, "POST", "/v1/networks", json.dumps(NETWORK).encode())
    assert status == 201
    assert json.loads(answer) == {
        "networks": 1,
        "instances": 0,
        "applied": True,
        "pending": [],
        "warnings": [],
    }

    assert server.client.get("/v1/networks/blue") == {
        "record": NETWORK,
        "source": "sqlite",
        "instances": 0,
        "serving": True,
        "left_out": None,
    }
    server.client.request("PUT", "/v1/networks/blue", body={"listener": {"bridge": "br0"}})
    shown = server.client.get("/v1/networks")
    assert [one["record"] for one in cast("list[dict[str, object]]", shown)] == [
        {"id": "blue", "listener": {"bridge": "br0"}}
    ]
    server.client.request("DELETE", "/v1/networks/blue")
    assert server.networks == {}


def test_an_instance_is_added_shown_and_removed(filled: AdminServer) -> None:
    shown = filled.client.get("/v1/instances/web-1")

    assert isinstance(shown, dict)
    assert shown["record"] == {**INSTANCE, "hostname": "web-1", "created_at": NOW}
    assert shown["ec2_id"].startswith("i-")
    filled.client.request("DELETE", "/v1/instances/web-1")
    assert filled.instances == {}


def test_what_is_there_cannot_be_added_again(filled: AdminServer) -> None:
    for path, body in (("/v1/networks", NETWORK), ("/v1/instances", INSTANCE)):
        status, decoded = _problem(filled, "POST", path, body)
        assert (status, decoded["code"]) == (409, "already-exists")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
@pytest.mark.parametrize("kind", ["networks", "instances"])
def test_what_is_not_there_is_404(server: AdminServer, method: str, kind: str) -> None:
    body: dict[str, object] | None = {} if method == "PATCH" else None
    status, decoded = _problem(server, method, f"/v1/{kind}/nobody", body)

    assert (status, decoded["code"]) == (404, "not-found")
    assert decoded["hint"]


def test_a_patch_changes_what_is_given_and_null_takes_away(filled: AdminServer) -> None:
    patch = {"tags": {"a": "1", "b": "2"}, "user_data": "#!/bin/sh\n", "dialects": {"ec2": False}}
    filled.client.request("PATCH", "/v1/instances/web-1", body=patch)
    again = {"tags": {"a": None, "c": "3"}, "user_data": None}
    filled.client.request("PATCH", "/v1/instances/web-1", body=again)

    stored = filled.instances[InstanceId("web-1")]
    assert stored.tags == (("b", "2"), ("c", "3"))
    assert stored.user_data is None
    assert {dialect.value for dialect in stored.dialects} == {"openstack", "nocloud"}
    assert stored.ports[0].addresses == (ip_address("10.0.0.5"),)


def test_a_patch_to_something_unacceptable_changes_nothing(filled: AdminServer) -> None:
    before = filled.networks[NetworkId("blue")]

    status, decoded = _problem(filled, "PATCH", "/v1/networks/blue", {"mtu": "wide", "name": "x"})

    assert status == 422
    assert _fields(decoded) == ["mtu"]
    assert filled.networks[NetworkId("blue")] == before


@pytest.mark.parametrize(
    ("path", "patch", "fields"),
    [
        ("networks/blue", {"nonsense": None, "listener": None}, ["nonsense", "listener"]),
        ("networks/blue", {"listener": {"vlan": None}}, ["listener.vlan"]),
        ("instances/web-1", {"policy": {"nonsense": None}}, ["policy.nonsense"]),
        ("instances/web-1", {"dialects": {"ec3": None}}, ["dialects.ec3"]),
        ("instances/web-1", {"name": None}, ["name"]),
    ],
)
def test_null_for_what_no_record_has_or_all_must_have_is_refused(
    filled: AdminServer, path: str, patch: dict[str, object], fields: list[str]
) -> None:
    status, decoded = _problem(filled, "PATCH", f"/v1/{path}", patch)
    assert (status, _fields(decoded)) == (422, fields)
    assert cast("str", decoded["hint"]).startswith("can be cleared: ")


@pytest.mark.parametrize(
    ("record", "path"), [(NETWORK_TABLE, "networks/blue"), (INSTANCE_TABLE, "instances/web-1")]
)
def test_every_key_that_can_be_cleared_is_cleared(
    filled: AdminServer, record: Table[object], path: str
) -> None:
    before = filled.client.get(f"/v1/{path}")
    for key in record.keys:
        if not (key.required or key.only_in_files):
            filled.client.request("PATCH", f"/v1/{path}", body={key.name: None})
    assert isinstance(before, dict)
    after = filled.client.get(f"/v1/{path}")
    assert isinstance(after, dict)
    assert after["record"].keys() >= {"id"}


def test_a_password_is_cleared_without_touching_the_record(filled: AdminServer) -> None:
    assert filled.passwords.keep(InstanceId("web-1"), b"x")
    before = filled.instances[InstanceId("web-1")]
    filled.client.request("PATCH", "/v1/instances/web-1", body={"password": None})
    assert filled.passwords.read(InstanceId("web-1")) is None
    assert filled.instances[InstanceId("web-1")] is before
    status, decoded = _problem(filled, "PATCH", "/v1/instances/web-1", {"password": "x"})
    assert (status, _fields(decoded)) == (422, ["password"])


def test_bytes_that_are_no_text_go_and_come_as_base64(filled: AdminServer) -> None:
    body = {"user_data": {"base64": "H4sIAP8="}}
    filled.client.request("PATCH", "/v1/instances/web-1", body=body)

    shown = filled.client.get("/v1/instances/web-1")

    assert isinstance(shown, dict)
    assert shown["record"]["user_data"] == {"base64": "H4sIAP8="}
    stored = filled.instances[InstanceId("web-1")]
    assert stored.user_data == b"\x1f\x8b\x08\x00\xff"


def test_a_list_of_instances_has_sizes_instead_of_payloads(filled: AdminServer) -> None:
    filled.client.request("PATCH", "/v1/instances/web-1", body={"user_data": "x" * 1000})

    (one,) = cast("list[dict[str, object]]", filled.client.get("/v1/instances"))

    assert one["user_data_bytes"] == 1000
    assert "user_data" not in cast("dict[str, object]", one["record"])


def test_instances_are_listed_by_network(filled: AdminServer) -> None:
    assert len(cast("list[object]", filled.client.get("/v1/instances", {"network": "blue"}))) == 1
    assert filled.client.get("/v1/instances", {"network": "red"}) == []


def test_every_wrong_field_of_a_record_is_told(server: AdminServer) -> None:
    body = {"id": "-", "name": "", "ports": [{"mac": "x", "addresses": ["10.0.0.300"]}], "nam": 1}

    status, decoded = _problem(server, "POST", "/v1/instances", body)

    assert status == 422
    assert set(_fields(decoded)) == {
        "id",
        "name",
        "nam",
        "ports[0].network",
        "ports[0].mac",
        "ports[0].addresses[0]",
    }


def test_the_daemon_reads_no_file_for_a_caller(filled: AdminServer) -> None:
    body = {"user_data_file": "/etc/shadow"}

    status, decoded = _problem(filled, "PATCH", "/v1/instances/web-1", body)

    assert status == 422
    assert _fields(decoded) == ["user_data_file"]


def test_a_body_with_another_id_than_the_address_is_refused(server: AdminServer) -> None:
    status, decoded = _problem(server, "PUT", "/v1/networks/red", NETWORK)

    assert status == 422
    assert _fields(decoded) == ["id"]
    assert server.networks == {}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "not JSON"),
        (b'{"id": "a", "id": "b"}', "'id' stands twice"),
        (b'{"mtu": NaN}', "NaN"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_body_that_is_no_clean_json_is_refused(
    server: AdminServer, body: bytes, word: str
) -> None:
    status, _, answer = _raw(server, "POST", "/v1/networks", body)

    decoded = json.loads(answer)
    assert status == 422
    assert word in decoded["message"]
    assert _fields(decoded) == ["body"]


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"'])
def test_a_body_that_is_no_object_is_refused(server: AdminServer, body: bytes) -> None:
    for method, path in (("POST", "/v1/networks"), ("PUT", "/v1/networks/a")):
        status, _, answer = _raw(server, method, path, body)
        assert status == 422
        assert json.loads(answer)["code"] == "request-refused"


def test_a_body_beyond_the_limit_is_refused(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY", 100)

    status, _, answer = _raw(server, "POST", "/v1/networks", b'"' + b"x" * 200 + b'"')

    assert status == 422
    assert "too large" in json.loads(answer)["message"]


def test_bulk_records_are_stored_all_or_none(server: AdminServer) -> None:
    def ports(number: int) -> list[dict[str, object]]:
        return [{"network": "blue", "addresses": [str(ip_address("10.0.0.0") + number)]}]

    many = [{"id": f"i{n}", "name": f"i{n}", "ports": ports(n)} for n in range(200)]
    answer = server.client.request(
        "POST", "/v1/records", body={"networks": [NETWORK], "instances": many}
    )
    assert isinstance(answer, dict)
    assert (answer["networks"], answer["instances"]) == (1, 200)

    bad = {"networks": [{"id": "red", "listener": {"bridge": "br0"}}], "instances": [{"id": "x"}]}
    status, decoded = _problem(server, "POST", "/v1/records", bad)
    assert status == 422
    assert _fields(decoded) == ["instances[0].name"]
    assert NetworkId("red") not in server.networks


def test_bulk_creation_refuses_what_is_there(filled: AdminServer) -> None:
    status, decoded = _problem(filled, "POST", "/v1/records?create=true", {"networks": [NETWORK]})

    assert (status, decoded["code"]) == (409, "already-exists")


def test_a_network_in_use_is_not_removed(filled: AdminServer) -> None:
    status, decoded = _problem(filled, "DELETE", "/v1/networks/blue")

    assert (status, decoded["code"]) == (409, "source-refused")
    assert _fields(decoded) == ["id"]


def test_a_guest_is_explained(filled: AdminServer) -> None:
    told = filled.client.get("/v1/explain", {"network": "blue", "address": "::ffff:10.0.0.5"})

    assert isinstance(told, dict)
    assert (told["verdict"], told["instance"], told["address"]) == ("found", "web-1", "10.0.0.5")


@pytest.mark.parametrize("path", ["/v1/explain?network=blue", "/v1/documents?network=a&address=b"])
def test_a_missing_parameter_is_named(server: AdminServer, path: str) -> None:
    status, decoded = _problem(server, "GET", path)

    assert status == 422
    assert _fields(decoded)[0] in {"address", "path"}


def test_an_address_that_is_none_is_named(server: AdminServer) -> None:
    status, decoded = _problem(server, "GET", "/v1/explain?network=blue&address=10.0.0.300")

    assert status == 422
    assert _fields(decoded) == ["address"]


def test_a_document_comes_with_its_status_headers_and_bytes(filled: AdminServer) -> None:
    filled.answer("/latest/user-data?x=1", b"\xff\x00", (b"content-type", b"text/plain"))

    query = {"network": "blue", "address": "10.0.0.5", "path": "/latest/user-data?x=1"}

    assert filled.client.get("/v1/documents", query) == {
        "status": 200,
        "headers": [["content-type", "text/plain"]],
        "body": {"base64": "/wA="},
    }


def test_a_path_that_no_guest_could_ask_for_is_refused(server: AdminServer) -> None:
    path = "/v1/documents?network=blue&address=10.0.0.5&path=latest"

    status, decoded = _problem(server, "GET", path)

    assert status == 422
    assert _fields(decoded) == ["path"]


def test_the_configuration_is_plain_text(server: AdminServer) -> None:
    status, headers, answer = _raw(server, "GET", "/v1/haproxy-configuration")

    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert answer.startswith(b"global\n")


def test_reload_and_stop_reach_the_controller(server: AdminServer) -> None:
    reloaded = server.client.request("POST", "/v1/reload")
    server.client.request("POST", "/v1/stop", body={"data_plane": True})

    assert isinstance(reloaded, dict)
    assert reloaded["restart_needed"] == ["admin.mode"]
    assert (server.reloads, server.stopped) == ([False], [True])


@pytest.mark.parametrize(
    ("body", "allowed"), [(None, False), ({}, False), ({"allow_dropped": True}, True)]
)
def test_a_reload_may_drop_settings_only_where_the_body_allows_it(
    server: AdminServer, body: object, *, allowed: bool
) -> None:
    server.client.request("POST", "/v1/reload", body=body)
    assert server.reloads == [allowed]


@pytest.mark.parametrize("body", [{"data_plane": "yes"}, {"all": True}, [], None])
def test_stop_takes_nothing_that_it_does_not_know(server: AdminServer, body: object) -> None:
    status, _ = _problem(server, "POST", "/v1/stop", body)

    assert status == 422
    assert server.stopped == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFound("x"), 404),
        (AlreadyExists("x"), 409),
        (RequestRefused("x"), 422),
        (SourceRefused("x"), 409),
        (SourceUnavailable("x"), 503),
        (ConfigInvalid("x"), 422),
        (ConfigRejected("x"), 500),
    ],
)
def test_an_error_of_the_controller_keeps_its_code_hint_and_fields(
    server: AdminServer, error: ImdsproxyError, status: int
) -> None:
    error.hint = "act"
    error.problems = (Problem("f", "r", hint="h", file="/x", line=3),)
    server.failure = error

    answered, decoded = _problem(server, "GET", "/v1/status")

    assert answered == status == status_of(error)
    assert (decoded["code"], decoded["message"], decoded["hint"]) == (error.code, "x", "act")
    assert decoded["problems"] == [
        {"field": "f", "reason": "r", "hint": "h", "file": "/x", "line": 3}
    ]


def test_what_helps_when_tried_again_says_when(server: AdminServer) -> None:
    server.failure = SourceUnavailable("the store is locked")

    _, headers, _ = _raw(server, "GET", "/v1/status")

    assert headers["retry-after"] == "1"


def test_a_fault_of_ours_is_an_answer_without_internals(server: AdminServer) -> None:
    server.failure = KeyError("secret words")

    status, decoded = _problem(server, "GET", "/v1/status")

    assert (status, decoded["code"]) == (500, "internal")
    assert "secret words" not in json.dumps(decoded)


@pytest.mark.parametrize("what", ["revoke-tokens", "reopen"])
def test_what_is_done_about_an_instance_is_told_and_kept(filled: AdminServer, what: str) -> None:
    done = cast("dict[str, object]", filled.client.request("POST", f"/v1/instances/web-1/{what}"))
    epoch, reopened = (1, None) if what == "revoke-tokens" else (0, NOW)
    assert done == {
        "instance": "web-1",
        "epoch": epoch,
        "reopened_at": reopened,
        "applied": True,
        "pending": [],
        "shared": None,
    }

    status, decoded = _problem(filled, "POST", f"/v1/instances/nobody/{what}")
    assert (status, decoded["code"]) == (404, "not-found")
    # It is gone, and what was done about it stays.
    filled.client.request("DELETE", "/v1/instances/web-1")
    assert _raw(filled, "POST", f"/v1/instances/web-1/{what}")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "no-such-route"),
        ("GET", "/v1/networks/", 404, "no-such-route"),
        ("GET", "/docs", 404, "no-such-route"),
        ("PUT", "/v1/status", 405, "method-not-allowed"),
    ],
)
def test_what_is_no_route_is_told(
    server: AdminServer, method: str, path: str, status: int, code: str
) -> None:
    answered, decoded = _problem(server, method, path)

    assert (answered, decoded["code"]) == (status, code)


def test_the_openapi_document_describes_every_route_and_error(server: AdminServer) -> None:
    document = server.client.get("/openapi.json")

    assert isinstance(document, dict)
    assert document["openapi"].startswith("3.")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            errors = operation["responses"]["4XX"]["content"]
            assert list(errors) == ["application/problem+json"], (method, path)
            assert operation["description"]
    missing = set(_references(document)) - set(document["components"]["schemas"])
    assert missing == set()


def _references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield str(value["$ref"]).rpartition("/")[2]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def test_answers_have_the_shape_that_is_described(filled: AdminServer) -> None:
    document = filled.client.get("/openapi.json")
    assert isinstance(document, dict)
    shapes = document["components"]["schemas"]
    explained = filled.client.get("/v1/explain", {"network": "blue", "address": "10.0.0.5"})
    seen: dict[str, object] = {
        "StatusReport": filled.client.get("/v1/status"),
        "Explanation": explained,
        "NetworkView": filled.client.get("/v1/networks/blue"),
        "InstanceView": filled.client.get("/v1/instances/web-1"),
        "InstanceSummary": cast("list[object]", filled.client.get("/v1/instances"))[0],
        "Written": filled.client.request("PATCH", "/v1/networks/blue", body={"mtu": 1400}),
        "GuardChange": filled.client.request("POST", "/v1/instances/web-1/revoke-tokens"),
        "KeyRotation": filled.client.request("POST", "/v1/token-keys/rotate"),
        "SettingsReload": filled.client.request("POST", "/v1/reload"),
    }

    for name, value in seen.items():
        assert set(cast("dict[str, object]", value)) == set(shapes[name]["properties"]), name


def test_the_described_records_are_the_ones_that_are_read(server: AdminServer) -> None:
    document = cast("Any", server.client.get("/openapi.json"))
    for table in (NETWORK_TABLE, INSTANCE_TABLE, POLICY):
        described = document["components"]["schemas"][table.name]
        assert set(described["properties"]) == set(table.names) - {"user_data_file"}
        assert described.get("required", []) == list(table.required)
        assert described["additionalProperties"] is False


def _shape_of(document: object, record: str, field: str) -> dict[str, object]:
    """How OpenAPI describes a field, without that it may be null."""
    found: dict[str, object] = cast("Any", document)["components"]["schemas"][record]["properties"][
        field
    ]
    return cast("list[dict[str, object]]", found["anyOf"])[0] if "anyOf" in found else found


@pytest.mark.parametrize(
    ("field", "bounds"), [(rule.name, rule.bounds) for rule in RULES.values() if rule.bounds]
)
def test_openapi_the_settings_schema_and_both_parsers_have_the_same_bounds(
    server: AdminServer, field: str, bounds: tuple[int, int]
) -> None:
    document = server.client.get("/openapi.json")
    shape = _shape_of(document, "PolicyRecord", field)
    settings = PolicyRulesSettings.model_json_schema()["properties"][field]["anyOf"][0]
    for described in (shape, settings):
        assert (described["minimum"], described["maximum"]) == bounds
    for value in bounds:
        record = parse_network({"id": "n", "listener": {"bridge": "b"}, "policy": {field: value}})
        assert isinstance(record, Network)
        PolicyRulesSettings.model_validate({field: value})
    for value in (bounds[0] - 1, bounds[1] + 1):
        policy = {field: value}
        assert isinstance(
            parse_network({"id": "n", "listener": {"bridge": "b"}, "policy": policy}), Refused
        )
        with pytest.raises(ValidationError):
            PolicyRulesSettings.model_validate(policy)


def test_openapi_shows_the_bounds_and_patterns_of_records(server: AdminServer) -> None:
    document = server.client.get("/openapi.json")
    mtu = _shape_of(document, "NetworkRecord", "mtu")
    assert (mtu["minimum"], mtu["maximum"]) == MTU_BOUNDS
    for record, field in [
        ("NetworkRecord", "id"),
        ("InstanceRecord", "id"),
        ("PortRecord", "network"),
        ("PortRecord", "project"),
    ]:
        assert _shape_of(document, record, field)["pattern"] == ID_PATTERN
    assert _shape_of(document, "PortRecord", "mac")["pattern"] == MAC_PATTERN
    assert _shape_of(document, "BridgeListenerRecord", "bridge")["pattern"] == DEVICE_PATTERN
    assert _shape_of(document, "PolicyRecord", "paths")["maxProperties"] == MOST_PATH_RULES
