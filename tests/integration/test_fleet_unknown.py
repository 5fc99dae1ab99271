"""What others have is for an operator, mover or reader of one project as what is not there, by every route of a hub."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlencode

import pytest
from fastapi.routing import APIRoute

from imdsproxy.errors import AlreadyExists, NotFound, SourceRefused
from imdsproxy.fleet.members import OPERATOR_ROLES
from imdsproxy.hub.api import fleet_records
from imdsproxy.hub.api.app import ROUTERS
from support.scoped_fleet import ScopedFleet, instance, network, open_scoped_fleet, port

pytestmark = pytest.mark.root

_ABSENT: Final = {
    "red-web": "nil-web",
    "red-name": "nil-name",
    "rednet": "nilnet",
    "red-host": "nil-host",
    "red-project": "nil-project",
    "10.0.0.5": "10.0.0.8",
    "10.9.0.70": "10.9.0.71",
}
"""What another project has, and what is not there."""


@dataclass(frozen=True)
class _Ask:
    """A request that names what another project has.

    Attributes:
        route: As the hub has it.
        names: Of its path.
        roles: Which of them may ask this at all.
    """

    route: str
    names: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: object = None

    @property
    def target(self) -> str:
        path = self.route.partition(" ")[2].replace(":path", "")
        path = path.format(**{key: quote(one) for key, one in self.names.items()})
        return f"{path}?{urlencode(self.query)}" if self.query else path


def _of(
    kind: str, *routes: str, query: Mapping[str, str] | None = None, body: object = None
) -> Iterator[_Ask]:
    names = {"instance": ("red-web", "red-name"), "network": ("rednet", "red-name")}[kind]
    for route in routes:
        for name in names:
            yield _Ask(route, {kind: name}, query or {}, body)


_MOVES: Final = (
    {"to": "a"},
    {"to": "red-host"},
    {"finish": True},
    {"cancel": True},
    {"to": "c", "now": True},
)
_HOSTS: Final = instance("x", "shop", port("shopnet", "10.0.0.6"), hosts=("red-host",))
_PORTS: Final = instance("x", "shop", port("rednet", "10.0.0.5"))
_ASKS: Final = (
    *_of("network", "GET /v1/networks/{network}", "DELETE /v1/networks/{network}"),
    *_of("network", "PATCH /v1/networks/{network}", body={"mtu": 1400}),
    *_of("network", "PATCH /v1/networks/{network}", body={"mtu": "x"}),
    _Ask("POST /v1/networks", body=network("rednet", "shop")),
    _Ask("PUT /v1/networks/{network}", {"network": "rednet"}, body=network("rednet", "shop")),
    _Ask("GET /v1/instances", query={"network": "rednet"}),
    _Ask("GET /v1/instances", query={"network": "red-name"}),
    _Ask("GET /v1/instances", query={"project": "red-project"}),
    _Ask("GET /v1/instances", query={"host": "red-host"}),
    _Ask("GET /v1/instances", query={"text": "red-web"}),
    _Ask("GET /v1/search/instances", query={"network": "rednet"}),
    _Ask("GET /v1/search/instances", query={"text": "red-name", "after": "red-web"}),
    _Ask("POST /v1/instances", body=_HOSTS),
    _Ask("POST /v1/instances", body=_PORTS),
    _Ask("POST /v1/instances", body={**_PORTS, "id": "red-web"}),
    _Ask("POST /v1/instances", body=instance("red-web", "red-project", hosts=("a",))),
    _Ask("POST /v1/instances", body=instance("x", "shop", port("public", "10.0.0.5"))),
    _Ask("PUT /v1/instances/{instance}", {"instance": "x"}, body=_PORTS),
    _Ask(
        "PUT /v1/instances/{instance}",
        {"instance": "red-web"},
        {"if_revision": "6"},
        instance("red-web", "shop", hosts=("a",)),
    ),
    _Ask("PATCH /v1/instances/{instance}", {"instance": "shop-web"}, body={"hosts": ["red-host"]}),
    _Ask(
        "PATCH /v1/instances/{instance}",
        {"instance": "shop-web"},
        body={"ports": [port("rednet", "10.0.0.5")]},
    ),
    _Ask(
        "PATCH /v1/instances/{instance}",
        {"instance": "shop-web"},
        body={"ports": [port("red-name", "10.0.0.5")]},
    ),
    _Ask(
        "PATCH /v1/instances/{instance}", {"instance": "shop-web"}, body={"project": "red-project"}
    ),
    *_of("instance", "PATCH /v1/instances/{instance}", body={"name": "x"}),
    *_of("instance", "PATCH /v1/instances/{instance}", body={"user_data": "x", "mtu": 1}),
    *_of("instance", "GET /v1/instances/{instance}", "DELETE /v1/instances/{instance}"),
    *_of("instance", "DELETE /v1/instances/{instance}", query={"if_revision": "6"}),
    *(
        one
        for body in _MOVES
        for one in _of("instance", "POST /v1/instances/{instance}/move", body=body)
    ),
    _Ask("POST /v1/instances/{instance}/move", {"instance": "shop-web"}, body={"to": "red-host"}),
    _Ask(
        "POST /v1/instances/{instance}/move",
        {"instance": "shop-web"},
        body={"to": "red-host", "finish": True},
    ),
    _Ask(
        "POST /v1/records",
        body={"instances": [_HOSTS, _PORTS], "networks": [network("rednet", "shop")]},
    ),
    _Ask("POST /v1/records", body={"instances": [_HOSTS, {**_PORTS, "id": "red-web"}]}),
    *_of(
        "instance",
        "POST /v1/instances/{instance}/revoke-tokens",
        "POST /v1/instances/{instance}/reopen",
    ),
    *_of("instance", "GET /v1/instances/{instance}/explain", query={"probe": "true"}),
    *_of(
        "instance",
        "GET /v1/instances/{instance}/identity-check",
        query={"audience": "vault", "network": "rednet", "host": "red-host"},
    ),
    *_of("instance", "GET /v1/instances/{instance}/identity", query={"host": "red-host"}),
    *_of(
        "instance",
        "GET /v1/instances/{instance}/password",
        "DELETE /v1/instances/{instance}/password",
    ),
    _Ask("GET /v1/explain", query={"network": "rednet", "address": "10.0.0.5"}),
    _Ask(
        "GET /v1/explain", query={"network": "red-name", "address": "10.0.0.5", "host": "red-host"}
    ),
    _Ask("GET /v1/explain", query={"network": "public", "address": "10.9.0.70", "host": "a"}),
    _Ask("GET /v1/documents", query={"network": "rednet", "address": "10.0.0.5", "path": "/"}),
    _Ask("GET /v1/documents", query={"network": "public", "address": "10.9.0.70", "path": "/"}),
    _Ask("GET /v1/watch", query={"instance": "red-web"}),
    _Ask("GET /v1/watch", query={"instance": "red-name", "network": "rednet", "host": "red-host"}),
    _Ask("GET /v1/watch", query={"host": "red-host"}),
    _Ask("GET /v1/policies/{place}", {"place": "project/red-project"}),
    _Ask("GET /v1/policies/{place}", {"place": "host/red-host"}),
    _Ask("PATCH /v1/policies/{place}", {"place": "project/red-project"}, body={"tokens": "off"}),
    _Ask("PATCH /v1/policies/{place}", {"place": "host/red-host"}, body={"tokens": "off"}),
    _Ask("DELETE /v1/policies/{place}", {"place": "host/red-host"}),
    _Ask("GET /v1/grants/{project}", {"project": "red-project"}),
    _Ask("PUT /v1/grants/{project}", {"project": "red-project"}, body={}),
    _Ask("DELETE /v1/grants/{project}", {"project": "red-project"}),
    _Ask("POST /fleet/wait", body={"revision": 1, "hosts": ["red-host"], "timeout_s": 0}),
    _Ask("POST /fleet/wait", body={"revision": 1, "hosts": ["a", "red-host"], "timeout_s": 0}),
    _Ask("POST /fleet/revoked-hosts", body={"name": "red-host"}),
    _Ask("POST /fleet/invitations", body={"host": "red-host"}),
)
_NAME_NOTHING: Final = frozenset(
    (
        "GET /fleet/alive",
        "GET /v1/progress",
        "GET /v1/networks",
        "GET /v1/imports/{name}",
        "GET /v1/policies",
        "GET /v1/grants",
        # Public documents.
        "GET /fleet/issuer/{path}",
    )
)
"""They take no name. What they show is looked at by other tests of this module."""

_REFUSED: Final = frozenset(
    (
        "POST /v1/token-keys/rotate",
        "GET /v1/identity/keys",
        "POST /v1/identity/rotate",
        "GET /fleet/status",
        "GET /fleet/hosts",
        "POST /fleet/accept-restore",
        "POST /fleet/reseal",
        "GET /fleet/envelope",
        "GET /fleet/applied",
        "POST /fleet/applied",
        "POST /fleet/ask",
        "POST /fleet/leave",
        "POST /fleet/password",
        "GET /fleet/blob/{sha256}",
        "POST /fleet/identity",
        "POST /fleet/identity-document",
        "POST /fleet/enrol",
        "POST /fleet/renew",
        "POST /fleet/revoked-operators",
    )
)
"""No operator of one project may ask these, or anybody may who has a token to enrol."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[ScopedFleet]:
    with open_scoped_fleet() as made:
        made.anna.request("PATCH", "/v1/policies/project/red-project", body={"tokens": "required"})
        made.anna.request("PATCH", "/v1/policies/host/red-host", body={"tokens": "required"})
        made.anna.request("PUT", "/v1/grants/red-project", body={"hosts": ["red-host", "a"]})
        yield made


