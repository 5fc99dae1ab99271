"""What policies say of paths: how it is written and folded, and that no spelling reads what the plain one does not.

Nothing here knows which spelling leads where: what the documents have says what policies must refuse. That HAProxy
decides the same of each spelling is in tests/integration/test_access_rules.py; the same of a genuine Nova's documents
in tests/e2e/test_nova_spellings.py.
"""

from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.model.entities import Dialect
from imdsproxy.model.path_rules import (
    PathRules,
    PathWord,
    find_path_fault,
    find_rule,
    fold_paths,
    group_sets,
    plain_path,
    render_set,
    set_id,
    undo_spelling,
)
from imdsproxy.model.policy import OperatorOverride, Policy, TokenMode, render_policy_word
from imdsproxy.model.policy_report import decide_read
from support.guest_records import Guest, guest
from support.record_strategies import path_rules, rule_paths
from support.spellings import HAND_WRITTEN, is_plain_http, spellings

_SCOPES = ("host", "network", "project", "instance")


def _plain(target: str) -> str:
    undone = undo_spelling(target.encode())
    assert undone is not None
    return plain_path(undone).decode()


_RIGHT = {
    "/latest/user-data": "/2009-04-04/user-data /ec2/latest/user-data /ec2/2009-04-04/user-data /latest//user-data "
    "/latest/./user-data /latest/user-data/ /latest/user%2ddata /%6Catest/user-data?x=1",
    "/latest": "/1.0",
    "/openstack/latest/user_data": "/openstack/2012-08-10/user_data",
    "/": "/ec2 //",
    "tokens: off": "/latest/api/token /latest/api/token/x",
    "": "/user-data /openstack/Content/0000 /Latest/user-data /latest/../x /latest/%2e%2e/x /latest/%zz /latest/a;b "
    f"/latest/a|b /latest/a\\b /latest/ä latest/user-data http://169.254.169.254/latest * /latest/{'x' * 300}",
}
"""By what is to be written in its place, where that is known."""


@pytest.mark.parametrize(
    ("path", "right"),
    [
        *((path, "") for path in ("", "/latest/a b", "/latest/\n")),
        *((path, right) for right, paths in _RIGHT.items() for path in paths.split()),
    ],
)
def test_any_other_is_refused_and_the_right_one_is_told(path: str, right: str) -> None:
    fault = find_path_fault(path)
    assert fault is not None
    assert fault[0]
    assert fault[1]
    if right:
        assert fault[1] == right
    if right.startswith("/"):
        assert find_path_fault(right) is None
    else:
        assert not fault[1].startswith("/")


@settings(deadline=None)
@given(rule_paths)
def test_a_path_that_can_have_a_rule_is_its_own_plain_spelling(path: str) -> None:
    assert find_path_fault(path) is None
    assert _plain(path) == path


@settings(deadline=None)
@given(st.lists(path_rules, min_size=len(_SCOPES), max_size=len(_SCOPES)), rule_paths)
def test_the_most_specific_scope_that_says_anything_of_a_path_decides_it(
    said: list[PathRules], path: str
) -> None:
    by_scope = list(zip(_SCOPES, said, strict=True))
    wanted = None
    for scope, rules in reversed(by_scope):
        found = find_rule(rules, path)
        if found is not None:
            wanted = (*found, scope)
            break
    folded = fold_paths(by_scope)
    decided = find_rule(tuple((name, word) for name, (word, _) in folded.items()), path)
    assert (None if decided is None else (*decided, folded[decided[0]][1])) == wanted


@settings(deadline=None)
@given(path_rules, rule_paths)
def test_haproxys_longest_key_is_the_rule_that_decides(rules: PathRules, path: str) -> None:
    entries = render_set(rules)
    looked_up = f"{set_id(rules)}|{path}/"
    longest = max((key for key in entries if looked_up.startswith(key)), key=len)
    found = find_rule(rules, path)
    assert entries[longest] == ("a" if found is None else found[1].letter)


@settings(deadline=None)
@given(path_rules, path_rules)
def test_sets_are_told_apart_by_what_they_say(one: PathRules, other: PathRules) -> None:
    assert (set_id(one) == set_id(other)) == (one == other)
    both = {**render_set(one), **render_set(other)}
    assert group_sets(both) == {set_id(one): render_set(one), set_id(other): render_set(other)}


# Spellings

_SECRET: Final = b"#!/bin/sh\n# the user-data of the twin\n"
_ALL: Final = Guest(guest(user_data=_SECRET))
_TREES: Final = {
    dialect: Guest(guest(user_data=_SECRET, dialects=frozenset({dialect}))) for dialect in Dialect
}
_REQUIRED: Final = TokenMode.REQUIRED


def _paths(**words: PathWord) -> PathRules:
    rules = ((f"/{name}" if name != "root" else "/", word) for name, word in words.items())
    return tuple(sorted(rules))


_EVERYWHERE: Final = (
    Policy(tokens=_REQUIRED, openstack_tokens=_REQUIRED, nocloud_tokens=_REQUIRED),
    Policy(paths=_paths(root=PathWord.REQUIRED)),
)
_KEPT: Final = {
    Dialect.EC2: (
        Policy(tokens=_REQUIRED),
        Policy(paths=_paths(root=PathWord.DENY, openstack=PathWord.ALLOW, nocloud=PathWord.ALLOW)),
    ),
    Dialect.OPENSTACK: (
        Policy(openstack_tokens=_REQUIRED),
        Policy(paths=_paths(openstack=PathWord.DENY)),
    ),
    Dialect.NOCLOUD: (
        Policy(nocloud_tokens=_REQUIRED),
        Policy(paths=_paths(nocloud=PathWord.DENY)),
    ),
}
_SEALED: Final = Policy(seal_user_data=True)
_OFF: Final = Policy(endpoint=False)
_NOW: Final = 1_795_000_000


def _is_open(policy: Policy, target: str) -> bool:
    """Whether a guest whose boot is over may read it without a token."""
    word = render_policy_word(policy, OperatorOverride(), 1)
    decided = decide_read(word, _NOW, target, token=False, paths=policy.paths)
    return decided.status not in (400, 401, 403)


def _wrong(target: str) -> list[object]:
    """Under which policies it is read though it must not be."""
    path = target.partition("?")[0]
    found = _ALL.ask(path)
    policies = [_OFF, *(_EVERYWHERE if found.status == 200 else ())]
    if found.status == 200 and _ALL.read(path) == _SECRET:
        policies.append(_SEALED)
    for tree, twin in _TREES.items():
        # The list of trees is of none of them.
        if twin.ask(path).status == 200 and twin.read(path) not in (b"openstack/", b"nocloud/"):
            policies += _KEPT[tree]
    return [policy for policy in policies if _is_open(policy, target)]


def test_no_hand_written_spelling_reads_what_the_plain_one_does_not() -> None:
    targets = list(filter(is_plain_http, HAND_WRITTEN))
    assert {target: wrong for target in targets if (wrong := _wrong(target))} == {}
    # Else nothing would have been tried.
    read = sum(_ALL.ask(target.partition("?")[0]).status == 200 for target in targets)
    assert read > len(HAND_WRITTEN) // 8


@settings(max_examples=settings().max_examples * 10, derandomize=True, deadline=None, database=None)
@given(target=spellings().filter(is_plain_http))
def test_no_spelling_reads_what_the_plain_one_does_not(target: str) -> None:
    assert not _wrong(target)
