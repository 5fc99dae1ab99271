"""Operators' questions about guests: owner of an address with reasons, and answers to the guest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import Final, assert_never

from imdsproxy.api.bodies import DocumentBody, DocumentView
from imdsproxy.api.records import no_such, refuse_unknown
from imdsproxy.controller.lookup import Lookup
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.record_plan import GuestPolicy, record_key
from imdsproxy.documents.resolver_app import CollectedAnswer, GuestRequest
from imdsproxy.errors import NotFound, RuntimeUnavailable
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.model import entities, identity, policy_word
from imdsproxy.model.identity_paths import METHODS, IdentityPlace, decide_identity, list_guards
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Claimant, Expired, SourceName
from imdsproxy.model.path_rules import PathRules
from imdsproxy.model.policy_report import Decided, PolicyInForce, decide_read, report_policy
from imdsproxy.model.wire import (
    DOCUMENT_PATHS,
    HEADER_AUDITED,
    MISMATCH_TEXT,
    NovaRecord,
    hide_signatures,
)
from imdsproxy.network.anti_spoofing.plan import ANY_MAC, plan_pair
from imdsproxy.network.endpoints import networks_of
from imdsproxy.network.listeners.loop import ListenerLoop
from imdsproxy.sources.api import LookUpUnavailable, PortAmbiguous, PortFound, PortMissing

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Form of the ids that Neutron generates."""

_COMMON: Final[Mapping[entities.Dialect, str]] = {
    entities.Dialect.EC2: "/latest/meta-data/",
    entities.Dialect.OPENSTACK: "/openstack/latest/meta_data.json",
    entities.Dialect.NOCLOUD: "/nocloud/meta-data",
}


@dataclass(frozen=True, slots=True)
class PairReport:
    """An address and its MAC, in a network that checks MACs.

    Attributes:
        expected: The MAC that the records require; `*` for any, `None` if no instance has the address.
        granted: The MAC that the kernel lets through to HAProxy's quick answers.
        gate: True if the network has a MAC filter; without a filter, guests with a MAC in their records get no answer.
    """

    seen: entities.MacAddress | None
    expected: entities.MacAddress | None
    granted: entities.MacAddress | None
    gate: bool


