"""Trees that serve user-data without a token, while another tree requires one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.path_rules import PathWord, find_rule
from imdsproxy.core.policy import Policy, TokenMode

_EC2: Final = "/latest"
USER_DATA: Final[Mapping[str, str]] = {
    _EC2: "/latest/user-data",
    "/openstack": "/openstack/latest/user_data",
    "/nocloud": "/nocloud/user-data",
}
"""Where each tree has it."""

_MODES: Final = {_EC2: "tokens", "/openstack": "openstack_tokens", "/nocloud": "nocloud_tokens"}


@dataclass(frozen=True, slots=True)
class OpenUserData:
    """The same user-data is kept in one place and given in others.

    Attributes:
        denied: Paths under which it is denied.
        trees: Those that give it without a token: `/latest` for EC2's, `/openstack`, `/nocloud`.
    """

    denied: tuple[str, ...]
    trees: tuple[str, ...]


def open_user_data(policy: Policy, served: Collection[str] = tuple(USER_DATA)) -> OpenUserData:
    """What a policy leaves open; no `trees` where it keeps user-data nowhere, or everywhere.

    Who denies a tree as a whole has it turned off, and keeps nothing by that. Sealed user-data does not count: after
    the boot it is not served, and no tree asks for tokens before.

    Args:
        policy: What is in force.
        served: The trees that there are.
    """
    if not policy.endpoint or policy.seal_user_data:
        return OpenUserData(denied=(), trees=())
    needs_token = _EC2 in served and _state(policy, _EC2) is PathWord.REQUIRED
    denied = tuple(
        path
        for tree, path in USER_DATA.items()
        if tree in served and (path, PathWord.DENY) in policy.paths
    )
    trees = tuple(_open(policy, served)) if needs_token or denied else ()
    return OpenUserData(denied, trees)


def _open(policy: Policy, served: Collection[str]) -> Iterator[str]:
    for tree in USER_DATA:
        if tree in served and _state(policy, tree) is PathWord.OPTIONAL:
            yield tree


def _state(policy: Policy, tree: str) -> PathWord:
    """Whether a tree's user-data is denied, takes a token, or does not."""
    rule = find_rule(policy.paths, USER_DATA[tree])
    if rule is not None and rule[1] is not PathWord.ALLOW:
        return rule[1]
    required = getattr(policy, _MODES[tree]) is TokenMode.REQUIRED
    return PathWord.REQUIRED if required else PathWord.OPTIONAL
