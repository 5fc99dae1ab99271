"""What guests may read and how: said for the host, networks, projects and instances, folded into one word.

The word stands at the head of a record in HAProxy's maps, so that a new policy is in force with the change of an
entry. An instance of which nothing is said that differs from `DEFAULT` has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Final

from imdsproxy.core.path_rules import (
    WITHIN_OTHER_TREES,
    PathRules,
    PathWord,
    covers,
    fold_paths,
    path_rule_name,
    set_id,
)

__all__ = [
    "BOOT_GRACE_S",
    "BOUNDS",
    "DEFAULT",
    "LONGEST_BOOT_S",
    "Folded",
    "Guard",
    "NOTHING_SAID",
    "POLICY_WORD",
    "Policy",
    "PolicyBook",
    "PolicyPlace",
    "PolicyRules",
    "PolicyScope",
    "TokenMode",
    "boot_ends_at",
    "boot_is_over",
    "fold_policy",
    "render_policy_word",
    "rule_set_of",
]

LONGEST_BOOT_S: Final = 604_800
"""A week."""

BOOT_GRACE_S: Final = 900
"""Seconds that a boot may take: a stock image under emulation needs five minutes, a slow disk as long again."""

BOUNDS: Final[Mapping[str, tuple[int, int]]] = {
    "boot_grace_s": (0, LONGEST_BOOT_S),
    "hop_limit": (1, 64),
    "requests_per_s": (1, 1_000_000),
    "burst": (1, 10_000_000),
    "connections": (1, 100_000),
}
"""The least and the most of each number among `PolicyRules`: in settings, in records, and as the schemas show."""

POLICY_WORD: Final = "+"
"""How a record begins that has a policy word; no instance's id and no other kind of record begins so."""

_SET_FIELD: Final = 7


class TokenMode(StrEnum):
    """Whether reading takes a session token (EC2's `HttpTokens`, which has no `off`)."""

    OFF = "off"
    """There is no token route, and a token is a header like any other."""

    OPTIONAL = "optional"
    """Who sends a token must send a good one."""

    REQUIRED = "required"
    """Nothing is read without one."""


