"""Rules of operators for single paths: checked spelling, merged scopes, and lookup under every spelling.

A rule applies to a path and everything below it. `latest` stands for every version: Nova and our documents serve the
same under each version, and an unknown version of today may be valid tomorrow.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias, TypeVar

MOST_PATH_RULES: Final = 64
"""Maximum number of one scope's path rules."""

_LONGEST: Final = 255
_ID_LENGTH: Final = 16
_NAMED: Final = "paths."

ROOT: Final = "/"
TOKEN_PATH: Final = "/latest/api/token"  # noqa: S105 - where tokens are, not one
"""AWS, "Use the Instance Metadata Service to access instance metadata"."""

WITHIN_OTHER_TREES: Final = ("/openstack", "/nocloud")
"""Roots of the other trees; all other paths belong to EC2's tree."""

_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})?")
_ODD: Final = re.compile(rb"%|//|/\.|^/ec2")
_SLASHES: Final = re.compile(rb"/(?:\.?/)*(?:\.$)?")
_EC2: Final = re.compile(rb"^/ec2(?=/|$)")
_VERSIONS: Final = (
    (re.compile(rb"^/openstack/(?!content(?:/|$))[^/]+"), b"/openstack/latest"),
    (re.compile(rb"^/(?!(?:openstack|nocloud)(?:/|$))[^/]+"), b"/latest"),
)
_DATED: Final = re.compile(rb"/(?:openstack/)?[0-9]")
PATH_PATTERN: Final = "^/[A-Za-z0-9._~+,=:@/-]*$"
_WRITABLE: Final = re.compile(PATH_PATTERN)

_Scope = TypeVar("_Scope")


class PathWord(StrEnum):
    DENY = "deny"
    """403, also with a token."""

    ALLOW = "allow"
    """Served in the tree's token mode: undoes a rule for more paths."""

    REQUIRED = "required"
    """401 without a token; in the other trees only after the boot."""

    OPTIONAL = "optional"
    """Served without a token although the tree requires one."""

    @property
    def letter(self) -> str:
        return self.value[0]


PathRules: TypeAlias = tuple[tuple[str, PathWord], ...]
"""Each path once, in the rules' order."""


def undo_spelling(path: bytes) -> bytes | None:
    """Normalise a path as Nova and our documents do; return `None` if an escape is broken.

    HAProxy does the same (`haproxy/rules/access_rules.cfg`); a test compares the two.
    """
    spelled = _spell_out(path)
    return None if spelled is None else _EC2.sub(b"", spelled)


def is_below_ec2(path: bytes) -> bool:
    """Return whether a path is below `/ec2`, Nova's second root of EC2's tree."""
    return (_spell_out(path) or b"").startswith(b"/ec2/")


def _spell_out(path: bytes) -> bytes | None:
    if not _ODD.search(path):
        return path
    if any(found[1] is None for found in _ESCAPE.finditer(path)):
        return None
    plain = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), path)
    return _SLASHES.sub(b"/", plain)


def plain_path(undone: bytes) -> bytes:
    """Replace the version by `latest`, whatever the version is: the form of paths in rules."""
    for version, latest in _VERSIONS:
        undone = version.sub(latest, undone)
    return undone


def find_path_fault(path: str) -> tuple[str, str] | None:
    """Return why a rule cannot be for the path, and the correct form; `None` if the path is valid."""
    if not _WRITABLE.fullmatch(path):
        hint = _right(path, "letters, digits and ._~+,=:@- between slashes, a slash first")
        return "is not a path for a rule", hint
    if len(path) > _LONGEST:
        return f"is {len(path)} characters long", f"at most {_LONGEST}"
    return None if path == ROOT else _find_odd_spelling(path)


def _find_odd_spelling(path: str) -> tuple[str, str] | None:
    names = path.split("/")[1:]
    if ".." in names:
        return "leads upwards", "the path where it ends"
    if covers(TOKEN_PATH, path):
        return "gives tokens, which path rules cannot change", "tokens: off"
    if "" in names or "." in names:
        reason = "is not in its plain form"
    elif names[0] == "ec2":
        reason = "is another spelling"
    elif plain_path(path.encode()) != path.encode():
        reason = "names a version, but a rule applies to all versions"
    else:
        return None
    return reason, _right(path, "a path below /latest, /openstack/latest or /nocloud")


def _right(path: str, otherwise: str) -> str:
    undone = undo_spelling(path.partition("?")[0].encode("utf-8", "replace"))
    if undone is None or not path.startswith("/"):
        return otherwise
    right = plain_path(undone)
    if right != undone and not _DATED.match(undone):
        # The path more likely lacks a version than has one of this name.
        return otherwise
    found = right.decode("utf-8", "replace").rstrip("/") or ROOT
    return found if found != path and find_path_fault(found) is None else otherwise


def covers(rule: str, path: str) -> bool:
    return rule in (ROOT, path) or path.startswith(f"{rule}/")


def find_rule(rules: PathRules, plain: str) -> tuple[str, PathWord] | None:
    found = [rule for rule in rules if covers(rule[0], plain)]
    return max(found, key=lambda rule: len(rule[0]), default=None)


def fold_paths(scopes: Iterable[tuple[_Scope, PathRules]]) -> dict[str, tuple[PathWord, _Scope]]:
    """Merge scopes so that the longest rule that covers a path is that of the most specific scope with a rule for it.

    A rule for a path removes the rules of less specific scopes, which come first, for that path and for paths below it.
    """
    folded: dict[str, tuple[PathWord, _Scope]] = {}
    for scope, rules in scopes:
        for path in [path for path in folded if any(covers(rule, path) for rule, _ in rules)]:
            del folded[path]
        folded.update({path: (word, scope) for path, word in rules})
    return dict(sorted(folded.items()))


def path_rule_name(path: str) -> str:
    return f"{_NAMED}{path}"


def set_id(rules: PathRules) -> str:
    """Return the id by which records refer to a rule set: a digest of its rules, so that a set never changes."""
    text = "".join(f"{path} {word.letter}\n" for path, word in rules)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


def render_set(rules: PathRules) -> dict[str, str]:
    """Render the map entries of a set. HAProxy takes the entry with the longest key that begins `ID|PLAIN-PATH/`.

    The entry for `/` always exists: if HAProxy finds no entry, the set is missing.
    """
    name = set_id(rules)
    entries = {f"{name}|/": PathWord.ALLOW.letter}
    entries |= {f"{name}|{path.rstrip('/')}/": word.letter for path, word in rules}
    return entries


def group_sets(entries: Mapping[str, str]) -> dict[str, dict[str, str]]:
    sets: dict[str, dict[str, str]] = {}
    for key, value in entries.items():
        sets.setdefault(key.partition("|")[0], {})[key] = value
    return sets
