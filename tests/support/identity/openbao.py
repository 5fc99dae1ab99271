"""Genuine OpenBao, which takes tokens of one issuer by its auth method `jwt`."""

import contextlib
import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from support.identity.signing import Issuer
from support.lab import within as enter
from support.openstack.neutron_rest import ask
from support.openstack.servers import Server, ends_with_us
from support.pinned_venv import pinned_venv

_LOOPBACK: Final = "127.0.0.1"
_PORT: Final = 8200
_ROOT: Final = "root"


class Refused(Exception):
    """OpenBao refused a request; the message has its reasons."""


@dataclass(frozen=True, slots=True)
class Login:
    """OpenBao's own token, which a token of the issuer was exchanged for."""

    token: str = field(repr=False)
    policies: tuple[str, ...]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class OpenBao:
    """A server that runs, and its client.

    Attributes:
        namespace: Where the client asks the server.
    """

    server: Server
    namespace: str
    url: str

    def trust(self, issuer: Issuer) -> None:
        """Take tokens of one issuer, and of no other from now on."""
        if "jwt/" not in self.read("sys/auth")["data"]:
            self.write("sys/auth/jwt", type="jwt")
        self.write(
            "auth/jwt/config",
            jwks_url=issuer.jwks_url,
            jwks_ca_pem=issuer.ca_file.read_text(),
            bound_issuer=issuer.url,
        )

    def admit(self, role: str, *, audience: str, projects: Sequence[str]) -> None:
        """Make a role for the guests of some projects: each reads and writes the secrets of its own project.

        The secrets of a project are below `secret/data/PROJECT/`.
        """
        for project in projects:
            rule = (
                f'path "secret/data/{project}/*" {{ capabilities = ["create", "read", "update"] }}'
            )
            self.write(f"sys/policies/acl/project-{project}", policy=rule)
        self.write(
            f"auth/jwt/role/{role}",
            role_type="jwt",
            bound_audiences=[audience],
            user_claim="sub",
            bound_claims={"project_id": list(projects)},
            claim_mappings={"instance_id": "instance_id", "project_id": "project_id"},
            token_policies=["project-{{.project_id}}"],
            token_policies_template_claims=True,
            token_ttl="10m",
        )

    def login(self, role: str, token: str) -> Login:
        """Log in by a token of the issuer.

        Raises:
            Refused: OpenBao does not take the token.
        """
        body = {"role": role, "jwt": token}
        auth = self._send("POST", "auth/jwt/login", body, token="")["auth"]
        return Login(auth["client_token"], tuple(auth["policies"]), auth["metadata"])

    def write(self, path: str, *, token: str = _ROOT, **body: object) -> None:
        """Write at a path below `/v1/`."""
        self._send("POST", path, body, token=token)

    def read(self, path: str, *, token: str = _ROOT) -> dict[str, Any]:
        """Read a path below `/v1/`."""
        return self._send("GET", path, None, token=token)

    def _send(
        self, method: str, path: str, body: Mapping[str, object] | None, *, token: str
    ) -> dict[str, Any]:
        answer = ask(
            self.url,
            method,
            f"/v1/{path}",
            headers=(("X-Vault-Token", token),) if token else (),
            body=None if body is None else json.dumps(body).encode(),
            namespace=self.namespace,
        )
        shape: dict[str, Any] = json.loads(answer.body) if answer.body else {}
        if answer.status >= http.client.BAD_REQUEST:
            raise Refused(f"{answer.status} {'; '.join(shape.get('errors', ()))}")
        return shape


@contextlib.contextmanager
def open_openbao(
    namespace: str,
    directory: Path,
    *,
    address: str = _LOOPBACK,
    within: Sequence[str] = (),
    settings: str = "",
) -> Iterator[OpenBao]:
    """Run a server at an address of a namespace, with its secrets in memory and its log in a directory.

    Args:
        within: Words before its command; by default those that enter the namespace.
        settings: Text of its settings file, beside those of a server in memory.
    """
    file = directory / "openbao.hcl"
    file.write_text(settings)
    words = (
        *(str(pinned_venv("identity") / "bin" / "bao"), "server", "-dev", "-dev-no-store-token"),
        *(f"-dev-root-token-id={_ROOT}", f"-dev-listen-address={address}:{_PORT}"),
        f"-config={file}",
    )
    server = Server(
        name="OpenBao",
        argv=[*ends_with_us(), *(within or enter(namespace)), *words],
        cwd=directory,
        environment={"HOME": str(directory)},
        log=directory / "openbao.log",
        is_up=lambda: _is_unsealed(bao),
    )
    bao = OpenBao(server, namespace, f"http://{address}:{_PORT}")
    try:
        server.start()
        yield bao
    finally:
        server.kill()


def _is_unsealed(bao: OpenBao) -> bool:
    try:
        return bao.read("sys/seal-status")["sealed"] is False
    except OSError:
        return False
