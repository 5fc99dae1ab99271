from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.path_rules import PathRules, PathWord, set_id
from imdsproxy.core.policy import (
    DEFAULT,
    NO_RULES,
    OperatorOverride,
    Policy,
    PolicyBook,
    PolicyPlace,
    PolicyRules,
    PolicyScope,
    TokenMode,
    fold_policy,
    render_policy_word,
    rule_set_of,
)

_REQUIRED = PolicyRules(tokens=TokenMode.REQUIRED)
_OFF = PolicyRules(tokens=TokenMode.OFF)
_PLACE = PolicyPlace("red", "acme", "web")
_BORN = 1_795_000_000


def test_where_nothing_is_said_the_default_is_in_force() -> None:
    folded = fold_policy([(PolicyScope.HOST, NO_RULES)])
    assert folded.policy == DEFAULT
    assert folded.origins == ()


def test_the_most_specific_word_on_each_rule_wins_and_it_is_known_whose_it_was() -> None:
    folded = fold_policy(
        [
            (PolicyScope.HOST, PolicyRules(tokens=TokenMode.REQUIRED, hop_limit=1)),
            (PolicyScope.PROJECT, PolicyRules(endpoint=False)),
            (PolicyScope.INSTANCE, PolicyRules(tokens=TokenMode.OFF)),
        ]
    )
    assert folded.policy == Policy(endpoint=False, tokens=TokenMode.OFF, hop_limit=1)
    assert folded.origins == (
        ("endpoint", PolicyScope.PROJECT),
        ("hop_limit", PolicyScope.HOST),
        ("tokens", PolicyScope.INSTANCE),
    )


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


def test_the_default_needs_no_word() -> None:
    assert render_policy_word(DEFAULT, OperatorOverride(), _BORN) == ""
    # A boot that ends later is no difference while nothing depends on its end.
    assert PolicyBook().word(_PLACE, None) == ("", ())


@pytest.mark.parametrize(
    ("policy", "word"),
    [
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
        (Policy(requests_per_s=20, burst=300, connections=8), "+1tooo---::1795000900:64:20:300:8"),
    ],
)
def test_each_rule_has_its_place_in_the_word(policy: Policy, word: str) -> None:
    assert render_policy_word(policy, OperatorOverride(), _BORN) == word


def test_without_tokens_for_ec2_there_is_a_token_route_only_where_another_tree_requires_them() -> (
    None
):
    off = TokenMode.OFF
    for others in (off, TokenMode.OPTIONAL):
        word = render_policy_word(Policy(True, off, others, others), OperatorOverride(), None)
        assert word.startswith("+1-ooo")
    word = render_policy_word(Policy(True, off, TokenMode.REQUIRED, off), OperatorOverride(), None)
    assert word.startswith("+1toro")


def test_revoked_tokens_are_of_another_epoch_whatever_the_policy() -> None:
    assert (
        render_policy_word(DEFAULT, OperatorOverride(epoch=3), _BORN) == "+1tooo---:3:1795000900:64"
    )


def test_who_is_not_known_to_be_new_has_booted() -> None:
    assert "::0:" in render_policy_word(Policy(seal_user_data=True), OperatorOverride(), None)


def test_an_operator_opens_a_boot_again() -> None:
    guard = OperatorOverride(reopened_at=_BORN + 5000)
    word = render_policy_word(Policy(seal_user_data=True), guard, _BORN)
    assert f":{_BORN + 5900}:" in word
    assert f":{_BORN + 5900}:" in render_policy_word(Policy(seal_user_data=True), guard, None)


_DENIED: PathRules = (("/latest/user-data", PathWord.DENY),)


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (Policy(), "+1tooo---p::1795000900:64::::"),
        (Policy(tokens=TokenMode.OFF), "+1-ooo---p::1795000900:64::::"),
        (Policy(burst=300, seal_user_data=True), "+1tooo-sbp::1795000900:64::300::"),
    ],
)
def test_what_is_said_of_paths_is_a_set_that_the_word_names(policy: Policy, word: str) -> None:
    said = render_policy_word(replace(policy, paths=_DENIED), OperatorOverride(), _BORN)
    assert said == f"{word}{set_id(_DENIED)}"
    assert rule_set_of(said) == set_id(_DENIED)
    assert rule_set_of(f"{said}|web|r1") == set_id(_DENIED)


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
