"""Whether tokens keep what they are to keep: trees that stay open, limits that do nothing, keys that others read."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from imdsproxy.cli.preflight import Finding, findings_of
from imdsproxy.core.policy import (
    DEFAULT,
    NOTHING_SAID,
    Policy,
    PolicyBook,
    PolicyRules,
    PolicyScope,
    TokenMode,
    fold_policy,
)
from imdsproxy.errors import ImdsproxyError

if TYPE_CHECKING:
    from imdsproxy.config.schema import Settings

__all__ = ["check_guards", "check_hop_limits", "check_token_keys", "check_trees"]

_AREA: Final = "tokens"
_TREES: Final = {"openstack_tokens": "/openstack", "nocloud_tokens": "/nocloud"}
_CONCERNED: Final = ("tokens", "seal_user_data", *_TREES)
_GROUP: Final = stat.S_IRWXG


def check_trees(book: PolicyBook) -> list[Finding]:
    """Where EC2's tree takes a token, and another one gives the same user-data without: a warning for each scope.

    Args:
        book: What the settings say.
    """
    host = fold_policy([(PolicyScope.HOST, book.host)]).policy
    found: list[Finding] = []
    for place, scope, rules in _scopes(book):
        if scope is PolicyScope.HOST:
            policy = host
        elif any(getattr(rules, name) is not None for name in _CONCERNED):
            policy = fold_policy([(PolicyScope.HOST, book.host), (scope, rules)]).policy
        else:
            # What the host's section says was told there.
            continue
        trees = _open_trees(policy)
        if trees:
            gives = "give" if len(trees) > 1 else "gives"
            found.append(
                Finding(
                    _AREA,
                    f"{place}: EC2's tree takes a token, and {' and '.join(_TREES[one] for one in trees)} {gives} "
                    "the same user-data without",
                    f"{' and '.join(f'{one}: required' for one in trees)} (no client of theirs sends tokens: "
                    "they are locked when the boot is over), seal_user_data: true, or no such dialect in the records",
                    warning=True,
                )
            )
    return found


def _open_trees(policy: Policy) -> list[str]:
    if not policy.endpoint or policy.seal_user_data or policy.tokens is not TokenMode.REQUIRED:
        return []
    return [name for name in _TREES if getattr(policy, name) is not TokenMode.REQUIRED]


def check_hop_limits(book: PolicyBook, *, unix_listener: bool) -> list[Finding]:
    """Hop limits that do nothing for guests of the unix listener: a warning for each scope.

    Args:
        book: What the settings say.
        unix_listener: It is on.
    """
    if not unix_listener:
        return []
    return [
        Finding(
            _AREA,
            f"{place}: hop_limit {rules.hop_limit} does nothing for guests that come through the unix listener: the "
            "packet that reaches them is Neutron's proxy's",
            "only a listener of its own can keep a token from what is behind such a guest; or leave hop_limit out",
            warning=True,
        )
        for place, _, rules in _scopes(book)
        if rules.hop_limit is not None and rules.hop_limit < DEFAULT.hop_limit
    ]


def check_token_keys(settings: Settings, default: Path) -> list[Finding]:
    """The file of the keys: it can be used, and nobody but root can make tokens with it.

    Args:
        settings: All of them.
        default: Where the keys are while the settings name no other file; made at the first start.
    """
    from imdsproxy.app.token_keys import read_token_keys  # noqa: PLC0415 - `--help` need not load it

    configured = settings.tokens.key_file
    path = configured or default
    if configured is None and not _is_there(path):
        return [Finding(_AREA, f"the first key will be made in {path}")]
    try:
        keys = read_token_keys(path)
        mode = path.stat().st_mode
    except ImdsproxyError as error:
        return [
            Finding(_AREA, f"tokens.key_file: {one.text}", one.hint, one.exit_status)
            for one in findings_of(_AREA, error)
        ]
    except OSError as error:
        return [Finding(_AREA, f"tokens.key_file: {path}: {error.strerror}", warning=True)]
    if mode & _GROUP:
        text = f"a group can use {path}: whoever reads it can make tokens for any instance"
        return [Finding(_AREA, text, f"chmod 0600 {path}", warning=True)]
    number = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    return [Finding(_AREA, f"{number} in {path}")]


def check_guards(path: Path) -> list[Finding]:
    """What operators did about instances can be read; `run` does not start where it cannot."""
    from imdsproxy.app.guards import read_guards  # noqa: PLC0415 - as above

    try:
        guards = read_guards(path)
    except ImdsproxyError as error:
        return findings_of(_AREA, error)
    if not guards:
        return []
    number = "1 instance" if len(guards) == 1 else f"{len(guards)} instances"
    return [Finding(_AREA, f"tokens of {number} were revoked, or boots opened again")]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # Who may not look is told so by whatever reads it.
        return True


def _scopes(book: PolicyBook) -> Iterator[tuple[str, PolicyScope, PolicyRules]]:
    yield "policy.host", PolicyScope.HOST, book.host
    for section, scope, said in (
        ("networks", PolicyScope.NETWORK, book.networks),
        ("projects", PolicyScope.PROJECT, book.projects),
        ("instances", PolicyScope.INSTANCE, book.instances),
    ):
        for name, rules in said.items():
            if rules != NOTHING_SAID:
                yield f"policy.{section}.{name}", scope, rules
