"""Policy for `explain`: each rule with the scope that sets it, and the policy's effect on one request.

HAProxy's rules (`haproxy/rules/access_rules.cfg`) do not report which of them refused a request. `decide_read`
evaluates the same policy word; an integration test compares the two.
"""

import re
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from imdsproxy.model import path_rules, policy_word
from imdsproxy.model.path_rules import PathRules, PathWord, path_rule_name
from imdsproxy.model.policy import (
    Folded,
    OperatorOverride,
    boot_ends_at,
    boot_is_over,
)

RuleValue: TypeAlias = bool | int | str | tuple[str, ...]

DEFAULT_ORIGIN: Final = "default"
"""Origin of a rule that no scope sets."""


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """Rule in force.

    Attributes:
        name: Name in the settings; each path rule has a name of its own (`path_rule_name`).
        origin: Scope that set the rule: `host`, `network`, `project` or `instance`; `fleet`, `fleet-host` or
            `fleet-project` of a fleet; `default` if no scope set it.
    """

    name: str
    value: RuleValue
    origin: str


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """Policy in force for a guest, with the scope of each rule.

    Attributes:
        token_epoch: Number of times that the instance's tokens were revoked.
        boot_ends_at: End of the boot, Unix time; `None` without a creation time.
        boot_over: Whether the boot is over, so that the rules for the time after it apply.
        reopened_at: Time at which an operator started a new boot, Unix time; `None` for never.
        of_fleet: Whether a fleet's keys sign the tokens, so that the fleet's operators revoke them.
    """

    rules: tuple[RuleInForce, ...]
    token_epoch: int
    boot_ends_at: int | None
    boot_over: bool
    reopened_at: int | None
    word: str
    of_fleet: bool = False


def report_policy(
    folded: Folded, override: OperatorOverride, created_at: int | None, now: int, word: str
) -> PolicyInForce:
    """Describe a policy; `word` is the policy word of the guest's record."""
    origins: dict[str, str] = dict(folded.origins)
    values: dict[str, Any] = {
        one.name: getattr(folded.policy, one.name) for one in fields(folded.policy)
    }
    for path, effect in values.pop("paths"):
        values[path_rule_name(path)] = effect.value
    rules = tuple(
        RuleInForce(name, value, origins.get(name, DEFAULT_ORIGIN))
        for name, value in values.items()
    )
    ends = boot_ends_at(folded.policy, override, created_at)
    return PolicyInForce(
        rules,
        override.epoch,
        ends,
        boot_over=boot_is_over(ends, now),
        reopened_at=override.reopened_at or None,
        word=word,
    )


_TOKEN_ROUTE: Final = path_rules.TOKEN_PATH.encode()
_UP: Final = re.compile(rb"(?:^|/)\.\.(?:/|$)")
_TREES: Final = (
    ("openstack_tokens", "/openstack", policy_word.OPENSTACK_TOKENS),
    ("nocloud_tokens", "/nocloud", policy_word.NOCLOUD_TOKENS),
)
_USER_DATA: Final = re.compile(rb"/(?:openstack/[^/]+/user_data|[^/]+/user-data)(?:/|$)")


@dataclass(frozen=True, slots=True)
class Decided:
    """Decision of the policy on a GET. It does not say whether the document exists.

    Attributes:
        status: Status of the refusal; `None` if the policy allows the request.
        rule: Deciding rule, by its name in the settings or by `path_rule_name`; `path` if the path itself is refused;
            empty if nothing is refused.
    """

    status: int | None
    rule: str = ""
    why: str = ""


_PASSES: Final = Decided(None)


def decide_read(word: str, now: int, target: str, *, token: bool, paths: PathRules = ()) -> Decided:
    """Return the policy's decision on `GET target`.

    Args:
        word: Policy word of the record (`model.policy.render_policy_word`).
        target: Path and query as the guest would send them.
        paths: Path rules of the set to which the word refers.
    """
    path = target.partition("?")[0].encode()
    # With tokens off and defaults otherwise there is nothing to check.
    nothing = word.startswith(policy_word.ONLY_TOKENS_OFF) if word else not token
    if nothing and path != _TOKEN_ROUTE:
        return _PASSES
    undone = path_rules.undo_spelling(path)
    if word and not policy_word.ENDPOINT.is_on(word):
        return Decided(403, "endpoint", "the endpoint is off")
    if word and (undone is None or _UP.search(undone) or b"%00" in path):
        return Decided(400, "path", "no document has this path; it would evade a rule")
    if undone is None:
        return _PASSES
    if undone.endswith((b"/api/token", b"/api/token/")):
        return _token_route(word, undone, below_ec2=path_rules.is_below_ec2(path))
    return _read(word, now, undone, paths, token=token) if word else _PASSES


def _token_route(word: str, path: bytes, *, below_ec2: bool) -> Decided:
    if word and not policy_word.TOKEN_ROUTE.is_on(word):
        return Decided(404, "tokens", "no tokens are given")
    if below_ec2 or path.rstrip(b"/") != _TOKEN_ROUTE:
        return Decided(404, "tokens", "only /latest gives tokens")
    return Decided(405, "tokens", "only PUT gets a token")


def _read(word: str, now: int, path: bytes, paths: PathRules, *, token: bool) -> Decided:
    booted = boot_is_over(int(policy_word.BOOT_END.read(word)), now)
    tree, rule, required = "EC2's tree", "tokens", policy_word.TOKENS.is_on(word)
    for name, begin, mode in _TREES:
        if path.startswith(begin.encode()):
            tree, rule, required = begin, name, mode.is_on(word)
    locked = rule == "tokens" or booted
    since = "" if rule == "tokens" else ", since the boot is over"
    found = path_rules.find_rule(paths, path_rules.plain_path(path).decode("latin-1"))
    if found is not None:
        by, what = path_rule_name(found[0]), f"{found[0]} and everything below it"
        if found[1] is PathWord.DENY:
            return Decided(403, by, f"{what} is denied")
        if found[1] is PathWord.REQUIRED and locked and not token:
            return Decided(401, by, f"{what} needs a token{since}")
        if found[1] is not PathWord.ALLOW:
            required = False
    if required and not token and locked:
        return Decided(401, rule, f"{tree} needs a token{since}")
    if policy_word.SEALED.is_on(word) and booted and _USER_DATA.match(path):
        return Decided(403, "seal_user_data", "user-data is sealed, since the boot is over")
    return _PASSES
