"""The admin API over its socket: what is stored and shown, what is refused and how, and what OpenAPI says of it."""

import asyncio
import http.client
import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.api import bodies
from imdsproxy.api.app import admin_app
from imdsproxy.errors import (
    ConfigInvalid,
    ConfigRejected,
    ImdsproxyError,
    NotFound,
    Problem,
    SourceUnavailable,
)
from imdsproxy.host import turns
from imdsproxy.model.entities import Instance, InstanceId
from imdsproxy.model.records import INSTANCE as INSTANCE_TABLE
from imdsproxy.model.records import NETWORK as NETWORK_TABLE
from imdsproxy.model.records import parse_instance
from imdsproxy.model.records.schema import Table
from support.admin_server import INSTANCE, NETWORK, AdminServer
from support.controllers import NOW

WEB = InstanceId("web-1")


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


def _refused(server: AdminServer, method: str, path: str, body: object = None) -> dict[str, Any]:
    """The body of a refusal, which has always the same shape."""
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    status, headers, answer = _raw(server, method, path, raw)
    assert headers["content-type"] == "application/problem+json"
    decoded: dict[str, Any] = json.loads(answer)
    assert set(decoded) == {"status", "code", "message", "hint", "problems"}
    assert decoded["status"] == status
    return decoded


def _patch(server: AdminServer, body: Mapping[str, object]) -> None:
    server.client.request("PATCH", "/v1/instances/web-1", body=body)


def test_a_network_is_added_shown_replaced_and_removed(server: AdminServer) -> None:
    body = {"id": "red", "listener": {"namespace": "red"}}
    status, _, answer = _raw(server, "POST", "/v1/networks", json.dumps(body).encode())
    written = {"networks": 1, "instances": 0, "applied": True, "pending": [], "warnings": []}
    assert (status, json.loads(answer)) == (201, written)
    server.client.request("PUT", "/v1/networks/red", body={"listener": {"bridge": "br0"}})
    records = [one["record"] for one in server.client.get("/v1/networks")]
    assert records == [NETWORK, {"id": "red", "listener": {"bridge": "br0"}}]
    server.client.request("DELETE", "/v1/networks/red")
    assert set(server.networks) == {"blue"}
    many = [{"id": f"i{n}", "name": f"i{n}", "ports": [{"network": "red"}]} for n in range(200)]
    stored = server.client.request(
        "POST", "/v1/records", body={"networks": [body], "instances": many}
    )
    assert stored == {**written, "instances": 200}


def test_an_instance_is_shown_patched_listed_by_network_and_removed(server: AdminServer) -> None:
    shown = server.client.get("/v1/instances/web-1")
    assert shown["record"] == {**INSTANCE, "hostname": "web-1", "created_at": NOW}
    assert shown["ec2_id"].startswith("i-")
    assert server.passwords.keep(WEB, b"x")
    before = server.instances[WEB]
    _patch(server, {"password": None})
    assert (server.passwords.read(WEB), server.instances[WEB] is before) == (None, True)
    # Bytes that are no text are base64, and lists have their size.
    _patch(server, {"tags": {"a": "1", "b": "2"}, "user_data": {"base64": "H4sIAP8="}})
    (listed,) = server.client.get("/v1/instances", {"network": "blue"})
    assert (listed["user_data_bytes"], "user_data" in listed["record"]) == (5, False)
    assert server.instances[WEB].user_data == b"\x1f\x8b\x08\x00\xff"
    assert server.client.get("/v1/instances", {"network": "red"}) == []
    gone = {"user_data": None, "password": None}
    _patch(server, {"tags": {"a": None, "c": "3"}, "dialects": {"ec2": False}, **gone})
    record = server.client.get("/v1/instances/web-1")["record"]
    assert (record["tags"], record["dialects"]) == ({"b": "2", "c": "3"}, {"ec2": False})
    assert record["ports"] == INSTANCE["ports"]
    assert "user_data" not in record
    server.client.request("DELETE", "/v1/instances/web-1")
    assert server.instances == {}


