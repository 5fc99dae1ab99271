from __future__ import annotations

from dataclasses import fields

import pytest

from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.policy import (
    Folded,
    OperatorOverride,
    Policy,
    PolicyRules,
    PolicyScope,
    TokenMode,
    fold_policy,
)
from imdsproxy.core.policy_report import DEFAULT_ORIGIN, report_policy

_BORN = 1_795_000_000


def test_every_rule_is_told_with_its_value_and_who_set_it() -> None:
    folded = fold_policy(
        [
            (PolicyScope.HOST, PolicyRules(tokens=TokenMode.REQUIRED, seal_user_data=True)),
            (PolicyScope.INSTANCE, PolicyRules(tokens=TokenMode.OFF)),
        ]
    )
    told = report_policy(folded, OperatorOverride(), None, _BORN)
    names = [one.name for one in fields(Policy) if one.name != "paths"]
    assert [rule.name for rule in told.rules] == names
    by_name = {rule.name: (rule.value, rule.origin) for rule in told.rules}
    assert by_name["tokens"] == ("off", "instance")
    assert by_name["seal_user_data"] == (True, "host")
    assert by_name["hop_limit"] == (64, DEFAULT_ORIGIN)


def test_each_path_is_told_with_who_said_what_of_it() -> None:
    paths = (("/", PathWord.DENY), ("/latest", PathWord.OPTIONAL))
    folded = fold_policy([(PolicyScope.PROJECT, PolicyRules(paths=paths))])
    told = report_policy(folded, OperatorOverride(), None, _BORN)
    assert [(rule.name, rule.value, rule.origin) for rule in told.rules[-2:]] == [
        ("paths./", "deny", "project"),
        ("paths./latest", "optional", "project"),
    ]


@pytest.mark.parametrize(
    ("created_at", "reopened_at", "now", "ends", "over"),
    [
        (None, 0, _BORN, None, True),
        (_BORN, 0, _BORN, _BORN + 60, False),
        (_BORN, 0, _BORN + 59, _BORN + 60, False),
        (_BORN, 0, _BORN + 60, _BORN + 60, True),
        (_BORN, _BORN + 100, _BORN + 60, _BORN + 160, False),
        (_BORN, _BORN - 100, _BORN + 60, _BORN + 60, True),
        (None, _BORN, _BORN, _BORN + 60, False),
        # Clocks that are wrong: this host's has been set back by years, or the one by which it was made is ahead.
        (_BORN, 0, _BORN - 9 * 365 * 86_400, _BORN + 60, True),
        (_BORN + 8 * 86_400, 0, _BORN, _BORN + 8 * 86_400 + 60, True),
        (_BORN, 0, _BORN - 604_740, _BORN + 60, False),
        (_BORN, 0, _BORN - 604_741, _BORN + 60, True),
    ],
)
def test_the_end_of_the_boot_is_the_one_that_haproxy_sees(
    created_at: int | None, reopened_at: int, now: int, ends: int | None, *, over: bool
) -> None:
    folded = Folded(Policy(boot_grace_s=60))
    told = report_policy(folded, OperatorOverride(3, reopened_at), created_at, now)
    assert (told.boot_ends_at, told.boot_over) == (ends, over)
    assert (told.token_epoch, told.reopened_at) == (3, reopened_at or None)
