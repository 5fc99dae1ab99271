"""Parse what a record says of how its guests may read."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.path_rules import (
    MOST_PATH_RULES,
    PathRules,
    PathWord,
    find_path_fault,
    sort_paths,
)
from imdsproxy.core.policy import NOTHING_SAID, RULES, PolicyRules, Rule, TokenMode
from imdsproxy.core.records.fields import Field

__all__ = ["parse_policy"]

_MODES: Final = tuple(mode.value for mode in TokenMode)
_WORDS: Final = tuple(word.value for word in PathWord)


def parse_policy(field: Field) -> PolicyRules:
    """The rules of a mapping, each of which is optional; a rule that is refused is `None`."""
    entries = field.mapping(tuple(RULES))
    if not entries:
        return NOTHING_SAID
    rules = {name: _parse_rule(entry, RULES[name]) for name, entry in entries.items()}
    return PolicyRules(**rules)  # type: ignore[arg-type] # each parser gives what its rule is


def _parse_rule(field: Field, rule: Rule) -> object:
    if rule.bounds is not None:
        return field.whole_number(*rule.bounds)
    if rule.kind is TokenMode:
        return _parse_mode(field)
    return field.boolean() if rule.kind is bool else _parse_paths(field)


def _parse_mode(field: Field) -> TokenMode | None:
    if field.value is False:
        # `off` without quotes is false in YAML 1.1.
        return TokenMode.OFF
    if not isinstance(field.value, str):
        field.refuse("is no mode of tokens", f"one of {', '.join(_MODES)}")
        return None
    word = field.one_of(_MODES)
    return None if word is None else TokenMode(word)


def _parse_paths(field: Field) -> PathRules | None:
    entries = field.mapping() or {}
    if len(entries) > MOST_PATH_RULES:
        field.refuse(f"has {len(entries)} paths", f"at most {MOST_PATH_RULES}")
        return None
    said: list[tuple[str, PathWord]] = []
    for path, entry in entries.items():
        fault = find_path_fault(path)
        if fault is not None:
            entry.refuse(fault.reason, fault.hint)
        elif (word := entry.one_of(_WORDS)) is not None:
            said.append((path, PathWord(word)))
    return sort_paths(said) or None
