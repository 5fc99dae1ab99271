from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.path_rules import PathRules, PathWord, set_id
from imdsproxy.core.policy import (
    DEFAULT,
    OperatorOverride,
    Policy,
    PolicyBook,
    PolicyPlace,
    PolicyRules,
    PolicyScope,
    TokenMode,
    render_policy_word,
    rule_set_of,
)

_REQUIRED = PolicyRules(tokens=TokenMode.REQUIRED)
_OFF = PolicyRules(tokens=TokenMode.OFF)
_PLACE = PolicyPlace("red", "acme", "web")
_BORN = 1_795_000_000


@pytest.mark.parametrize(
    ("book", "mode"),
    [
        (PolicyBook(), TokenMode.OPTIONAL),
        (PolicyBook(host=_REQUIRED), TokenMode.REQUIRED),
        (PolicyBook(host=_REQUIRED, networks={"red": _OFF}), TokenMode.OFF),
        (PolicyBook(networks={"red": _OFF}, projects={"acme": _REQUIRED}), TokenMode.REQUIRED),
        (PolicyBook(projects={"acme": _OFF}, instances={"web": _REQUIRED}), TokenMode.REQUIRED),
        (PolicyBook(networks={"blue": _REQUIRED}, projects={"b": _OFF}), TokenMode.OPTIONAL),
    ],
)
def test_an_instances_word_counts_before_its_projects_its_networks_and_the_hosts(
    book: PolicyBook, mode: TokenMode
) -> None:
    assert book.fold(_PLACE).policy.tokens is mode


def test_settings_have_the_last_word_over_a_record_of_the_same_scope() -> None:
    place = PolicyPlace("red", None, "web", of_network=_OFF, of_instance=_OFF)
    assert PolicyBook(networks={"red": _REQUIRED}).fold(place).policy.tokens is TokenMode.OFF
    book = PolicyBook(instances={"web": _REQUIRED})
    assert book.fold(place).policy.tokens is TokenMode.REQUIRED


_DENIED: PathRules = (("/latest/user-data", PathWord.DENY),)
_SET = set_id(_DENIED)
_NO_TOKENS = Policy(
    tokens=TokenMode.OFF, openstack_tokens=TokenMode.OFF, nocloud_tokens=TokenMode.OFF
)
_SEALED = Policy(seal_user_data=True)
_REOPENED = OperatorOverride(reopened_at=_BORN + 5000)


@pytest.mark.parametrize(
    ("policy", "override", "created_at", "word"),
    [
        # A boot that ends later is no difference while nothing depends on its end.
        (DEFAULT, OperatorOverride(), _BORN, ""),
        *(
            (policy, OperatorOverride(), _BORN, word)
            for policy, word in (
                (Policy(endpoint=False), "+0tooo---::1795000900:64"),
                (Policy(tokens=TokenMode.REQUIRED), "+1troo---::1795000900:64"),
                (Policy(openstack_tokens=TokenMode.REQUIRED), "+1toro--b::1795000900:64"),
                (Policy(nocloud_tokens=TokenMode.REQUIRED), "+1toor--b::1795000900:64"),
                (Policy(refuse_forwarded=True), "+1tooog--::1795000900:64"),
                (Policy(seal_user_data=True, boot_grace_s=60), "+1tooo-sb::1795000060:64"),
                (Policy(hop_limit=1), "+1tooo---::1795000900:1"),
                (Policy(requests_per_s=20), "+1tooo---::1795000900:64:20::"),
                (Policy(burst=300), "+1tooo---::1795000900:64::300:"),
                (Policy(connections=8), "+1tooo---::1795000900:64:::8"),
                (Policy(paths=_DENIED), f"+1tooo---p::1795000900:64::::{_SET}"),
                (replace(_NO_TOKENS, paths=_DENIED), f"+1-ooo---p::1795000900:64::::{_SET}"),
                (Policy(burst=3, paths=_DENIED), f"+1tooo---p::1795000900:64::3::{_SET}"),
                # There is a token route where a tree takes tokens.
                (_NO_TOKENS, "+1-ooo---::1795000900:64"),
                (Policy(tokens=TokenMode.OFF), "+1-ooo---::1795000900:64"),
                (replace(_NO_TOKENS, openstack_tokens=TokenMode.REQUIRED), "+1toro--b::1795000900:64"),
            )
        ),
        # Revoked tokens are of another epoch, whatever the policy.
        (DEFAULT, OperatorOverride(epoch=3), _BORN, "+1tooo---:3:1795000900:64"),
        # Without a creation time the boot is over; an operator opens it again.
        (_SEALED, OperatorOverride(), None, "+1tooo-sb::0:64"),
        (_SEALED, _REOPENED, _BORN, f"+1tooo-sb::{_BORN + 5900}:64"),
        (_SEALED, _REOPENED, None, f"+1tooo-sb::{_BORN + 5900}:64"),
    ],
)  # fmt: skip
def test_each_rule_has_its_place_in_the_word(
    policy: Policy, override: OperatorOverride, created_at: int | None, word: str
) -> None:
    assert render_policy_word(policy, override, created_at) == word
    for value in (word, f"{word}|web|r1"):
        assert rule_set_of(value) == (_SET if policy.paths else None)


