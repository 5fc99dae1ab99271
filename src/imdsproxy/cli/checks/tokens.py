"""Whether tokens keep what they are to keep: trees that stay open, limits that do nothing, keys that others read."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from imdsproxy.app.policy_store import read_overrides, read_token_keys
from imdsproxy.cli.checks import Finding, Subject, count, found, refused
from imdsproxy.cli.checks.guests import read_record_files
from imdsproxy.core.documents.respond import can_be_served
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.observation import Observation, SourceName
from imdsproxy.core.policy import (
    DEFAULT,
    NO_RULES,
    PolicyBook,
    PolicyRules,
    PolicyScope,
    fold_policy,
)
from imdsproxy.core.records import Records
from imdsproxy.core.token_report import USER_DATA, OpenUserData, open_trees, open_user_data
from imdsproxy.errors import ImdsproxyError, SourceUnavailable

_TREES: Final = {"/openstack": "openstack_tokens", "/nocloud": "nocloud_tokens"}
_NAMES: Final = {"/latest": "EC2's tree", "/openstack": "/openstack", "/nocloud": "/nocloud"}
_CONCERNED: Final = ("tokens", "seal_user_data", "paths", *_TREES.values())
_SHOWN: Final = 3


def check_trees(on: Subject) -> list[Finding]:
    """Where one tree keeps user-data, and another one gives the same (`core.token_report`): one warning a scope."""
    host = on.settings.policy.book().host
    findings: list[Finding] = []
    for place, scope, rules in _scopes(on):
        # Any other scope would only repeat what is reported for the host's section.
        if scope is PolicyScope.HOST or any(getattr(rules, one) is not None for one in _CONCERNED):
            own = [] if scope is PolicyScope.HOST else [(scope, rules)]
            left = open_user_data(fold_policy([(PolicyScope.HOST, host), *own]).policy)
            findings += [_of_open_trees(place, left)] if left.trees else []
    return findings


def _of_open_trees(place: str, left: OpenUserData) -> Finding:
    named = " and ".join(_NAMES[tree] for tree in left.trees)
    trees = f"{named} {'give' if len(left.trees) > 1 else 'gives'}"
    if left.denied:
        denied = f"{' and '.join(left.denied)} {'are' if len(left.denied) > 1 else 'is'}"
        paths = ", ".join(f"{USER_DATA[tree]}: deny" for tree in left.trees)
        return found("trees-denied", place=place, denied=denied, trees=trees, paths=paths)
    modes = " and ".join(f"{_TREES[tree]}: required" for tree in left.trees)
    return found("trees-open", place=place, trees=trees, modes=modes)


def check_instances(on: Subject) -> list[Finding]:
    """The same of the daemon's instances where it runs, else of those in record files and in the store: one warning."""
    if on.daemon is not None:
        report = on.daemon.get("/v1/token-report")
        trees, number = report["open_trees"], report["open_tree_count"]
    else:
        left = open_trees(_read_inventory(on), on.settings.policy.book())
        trees, number = [asdict(one) for one in left[:_SHOWN]], len(left)
    shown = [f"{one['tree']} of {one['instance']} in {one['network']}" for one in trees[:_SHOWN]]
    more = f" and {number - len(shown)} more" if number > len(shown) else ""
    return [found("instances-open", trees=", ".join(shown) + more)] if number else []


def _read_inventory(on: Subject) -> Inventory:
    """What record files and the store hold."""
    file, source = on.settings.sources.file, SourceName("records")
    in_files = file.enabled and file.directory.is_dir()
    given = read_record_files(file.directory)[0] if in_files else []
    if isinstance(on.stored, Records):
        given.append(on.stored)
    networks = {one.id: one for records in given for one in records.networks}
    instances = {one.id: one for records in given for one in records.instances}
    inventory = Inventory([source])
    inventory.observe(Observation(source, networks=networks, instances=instances))
    return inventory


def check_store(on: Subject) -> list[Finding]:
    """That the store can be read, where no daemon is asked for what it holds."""
    return refused(on.stored) if isinstance(on.stored, SourceUnavailable) else []


def check_path_rules(on: Subject) -> list[Finding]:
    """Rules for paths that nothing has: a warning for each, since another path is perhaps meant."""
    return [
        found("path-unserved", place=place, path=path)
        for place, _, rules in _scopes(on)
        for path, _ in rules.paths or ()
        if not can_be_served(path)
    ]


def check_hop_limits(on: Subject) -> list[Finding]:
    """Hop limits that do nothing for guests of the unix listener: a warning for each scope."""
    return [
        found("hop-limit", place=place, limit=rules.hop_limit)
        for place, _, rules in _scopes(on)
        if rules.hop_limit is not None and rules.hop_limit < DEFAULT.hop_limit
        if on.settings.unix_listener.enabled
    ]


def check_token_keys(on: Subject) -> list[Finding]:
    """The file of the keys: it can be used, and only root can make tokens with it."""
    configured = on.settings.tokens.key_file
    path = configured or on.layout.token_keys
    try:
        number = count(len(read_token_keys(path)), "key")
        shared = path.stat().st_mode & stat.S_IRWXG
    except ImdsproxyError as error:
        if configured is None and isinstance(error.__cause__, FileNotFoundError):
            return [found("keys-to-come", path=path)]
        return refused(error, "tokens.key_file")
    except OSError as error:
        return [found("keys-unread", path=path, reason=error.strerror)]
    return [found("keys-group" if shared else "keys", path=path, number=number)]


def check_overrides(on: Subject) -> list[Finding]:
    """What operators did about instances can be read; `run` does not start where it cannot."""
    try:
        overrides = read_overrides(on.layout.guards)
    except ImdsproxyError as error:
        return refused(error)
    number = count(len(overrides), "instance")
    return [found("overrides", number=number)] if overrides else []


def _scopes(on: Subject) -> Iterator[tuple[str, PolicyScope, PolicyRules]]:
    book: PolicyBook = on.settings.policy.book()
    yield "policy.host", PolicyScope.HOST, book.host
    for scope in (PolicyScope.NETWORK, PolicyScope.PROJECT, PolicyScope.INSTANCE):
        for name, rules in getattr(book, f"{scope}s").items():
            if rules != NO_RULES:
                yield f"policy.{scope}s.{name}", scope, rules
