"""Check of the whole chain by which a guest gets into a service, carried out by the guest's host."""

import json
import ssl
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlencode

import httpcore

from imdsproxy.api import guests
from imdsproxy.api.guests import Explanation
from imdsproxy.config.identity import AudienceSettings
from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.parts import Parts
from imdsproxy.errors import NotFound, RequestRefused
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.issuer.check import (
    Answered,
    Chain,
    Finding,
    Link,
    Seen,
    Silent,
    Verdict,
    close_chain,
    failed,
    find_keys_url,
    good,
    judge_keys,
    judge_problem,
    judge_refusal,
    judge_token,
    judge_verifier,
    read_token,
    unchecked,
)
from imdsproxy.issuer.claims import Refusal, is_audience
from imdsproxy.issuer.documents import DISCOVERY_PATH
from imdsproxy.issuer.exchange import Token, parse_shape
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.subject import RESERVED, Subject
from imdsproxy.model.wire import IDENTITY_PATH

_LIMITS: Final = dict.fromkeys(("connect", "read", "write", "pool"), 2.0)
_SIGNING_LIMITS: Final = {**_LIMITS, "read": 5.0}
_MOST_BYTES: Final = 512 * 1024
_LOGIN: Final = "/v1/"


async def check_identity(
    parts: Parts, instance: InstanceId, audience: str, network: NetworkId | None = None
) -> Chain:
    """Check each link until one fails. A token is signed for it; nobody but the verifier of the settings gets it.

    Args:
        network: Network by which the instance asks; `None` takes the first that serves it.

    Raises:
        NotFound: The instance does not exist, or this host gives no identity tokens.
        RequestRefused: The audience has a wrong form.
    """
    if not is_audience(audience):
        raise RequestRefused(f"{audience!r} is no audience", hint="a name, as vault, or a URL")
    if parts.identity is None or not parts.identity.service.needed:
        raise NotFound("this host gives no identity tokens", hint="identity.enabled turns them on")
    keys = guests.list_addresses(parts, instance)
    found: list[Finding] = []
    chosen = [key for key in keys if network in {None, key[0]}]
    async for finding in _walk(parts, parts.identity, instance, chosen, audience):
        found.append(finding)
        if finding.verdict is Verdict.FAILED:
            break
    return close_chain(instance, audience, found)


async def _walk(
    parts: Parts,
    identity: IdentityHost,
    instance: InstanceId,
    keys: list[AddressKey],
    audience: str,
) -> AsyncIterator[Finding]:
    record = await _find_served(parts, instance, keys)
    if isinstance(record, Finding):
        yield record
        return
    yield good(Link.RECORD, f"{record.address} in network {record.network} is served")
    subject = _find_subject(parts, record, audience)
    if isinstance(subject, Finding):
        yield subject
        return
    yield good(Link.POLICY, f"audiences {', '.join(subject.audiences)}, {_origin(record)}")
    token = await _sign(identity, subject, audience)
    if isinstance(token, Finding):
        yield token
        return
    for finding in judge_token(token, parts.clock.now().timestamp()):
        yield finding
    settings = parts.holder.settings.identity
    try:
        trust = ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        reason = f"cannot use {settings.ca_file}: {error.strerror or error}"
        yield failed(Link.ISSUER, reason, "identity.ca_file: a PEM file")
        return
    async with httpcore.AsyncConnectionPool(ssl_context=trust) as pool:
        yield await _check_issuer(pool, token)
        yield await _check_verifier(pool, token, settings.audiences.get(audience))


async def _find_served(
    parts: Parts, instance: InstanceId, keys: list[AddressKey]
) -> Explanation | Finding:
    """Return the explanation of the first address that is served, or the finding that none is."""
    last = None
    for key in keys:
        last = await guests.explain(parts, key, IDENTITY_PATH)
        if last.verdict == "found" and last.instance == instance:
            return last
    hint = f"imdsproxy explain {instance}"
    if last is None:
        return failed(Link.RECORD, "the instance has no address that this host knows", hint)
    where = f"{last.address} in network {last.network}"
    return failed(Link.RECORD, f"{where} is not served: {last.verdict}", hint)


