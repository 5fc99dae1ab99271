"""Requests to the admin APIs of hosts, whichever hub a host is connected to."""

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from imdsproxy.errors import NotFound, SourceUnavailable
from imdsproxy.fleet import codec
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.stream import CONNECT_S
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.hosts.in_force import NOT_CONNECTED

ASK_PATH: Final = "/fleet/ask"
_NO_QUERY: Final[Mapping[str, str | None]] = {}
_ASK_S: Final = 10.0
_BAD: Final = 400
_NOT_FOUND: Final = 404


async def ask_host(
    operations: Operations,
    host: HostId,
    path: str,
    query: Mapping[str, str | None] = _NO_QUERY,
    method: str = "GET",
) -> Any:
    """Return the body of a host's answer to a request, whose query omits `None`.

    A host may be captured: the only guarantee is that the body can be rendered as JSON.

    Raises:
        NotFound: The host answers that something does not exist.
        SourceUnavailable: The host is not connected, does not answer, or answers with another error.
    """
    given = {key: value for key, value in query.items() if value is not None}
    target = f"{path}?{urlencode(given)}" if given else path
    answer = await ask_here(operations, host, target, method)
    if answer is None:
        asked = {"host": host, "path": target, "method": method}
        answers = await operations.peers.ask_all(ASK_PATH, {}, _ASK_S + CONNECT_S, asked)
        answer = next((one for one in answers.values() if "status" in one), None)
    if answer is None:
        raise SourceUnavailable(f"host {host} is {NOT_CONNECTED}", hint="imdsproxy fleet hosts")
    return _read_body(host, answer)


async def ask_here(
    operations: Operations, host: HostId, path: str, method: str
) -> dict[str, Any] | None:
    """Return the answer (`status` and `body`) of a host that is connected to this hub, otherwise `None`."""
    if host not in operations.streams.hosts:
        return None
    answer = await operations.streams.ask(host, path, _ASK_S, method)
    return {"status": answer.status, "body": answer.body}


def _read_body(host: HostId, answer: Json) -> Any:
    status, body = answer.get("status"), answer.get("body")
    if not isinstance(status, int) or not _is_json(body):
        raise odd_answer(host)
    if status < _BAD:
        return body
    message, hint = f"host {host} answered {status}", ""
    if isinstance(body, dict):
        message = f"host {host}: {codec.plain(str(body.get('message', message)))}"
        hint = codec.plain(str(body.get("hint", "")))
    kind = NotFound if status == _NOT_FOUND else SourceUnavailable
    raise kind(message, hint=hint)


def _is_json(body: object) -> bool:
    try:
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def odd_answer(host: HostId) -> SourceUnavailable:
    return SourceUnavailable(
        f"the answer of host {host} is not one of this version of imdsproxy",
        hint=f"check host {host}: another version may run there, or the host may be captured",
    )


async def ask_for_object(
    operations: Operations, host: HostId, path: str, query: Mapping[str, str | None]
) -> Json:
    """Return the body of a host's answer, which must be an object; raise as `ask_host`."""
    body = await ask_host(operations, host, path, query)
    if not isinstance(body, dict):
        raise odd_answer(host)
    return body