def test_a_password_is_cleared_where_the_record_is_another_sources(server: AdminServer) -> None:
    one = parse_instance({"id": "f", "name": "f"})
    assert isinstance(one, Instance)
    server.claim_twice(one)
    assert server.passwords.keep(one.id, b"x")
    assert _raw(server, "PATCH", "/v1/instances/f", b'{"password": null}')[0] == 200
    assert server.passwords.read(one.id) is None
    assert _raw(server, "PATCH", "/v1/instances/f", b'{"name": "g"}')[0] == 409


def test_a_list_of_instances_takes_turns_with_other_work_of_the_event_loop(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "AT_ONCE", 2)
    turn, seen = [0], dict[str, int]()

    def make(instance: Instance) -> str:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            turn[0] += 1
            if turn[0] < 1000:
                loop.call_soon(tick)

        if not seen:
            tick()
        seen.setdefault(instance.id, turn[0])
        return "u"

    for number in range(5):
        body = {"id": f"many-{number}", "name": "many", "project": "p" if number else None}
        server.client.request("POST", "/v1/instances", body=body)
    monkeypatch.setattr(Instance, "uuid", property(make))
    assert [one["uuid"] for one in server.client.get("/v1/instances")] == ["u"] * 6
    assert max(Counter(seen.values()).values()) == 2
    chosen = server.client.get("/v1/instances", {"project": "p", "text": "many-3"})
    assert [one["record"]["id"] for one in chosen] == ["many-3"]
    assert server.client.get("/v1/instances", {"text": "none such"}) == []


def test_a_document_of_another_instance_than_the_expected_one_is_not_shown(
    server: AdminServer,
) -> None:
    asked = {"network": "blue", "address": "10.0.0.5", "path": "/"}
    own = server.client.get("/v1/documents", {**asked, "instance": "web-1"})
    assert own == server.client.get("/v1/documents", asked)
    for query in (
        {**asked, "instance": "web-2"},
        {**asked, "address": "10.0.0.99", "instance": "web-1"},
    ):
        with pytest.raises(NotFound, match="on this host"):
            server.client.get("/v1/documents", query)


def test_a_name_stands_for_an_id_unless_it_is_one_or_two_have_it(server: AdminServer) -> None:
    client = server.client
    client.request("PATCH", "/v1/networks/blue", body={"name": "Blue network"})
    guest = {"network": "Blue network", "address": "10.0.0.5"}
    assert client.get("/v1/networks/Blue%20network")["record"]["id"] == "blue"
    assert client.get("/v1/explain", guest)["instance"] == "web-1"
    assert client.get("/v1/documents", {**guest, "path": "/"})["status"] == 404
    assert len(client.get("/v1/instances", {"network": "Blue network"})) == 1
    body = {"id": "web-2", "name": "web-1", "ports": [{"network": "Blue network"}]}
    client.request("POST", "/v1/instances", body=body)
    assert client.get("/v1/instances/web-1")["record"]["id"] == "web-1", "an id wins"
    for name in ("web-1", "web-2"):
        body = {"name": "front", "ports": [{"network": "Blue network"}]}
        client.request("PATCH", f"/v1/instances/{name}", body=body)
    for method in ("GET", "DELETE", "PATCH"):
        decoded = _refused(server, method, "/v1/instances/front", {} if method == "PATCH" else None)
        assert decoded["message"] == "2 have the name front"
        assert decoded["hint"] == "use an id: web-1, web-2"
    client.request("DELETE", "/v1/instances/web-1")
    for path in ("revoke-tokens", "reopen"):
        assert client.request("POST", f"/v1/instances/front/{path}")["instance"] == "web-2"
    client.request("DELETE", "/v1/instances/front")
    assert server.instances == {}


