"""Moves of a fleet's instances when libvirt migrates their guests.

libvirt runs its hook as `NAME OPERATION SUBOPERATION EXTRA`, with the domain's XML on standard input
(https://libvirt.org/hooks.html). These calls concern a migration:

- `migrate begin -` on the destination, first of all. A failure ends the migration. Output of the hook would replace the
  XML, so the hook prints nothing.
- `release end migrated` on the source, when the guest runs on the destination.
- `release end failed` on the destination, when the migration failed or was canceled.

`started begin` on the destination comes before the guest's memory is copied, so it is ignored.
"""

import asyncio
import json
import sys
from enum import Enum, auto
from http import HTTPStatus
from pathlib import Path
from typing import Final

from imdsproxy.api.client import FleetClient, path_to
from imdsproxy.config.schema import Settings
from imdsproxy.errors import (
    AdminError,
    NotFound,
    RequestRefused,
    SourceUnavailable,
    optional_library,
)
from imdsproxy.fleet.members import LEAVE_PATH, LIBRARY_HINT
from imdsproxy.model.records import Refused
from imdsproxy.sources.fleet.client import HostFiles, HubClient
from imdsproxy.sources.libvirt.xml import parse_domain

MOVER: Final = "mover.pem"
"""Certificate file, beside the host's own, with which a host takes over instances that migrate to it."""

_ANSWER_S: Final = 15.0
"""Timeout of a move; a hub waits up to ten seconds for the host."""


class _Step(Enum):
    TAKE = auto()
    FINISH = auto()
    CANCEL = auto()


def _step(operation: str, suboperation: str, reason: str) -> _Step | None:
    match operation, suboperation, reason:
        case "migrate", "begin", _:
            return _Step.TAKE
        case "release", "end", "migrated":
            return _Step.FINISH
        case "release", "end", "failed":
            return _Step.CANCEL
        case _:
            return None


def follow(settings: Settings, domain: str, operation: str, suboperation: str, extra: str) -> None:
    """Handle one call of the hook, with the domain's XML on standard input.

    Raises:
        AdminError: A hub refuses the move.
        RequestRefused: Standard input is not a domain's XML, or the guest has migrated but its instance is placed on
            this host only.
        SourceUnavailable: No hub answers, or this host does not serve the instance yet.
    """
    step, wanted = _step(operation, suboperation, extra), settings.sources.fleet
    if step is None or not wanted.enabled:
        return
    files = HostFiles.configured(wanted, settings.paths.state_dir)
    mover = files.certificate.with_name(MOVER)
    if step is _Step.TAKE and not mover.exists():
        return
    hubs, ids = wanted.hubs or files.read_hubs(), _read_ids(domain)
    if step is _Step.TAKE:
        host = _name_of(files.certificate)
        _take(FleetClient(mover, hubs, timeout_s=_ANSWER_S, waiting=None), ids, host)
        return
    client = HubClient(files, wanted.timeout_s)
    staying = asyncio.run(_leave(client, hubs, ids, cancel=step is _Step.CANCEL))
    if staying is not None and step is _Step.FINISH:
        raise RequestRefused(
            f"instance {staying} is placed on this host only, but its guest has migrated to another host",
            hint=f"run `imdsproxy instance move {staying} --to HOST --now`",
        )


def _read_ids(domain: str) -> tuple[str, ...]:
    parsed = parse_domain(sys.stdin.read())
    if isinstance(parsed, Refused):
        raise RequestRefused(
            "standard input is not the XML of a domain",
            hint="libvirt runs this command as a hook",
            problems=parsed.problems,
        )
    return tuple(dict.fromkeys((str(parsed.keys.get("id") or parsed.uuid), domain)))


def _take(client: FleetClient, ids: tuple[str, ...], host: str) -> None:
    for one in ids:
        try:
            done = client.request("POST", path_to("instances", one, "move"), body={"to": host})
        except NotFound:
            continue
        if not done["applied"]:
            raise SourceUnavailable(
                f"instance {one} is not served here yet: {'; '.join(done['pending'])}",
                hint="see `imdsproxy status`",
            )
        return


async def _leave(
    client: HubClient, hubs: tuple[str, ...], ids: tuple[str, ...], *, cancel: bool
) -> str | None:
    """End or cancel the move; return the instance that stays on this host, or `None`."""
    for one in ids:
        body = json.dumps({"instance": one, "cancel": cancel}).encode()
        status, answer = await _ask(client, hubs, body)
        if status == HTTPStatus.OK:
            return None if json.loads(answer)["left"] else one
        if status != HTTPStatus.NOT_FOUND:
            raise AdminError(f"a hub answers {status}: {answer.decode(errors='replace')}")
    return None


async def _ask(client: HubClient, hubs: tuple[str, ...], body: bytes) -> tuple[int, bytes]:
    reasons: list[str] = []
    for url in hubs:
        try:
            return await client.request("POST", url, LEAVE_PATH, body=body)
        except SourceUnavailable as error:
            reasons.append(error.message)
    raise SourceUnavailable(
        "; ".join(reasons), hint="run `imdsproxy instance move ID --finish` later"
    )


def _name_of(certificate: Path) -> str:
    with optional_library("cryptography", LIBRARY_HINT):
        from cryptography.x509.oid import NameOID  # only some hosts have it
    from imdsproxy.host.certificates import parse_certificate

    subject = parse_certificate(certificate.read_bytes(), str(certificate)).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
