from __future__ import annotations

import pytest

from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.policy import OperatorOverride, Policy, TokenMode, render_policy_word
from imdsproxy.core.policy_report import decide_read

_NOW = 1_795_000_000
_REQUIRED = TokenMode.REQUIRED
_USER_DATA = "/latest/user-data"
_META = "/openstack/latest/meta_data.json"


def _decided(
    policy: Policy, target: str, *, token: bool = False, born: int | None = None, epoch: int = 0
) -> tuple[int | None, str]:
    word = render_policy_word(policy, OperatorOverride(epoch), born)
    decided = decide_read(word, _NOW, target, token=token, paths=policy.paths)
    assert bool(decided.rule) == bool(decided.why) == (decided.status is not None)
    return decided.status, decided.rule


@pytest.mark.parametrize(
    "target", ["/", _USER_DATA, _META, "/nocloud/user-data", "/x/../y", "/%zz"]
)
def test_where_nothing_is_said_everything_passes(target: str) -> None:
    assert _decided(Policy(), target) == (None, "")
    assert _decided(Policy(), target, token=True) == (None, "")


def test_an_endpoint_that_is_off_refuses_everything() -> None:
    for target in ("/", "/latest/api/token", "/%zz"):
        assert _decided(Policy(endpoint=False), target, token=True) == (403, "endpoint")


@pytest.mark.parametrize(
    "target",
    [
        "/",
        _USER_DATA,
        f"{_USER_DATA}?x=/openstack/",
        "//latest/./user-data/.",
        "/ec2/latest/user-data",
        "/ec2",
        "/%6catest/user%2Ddata",
    ],
)
def test_ec2s_tree_takes_a_token_in_every_spelling(target: str) -> None:
    assert _decided(Policy(tokens=_REQUIRED), target) == (401, "tokens")
    assert _decided(Policy(tokens=_REQUIRED), target, token=True) == (None, "")


@pytest.mark.parametrize(
    ("policy", "target"),
    [
        (Policy(openstack_tokens=_REQUIRED), _META),
        (Policy(openstack_tokens=_REQUIRED), "//openstack"),
        (Policy(nocloud_tokens=_REQUIRED), "/%6eocloud/user-data"),
    ],
)
def test_another_tree_is_locked_when_the_boot_is_over(policy: Policy, target: str) -> None:
    rule = "openstack_tokens" if policy.openstack_tokens is _REQUIRED else "nocloud_tokens"
    assert _decided(policy, target) == (401, rule)
    assert _decided(policy, target, token=True) == (None, "")
    assert _decided(policy, target, born=_NOW - 899) == (None, "")
    assert _decided(policy, target, born=_NOW - 900) == (401, rule)
    assert _decided(policy, _USER_DATA) == (None, "")


@pytest.mark.parametrize(
    "target", [_USER_DATA, "/1.0/user-data/", "/openstack/latest/user_data", "/nocloud/user-data"]
)
def test_sealed_user_data_is_refused_with_a_token_too(target: str) -> None:
    sealed = Policy(seal_user_data=True)
    assert _decided(sealed, target, token=True) == (403, "seal_user_data")
    assert _decided(sealed, target, born=_NOW) == (None, "")
    assert _decided(sealed, _META) == (None, "")


@pytest.mark.parametrize(
    "target", ["/a/../b", "/..", "/a/%2e%2e/b", "/a%00", "/a%", "/a%4", "/a%zz"]
)
def test_what_is_made_to_pass_by_rules_is_refused_where_there_are_any(target: str) -> None:
    # Where tokens are off and nothing else is said there is nothing to pass by.
    assert _decided(Policy(tokens=TokenMode.OFF), target) == (None, "")
    for policy in (Policy(tokens=_REQUIRED), Policy(hop_limit=1)):
        assert _decided(policy, target, token=True) == (400, "path")
    assert _decided(Policy(), target, epoch=1) == (400, "path")


def test_the_tokens_own_path_takes_no_get() -> None:
    token = "/latest/api/token"
    assert _decided(Policy(), token) == (405, "tokens")
    assert _decided(Policy(), f"/{token}") == (None, "")
    assert _decided(Policy(), f"/{token}", token=True) == (405, "tokens")
    assert _decided(Policy(hop_limit=1), f"/ec2{token}/") == (405, "tokens")
    assert _decided(Policy(tokens=TokenMode.OFF), token) == (404, "tokens")
    assert _decided(Policy(hop_limit=1), "/2021-01-03/api/token") == (404, "tokens")


@pytest.mark.parametrize(
    ("word", "tokens", "status", "with_token"),
    [
        (PathWord.DENY, TokenMode.OPTIONAL, 403, 403),
        (PathWord.DENY, TokenMode.OFF, 403, 403),
        (PathWord.REQUIRED, TokenMode.OPTIONAL, 401, None),
        (PathWord.OPTIONAL, _REQUIRED, None, None),
        (PathWord.ALLOW, TokenMode.OPTIONAL, None, None),
    ],
)
def test_what_is_said_of_a_path_decides_in_every_spelling(
    word: PathWord, tokens: TokenMode, status: int | None, with_token: int | None
) -> None:
    policy = Policy(tokens=tokens, paths=((_USER_DATA, word),))
    name = f"paths.{_USER_DATA}"
    for target in (_USER_DATA, "/1.0/user-data/x", "//ec2//x/user%2ddata", "/ec2/latest/user-data"):
        assert _decided(policy, target) == (status, name if status else "")
        assert _decided(policy, target, token=True) == (with_token, name if with_token else "")


def test_allowed_is_as_the_tree_is_and_sealed_stays_sealed() -> None:
    policy = Policy(tokens=_REQUIRED, paths=(("/", PathWord.DENY), ("/latest", PathWord.ALLOW)))
    assert _decided(policy, _USER_DATA) == (401, "tokens")
    assert _decided(policy, _USER_DATA, token=True) == (None, "")
    assert _decided(policy, _META, token=True) == (403, "paths./")
    sealed = Policy(seal_user_data=True, paths=((_USER_DATA, PathWord.OPTIONAL),))
    assert _decided(sealed, _USER_DATA) == (403, "seal_user_data")


def test_another_trees_path_takes_a_token_when_the_boot_is_over() -> None:
    policy = Policy(paths=(("/openstack", PathWord.REQUIRED),))
    assert _decided(policy, _META) == (401, "paths./openstack")
    assert _decided(policy, _META, born=_NOW) == (None, "")
    everything = Policy(paths=(("/", PathWord.REQUIRED),))
    assert _decided(everything, _META, born=_NOW) == (None, "")
    assert _decided(everything, _USER_DATA, born=_NOW) == (401, "paths./")


def test_no_rule_is_for_where_tokens_are_given() -> None:
    policy = Policy(paths=(("/", PathWord.DENY),))
    assert _decided(policy, "/latest/api/token") == (405, "tokens")
