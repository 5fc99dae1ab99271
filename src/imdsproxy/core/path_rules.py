"""What operators say of single paths: written plainly, folded over scopes, and looked up under every spelling.

A rule is about a path and all that is beneath it. `latest` stands for every version: Nova and our documents give the
same under each, and what is no version today may be one tomorrow.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias, TypeVar

MOST_PATH_RULES: Final = 64
"""Of one scope."""

_LONGEST: Final = 255
_ID_LENGTH: Final = 16
_NAMED: Final = "paths."

ROOT: Final = "/"
TOKEN_PATH: Final = "/latest/api/token"  # noqa: S105 - where tokens are, not one
"""AWS, "Use the Instance Metadata Service to access instance metadata"."""

WITHIN_OTHER_TREES: Final = ("/openstack", "/nocloud")
"""All else is EC2's."""

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
    """What a rule says of a path, and of all that is beneath it."""

    DENY = "deny"
    """403, with a token too."""

    ALLOW = "allow"
    """Served, with or without a token as the tree's mode has it: it undoes a rule for more paths."""

    REQUIRED = "required"
    """401 without a token; in other trees than EC2's once the boot is over."""

    OPTIONAL = "optional"
    """Served without a token although the tree takes one."""

    @property
    def letter(self) -> str:
        """As HAProxy has it."""
        return self.value[0]


PathRules: TypeAlias = tuple[tuple[str, PathWord], ...]
"""Each path once, in their order."""


def undo_spelling(path: bytes) -> bytes | None:
    """The path without what Nova or our documents undo; `None` where an escape is broken.

    HAProxy does the same (`core/haproxy/access_rules.cfg`), and a test holds the two together.
    """
    spelled = _spell_out(path)
    return None if spelled is None else _EC2.sub(b"", spelled)


def is_below_ec2(path: bytes) -> bool:
    """Whether a path is below `/ec2`, where Nova has a second way to EC2's tree."""
    return (_spell_out(path) or b"").startswith(b"/ec2/")


def _spell_out(path: bytes) -> bytes | None:
    if not _ODD.search(path):
        return path
    if any(found[1] is None for found in _ESCAPE.finditer(path)):
        return None
    plain = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), path)
    return _SLASHES.sub(b"/", plain)


def plain_path(undone: bytes) -> bytes:
    """With `latest` in the place of the version, whatever stands there: a path as rules have it.

    Args:
        undone: What `undo_spelling` gave.
    """
    for version, latest in _VERSIONS:
        undone = version.sub(latest, undone)
    return undone


def find_path_fault(path: str) -> tuple[str, str] | None:
    """Why a rule cannot be for the path, and what would be right; `None` where it can."""
    if not _WRITABLE.fullmatch(path):
        hint = _right(path, "letters, digits and ._~+,=:@- between slashes, a slash first")
        return "is no path as rules have it", hint
    if len(path) > _LONGEST:
        return f"is {len(path)} characters long", f"at most {_LONGEST}"
    return None if path == ROOT else _find_odd_spelling(path)


def _find_odd_spelling(path: str) -> tuple[str, str] | None:
    names = path.split("/")[1:]
    if ".." in names:
        return "leads upwards", "the path where it ends"
    if covers(TOKEN_PATH, path):
        return "is where tokens are given, which no path rule is for", "tokens: off"
    if "" in names or "." in names:
        reason = "is not spelt plainly"
    elif names[0] == "ec2":
        reason = "is another spelling"
    elif plain_path(path.encode()) != path.encode():
        reason = "names a version, and a rule is for all of them"
    else:
        return None
    return reason, _right(path, "a path below /latest, /openstack/latest or /nocloud")


def _right(path: str, otherwise: str) -> str:
    """The spelling that would be right, where there is one."""
    undone = undo_spelling(path.partition("?")[0].encode("utf-8", "replace"))
    if undone is None or not path.startswith("/"):
        return otherwise
    right = plain_path(undone)
    if right != undone and not _DATED.match(undone):
        # More likely without any version than with one of this name.
        return otherwise
    found = right.decode("utf-8", "replace").rstrip("/") or ROOT
    return found if found != path and find_path_fault(found) is None else otherwise


def covers(rule: str, path: str) -> bool:
    """Whether a rule for the one path is about the other: it is that, or beneath it."""
    return rule in (ROOT, path) or path.startswith(f"{rule}/")


def find_rule(rules: PathRules, plain: str) -> tuple[str, PathWord] | None:
    """The rule that decides: the longest that covers the path."""
    found = [rule for rule in rules if covers(rule[0], plain)]
    return max(found, key=lambda rule: len(rule[0]), default=None)


def fold_paths(scopes: Iterable[tuple[_Scope, PathRules]]) -> dict[str, tuple[PathWord, _Scope]]:
    """Rules of which the longest that covers a path is that of the most specific scope which says something of it.

    A rule for a path removes the rules of less specific scopes for it and for what is beneath it.

    Args:
        scopes: From the least specific to the most.
    """
    folded: dict[str, tuple[PathWord, _Scope]] = {}
    for scope, rules in scopes:
        for path in [path for path in folded if any(covers(rule, path) for rule, _ in rules)]:
            del folded[path]
        folded.update({path: (word, scope) for path, word in rules})
    return dict(sorted(folded.items()))


def path_rule_name(path: str) -> str:
    """How a rule is called where the rules of a policy have names."""
    return f"{_NAMED}{path}"


def set_id(rules: PathRules) -> str:
    """What a record refers to them by: made of all that they say, so that a set never changes."""
    text = "".join(f"{path} {word.letter}\n" for path, word in rules)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_LENGTH]


def render_set(rules: PathRules) -> dict[str, str]:
    """Map entries, of which HAProxy takes the one with the longest key that begins `ID|PLAIN-PATH/`.

    One for `/` is always there: where none is found, the set is not there.
    """
    name = set_id(rules)
    entries = {f"{name}|/": PathWord.ALLOW.letter}
    entries |= {f"{name}|{path.rstrip('/')}/": word.letter for path, word in rules}
    return entries


def group_sets(entries: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Map entries by the set that they are of."""
    sets: dict[str, dict[str, str]] = {}
    for key, value in entries.items():
        sets.setdefault(key.partition("|")[0], {})[key] = value
    return sets
