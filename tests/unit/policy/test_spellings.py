"""However a path is spelt: what its plain spelling is refused, no other spelling reads.

Nothing here knows which spelling leads where: what the documents have says what policies must refuse. That HAProxy
decides the same of each spelling is in tests/integration/test_access_rules.py; the same of a genuine Nova's documents
in tests/e2e/test_nova_spellings.py.
"""

from __future__ import annotations

from typing import Final

from hypothesis import given, settings

from imdsproxy.core.model import Dialect
from imdsproxy.core.path_rules import PathRules, PathWord
from imdsproxy.core.policy import OperatorOverride, Policy, TokenMode, render_policy_word
from imdsproxy.core.policy_report import decide_read
from support.guest_records import Guest, guest
from support.spellings import HAND_WRITTEN, is_plain_http, spellings

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


@settings(max_examples=1000, derandomize=True, deadline=None, database=None)
@given(target=spellings().filter(is_plain_http))
def test_no_spelling_reads_what_the_plain_one_does_not(target: str) -> None:
    assert not _wrong(target)