@pytest.mark.parametrize(
    "value", ["web|r1", "-", "!", "+1tooo---::0:64", "+1tooo---::0:64:1:2:3|w|r"]
)
def test_where_nothing_is_said_of_paths_there_is_no_set(value: str) -> None:
    assert rule_set_of(value) is None


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("/", True),
        ("/openstack", True),
        ("/openstack/latest/user_data", True),
        ("/nocloud/user-data", True),
        ("/latest", False),
        ("/latest/user-data", False),
    ],
)
def test_the_boot_counts_where_another_trees_path_takes_a_token(path: str, *, counts: bool) -> None:
    for word in PathWord:
        said = render_policy_word(Policy(paths=((path, word),)), OperatorOverride(), _BORN)
        assert said[8] == ("b" if counts and word is PathWord.REQUIRED else "-")


def test_tokens_are_given_where_a_path_takes_one_although_they_are_off() -> None:
    for word in PathWord:
        paths = (("/latest/user-data", word),)
        said = render_policy_word(
            Policy(tokens=TokenMode.OFF, paths=paths), OperatorOverride(), None
        )
        assert said[2] == ("t" if word is PathWord.REQUIRED else "-")


def test_paths_are_folded_one_by_one_and_it_is_known_whose_each_is() -> None:
    host = PolicyRules(paths=(("/", PathWord.DENY), ("/latest/user-data", PathWord.DENY)))
    of_network = PolicyRules(paths=(("/latest", PathWord.ALLOW),))
    said = PolicyRules(tokens=TokenMode.REQUIRED, paths=(("/nocloud", PathWord.OPTIONAL),))
    book = PolicyBook(host=host, networks={"red": said})
    folded = book.fold(PolicyPlace("red", None, "web", of_network=of_network))
    assert folded.policy.paths == (
        ("/", PathWord.DENY),
        ("/latest", PathWord.ALLOW),
        ("/nocloud", PathWord.OPTIONAL),
    )
    assert folded.origins == (
        ("paths./", PolicyScope.HOST),
        ("paths./latest", PolicyScope.NETWORK),
        ("paths./nocloud", PolicyScope.NETWORK),
        ("tokens", PolicyScope.NETWORK),
    )
    word, paths = book.word(PolicyPlace("red", None, "web"), None)
    assert rule_set_of(word) == set_id(paths)


def test_settings_have_the_last_word_on_a_path_over_a_record_of_the_same_scope() -> None:
    record = PolicyRules(paths=(("/latest", PathWord.DENY), ("/nocloud", PathWord.DENY)))
    settings = PolicyRules(paths=(("/latest", PathWord.ALLOW),))
    place = PolicyPlace("red", None, "web", of_instance=record)
    folded = PolicyBook(instances={"web": settings}).fold(place)
    assert folded.policy.paths == (("/latest", PathWord.ALLOW), ("/nocloud", PathWord.DENY))
