"""Whether tokens keep what they are to keep: trees that stay open, limits that do nothing, keys that others read."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from imdsproxy.app.policy_store import read_overrides
from imdsproxy.app.token_keys import read_token_keys
from imdsproxy.cli.checks.finding import Area, Finding
from imdsproxy.config.schema import Settings
from imdsproxy.core.documents.served import can_be_served
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
from imdsproxy.core.observation import Observation, SourceName
from imdsproxy.core.open_trees import USER_DATA, OpenUserData, open_user_data
from imdsproxy.core.policy import (
    DEFAULT,
    NO_RULES,
    PolicyBook,
    PolicyRules,
    PolicyScope,
    fold_policy,
)
from imdsproxy.core.records.document import Records
from imdsproxy.core.token_report import open_trees
from imdsproxy.errors import ImdsproxyError

_TOKENS: Final = Area("tokens")
_TREES: Final = {"/openstack": "openstack_tokens", "/nocloud": "nocloud_tokens"}
_NAMES: Final = {"/latest": "EC2's tree", "/openstack": "/openstack", "/nocloud": "/nocloud"}
_CONCERNED: Final = ("tokens", "seal_user_data", "paths", *_TREES.values())
_GROUP: Final = stat.S_IRWXG
_NAMED: Final = 3


def check_trees(book: PolicyBook) -> list[Finding]:
    """Where one tree keeps user-data, and another one gives the same (`core.open_trees`): a warning for each scope.

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
            # Reported for the host's section.
            continue
        left = open_user_data(policy)
        if left.trees:
            found.append(_of_open_trees(place, left))
    return found


def _of_open_trees(place: str, left: OpenUserData) -> Finding:
    gives = "give" if len(left.trees) > 1 else "gives"
    trees = " and ".join(_NAMES[tree] for tree in left.trees)
    if left.denied:
        kept = f"{' and '.join(left.denied)} {'are' if len(left.denied) > 1 else 'is'} denied"
        denied = ", ".join(f"{USER_DATA[tree]}: deny" for tree in left.trees)
        hint = f"paths: {{{denied}}}, seal_user_data: true, or no such dialect in the records"
        return _TOKENS.warn(f"{place}: {kept}, and {trees} {gives} the same", hint)
    modes = " and ".join(f"{_TREES[tree]}: required" for tree in left.trees)
    return _TOKENS.warn(
        f"{place}: EC2's tree takes a token, and {trees} {gives} the same user-data without",
        f"{modes} (no client of theirs sends tokens: they are locked when the boot is over), "
        "seal_user_data: true, or no such dialect in the records",
    )


def check_records_trees(given: Iterable[Records], book: PolicyBook) -> list[Finding]:
    """The same of records beside the settings, where no daemon can be asked.

    Args:
        given: What each place holds.
        book: What the settings say.
    """
    source = SourceName("records")
    networks: dict[NetworkId, Network] = {}
    instances: dict[InstanceId, Instance] = {}
    for records in given:
        networks |= {one.id: one for _, one in records.networks}
        instances |= {one.id: one for _, one in records.instances}
    inventory = Inventory([source])
    inventory.observe(Observation(source, networks=networks, instances=instances))
    found = open_trees(inventory, book)
    return check_instances_trees(
        [(one.instance, one.network, one.tree) for one in found], len(found)
    )


def check_instances_trees(named: Sequence[tuple[str, str, str]], count: int) -> list[Finding]:
    """One warning for all instances whose user-data is kept in one tree and open in another.

    Args:
        named: Instance, network and open tree; at least the first few.
        count: Of all of them.
    """
    if not count:
        return []
    shown = [f"{tree} of {who} in {where}" for who, where, tree in named[:_NAMED]]
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    text = f"user-data is open beside a tree that keeps it: {', '.join(shown)}{more}"
    hint = (
        "openstack_tokens, nocloud_tokens or seal_user_data lock it after the boot, paths at once; "
        "`dialects` in a record takes a tree away"
    )
    return [_TOKENS.warn(text, hint)]


def check_path_rules(book: PolicyBook) -> list[Finding]:
    """Rules for paths that nothing has: a warning for each, since another path is perhaps meant.

    Args:
        book: What the settings say.
    """
    return [
        _TOKENS.warn(
            f"{place}.paths: nothing is ever served at {path} or beneath it",
            "imdsproxy get lists what there is; nothing is lost by the rule, if it was meant so",
        )
        for place, _, rules in _scopes(book)
        for path, _ in rules.paths or ()
        if not can_be_served(path)
    ]


def check_hop_limits(book: PolicyBook, *, unix_listener: bool) -> list[Finding]:
    """Hop limits that do nothing for guests of the unix listener: a warning for each scope.

    Args:
        book: What the settings say.
        unix_listener: It is on.
    """
    if not unix_listener:
        return []
    return [
        _TOKENS.warn(
            f"{place}: hop_limit {rules.hop_limit} does nothing for guests that come through the unix listener: the "
            "packet that reaches them is Neutron's proxy's",
            "only a listener of its own can keep a token from what is behind such a guest; or remove hop_limit",
        )
        for place, _, rules in _scopes(book)
        if rules.hop_limit is not None and rules.hop_limit < DEFAULT.hop_limit
    ]


def check_token_keys(settings: Settings, default: Path) -> list[Finding]:
    """The file of the keys: it can be used, and only root can make tokens with it.

    Args:
        settings: All of them.
        default: Where the keys are while the settings name no other file; made at the first start.
    """
    configured = settings.tokens.key_file
    path = configured or default
    if configured is None and not _is_there(path):
        return [_TOKENS.ok(f"the first key will be made in {path}")]
    try:
        keys = read_token_keys(path)
        mode = path.stat().st_mode
    except ImdsproxyError as error:
        return [replace(one, text=f"tokens.key_file: {one.text}") for one in _TOKENS.of(error)]
    except OSError as error:
        return [_TOKENS.warn(f"tokens.key_file: {path}: {error.strerror}")]
    if mode & _GROUP:
        text = f"a group can use {path}: its members can make tokens for any instance"
        return [_TOKENS.warn(text, f"chmod 0600 {path}")]
    number = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    return [_TOKENS.ok(f"{number} in {path}")]


def check_guards(path: Path) -> list[Finding]:
    """What operators did about instances can be read; `run` does not start where it cannot."""
    try:
        guards = read_overrides(path)
    except ImdsproxyError as error:
        return _TOKENS.of(error)
    if not guards:
        return []
    number = "1 instance" if len(guards) == 1 else f"{len(guards)} instances"
    return [_TOKENS.ok(f"tokens of {number} were revoked, or boots opened again")]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # Reading it reports the reason.
        return True


def _scopes(book: PolicyBook) -> Iterator[tuple[str, PolicyScope, PolicyRules]]:
    yield "policy.host", PolicyScope.HOST, book.host
    for section, scope, scopes in (
        ("networks", PolicyScope.NETWORK, book.networks),
        ("projects", PolicyScope.PROJECT, book.projects),
        ("instances", PolicyScope.INSTANCE, book.instances),
    ):
        for name, rules in scopes.items():
            if rules != NO_RULES:
                yield f"policy.{section}.{name}", scope, rules