class PolicyScope(StrEnum):
    """Where a rule is said; a later one is more specific."""

    HOST = "host"
    NETWORK = "network"
    PROJECT = "project"
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class PolicyRules:
    """What one scope says; `None` leaves it to the less specific ones.

    Attributes:
        endpoint: Off: everything is 403.
        tokens: For EC2's tree, and whether there are tokens at all.
        openstack_tokens: For `/openstack`; no client of that tree sends tokens, so it is locked after the boot only.
        nocloud_tokens: The same for `/nocloud`.
        boot_grace_s: Seconds after the instance's creation at which its boot counts as over.
        seal_user_data: Refuse user-data from then on.
        refuse_forwarded: Without a token, refuse what a web application was made to send: requests with headers of
            browsers and proxies, or for another host.
        hop_limit: IP TTL or hop limit of the answer that has the token, 1 to 64.
        requests_per_s: How much the instance may ask for on average, over as long as settings count.
        burst: Requests in ten seconds. Where this or the one before is said, neither of the settings' counts.
        connections: At once, over all its addresses.
        paths: What is said of single paths (`core.path_rules`); no scope's rules take the place of all of another's.
    """

    endpoint: bool | None = None
    tokens: TokenMode | None = None
    openstack_tokens: TokenMode | None = None
    nocloud_tokens: TokenMode | None = None
    boot_grace_s: int | None = None
    seal_user_data: bool | None = None
    refuse_forwarded: bool | None = None
    hop_limit: int | None = None
    requests_per_s: int | None = None
    burst: int | None = None
    connections: int | None = None
    paths: PathRules | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What is in force for one instance in one network; attributes as of `PolicyRules`.

    Limits that nobody has said anything about are those of the settings' section `limits`, which HAProxy's file has.
    """

    endpoint: bool = True
    tokens: TokenMode = TokenMode.OPTIONAL
    openstack_tokens: TokenMode = TokenMode.OPTIONAL
    nocloud_tokens: TokenMode = TokenMode.OPTIONAL
    boot_grace_s: int = BOOT_GRACE_S
    seal_user_data: bool = False
    refuse_forwarded: bool = False
    hop_limit: int = 64
    requests_per_s: int | None = None
    burst: int | None = None
    connections: int | None = None
    paths: PathRules = ()


DEFAULT: Final = Policy()
NOTHING_SAID: Final = PolicyRules()
_SIMPLE: Final = tuple(one.name for one in fields(PolicyRules) if one.name != "paths")


@dataclass(frozen=True, slots=True)
class Guard:
    """What an operator did about one instance, and what it has been through; it outlives every restart.

    Attributes:
        epoch: How often its tokens were revoked; each token is of one epoch.
        reopened_at: When an operator said that it boots anew, Unix time; 0 for never.
    """

    epoch: int = 0
    reopened_at: int = 0


_UNTOUCHED: Final = Guard()


@dataclass(frozen=True, slots=True)
class Folded:
    """A policy, and which scope each of its rules comes from; what is not there nobody has said.

    Attributes:
        origins: By the rule's name; that of one for a path is as `path_rule_name` has it.
    """

    policy: Policy
    origins: tuple[tuple[str, PolicyScope], ...] = ()


_NOTHING_FOLDED: Final = Folded(DEFAULT)


def fold_policy(said: Iterable[tuple[PolicyScope, PolicyRules]]) -> Folded:
    """The most specific word on each rule wins, and on each path (`core.path_rules.fold_paths`).

    Args:
        said: From the least specific scope to the most; a scope may come twice, and then its later word wins.
    """
    values: dict[str, object] = {}
    origins: dict[str, PolicyScope] = {}
    of_paths: list[tuple[PolicyScope, PathRules]] = []
    for scope, rules in said:
        if rules is NOTHING_SAID:
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
        paths = fold_paths(of_paths)
        values["paths"] = tuple((path, word) for path, (word, _) in paths.items())
        origins |= {path_rule_name(path): scope for path, (_, scope) in paths.items()}
    return Folded(Policy(**values), tuple(sorted(origins.items())))  # type: ignore[arg-type] # the fields are the same


@dataclass(frozen=True, slots=True)
class PolicyBook:
    """All that settings and operators say; what records say of themselves comes with the records.

    Attributes:
        networks: By the id of a network, or of a router whose guests come through one listener.
        guards: What operators did, by instance.
    """

    host: PolicyRules = NOTHING_SAID
    networks: Mapping[str, PolicyRules] = field(default_factory=dict)
    projects: Mapping[str, PolicyRules] = field(default_factory=dict)
    instances: Mapping[str, PolicyRules] = field(default_factory=dict)
    guards: Mapping[str, Guard] = field(default_factory=dict)

    def fold(self, place: PolicyPlace) -> Folded:
        """What is in force for an instance there."""
        return fold_policy(self._said(place))

    def guard(self, instance: str) -> Guard:
        """What an operator did about an instance, or nothing."""
        return self.guards.get(instance, _UNTOUCHED)

    def word(self, place: PolicyPlace, created_at: int | None) -> tuple[str, PathRules]:
        """The word of `render_policy_word`, and the path rules that it refers to."""
        policy = self.fold(place).policy
        return render_policy_word(policy, self.guard(place.instance), created_at), policy.paths

    def _said(self, place: PolicyPlace) -> Iterator[tuple[PolicyScope, PolicyRules]]:
        # Settings come after the record of the same scope: who has the host has the last word.
        yield PolicyScope.HOST, self.host
        yield PolicyScope.NETWORK, place.of_network
        yield PolicyScope.NETWORK, self.networks.get(place.network, NOTHING_SAID)
        if place.project is not None:
            yield PolicyScope.PROJECT, self.projects.get(place.project, NOTHING_SAID)
        yield PolicyScope.INSTANCE, place.of_instance
        yield PolicyScope.INSTANCE, self.instances.get(place.instance, NOTHING_SAID)


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
    of_network: PolicyRules = NOTHING_SAID
    of_instance: PolicyRules = NOTHING_SAID


def boot_ends_at(policy: Policy, guard: Guard, created_at: int | None) -> int | None:
    """When the boot is over, Unix time; `None` where nobody says when it began: then it is over.

    Args:
        policy: What is in force.
        guard: What an operator did.
        created_at: Of the instance, Unix time; one of which nobody says when it was made has booted already.
    """
    begun = max(created_at or 0, guard.reopened_at)
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


def render_policy_word(policy: Policy, guard: Guard, created_at: int | None) -> str:
    """The word that HAProxy's rules read, empty where they do as without one.

    `+` and eight letters, then by colons the epoch (nothing for the first), the end of the boot in Unix time, and the
    hop limit:

        +1troo-sb:2:1795697569:64

    1 or 0: the endpoint; t or -: the token route; then r or o for EC2, OpenStack and NoCloud (the last two from the
    end of the boot on); g or -: what was forwarded is refused; s or -: user-data is sealed from the end of the
    boot on; b or -: something depends on the end of the boot.

    Where a limit is said, the three follow: requests a second, burst, connections, each empty where it is not:

        +1tooo---::0:64:20::

    Where something is said of paths, there is a ninth letter p, and after the limits the id of the rules' set, which is
    in a map of its own (`core.path_rules.render_set`):

        +1tooo---p::0:64::::9f86d081884c7d65

    Args:
        policy: What is in force.
        guard: What an operator did.
        created_at: As of `boot_ends_at`.
    """
    if (policy is DEFAULT or policy == DEFAULT) and guard.epoch == 0:
        return ""
    booted_at = boot_ends_at(policy, guard, created_at) or 0
    modes = (policy.tokens, policy.openstack_tokens, policy.nocloud_tokens)
    # `optional` in the other trees is what nobody said: it is no reason to give tokens where EC2's tree has none.
    needed = [path for path, word in policy.paths if word is PathWord.REQUIRED]
    route = policy.tokens is not TokenMode.OFF or TokenMode.REQUIRED in modes or bool(needed)
    boot_counts = TokenMode.REQUIRED in modes[1:] or any(
        covers(path, tree) or covers(tree, path) for path in needed for tree in WITHIN_OTHER_TREES
    )
    letters = (
        "1" if policy.endpoint else "0",
        "t" if route else "-",
        *("r" if mode is TokenMode.REQUIRED else "o" for mode in modes),
        "g" if policy.refuse_forwarded else "-",
        "s" if policy.seal_user_data else "-",
        "b" if policy.seal_user_data or boot_counts else "-",
        *(("p",) if policy.paths else ()),
    )
    # No epoch is what a record without a word has.
    word = f"{POLICY_WORD}{''.join(letters)}:{guard.epoch or ''}:{booted_at}:{policy.hop_limit}"
    limits = (policy.requests_per_s, policy.burst, policy.connections)
    if limits == (None, None, None) and not policy.paths:
        return word
    last = (set_id(policy.paths),) if policy.paths else ()
    return ":".join((word, *("" if limit is None else str(limit) for limit in limits), *last))


def rule_set_of(value: str) -> str | None:
    """The id of the set of path rules in a policy word, or in a map value that begins with one."""
    if not value.startswith(POLICY_WORD):
        return None
    parts = value.partition("|")[0].split(":")
    return parts[_SET_FIELD] if len(parts) > _SET_FIELD else None