def _find_subject(parts: Parts, record: Explanation, audience: str) -> Subject | Finding:
    """Return the subject of a guest's tokens, or the finding that the policy allows no token."""
    if audience.startswith(RESERVED):
        return failed(Link.POLICY, f"audiences that begin with {RESERVED} are no guest's")
    decided = None if record.decision is None else record.decision.with_token
    if decided is not None and decided.status is not None and decided.rule != "audiences":
        return failed(Link.POLICY, f"{decided.rule} refuses {IDENTITY_PATH}: {decided.why}")
    planned = parts.records.planned((record.network, record.address))
    subject = getattr(getattr(planned, "beside", None), "subject", None)
    if isinstance(subject, Subject) and subject.allows(audience):
        return subject
    allowed = subject.audiences if isinstance(subject, Subject) else ()
    return failed(
        Link.POLICY,
        f"the policy allows {', '.join(allowed) or 'no audience'}, {_origin(record)}, and not {audience}",
        "add the audience to `audiences` in the policy of the host, network, project or instance",
    )


def _origin(record: Explanation) -> str:
    rules = () if record.rules is None else record.rules.rules
    origin = next((one.origin for one in rules if one.name == "audiences"), "default")
    return f"by the policy of {origin}"


async def _sign(identity: IdentityHost, subject: Subject, audience: str) -> Token | Finding:
    """Request a token from the process that answers guests, as a guest's request does."""
    query = urlencode({"subject": subject.id, "audience": audience})
    try:
        async with httpcore.AsyncConnectionPool(uds=str(identity.layout.identity_socket)) as pool:
            url = f"http://identity/check?{query}"
            status, data = await ask(pool, "GET", url, _SIGNING_LIMITS)
        shape: dict[str, Any] = json.loads(data)
        if "problem" in shape:
            return judge_problem(shape)
        answer = parse_shape(shape)
    except (Unanswered, ValueError) as error:
        reason = f"the process that answers guests does not answer: {error}"
        return failed(Link.SIGNER, reason, "journalctl -u imdsproxy-identity")
    if status != HTTPStatus.OK or isinstance(answer, Refusal):
        refused = answer if isinstance(answer, Refusal) else Refusal.REQUEST
        return judge_refusal(refused, audience, in_fleet=identity.fleet is not None)
    return answer


async def _check_issuer(pool: httpcore.AsyncConnectionPool, token: Token) -> Finding:
    issuer = read_token(token)[1]["iss"]
    seen = await _fetch(pool, f"{issuer}{DISCOVERY_PATH}")
    url = find_keys_url(issuer, seen)
    if isinstance(url, Finding):
        return url
    return judge_keys(token, url, await _fetch(pool, url))


async def _check_verifier(
    pool: httpcore.AsyncConnectionPool, token: Token, settings: AudienceSettings | None
) -> Finding:
    """Show the token to the verifier that the settings name; an operator cannot choose another one."""
    if settings is None or settings.verifier_url is None:
        return unchecked(Link.VERIFIER, "identity.audiences has no verifier_url for this audience")
    url = settings.verifier_url
    if settings.verifier_role is None:
        bearer = (("authorization", f"Bearer {token.text}"),)
        return judge_verifier(token, url, await _fetch(pool, url, headers=bearer))
    body = json.dumps({"role": settings.verifier_role, "jwt": token.text}).encode()
    seen = await _fetch(pool, url, method="POST", body=body)
    if isinstance(seen, Answered):
        await _log_out(pool, url, seen)
    return judge_verifier(token, url, seen)


async def _log_out(pool: httpcore.AsyncConnectionPool, url: str, seen: Answered) -> None:
    """Give up a login at OpenBao or Vault, which would last until its end otherwise."""
    try:
        login = json.loads(seen.body)["auth"]["client_token"]
    except (ValueError, KeyError, TypeError):
        return
    base = url.partition(_LOGIN)[0]
    headers = (("x-vault-token", str(login)),)
    await _fetch(pool, f"{base}{_LOGIN}auth/token/revoke-self", method="POST", headers=headers)


async def _fetch(
    pool: httpcore.AsyncConnectionPool,
    url: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: tuple[tuple[str, str], ...] | None = None,
) -> Seen:
    try:
        status, data = await ask(
            pool, method, url, _LIMITS, body=body, headers=headers, most=_MOST_BYTES
        )
    except Unanswered as error:
        return Silent(str(error))
    return Answered(status, data)