def test_every_route_of_a_hub_is_asked_here() -> None:
    present = {
        f"{method} {prefix}{route.path_format}"
        for router, prefix in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert present == {*_NAME_NOTHING, *_REFUSED, *(one.route for one in _ASKS)}


@pytest.mark.parametrize("role", sorted(OPERATOR_ROLES))
@pytest.mark.parametrize("ask", _ASKS, ids=lambda one: f"{one.route} {sorted(one.names.values())}")
def test_what_another_project_has_is_answered_as_what_is_not_there(
    fleet: ScopedFleet, ask: _Ask, role: str
) -> None:
    def change(value: str) -> str:
        for there, absent in _ABSENT.items():
            value = value.replace(there, absent)
        return value

    body = json.dumps(ask.body)
    status, answer = _send(fleet, role, ask.route, ask.target, body)
    assert change(ask.target) + change(body) != ask.target + body
    assert (status, change(answer)) == _send(
        fleet, role, ask.route, change(ask.target), change(body)
    )
    assert status != 500


@pytest.mark.parametrize("role", sorted(OPERATOR_ROLES))
@pytest.mark.parametrize("route", sorted(_REFUSED))
def test_routes_of_the_whole_fleet_are_refused_whatever_is_sent(
    fleet: ScopedFleet, route: str, role: str
) -> None:
    if route == "POST /fleet/enrol":
        return  # HAProxy lets those in who have no certificate
    target = route.partition(" ")[2].format(sha256="0" * 64)
    status, _ = _send(fleet, role, route, target, "{}")
    assert status in {403, 422}


def _send(fleet: ScopedFleet, role: str, route: str, target: str, body: str) -> tuple[int, str]:
    """An answer's status and all that is in it, as `role` of project `shop`."""
    client = fleet.shop(role)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        connected.connect(str(client.socket))
        connection = http.client.HTTPConnection("hub")
        connection.sock = connected
        said = {"role": role, "name": f"{role}-1", "serial": "7F", "scope": "shop"}
        headers = {f"x-imdsproxy-{key}": value for key, value in said.items()}
        method = route.partition(" ")[0]
        sent = None if method == "GET" else body
        connection.request(method, target, sent, {**headers, "content-type": "application/json"})
        answer = connection.getresponse()
        shown = [(key, one) for key, one in answer.getheaders() if key != "date"]
        return answer.status, f"{shown}{answer.read().decode()}"


def test_a_name_that_another_project_has_too_is_not_ambiguous(fleet: ScopedFleet) -> None:
    for project, name in (("shop", "red-web"), ("shop", "both"), ("red-project", "both")):
        record = {**instance(f"{project}-{name}", project, hosts=("a",)), "name": name}
        fleet.anna.request("POST", "/v1/instances", body=record)
        bridge = f"br-{project[:3]}-{name}"
        there = {**network(f"{project}-{name}", project, bridge), "name": name}
        fleet.anna.request("POST", "/v1/networks", body=there)
    for kind in ("instances", "networks"):
        for name in ("red-web", "both"):
            shown = fleet.shop("reader").get(f"/v1/{kind}/{name}")["record"]
            assert (shown["id"], shown["project"]) == (f"shop-{name}", "shop")
    for kind in ("instances", "networks"):
        for name in ("shop-red-web", "shop-both", "red-project-both"):
            fleet.anna.request("DELETE", f"/v1/{kind}/{name}")


def test_lists_have_what_the_project_has_and_of_shared_networks_its_own_part(
    fleet: ScopedFleet,
) -> None:
    reader = fleet.shop("reader")
    everything = json.dumps(
        [reader.get(f"/v1/{kind}") for kind in ("networks", "instances", "policies", "grants")]
    )
    assert "red" not in everything.replace("shared", "")
    networks = {one["record"]["id"]: one for one in reader.get("/v1/networks")}
    assert sorted(networks) == ["public", "shopnet"]
    assert (networks["public"]["hosts"], networks["public"]["instances"]) == ([], 0)
    assert networks["shopnet"]["hosts"] == ["a"]
    record = instance("shop-pub", "shop", port("public", "10.9.0.80", mac="52:54:00:5a:00:09"))
    fleet.shop().request("POST", "/v1/instances", body={**record, "hosts": ["c"]})
    shown = reader.get("/v1/networks/public")
    assert (shown["hosts"], shown["instances"]) == (["c"], 1)
    assert fleet.anna.get("/v1/networks/public")["hosts"] == ["a", "c"]
    fleet.shop().request("DELETE", "/v1/instances/shop-pub")
    # Without addresses for the project it is none of its networks.
    grant = fleet.anna.get("/v1/grants/shop")["grant"]
    fleet.anna.request("PUT", "/v1/grants/shop", body={"hosts": grant["hosts"]})
    assert [one["record"]["id"] for one in reader.get("/v1/networks")] == ["shopnet"]
    with pytest.raises(NotFound):
        reader.get("/v1/networks/public")
    fleet.anna.request("PUT", "/v1/grants/shop", body=grant)


def test_waiting_is_for_the_projects_own_hosts_and_records(fleet: ScopedFleet) -> None:
    fleet.hub.disconnect("a")
    host = fleet.hub.connect("a")
    host.failed = {
        "instance/red-web": "red is in the way",
        "instance/shop-web": "10.0.0.5 is red-web's",
    }
    written = fleet.anna.request("PATCH", "/v1/instances/red-web", body={"hostname": "new"})
    reader = fleet.shop("reader")

    def wait(**body: object) -> dict[str, Any]:
        asked = {"revision": written["revision"], "timeout_s": 0.5, **body}
        return dict(reader.request("POST", "/fleet/wait", body=asked))

    withheld = ["host a: it is not in force there: an operator of all projects sees why"]
    assert (wait()["hosts"], wait()["pending"]) == (["a"], withheld)
    assert wait(hosts=["a", "c"])["pending"] == withheld
    assert reader.get("/v1/instances/shop-web")["pending"] == [
        "host a: instance/shop-web: it is not in force there: an operator of all projects sees why"
    ]
    changed = fleet.shop().request("PATCH", "/v1/instances/shop-web", body={"hostname": "new"})
    assert changed["pending"] == withheld
    del host.failed["instance/shop-web"]
    fleet.shop().request("PATCH", "/v1/instances/shop-web", body={"hostname": "newer"})
    assert wait()["applied"], "the other project's failure does not count"
    fleet.hub.disconnect("a")
    fleet.hub.connect("a")


def test_an_explanation_that_is_about_others_too_says_no_more_than_the_answer(
    fleet: ScopedFleet,
) -> None:
    fleet.hub.disconnect("a")
    host = fleet.hub.connect("a")
    own = {"network": "shopnet", "address": "10.0.0.5", "verdict": "found", "answer": 200}
    own |= {"instance": "shop-web", "why": ["it is"], "claimants": [], "policy": {"x": "y"}}
    other = {**own, "verdict": "conflict", "answer": 503, "instance": None, "why": ["red-web"]}
    other["claimants"] = [{"source": "file", "instance": "red-web"}]
    paths = ("/v1/explain", "/v1/instances/shop-web/explain")
    for answer in (own, other):
        host.answers = {paths[0]: answer, paths[1]: [answer]}
        query = {"network": "shopnet", "address": "10.0.0.5"}
        shown = [fleet.shop("reader").get(paths[0], query), *fleet.shop("reader").get(paths[1])]
        for one in shown:
            if answer is own:
                assert one == {**own, "host": "a"}
            else:
                assert (one["verdict"], one["answer"], one["instance"]) == ("conflict", 503, None)
                assert "red-web" not in json.dumps(one)
    # The host is asked for the documents of the project's instance, whoever has the address there.
    host.answers = {"/v1/documents": {"status": 200, "headers": [], "body": {"text": ""}}}
    fleet.shop().get("/v1/documents", {**query, "path": "/"})
    assert "&instance=shop-web" in host.asked[-1]
    fleet.hub.disconnect("a")
    fleet.hub.connect("a")


def test_an_import_of_others_is_unknown(
    fleet: ScopedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_records, "_IMPORT_S", 0.0)
    many = [
        instance(f"red-{number}", "red-project", port("rednet", f"10.0.1.{number}"))
        for number in range(1, 50)
    ]
    begun = fleet.anna.request("POST", "/v1/records", body={"instances": many})
    refusals = []
    for name in (begun["importing"], "0" * 32):
        with pytest.raises(Exception, match="does not know import") as refused:
            fleet.shop().get(f"/v1/imports/{name}")
        refusals.append(str(refused.value).replace(name, ""))
    assert refusals[0] == refusals[1]
    assert fleet.shop().get("/v1/progress") == []
    monkeypatch.undo()
    answer = begun
    while "importing" in answer:
        answer = fleet.anna.get(f"/v1/imports/{begun['importing']}")
    assert answer["instances"] == len(many)
    for one in many:
        fleet.anna.request("DELETE", f"/v1/instances/{one['id']}")


def test_what_is_taken_is_said_only_to_an_operator_who_could_have_it(fleet: ScopedFleet) -> None:
    usable = instance("red-web", "shop", port("shopnet", "10.0.0.6"))
    with pytest.raises(AlreadyExists, match="the id red-web is taken"):
        fleet.shop().request("POST", "/v1/instances", body=usable)
    address = instance("x", "shop", port("public", "10.9.0.70", mac="52:54:00:5a:00:07"))
    with pytest.raises(SourceRefused) as refused:
        fleet.shop().request("POST", "/v1/instances", body=address)
    assert "red" not in str(refused.value).replace("refuses", "")