@pytest.mark.parametrize(
    ("record", "path"), [(NETWORK_TABLE, "networks/blue"), (INSTANCE_TABLE, "instances/web-1")]
)
def test_every_key_that_can_be_cleared_is_cleared(
    server: AdminServer, record: Table[object], path: str
) -> None:
    for key in record.keys:
        if not (key.required or key.only_in_files):
            server.client.request("PATCH", f"/v1/{path}", body={key.name: None})
    assert server.client.get(f"/v1/{path}")["record"].keys() >= {"id"}


_STATUS = {
    "already-exists": 409,
    "not-found": 404,
    "record-conflict": 409,
    "request-refused": 422,
    "no-such-route": 404,
    "method-not-allowed": 405,
}
_RED = {"id": "red", "listener": {"bridge": "br0"}}
_WRONG = {"id": "-", "name": "", "ports": [{"mac": "x", "addresses": ["10.0.0.300"]}], "nam": 1}
_WRONG_FIELDS = "id name nam ports[0].network ports[0].mac ports[0].addresses[0]"
_FILE = {"user_data_file": "/etc/shadow"}  # the daemon reads no file for a client
_SOME_BAD = {"networks": [_RED], "instances": [{"id": "x"}]}  # all are stored, or none


@pytest.mark.parametrize(
    ("request_line", "body", "code", "fields"),
    [
        ("POST /v1/networks", NETWORK, "already-exists", ""),
        ("POST /v1/instances", INSTANCE, "already-exists", ""),
        ("POST /v1/records?create=true", {"networks": [NETWORK]}, "already-exists", ""),
        *(
            (f"{method} /v1/{kind}/nobody", {} if method == "PATCH" else None, "not-found", "")
            for method in ("GET", "DELETE", "PATCH")
            for kind in ("networks", "instances")
        ),
        ("DELETE /v1/networks/blue", None, "record-conflict", "id"),
        ("PUT /v1/networks/red", NETWORK, "request-refused", "id"),
        ("PATCH /v1/networks/blue", {"mtu": "wide", "name": "x"}, "request-refused", "mtu"),
        ("PATCH /v1/networks/blue", {"a": None, "listener": None}, "request-refused", "a listener"),
        (
            "PATCH /v1/networks/blue",
            {"listener": {"vlan": None}},
            "request-refused",
            "listener.vlan",
        ),
        ("PATCH /v1/instances/web-1", {"policy": {"a": None}}, "request-refused", "policy.a"),
        ("PATCH /v1/instances/web-1", {"dialects": {"a": None}}, "request-refused", "dialects.a"),
        ("PATCH /v1/instances/web-1", {"name": None}, "request-refused", "name"),
        ("PATCH /v1/instances/web-1", {"password": "x"}, "request-refused", "password"),
        ("PATCH /v1/instances/web-1", _FILE, "request-refused", "user_data_file"),
        ("POST /v1/instances", _WRONG, "request-refused", _WRONG_FIELDS),
        ("POST /v1/records", _SOME_BAD, "request-refused", "instances[0].name"),
        ("GET /v1/explain?network=blue", None, "request-refused", "address"),
        ("GET /v1/explain?network=blue&address=10.0.0.300", None, "request-refused", "address"),
        ("GET /v1/documents?network=a&address=::1&path=b", None, "request-refused", "path"),
        ("POST /v1/stop", {"all": True}, "request-refused", "all"),
        ("POST /v1/stop", None, "request-refused", "body"),
        ("GET /", None, "no-such-route", ""),
        ("GET /docs", None, "no-such-route", ""),
        ("PUT /v1/status", None, "method-not-allowed", ""),
    ],
)
def test_a_refusal_names_every_wrong_field_and_changes_nothing(
    server: AdminServer, request_line: str, body: object, code: str, fields: str
) -> None:
    before = dict(server.networks), dict(server.instances)
    method, path = request_line.split()
    decoded = _refused(server, method, path, body)
    assert (decoded["status"], decoded["code"]) == (_STATUS[code], code)
    assert sorted(one["field"] for one in decoded["problems"]) == sorted(fields.split())
    assert decoded["hint"] or code == "request-refused"
    assert "can be cleared: " in decoded["hint"] or "listener" not in fields
    assert (dict(server.networks), dict(server.instances), server.stopped) == (*before, [])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"id": "a", "id": "b"}', "'id' stands twice"),
        (b'{"mtu": NaN}', "NaN"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"' + b"x" * 200_000 + b'"', "too large"),
        *((no_object, "is no JSON object") for no_object in (b"[]", b"1", b"null", b'"x"')),
    ],
)
def test_a_body_that_is_no_clean_json_object_is_refused(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, body: bytes, reason: str
) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY", 150_000)
    decoded = _refused(server, "PUT", "/v1/networks/blue", body)
    assert (decoded["status"], decoded["code"]) == (422, "request-refused")
    assert reason in decoded["problems"][0]["reason"]
    assert _refused(server, "POST", "/v1/networks", body)["code"] == "request-refused"


