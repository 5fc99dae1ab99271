"""The table of policy rules, and the layout of the word that is derived from it."""

from __future__ import annotations

import typing
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core import policy_word
from imdsproxy.core.policy import (
    DEFAULT,
    RULES,
    OperatorOverride,
    Policy,
    PolicyRules,
    Rule,
    TokenMode,
    render_policy_word,
)
from imdsproxy.core.policy_word import Field, Letter, Part
from imdsproxy.core.records import POLICY
from support.record_strategies import policies

_PARTS: dict[str, Part] = {
    name: part for name, part in vars(policy_word).items() if isinstance(part, Letter | Field)
}
_EACH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@_EACH
def test_a_scope_sets_what_the_effective_policy_has_or_leaves_it_open(rule: Rule) -> None:
    effective, scope = (typing.get_type_hints(one)[rule.name] for one in (Policy, PolicyRules))
    assert scope == effective | None
    assert getattr(DEFAULT, rule.name) == rule.default
    assert getattr(PolicyRules(), rule.name) is None


@_EACH
def test_every_rule_has_a_sentence_of_its_own_and_numbers_have_bounds(rule: Rule) -> None:
    summaries = {key.name: key.summary for key in POLICY.keys}
    assert summaries[rule.name].endswith(".")
    assert list(summaries.values()).count(summaries[rule.name]) == 1
    assert (rule.kind is int) == (rule.bounds is not None)


def test_no_two_parts_of_the_word_have_one_place() -> None:
    assert len(set(_PARTS.values())) == len(_PARTS)
    assert {rule.part for rule in RULES.values()} - {None} <= set(_PARTS.values())


@given(policies, st.builds(OperatorOverride, st.integers(0, 99), st.integers(0, 10**9)))
def test_each_part_is_read_from_the_word_as_it_was_written(
    rules: PolicyRules, guard: OperatorOverride
) -> None:
    given = {one.name: getattr(rules, one.name) for one in fields(rules)}
    policy = replace(DEFAULT, **{name: one for name, one in given.items() if one is not None})
    word = render_policy_word(policy, guard, None)
    assert policy_word.word_of(f"{word}|web|r1") == word
    for rule in RULES.values() if word else ():
        value = getattr(policy, rule.name)
        if isinstance(rule.part, Letter):
            assert rule.part.is_on(word) == (value in (True, TokenMode.REQUIRED))
        elif isinstance(rule.part, Field):
            assert rule.part.read(word) == ("" if value is None else str(value))
    assert policy_word.EPOCH.read(word) == str(guard.epoch or "")