@dataclass(frozen=True, slots=True)
class NicReport:
    """A NIC of the record.

    Attributes:
        seen: The MACs in the neighbour table for the NIC's addresses: the MACs of the guest's real NICs.
    """

    network: entities.NetworkId
    mac: entities.MacAddress
    seen: tuple[entities.MacAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class PathDecision:
    """Decision of the policy on a request, whether or not the document exists.

    Attributes:
        without_token: Decision if the guest sends no session token.
        with_token: Decision if the guest sends a valid session token.
        method: GET, or the method by which guests request identity tokens at this path.
        guards: Other conditions of a request for identity, one sentence each.
    """

    path: str
    without_token: Decided
    with_token: Decided
    method: str = "GET"
    guards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """A GET as the guest sends it, without a session token, and the status of its answer."""

    path: str
    status: int


@dataclass(slots=True)
class Explanation:
    """Identity of a guest, the reasons for it, and the guest's answers.

    Attributes:
        verdict: `found`, `unknown`, `mismatch`, `conflict`, `expired`, `no-network` or `not-served`.
        answer: The HTTP status of a document of an enabled dialect: 200, 403, 404 or 503; `None` if Nova answers the
            request and decides.
        token_paths: Paths of documents that get 401 now without a session token, one path of each tree.
        why: The steps that led to the verdict, one sentence each, in order.
        how: `address`, `eui64`, `neighbour` or `router` if an instance was found.
        installed: The value in the map of HAProxy's worker; `None` if the map has no value or the worker does not
            answer.
        policy: Settings that apply to the guest's requests, by name (dialects, endpoint, hold).
        pair: The address and its MAC; `None` if the network does not check MACs.
        nics: The record's NICs, if an instance was found.
        rules: The guest's read permissions and the scopes that set them, if an instance was found.
        decision: The policy's decision, if a path was given and an instance was found.
        probe: The result of the GET, if a probe was requested.
    """

    network: entities.NetworkId
    address: entities.IpAddress
    verdict: str
    answer: int | None
    token_paths: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    instance: entities.InstanceId | None = None
    instance_name: str | None = None
    source: SourceName | None = None
    how: str | None = None
    revision: str | None = None
    installed: str | None = None
    claimants: tuple[Claimant, ...] = ()
    policy: Mapping[str, str] = field(default_factory=dict)
    pair: PairReport | None = None
    nics: tuple[NicReport, ...] = ()
    rules: PolicyInForce | None = None
    decision: PathDecision | None = None
    probe: Probe | None = None

    def add(self, *steps: str) -> None:
        self.why += steps


@dataclass(frozen=True, slots=True)
class _Owner:
    """Owner of an address.

    Attributes:
        at: The address by which the records know the instance; behind a router, an address in another network.
        why: The explanation of a source that was queried, in place of the records.
    """

    known: identity.Identity
    at: AddressKey
    why: str = ""
    denial: identity.Denial | None = None


async def get_document(
    parts: Parts, key: AddressKey, path: str, instance: entities.InstanceId | None = None
) -> DocumentView:
    """Return the answer that the guest at an address gets to `GET path` (with its query).

    The request leaves no trace. An unknown guest gets the answer for unknown guests, without being held.

    Raises:
        NotFound: The network does not exist, or the address does not belong to `instance`.
    """
    lookup = parts.lookup
    if not _may_know(lookup, key[0]):
        raise no_such("network", key[0])
    owner = await _owner(lookup, key)
    if instance is not None and not (
        isinstance(owner.known, identity.Found) and owner.known.instance.id == instance
    ):
        raise NotFound(
            f"{key[1]} in network {key[0]} is not instance {instance}'s on this host",
            hint="try again: a change may be on its way",
        )
    if isinstance(owner.known, identity.Found):
        # An operator asks, so there is no MAC to check.
        outcome = lookup.known(owner.known.instance, key)
    else:
        outcome = owner.denial or identity.deny(owner.known, in_sync=lookup.inventory.in_sync)
    if isinstance(outcome, identity.Denial):
        body = DocumentBody(text=MISMATCH_TEXT if outcome is identity.Denial.MISMATCH else "")
        again = [["retry-after", "5"]] if outcome is identity.Denial.CONFLICT else []
        return DocumentView(status=outcome.status, headers=again, body=body)
    answer = CollectedAnswer()
    request = GuestRequest(key, "GET", path.encode("utf-8"), by_operator=True)
    await parts.forward(outcome, request, answer.take)
    sent = ([name.decode("latin-1"), value.decode("latin-1")] for name, value in answer.headers)
    headers = [header for header in sent if header[0] != HEADER_AUDITED]
    body = DocumentBody.of(bytes(answer.body))
    return DocumentView(status=answer.status, headers=headers, body=body)


def _may_know(lookup: Lookup, network: entities.NetworkId) -> bool:
    return lookup.inventory.knows(network) or lookup.source is not None


def list_addresses(parts: Parts, instance: entities.InstanceId) -> list[AddressKey]:
    """Return the addresses of the instance for `explain`; raise `NotFound` if the instance does not exist."""
    refuse_unknown(parts.inventory, instance)
    keys = parts.records.addresses_of(instance)
    # Few guests send requests from a link-local address, made of the MAC, if they have another address.
    chosen = {key for key in keys if not key[1].is_link_local} or keys
    return sorted(chosen, key=lambda key: (key[0], key[1].version, int(key[1])))


async def explain(
    parts: Parts, key: AddressKey, path: str | None = None, *, probe: bool = False
) -> Explanation:
    """Explain which instance owns an address in a network, or behind a router; never raises for an unknown address.

    Args:
        path: Also show the policy's decision on a GET of this path, or on the request for identity there.
        probe: Also send a GET of `path`, or of a document that every instance has.
    """
    network, lookup, listeners = key[0], parts.lookup, parts.listeners
    if not _may_know(lookup, network):
        return Explanation(*key, "no-network", 404, why=(f"no source reports network {network}",))
    owner, inventory = await _owner(lookup, key), lookup.inventory
    found = Explanation(*key, "found", None, why=(_origin(inventory, listeners, network),))
    wrong = [one.reason for one in listeners.degraded() if one.network == network]
    found.add(*(f"its listener is not as it should be: {reason}" for reason in wrong))
    if identity.checks_macs(inventory, network):
        found.pair = await _explain_pair(lookup, key, found)
        await parts.forged_claims.refresh()
        if claimants := ", ".join(parts.forged_claims.claimants(key)):
            claimed = f"claimed by {claimants} by ARP or ND in the last ten minutes"
            found.add(f"it was {claimed}; the MAC above gets its answers all the same")
    if owner.at != key:
        found.add(f"router {network} leads to network {owner.at[0]}")
    if isinstance(owner.known, identity.Found):
        _explain_found(parts, found, owner.at, owner.known, path)
    else:
        denial = owner.denial or identity.deny(owner.known, in_sync=inventory.in_sync)
        _explain_denied(found, owner, owner.known, denial)
    served = networks_of(listeners.last_plan.endpoints)
    if not (network in served if network in inventory.networks else listeners.unix.serving):
        # Without a listener the guest gets no answer at all.
        found.verdict, found.answer = "not-served", 503
    if probe:
        asked = path or _common_path(inventory, found.instance)
        found.probe = Probe(asked, (await get_document(parts, key, asked)).status)
    found.nics = await _nics(lookup, found.instance)
    found.installed = await _installed(parts, key)
    return found


def _common_path(inventory: Inventory, instance: entities.InstanceId | None) -> str:
    record = instance and inventory.instances.get(instance)
    dialects = record.dialects if record else frozenset(entities.Dialect)
    return next((path for dialect, path in _COMMON.items() if dialect in dialects), "/")


def _origin(inventory: Inventory, listeners: ListenerLoop, network: entities.NetworkId) -> str:
    if sources := inventory.sources_of_network(network):
        return f"network {network} comes from {', '.join(sources)}"
    why = "its guests come through the unix listener"
    unreported = f"no source reports how {network} is reached: {why}"
    if listeners.unix.serving:
        return unreported
    problem = listeners.unix.problem
    return f"{unreported}, which is {'off' if problem is None else f'not served: {problem.reason}'}"


async def _owner(lookup: Lookup, key: AddressKey) -> _Owner:
    """Return the owner by the records, else by the source that can be queried, whose answer is then put in force."""
    source, found = lookup.source, await lookup.identify(key)
    if source is None or not isinstance(found, identity.Unknown):
        return _Owner(found, key)
    declared = lookup.inventory.networks.get(key[0])
    # Only a request shows whether an id without a record is a router's.
    scopes = (
        (entities.Scope.NETWORK, entities.Scope.ROUTER) if declared is None else (declared.scope,)
    )
    for scope in scopes:
        match await lookup.ask(key, scope):
            case PortFound(network=network):
                # The look-up puts the guest in force, as a request would.
                await lookup.look(key, scope)
                if scope is entities.Scope.NETWORK:
                    return _Owner(await lookup.identify(key), key)
                at = (network, key[1])
                return _Owner(identity.identify(lookup.inventory, *at), at)
            case PortAmbiguous(count=count):
                ports = f"{count} ports of {source.name} have the address there"
                return _Owner(
                    found, key, f"{ports}; imdsproxy does not guess which guest sends the request"
                )
            case LookUpUnavailable(reason=reason):
                why = f"no record has the address, and {source.name} does not answer: {reason}"
                return _Owner(found, key, why, identity.Denial.UNAVAILABLE)
            case PortMissing() | None:
                pass
            case _ as never:
                assert_never(never)
    why = f"{source.name} was asked and has no port that may get metadata"
    if declared is None and not _UUID.fullmatch(key[0]):
        why += f"; it knows networks and routers by their ids, and {key[0]} is no UUID"
    return _Owner(found, key, why)


def _explain_denied(
    found: Explanation,
    owner: _Owner,
    known: identity.Unknown | identity.Ambiguous | identity.Mismatch | Expired,
    denial: identity.Denial,
) -> None:
    found.verdict, found.answer = denial.value, denial.status
    match known:
        case identity.Ambiguous(claimants=claimants):
            found.add("more than one record claims the address, and none is preferred")
            found.claimants = claimants
        case identity.Mismatch(instance=instance, expected=expected):
            found.add(f"instance {instance.id} has {found.address} with MAC {expected} only")
            found.instance, found.instance_name = instance.id, instance.name
        case Expired(instance, sources):
            found.verdict, found.instance = "expired", instance
            found.add(
                f"{' and '.join(sources)} may have removed instance {instance} since they were last reached, longer "
                "ago than sources.fleet.serve_without_hubs_s allows: nothing is risked until a hub is reached"
            )
        case identity.Unknown(reason=reason):
            found.verdict = "unknown"
            found.add(owner.why or reason.value)
            if owner.denial is None and denial is identity.Denial.UNKNOWN:
                found.add("requests are held for a while, then answered 404")
            elif owner.denial is None:
                found.add("a source is not in sync: it may still come")


def _explain_found(
    parts: Parts,
    found: Explanation,
    at: AddressKey,
    known: identity.Found,
    path: str | None,
) -> None:
    instance, lookup, records = known.instance, parts.lookup, parts.lookup.records
    key = found.network, found.address
    found.add(f"instance {instance.id} has {at[1]}, known by {known.how.value}")
    if lookup.source is not None and (seen := lookup.source.explain_freshness(*at)) is not None:
        found.add(seen)
    now, project = int(lookup.clock.now().timestamp()), known.port.project or instance.project
    book = records.policies()
    in_force = records.planner().find_policy(key[0], project, instance)
    folded = in_force.folded
    override = book.override(instance.id)
    rules = report_policy(folded, override, instance.created_at, now, in_force.word)
    of_fleet = parts.policy_store.is_of_fleet(instance.id)
    found.rules = replace(rules, of_fleet=of_fleet)
    paths = folded.policy.paths
    if path is not None:
        found.decision = _decide(parts, found.network, instance, in_force, path)
    if instance.upstream is entities.Upstream.EMBEDDED:
        found.policy = {"dialects": ", ".join(sorted(instance.dialects)) or "none"}
        found.answer = 200 if instance.dialects else 404
        problem = parts.probe.failure
        if problem is not None:
            found.add(f"no document is answered now: {problem.reason}")
        if problem is not None or not parts.companion.needed:
            found.answer = 503
    elif isinstance(record := records.planned(key), NovaRecord):
        found.policy = {
            "upstream": "nova",
            "endpoint set": record.endpoint_set,
            "project": record.project,
        }
    else:
        found.policy = {"upstream": "nova", "endpoint set": "none: guests get 503"}
        found.answer = 503
    if not folded.policy.endpoint:
        found.answer = 403
    found.token_paths = tuple(
        one
        for dialect, one in _COMMON.items()
        if dialect in instance.dialects or instance.upstream is entities.Upstream.NOVA
        if _needs_token(found.rules.word, now, one, paths)
    )
    found.instance, found.instance_name = instance.id, instance.name
    found.source = ", ".join(lookup.inventory.sources_of_instance(instance.id))
    found.how = (known.how if at == key else identity.How.ROUTER).value
    found.revision = records.compiler.revisions.get(instance.id)


def _decide(
    parts: Parts,
    network: entities.NetworkId,
    instance: entities.Instance,
    in_force: GuestPolicy,
    path: str,
) -> PathDecision:
    """Return the policy's decision on a request to a path, without and with a session token."""
    now, name = int(parts.clock.now().timestamp()), path.partition("?")[0]
    place = find_identity_place(parts, network, in_force)
    # Nova answers requests for documents that the policy does not allow, and each request while identity is off.
    allowed = name not in DOCUMENT_PATHS or policy_word.DOCUMENT.is_on(place.word)
    ours = place.enabled and allowed
    if name in METHODS and (ours or instance.upstream is entities.Upstream.EMBEDDED):
        by = partial(decide_identity, place, now, path)
        guards = list_guards(place, name)
        return PathDecision(path, by(token=False), by(token=True), METHODS[name], guards)
    decide = partial(decide_read, place.word, now, path, paths=place.paths)
    return PathDecision(path, decide(token=False), decide(token=True))


def find_identity_place(
    parts: Parts, network: entities.NetworkId, in_force: GuestPolicy
) -> IdentityPlace:
    """Return the facts on which a guest's requests for identity in a network depend."""
    return IdentityPlace(
        parts.listeners.hop_limits.effective(network, in_force.word),
        in_force.folded.policy.paths,
        in_force.beside.subject,
        parts.holder.settings.identity.openstack_audience,
        parts.records.planner().identity,
    )


def _needs_token(word: str, now: int, path: str, paths: PathRules) -> bool:
    without = decide_read(word, now, path, token=False, paths=paths)
    return without.status == HTTPStatus.UNAUTHORIZED


async def _explain_pair(lookup: Lookup, key: AddressKey, found: Explanation) -> PairReport:
    """Explain how MACs affect the answer, in a network that checks MACs."""
    filters = lookup.mac_filters
    neighbour, refusal = await lookup.last_seen(key)
    seen = neighbour if refusal is None else refusal.mac
    granted, filtered = filters.granted(key), filters.is_up(key[0])
    found.add(f"it was last seen with MAC {seen}" if seen else "no MAC was seen with it")
    if refusal is not None and neighbour not in {None, refusal.mac}:
        age_s = lookup.clock.monotonic() - refusal.at
        refused = f"its request was refused {age_s:.0f} s ago"
        found.add(f"{refused}; the neighbour table has MAC {neighbour}")
    if granted == ANY_MAC:
        found.add("the MAC filter lets it through with any MAC: no record has one")
    elif granted is not None:
        found.add(f"the MAC filter lets it through with MAC {granted} only")
    elif filtered:
        found.add("the MAC filter has no pair for it: each request goes to the resolver")
    if not filtered and not filters.is_plain(key[0]):
        found.add("there is no MAC filter: no guest with a MAC in its record is answered")
    wanted = plan_pair(lookup.inventory, key, lookup.records.learned)
    return PairReport(seen, wanted, granted, filtered)


async def _nics(lookup: Lookup, instance: entities.InstanceId | None) -> tuple[NicReport, ...]:
    known, nics = instance and lookup.inventory.instances.get(instance), []
    for port in known.ports if known else ():
        if port.mac is not None:
            met = [await lookup.neighbour((port.network, one)) for one in port.addresses]
            seen = tuple(dict.fromkeys(mac for mac in met if mac is not None))
            nics.append(NicReport(port.network, port.mac, seen))
    return tuple(nics)


async def _installed(parts: Parts, key: AddressKey) -> str | None:
    haproxy, layout = parts.haproxy, parts.haproxy.layout
    if (worker := haproxy.worker) is None:
        return None
    try:
        for path in (layout.overlay_map, layout.base_map):
            value = await haproxy.master.read_entry(worker, str(path), record_key(key))
            if value is not None:
                return hide_signatures(value)
    except (WorkerEnded, RuntimeUnavailable):
        return None
    return None
