"""Rules for guests' reads: policies of the host, networks, projects and instances.

`_Rules` is the table of rules. Settings, records, the admin API, command line flags, reference pages and the policy
word (`model.policy_word`) are derived from it. An instance whose policy is `DEFAULT` has no word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final, Generic, Never, TypeAlias, TypeVar

from imdsproxy.model import path_rules, policy_word
from imdsproxy.model.path_rules import PathRules, PathWord
from imdsproxy.model.policy_word import Letter, Part, render_parts, word_of

_Open = TypeVar("_Open")

Names: TypeAlias = tuple[str, ...]

AUDIENCE_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$"
"""Pattern of an audience: a name, as `vault`, or a URL."""

ANY_AUDIENCE: Final = "*"
AUDIENCE_RULE: Final = r"^([A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}|\*)$"
TAG_RULE: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/@+=-]{0,126}$"
MOST_NAMES: Final = 64
"""Maximum number of names in one list of a rule."""

LONGEST_BOOT_S: Final = 604_800
"""A week."""

BOOT_GRACE_S: Final = 900
"""Default seconds for a boot: a stock image under emulation needs five minutes, a slow disk as long again."""


class TokenMode(StrEnum):
    """Mode of session tokens for reads (EC2's `HttpTokens`, which has no `off`)."""

    OFF = "off"
    """No token route; HAProxy ignores a token header."""

    OPTIONAL = "optional"
    """A client that sends a token must send a valid one."""

    REQUIRED = "required"
    """Every read needs a valid token."""


class PolicyScope(StrEnum):
    FLEET = "fleet"
    HOST = "host"
    FLEET_HOST = "fleet-host"
    """The fleet's rules for this host: as specific as `HOST`."""

    NETWORK = "network"
    PROJECT = "project"
    FLEET_PROJECT = "fleet-project"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a policy.

    Attributes:
        name: Key in settings and records; the flag has hyphens instead of underscores.
        kind: `bool`, `TokenMode`, `int` (within `bounds`), `tuple` for path rules, or `list` for names.
        names: Pattern of each name, if the rule is a list of names; the value is a sorted tuple.
        part: Part of the policy word that holds the rule; `None` if parts of the word are computed from the rule.
        limits: As `Key.limits`: a host that ignored the rule would serve documents that it must refuse.
    """

    name: str
    kind: type[object]
    help: str
    bounds: tuple[int, int] | None = None
    names: str | None = None
    part: Part | None = None
    since: int = 1
    limits: bool = True


def _rule(default: object, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, slots=True)
class _Rules(Generic[_Open]):
    """Table of rules. `_Open` is the type of a rule that is not set; `Never` if every rule is set."""

    endpoint: bool | _Open = _rule(
        True,
        "Answer requests; if off, every request gets 403. On unless a scope sets it.",
        part=policy_word.ENDPOINT,
    )
    tokens: TokenMode | _Open = _rule(
        TokenMode.OPTIONAL,
        "Session tokens (IMDSv2) for the EC2 tree. `optional`: a token that is sent must be valid. `required`: 401 "
        "without one. `off`: no tokens are given. `optional` unless a scope sets it.",
        part=policy_word.TOKENS,
    )
    openstack_tokens: TokenMode | _Open = _rule(
        TokenMode.OPTIONAL,
        "Session tokens for `/openstack`. No client of this tree sends tokens: `required` applies from the end of "
        "the boot on, and then only programs written for it can read the tree.",
        part=policy_word.OPENSTACK_TOKENS,
    )
    nocloud_tokens: TokenMode | _Open = _rule(
        TokenMode.OPTIONAL,
        "Session tokens for `/nocloud`. `required` has the same effect as for `/openstack`.",
        part=policy_word.NOCLOUD_TOKENS,
    )
    boot_grace_s: int | _Open = _rule(
        BOOT_GRACE_S,
        f"Seconds after an instance's creation at which its boot is over; {BOOT_GRACE_S} unless a scope sets it. "
        "Without a creation time, boot counts as finished.",
        bounds=(0, LONGEST_BOOT_S),
    )
    seal_user_data: bool | _Open = _rule(
        False,
        "Refuse user-data with 403 once the boot is over. `imdsproxy instance reopen` opens it again. User-data "
        "often holds passwords, and is needed once.",
        part=policy_word.SEALED,
    )
    refuse_forwarded: bool | _Open = _rule(
        False,
        "Refuse with 403 requests that a web application was tricked into sending (SSRF). These are requests without a "
        "token, token requests too, that have headers of proxies or browsers, or name another host.",
        part=policy_word.FORWARDED,
    )
    hop_limit: int | _Open = _rule(
        64,
        "IP TTL or hop limit of the answer that holds a token: at 1 it reaches no container behind the guest. 64, the "
        "kernel's own, unless a scope sets it; 47 is sent as 46. It has no effect where guests come by the unix "
        "listener.",
        part=policy_word.HOP_LIMIT,
        bounds=(1, 64),
    )
    requests_per_s: int | None = _rule(
        None,
        "Requests a second that an instance may make on average, over the time of `limits` (40 seconds). Where this "
        "or `burst` is set, `limits.requests_per_s` and `limits.burst` are ignored.",
        part=policy_word.REQUESTS_PER_S,
        bounds=(1, 1_000_000),
    )
    burst: int | None = _rule(
        None,
        "Requests of an instance in ten seconds, beside `requests_per_s` or alone.",
        part=policy_word.BURST,
        bounds=(1, 10_000_000),
    )
    connections: int | None = _rule(
        None,
        "Connections of an instance at once, over all its addresses; `limits.connections` unless a scope sets it.",
        part=policy_word.CONNECTIONS,
        bounds=(1, 100_000),
    )
    paths: PathRules | _Open = _rule(
        (),
        "Rules for single paths and everything below them, as `/latest/meta-data/tags: deny`. `latest` stands for "
        "every version. `deny`: 403. `required`: 401 without a token (in `/openstack` and `/nocloud` from the end of "
        "the boot on). `optional`: served without one although the tree takes it. `allow`: served as the tree is. "
        "The most specific scope that has a rule for a path decides, in it the longest.",
    )
    audiences: Names | _Open = _rule(
        (),
        "Audiences for which the instance may request identity tokens (`identity`); `*` for any audience. None unless "
        "a scope sets the list; lists of several scopes are not merged.",
        names=AUDIENCE_RULE,
    )
    identity_tags: Names | _Open = _rule(
        (),
        "Tags of the instance that its identity tokens hold as claims. Tenants choose tags in most clouds, so a "
        "verifier may trust only tags that operators set. None unless a scope sets the list.",
        names=TAG_RULE,
    )
    identity_document: bool | _Open = _rule(
        False,
        "Serve `/latest/dynamic/instance-identity/document` and its signatures, as AWS has them. Off unless a scope "
        "sets it: the document names no audience and has no end, so the owner of a copy can show it for ever; and "
        "programs that find it believe that they run on AWS. It needs `identity.algorithm` RS256.",
        part=policy_word.DOCUMENT,
    )


class Policy(_Rules[Never]):
    """Effective policy of one instance in one network.

    A limit that is `None` is taken from the settings' section `limits`.
    """

    __slots__ = ()


class PolicyRules(_Rules[None]):
    """Rules of one scope; for a rule that is `None`, the less specific scopes decide.

    Path rules of several scopes are merged (`model.path_rules.fold_paths`).
    """

    __slots__ = ()

    def __init__(self, **rules: Any) -> None:
        super().__init__(**dict.fromkeys(RULES) | rules)


_KINDS: Final[Mapping[str, type[object]]] = {"bounds": int, "names": list}

RULES: Final[Mapping[str, Rule]] = {
    one.name: Rule(
        one.name,
        next((kind for key, kind in _KINDS.items() if key in one.metadata), type(one.default)),
        **one.metadata,
    )
    for one in fields(Policy)
}
"""Every rule by its name, in the order of the reference pages."""

DEFAULT: Final = Policy()
NO_RULES: Final = PolicyRules()
_SIMPLE: Final = tuple(name for name in RULES if name != "paths")


@dataclass(frozen=True, slots=True)
class OperatorOverride:
    """Operator's override for one instance; it survives every restart.

    `epoch` counts revocations of its tokens: each token belongs to one epoch. `reopened_at` is the Unix time at which
    an operator started a new boot, 0 for never.
    """

    epoch: int = 0
    reopened_at: int = 0


# Shared, because otherwise every planned record would make its own.
UNTOUCHED: Final = OperatorOverride()


@dataclass(frozen=True, slots=True)
class Folded:
    """Effective policy and the scope of each rule (by name or `path_rule_name`); defaults have no scope."""

    policy: Policy
    origins: tuple[tuple[str, PolicyScope], ...] = ()


_NOTHING_FOLDED: Final = Folded(DEFAULT)


def fold_policy(scopes: Iterable[tuple[PolicyScope, PolicyRules]]) -> Folded:
    """Merge scopes, from the least to the most specific: for each rule and path, the most specific scope wins.

    If a scope comes twice, its later rules win. `model.path_rules.fold_paths` merges path rules.
    """
    values: dict[str, object] = {}
    origins: dict[str, PolicyScope] = {}
    of_paths: list[tuple[PolicyScope, PathRules]] = []
    for scope, rules in scopes:
        if rules is NO_RULES:
            continue
        for name in _SIMPLE:
            value = getattr(rules, name)
            if value is not None:
                values[name] = value
                origins[name] = scope
        if rules.paths:
            of_paths.append((scope, rules.paths))
    if not values and not of_paths:
        return _NOTHING_FOLDED
    if of_paths:
        paths = path_rules.fold_paths(of_paths)
        values["paths"] = tuple((path, word) for path, (word, _) in paths.items())
        origins |= {path_rules.path_rule_name(path): scope for path, (_, scope) in paths.items()}
    return Folded(Policy(**values), tuple(sorted(origins.items())))  # type: ignore[arg-type] # the fields are the same


@dataclass(frozen=True, slots=True)
class FleetRules:
    """Rules of a fleet for guests of one host.

    `replaced_keys` counts the replacements of all the issuer's keys after a theft: no token of before is given.
    """

    everywhere: PolicyRules = NO_RULES
    host: PolicyRules = NO_RULES
    projects: Mapping[str, PolicyRules] = field(default_factory=dict)
    replaced_keys: int = 0


_NO_FLEET: Final = FleetRules()


@dataclass(frozen=True, slots=True)
class PolicyBook:
    """All rules of the settings, operators and the fleet; records bring their own rules.

    A router whose guests share one listener counts as a network.
    """

    host: PolicyRules = NO_RULES
    networks: Mapping[str, PolicyRules] = field(default_factory=dict)
    projects: Mapping[str, PolicyRules] = field(default_factory=dict)
    instances: Mapping[str, PolicyRules] = field(default_factory=dict)
    overrides: Mapping[str, OperatorOverride] = field(default_factory=dict)
    fleet: FleetRules = _NO_FLEET

    def fold(self, place: PolicyPlace) -> Folded:
        return fold_policy(self._scopes(place))

    def override(self, instance: str) -> OperatorOverride:
        return self.overrides.get(instance, UNTOUCHED)

    def _scopes(self, place: PolicyPlace) -> Iterator[tuple[PolicyScope, PolicyRules]]:
        # Settings follow the record of the same scope, because the host's operator overrides it. The fleet's rules of
        # the scope follow both.
        yield PolicyScope.FLEET, self.fleet.everywhere
        yield PolicyScope.HOST, self.host
        yield PolicyScope.FLEET_HOST, self.fleet.host
        yield PolicyScope.NETWORK, place.of_network
        yield PolicyScope.NETWORK, self.networks.get(place.network, NO_RULES)
        if place.project is not None:
            yield PolicyScope.PROJECT, self.projects.get(place.project, NO_RULES)
            yield PolicyScope.FLEET_PROJECT, self.fleet.projects.get(place.project, NO_RULES)
        yield PolicyScope.INSTANCE, place.of_instance
        yield PolicyScope.INSTANCE, self.instances.get(place.instance, NO_RULES)


@dataclass(frozen=True, slots=True)
class PolicyPlace:
    """Instance in one network, with the project of its port."""

    network: str
    project: str | None
    instance: str
    of_network: PolicyRules = NO_RULES
    of_instance: PolicyRules = NO_RULES


def boot_ends_at(policy: Policy, override: OperatorOverride, created_at: int | None) -> int | None:
    """Return the end of the boot, Unix time; `None` without a creation time, so that the boot is over."""
    begun = max(created_at or 0, override.reopened_at)
    return begun + policy.boot_grace_s if begun else None


def boot_is_over(ends_at: int | None, now: int) -> bool:
    """Return whether the boot is over, as HAProxy's rules decide: it is over in the second of its end.

    A boot with an end beyond the longest boot is over too: the clock that gave the creation time or this host's clock
    is wrong, and a clock that is set back must not open anything.
    """
    return ends_at is None or not 0 < ends_at - now <= LONGEST_BOOT_S


def render_policy_word(
    policy: Policy, override: OperatorOverride, created_at: int | None, subject: str = ""
) -> str:
    """Render the word for HAProxy's rules (`model.policy_word`); empty for the default policy.

    `subject` is the id of the instance's `model.subject.Subject`; empty if the instance gets no identity tokens.
    """
    if not subject:
        # Without a subject these three have no effect.
        policy = replace(policy, audiences=(), identity_tags=(), identity_document=False)
    if (policy is DEFAULT or policy == DEFAULT) and override.epoch == 0 and not subject:
        return ""
    modes = (policy.tokens, policy.openstack_tokens, policy.nocloud_tokens)
    # `optional` is the default of the other trees, so it does not bring the token route back if EC2's tree has `off`.
    needed = [path for path, word in policy.paths if word is PathWord.REQUIRED]
    required = TokenMode.REQUIRED in modes or bool(needed) or bool(subject)
    route = policy.tokens is not TokenMode.OFF or required
    boot_counts = TokenMode.REQUIRED in modes[1:] or any(
        path_rules.covers(path, tree) or path_rules.covers(tree, path)
        for path in needed
        for tree in path_rules.WITHIN_OTHER_TREES
    )
    parts: dict[Part, object] = {
        **{one.part: getattr(policy, one.name) for one in RULES.values() if one.part is not None},
        policy_word.TOKEN_ROUTE: route,
        policy_word.BOOT_COUNTS: policy.seal_user_data or boot_counts,
        policy_word.HAS_PATHS: bool(policy.paths),
        # The first epoch is empty, as it is for a record without a word.
        policy_word.EPOCH: override.epoch or None,
        policy_word.BOOT_END: boot_ends_at(policy, override, created_at) or 0,
        policy_word.PATH_SET: path_rules.set_id(policy.paths) if policy.paths else None,
        policy_word.SUBJECT: subject or None,
    }
    return render_parts({part: _part_text(part, value) for part, value in parts.items()})


def _part_text(part: Part, value: object) -> str:
    if isinstance(part, Letter):
        return part.on if value is True or value is TokenMode.REQUIRED else part.off
    return "" if value is None else str(value)


def subject_of(value: str) -> str:
    """Return the id of the subject in a policy word, or in a map value that begins with one; empty for none."""
    return policy_word.SUBJECT.read(word_of(value))


def rule_set_of(value: str) -> str | None:
    """Return the id of the path rule set in a policy word, or in a map value that begins with one."""
    return policy_word.PATH_SET.read(word_of(value)) or None
