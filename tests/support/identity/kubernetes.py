"""Stand-in for Kubernetes' API server, which takes tokens as an AuthenticationConfiguration says.

The genuine server is not at hand for tests. This one verifies tokens by the issuer's published keys, and evaluates the
few forms of CEL expressions that the recipe has; any other form is an error.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import jwt
import yaml

from support.recorder import Answer, Received, reply

ADMIN: Final = "administrator"
"""The administrator's token."""

_REVIEWS: Final = b"/apis/authentication.k8s.io/v1/selfsubjectreviews"
_BINDINGS: Final = b"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
_TERM: Final = re.compile(r'"([^"]*)" \+ claims\.(\w+)')
_LIST: Final = re.compile(rf"\[{_TERM.pattern}\]")
_LIFE: Final = re.compile(r"claims\.exp - claims\.nbf <= (\d+)")
_JSON: Final = ("Content-Type: application/json",)


@dataclass(slots=True)
class ApiServer:
    """Answers of a server.

    Args:
        read_settings: Reads the text of the AuthenticationConfiguration.
        read_keys: Reads the JWKS of the issuer at a URL.

    Attributes:
        bindings: Bodies of ClusterRoleBindings by name, as kubectl sends them, in protobuf.
    """

    read_settings: Callable[[], str]
    read_keys: Callable[[str], str]
    bindings: dict[str, bytes] = field(default_factory=dict)

    def answer(self, request: Received) -> Answer:
        """Answer a request of kubectl."""
        shown = b"".join(request.values("authorization")).decode().removeprefix("Bearer ")
        path = request.target.partition(b"?")[0]
        if shown == ADMIN:
            return self._answer_admin(request.method, path, request.body)
        try:
            user = self._authenticate(shown)
        except (jwt.InvalidTokenError, KeyError):
            return _status(HTTPStatus.UNAUTHORIZED, "Unauthorized")
        if path != _REVIEWS:
            return _status(HTTPStatus.FORBIDDEN, "Forbidden")
        kind = {"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"}
        return _reply({**kind, "status": {"userInfo": user}}, HTTPStatus.CREATED)

    def _answer_admin(self, method: str, path: bytes, body: bytes) -> Answer:
        if method == "POST" and path == _BINDINGS:
            (name,) = re.findall(rb"\bvm-\w+", body)
            self.bindings[name.decode()] = body
            kind = {"kind": "ClusterRoleBinding", "apiVersion": "rbac.authorization.k8s.io/v1"}
            return _reply({**kind, "metadata": {"name": name.decode()}}, HTTPStatus.CREATED)
        if method == "DELETE" and self.bindings.pop(path.rpartition(b"/")[2].decode(), b""):
            return _status(HTTPStatus.OK, "")
        return _discovery(path)

    def _authenticate(self, token: str) -> dict[str, object]:
        """Return the user of a token; raise `jwt.InvalidTokenError`, or `KeyError` for a missing claim."""
        settings = yaml.safe_load(self.read_settings())
        assert settings["apiVersion"] == "apiserver.config.k8s.io/v1"
        assert settings["kind"] == "AuthenticationConfiguration"
        (entry,) = settings["jwt"]
        keys = jwt.PyJWKSet.from_json(self.read_keys(entry["issuer"]["url"]))
        claims = jwt.decode(
            token,
            keys[jwt.get_unverified_header(token)["kid"]].key,
            algorithms=["RS256"],
            audience=entry["issuer"]["audiences"],
            issuer=entry["issuer"]["url"],
            options={"require": ["exp", "nbf"]},
        )
        for rule in entry["claimValidationRules"]:
            life = _LIFE.fullmatch(rule["expression"])
            assert life is not None, rule
            if claims["exp"] - claims["nbf"] > int(life[1]):
                raise jwt.InvalidTokenError(rule["message"])
        mappings = entry["claimMappings"]
        groups = _evaluate(_LIST, mappings["groups"]["expression"], claims)
        return {
            "username": _evaluate(_TERM, mappings["username"]["expression"], claims),
            "groups": [groups, "system:authenticated"],
        }


def _evaluate(form: re.Pattern[str], expression: str, claims: Mapping[str, Any]) -> str:
    found = form.fullmatch(expression)
    assert found is not None, expression
    return f"{found[1]}{claims[found[2]]}"


def _discovery(path: bytes) -> Answer:
    """Answer what kubectl asks about the server's resources."""
    if path == b"/apis":
        version = {"groupVersion": "rbac.authorization.k8s.io/v1", "version": "v1"}
        group = {
            "name": "rbac.authorization.k8s.io",
            "versions": [version],
            "preferredVersion": version,
        }
        return _reply({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]})
    if path == b"/apis/rbac.authorization.k8s.io/v1":
        resource = {
            "name": "clusterrolebindings",
            "singularName": "clusterrolebinding",
            "namespaced": False,
            "kind": "ClusterRoleBinding",
            "verbs": ["create", "delete", "get", "list"],
        }
        shape = {"kind": "APIResourceList", "groupVersion": "rbac.authorization.k8s.io/v1"}
        return _reply({**shape, "resources": [resource]})
    if path == b"/api":
        return _reply({"kind": "APIVersions", "versions": ["v1"]})
    if path == b"/api/v1":
        return _reply({"kind": "APIResourceList", "groupVersion": "v1", "resources": []})
    return _status(HTTPStatus.NOT_FOUND, "the server could not find the requested resource")


def _status(status: HTTPStatus, message: str) -> Answer:
    shape = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Success" if status is HTTPStatus.OK else "Failure",
        "reason": status.phrase.replace(" ", ""),
        "code": status,
        "message": message,
    }
    return _reply(shape, status)


def _reply(shape: Mapping[str, object], status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return reply(json.dumps(shape).encode(), status=status, headers=_JSON)
