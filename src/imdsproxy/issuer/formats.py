"""Forms in which a guest gets its token."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from shlex import quote

from imdsproxy.issuer.exchange import Token

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"


class TokenFormat(StrEnum):
    TEXT = "text"
    """The token alone."""

    JSON = "json"
    EXEC_CREDENTIAL = "execcredential"
    """Answer of an exec plug-in of kubectl (client.authentication.k8s.io/v1), so that curl can be the plug-in."""

    ENV = "env"
    """Assignments for a shell's `eval`."""


def render_token(token: Token, form: TokenFormat) -> tuple[str, str]:
    ends = f"{datetime.fromtimestamp(token.expires_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
    match form:
        case TokenFormat.TEXT:
            return _TEXT, token.text
        case TokenFormat.JSON:
            return _JSON, json.dumps({"token": token.text, "expires_at": ends})
        case TokenFormat.EXEC_CREDENTIAL:
            shape = {
                "apiVersion": "client.authentication.k8s.io/v1",
                "kind": "ExecCredential",
                "status": {"token": token.text, "expirationTimestamp": ends},
            }
            return _JSON, json.dumps(shape)
        case TokenFormat.ENV:
            values = {"IMDSPROXY_TOKEN": token.text, "IMDSPROXY_TOKEN_EXPIRES_AT": ends}
            return _TEXT, "".join(f"export {name}={quote(one)}\n" for name, one in values.items())
