"""What guests may read and how: the rules of a policy, set for the host, networks, projects and instances.

`_Rules` is the table of rules. Settings, records, the admin API, command line flags, reference pages and the policy
word (`core.policy_word`) are derived from it. An instance whose policy is `DEFAULT` has no word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Generic, Never, TypeVar

from imdsproxy.core import path_rules, policy_word
from imdsproxy.core.path_rules import PathRules, PathWord
from imdsproxy.core.policy_word import Letter, Part, render_parts, word_of

_Open = TypeVar("_Open")

LONGEST_BOOT_S: Final = 604_800
"""A week."""

BOOT_GRACE_S: Final = 900
"""Seconds that a boot may take: a stock image under emulation needs five minutes, a slow disk as long again."""


class TokenMode(StrEnum):
    """Whether reading takes a session token (EC2's `HttpTokens`, which has no `off`)."""

    OFF = "off"
    """There is no token route, and a token is a header like any other."""

    OPTIONAL = "optional"
    """Who sends a token must send a good one."""

    REQUIRED = "required"
    """Nothing is read without one."""


class PolicyScope(StrEnum):
    """Where a rule is set; a later scope is more specific."""

    FLEET = "fleet"
    HOST = "host"
    FLEET_HOST = "fleet-host"
    """Of this host, as its fleet says: as specific as `HOST`."""

    NETWORK = "network"
    PROJECT = "project"
    FLEET_PROJECT = "fleet-project"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a policy.

    Attributes:
        name: The key in settings and records; the flag is the same with hyphens.
        kind: `bool`, `TokenMode`, `int` (within `bounds`), or `tuple` for path rules.
        help: The first sentence is all that `--help` shows.
        part: Where the policy word has it; `None` where parts of the word are computed from it.
        since: As `core.records.schema.Key.since`.
        limits: As `Key.limits`: a host that ignored the rule would serve what it is to refuse.
    """

    name: str
    kind: type[object]
    help: str
    bounds: tuple[int, int] | None = None
    part: Part | None = None
    since: int = 1
    limits: bool = True


def _rule(default: object, text: str, **more: Any) -> Any:  # noqa: ANN401 - as dataclasses.field: it takes the type it stands beside
    """A field of `_Rules` with what else its `Rule` has."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, slots=True)
class _Rules(Generic[_Open]):
    """The table of rules; `_Open` is what stands for a rule that is not set, `Never` where each is."""

    endpoint: bool | _Open = _rule(
        True,
        "Serve at all; off, every request gets 403. On unless a scope sets it.",
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
        "Refuse with 403 what a web application was made to request (SSRF). These are requests without a token, "
        "token requests too, that have headers of proxies or browsers, or name another host.",
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
        "Rules for single paths and what is beneath them, as `/latest/meta-data/tags: deny`. `latest` stands for "
        "every version. `deny`: 403. `required`: 401 without a token (in `/openstack` and `/nocloud` from the end of "
        "the boot on). `optional`: served without one although the tree takes it. `allow`: served as the tree is. "
        "The most specific scope that has a rule for a path decides, in it the longest.",
    )


class Policy(_Rules[Never]):
    """The effective policy of one instance in one network.

    A limit that is `None` is that of the settings' section `limits`.
    """

    __slots__ = ()


class PolicyRules(_Rules[None]):
    """What one scope sets; `None` leaves a rule to the less specific scopes.

    Path rules of one scope are added to those of another (`core.path_rules.fold_paths`).
    """

    __slots__ = ()

    def __init__(self, **rules: Any) -> None:  # noqa: ANN401 - as the rule has it
        super().__init__(**dict.fromkeys(RULES) | rules)


RULES: Final[Mapping[str, Rule]] = {
    one.name: Rule(one.name, int if "bounds" in one.metadata else type(one.default), **one.metadata)
    for one in fields(Policy)
}
"""Every rule by its name, in the order of the reference pages."""

DEFAULT: Final = Policy()
NO_RULES: Final = PolicyRules()
_SIMPLE: Final = tuple(name for name in RULES if name != "paths")


@dataclass(frozen=True, slots=True)
class OperatorOverride:
    """What an operator did about one instance; it outlives every restart.

    Attributes:
        epoch: How often its tokens were revoked; each token is of one epoch.
        reopened_at: When an operator let it boot anew, Unix time; 0 for never.
    """

    epoch: int = 0
    reopened_at: int = 0


# Of each record that is planned, one of each would be made.
UNTOUCHED: Final = OperatorOverride()


@dataclass(frozen=True, slots=True)
class Folded:
    """A policy, and which scope each of its rules comes from; a rule without a scope is the default.

    Attributes:
        origins: By the rule's name; that of one for a path is as `path_rule_name` has it.
    """

    policy: Policy
    origins: tuple[tuple[str, PolicyScope], ...] = ()


_NOTHING_FOLDED: Final = Folded(DEFAULT)


def fold_policy(scopes: Iterable[tuple[PolicyScope, PolicyRules]]) -> Folded:
    """For each rule, and for each path (`core.path_rules.fold_paths`), the most specific scope wins.

    Args:
        scopes: From the least specific to the most. One may come twice, and then its later rules win.
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
    """What a fleet says of guests of this host.

    Attributes:
        everywhere: Of guests of each host of the fleet.
        host: Of all guests of this host.
    """

    everywhere: PolicyRules = NO_RULES
    host: PolicyRules = NO_RULES
    projects: Mapping[str, PolicyRules] = field(default_factory=dict)


_NO_FLEET: Final = FleetRules()


@dataclass(frozen=True, slots=True)
class PolicyBook:
    """All that settings, operators and the fleet say; what records say of themselves comes with the records.

    Attributes:
        networks: By the id of a network, or of a router whose guests come through one listener.
        overrides: What operators did, by instance.
    """

    host: PolicyRules = NO_RULES
    networks: Mapping[str, PolicyRules] = field(default_factory=dict)
    projects: Mapping[str, PolicyRules] = field(default_factory=dict)
    instances: Mapping[str, PolicyRules] = field(default_factory=dict)
    overrides: Mapping[str, OperatorOverride] = field(default_factory=dict)
    fleet: FleetRules = _NO_FLEET

    def fold(self, place: PolicyPlace) -> Folded:
        """What is in force for an instance there."""
        return fold_policy(self._scopes(place))

    def override(self, instance: str) -> OperatorOverride:
        """What an operator did about an instance, or nothing."""
        return self.overrides.get(instance, UNTOUCHED)

    def word(self, place: PolicyPlace, created_at: int | None) -> tuple[str, PathRules]:
        """The word of `render_policy_word`, and the path rules that it refers to."""
        policy = self.fold(place).policy
        return render_policy_word(policy, self.override(place.instance), created_at), policy.paths

    def _scopes(self, place: PolicyPlace) -> Iterator[tuple[PolicyScope, PolicyRules]]:
        # Settings come after the record of the same scope: the host's operator decides last. What a fleet says of the
        # same scope comes after both.
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
    """An instance as one network sees it.

    Attributes:
        project: The port's.
        of_network: What the network's record says.
        of_instance: What the instance's record says.
    """

    network: str
    project: str | None
    instance: str
    of_network: PolicyRules = NO_RULES
    of_instance: PolicyRules = NO_RULES


def boot_ends_at(policy: Policy, override: OperatorOverride, created_at: int | None) -> int | None:
    """When the boot is over, Unix time; `None` without a known begin: then it is over.

    Args:
        policy: What is in force.
        override: What an operator did.
        created_at: Of the instance, Unix time. Without it, boot counts as finished.
    """
    begun = max(created_at or 0, override.reopened_at)
    return begun + policy.boot_grace_s if begun else None


def boot_is_over(ends_at: int | None, now: int) -> bool:
    """As HAProxy's rules see it: in the second that a boot ends it has ended.

    One that would go on for longer than any may is over too: then a clock is wrong, the one by which the instance was
    made or this host's, and a clock that is set back is to open nothing.

    Args:
        ends_at: What `boot_ends_at` says.
        now: Unix time.
    """
    return ends_at is None or not 0 < ends_at - now <= LONGEST_BOOT_S


def render_policy_word(policy: Policy, override: OperatorOverride, created_at: int | None) -> str:
    """The word that HAProxy's rules read (`core.policy_word`); empty for the default policy.

    Args:
        policy: What is in force.
        override: What an operator did.
        created_at: As of `boot_ends_at`.
    """
    if (policy is DEFAULT or policy == DEFAULT) and override.epoch == 0:
        return ""
    modes = (policy.tokens, policy.openstack_tokens, policy.nocloud_tokens)
    # `optional` in the other trees is their default: it is no reason to give tokens where EC2's tree has none.
    needed = [path for path, word in policy.paths if word is PathWord.REQUIRED]
    route = policy.tokens is not TokenMode.OFF or TokenMode.REQUIRED in modes or bool(needed)
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
    }
    return render_parts({part: _part_text(part, value) for part, value in parts.items()})


def _part_text(part: Part, value: object) -> str:
    if isinstance(part, Letter):
        return part.on if value is True or value is TokenMode.REQUIRED else part.off
    return "" if value is None else str(value)


def rule_set_of(value: str) -> str | None:
    """The id of the set of path rules in a policy word, or in a map value that begins with one."""
    return policy_word.PATH_SET.read(word_of(value)) or None
