"""What a record says of how its guests may read: a key for each rule of `core.policy`."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.path_rules import (
    MOST_PATH_RULES,
    PathRules,
    PathWord,
    find_path_fault,
    sort_paths,
)
from imdsproxy.core.policy import NO_RULES, RULES, PolicyRules, Rule, TokenMode
from imdsproxy.core.records.fields import Field
from imdsproxy.core.records.schema import SWITCH, Key, Kind, Table, choice_of, number_between

_MODES: Final = tuple(mode.value for mode in TokenMode)
_WORDS: Final = tuple(word.value for word in PathWord)


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
    rules: list[tuple[str, PathWord]] = []
    for path, entry in entries.items():
        fault = find_path_fault(path)
        if fault is not None:
            entry.refuse(fault.reason, fault.hint)
        elif (word := entry.one_of(_WORDS)) is not None:
            rules.append((path, PathWord(word)))
    return sort_paths(rules) or None


_MODE: Final = choice_of(TokenMode)
_KINDS: Final[dict[type[object], Kind]] = {
    bool: SWITCH,
    TokenMode: Kind(_parse_mode, _MODE.schema, _MODE.render),
    tuple: Kind(
        _parse_paths,
        {
            "type": "object",
            "additionalProperties": {"type": "string", "enum": [*_WORDS]},
            "maxProperties": MOST_PATH_RULES,
        },
        lambda rules: {path: word.value for path, word in rules},
    ),
}


def _key(rule: Rule) -> Key:
    kind = _KINDS[rule.kind] if rule.bounds is None else number_between(*rule.bounds)
    return Key(rule.name, kind, rule.help)


POLICY: Final = Table(
    "PolicyRecord",
    PolicyRules,
    "What guests may read and how; what is missing is left to less specific scopes. Settings have the same fields for "
    "the host, networks, projects and instances, and win over a record of the same scope.",
    *map(_key, RULES.values()),
    make=lambda **rules: PolicyRules(**rules) if rules else NO_RULES,
)
