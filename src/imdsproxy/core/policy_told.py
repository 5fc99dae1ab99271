"""A policy as operators are told of it: each rule with the scope that set it, and when the boot is over."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, TypeAlias

from imdsproxy.core.path_rules import PathRules, PathWord, path_of_rule, path_rule_name
from imdsproxy.core.policy import Folded, Guard, boot_ends_at, boot_is_over, render_policy_word
from imdsproxy.core.policy_word import ENDPOINT

__all__ = ["NOBODY", "PolicyInForce", "RuleInForce", "RuleValue", "tell_policy"]

RuleValue: TypeAlias = bool | int | str | tuple[str, ...]

NOBODY: Final = "default"
"""The origin of a rule that no scope sets."""


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """One rule.

    Attributes:
        name: As the settings have it; each path that something is said of has one of its own (`path_rule_name`).
        origin: The scope that set it: `host`, `network`, `project` or `instance`; `default` where nobody did.
    """

    name: str
    value: RuleValue
    origin: str


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """What a guest may read, and who said so.

    Attributes:
        token_epoch: How often the instance's tokens were revoked.
        boot_ends_at: When the boot is over, Unix time; `None` where no source tells when the instance was made.
        boot_over: What is locked after the boot is locked.
        reopened_at: When an operator said that it boots anew, Unix time; `None` for never.
        word: What HAProxy goes by, empty where that is the default.
    """

    rules: tuple[RuleInForce, ...]
    token_epoch: int
    boot_ends_at: int | None
    boot_over: bool
    reopened_at: int | None
    word: str

    @property
    def endpoint_off(self) -> bool:
        """Every request is refused."""
        return bool(self.word) and not ENDPOINT.is_on(self.word)

    @property
    def paths(self) -> PathRules:
        """The rules for paths among them."""
        named = ((path_of_rule(rule.name), rule.value) for rule in self.rules)
        return tuple((path, PathWord(str(word))) for path, word in named if path is not None)


def tell_policy(folded: Folded, guard: Guard, created_at: int | None, now: int) -> PolicyInForce:
    """A policy with its origins.

    Args:
        folded: For one instance in one network.
        guard: What an operator did about the instance.
        created_at: Of the instance, Unix time; `None` where no source tells.
        now: Unix time.
    """
    origins = dict(folded.origins)
    values = {one.name: getattr(folded.policy, one.name) for one in fields(folded.policy)}
    for path, word in values.pop("paths"):
        values[path_rule_name(path)] = word.value
    rules = tuple(
        RuleInForce(name, value, origins[name].value if name in origins else NOBODY)
        for name, value in values.items()
    )
    ends = boot_ends_at(folded.policy, guard, created_at)
    return PolicyInForce(
        rules,
        guard.epoch,
        ends,
        boot_over=boot_is_over(ends, now),
        reopened_at=guard.reopened_at or None,
        word=render_policy_word(folded.policy, guard, created_at),
    )