@pytest.mark.parametrize(
    ("error", "status"),
    [(SourceUnavailable("x"), 503), (ConfigInvalid("x"), 422), (ConfigRejected("x"), 500)],
)
def test_an_error_of_the_controller_keeps_its_code_hint_and_fields(
    server: AdminServer, error: ImdsproxyError, status: int
) -> None:
    error.hint = "act"
    error.problems = (Problem("f", "r", hint="h", file="/x", line=3),)
    server.failure = error
    assert _refused(server, "GET", "/v1/status") == {
        "status": status,
        "code": error.code,
        "message": "x",
        "hint": "act",
        "problems": [{"field": "f", "reason": "r", "hint": "h", "file": "/x", "line": 3}],
    }
    retry = _raw(server, "GET", "/v1/status")[1].get("retry-after")
    assert retry == ("1" if status == 503 else None)
    # A fault of ours has no internals in its answer.
    server.failure = KeyError("secret words")
    decoded = _refused(server, "GET", "/v1/status")
    assert (decoded["status"], decoded["code"]) == (500, "internal")
    assert "secret words" not in json.dumps(decoded)


# Of the examples of RFC 7396, appendix A, those that no test above has.
@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_patch_merges_as_the_rfc_says(target: object, patch: object, result: object) -> None:
    assert bodies.merge_patch(target, patch) == result


_GOLDEN = Path(__file__).parents[2] / "golden" / "admin-api.txt"


def test_the_openapi_document_describes_what_clients_rely_on_and_what_is_answered(
    server: AdminServer,
) -> None:
    """Another shape may break a client: `GOLDEN=write` takes it over."""
    document, client = admin_app(None).openapi(), server.client
    assert client.get("/openapi.json") == document
    parts = {**document["paths"], **document["components"]["schemas"]}
    text = "".join(f"{name} {json.dumps(_bare(part))}\n" for name, part in sorted(parts.items()))
    if os.environ.get("GOLDEN") == "write":
        _GOLDEN.write_text(text)
    assert text == _GOLDEN.read_text()
    guest = {"network": "blue", "address": "::ffff:10.0.0.5"}
    assert client.get("/v1/explain", guest)["address"] == "10.0.0.5"
    # FastAPI makes sure of the others.
    for name, value in {
        "NetworkView": client.get("/v1/networks/blue"),
        "InstanceView": client.get("/v1/instances/web-1"),
        "InstanceSummary": client.get("/v1/instances")[0],
    }.items():
        assert set(value) == set(document["components"]["schemas"][name]["properties"]), name


def _bare(value: Any) -> Any:
    """Without words for people."""
    if isinstance(value, list):
        return [_bare(one) for one in value]
    words = ("title", "description", "examples")
    if isinstance(value, dict):
        return {key: _bare(one) for key, one in value.items() if key not in words}
    return value
