"""The YAML dialect of settings and records: YAML 1.2's core schema, no duplicate keys, and the line of each part.

Plain words are taken literally: `no` is text, `52:54:00:12:34:56` is text, `0123` is text. Only `true` and `false`
are booleans, and only decimal, `0o` and `0x` numbers are numbers. `!!binary` gives bytes; other tags are refused. The
merge key `<<` adds the missing keys from one or several mappings (a feature of YAML 1.1, kept because settings use it).
"""

import base64
import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import yaml
from yaml.composer import Composer
from yaml.cyaml import CParser  # type: ignore[attr-defined] # the stubs do not export it
from yaml.resolver import BaseResolver

from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem
from imdsproxy.model.records.schema import Fault, Path, render_path

_DEEPEST: Final = 100
_TOO_DEEP: Final = f"is nested deeper than {_DEEPEST} levels"
_ITEM: Final = 2
"""Depth of the items of the root's lists."""

_MAX_PROBLEMS: Final = 100
_TAG: Final = "tag:yaml.org,2002:"
_STR: Final = f"{_TAG}str"

Parts: TypeAlias = "dict[str, Tree] | list[Tree] | None"
Tree: TypeAlias = tuple[int, Parts]
"""Line or position of a value (in a mapping, of its key), and the same for its parts."""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Text that is neither YAML nor JSON, and the 1-based line of the error."""

    reason: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """Plain values, their lines, and faults.

    Attributes:
        value: Mappings, lists, text, numbers, booleans, bytes, `None`.
        line_of: The 1-based line of a path, or of its nearest parent that exists.
    """

    value: object
    line_of: Callable[[Path], int | None]
    faults: tuple[Fault, ...] = ()


Take: TypeAlias = "Callable[[Path, Decoded, float], None]"
"""Consumer of a list's items: gets the path, the item, and the share of the text that was read, from 0 to 1."""


def find_part(tree: Tree, path: Path) -> int:
    """Return the start of the value at `path`, or of its nearest parent that exists."""
    found: Any = tree
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for step in path:
            found = found[1][step]
    return int(found[0])


def decode_yaml(
    text: str, *, lists: Collection[str] = (), take: Take = lambda *_: None
) -> Decoded | Undecodable:
    """Decode the YAML document in `text`; an empty document is `None`.

    Args:
        lists: Keys of the root whose lists are given to `take` item by item, so that a large text needs little memory.
            These lists are empty in the result, except where an alias may refer to the list itself.
        take: Called with each item as soon as it is read. The items are valid only if no `Undecodable` is returned.
    """
    try:
        return _Loader(text, lists, take).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        if not isinstance(error, _TooMuchError):
            reason = f"is not YAML: {reason}"
        return Undecodable(reason, line=None if mark is None else mark.line + 1)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Undecodable(f"is not YAML: {error.reason}", line=line)
    except UnicodeEncodeError:
        # A variable of the environment may hold bytes that are not Unicode.
        return Undecodable("is not YAML: it is no Unicode text")


class _TooMuchError(yaml.MarkedYAMLError):
    """The text unfolds to more than people write: nesting, or aliases of aliases."""


class _Loader(Composer, CParser, BaseResolver):
    """libyaml's parser, ten times as fast as the Python parser, with the tags of the core schema (YAML 1.2.2 §10.3.2).

    The loader hands over the items of lists directly under the root instead of keeping them. A list with an anchor or a
    tag, or with a repeated key, is composed as usual. Nodes are composed in Python: libyaml before 0.2.6 has no limit
    of its own, and composing in C crashes the process if a text is nested too deeply.

    `budget`: number of nodes that may still come. A text without aliases has fewer nodes than characters; a text whose
    aliases multiply (the billion laughs) exhausts the budget.
    """

    def __init__(self, text: str, lists: Collection[str], take: Take) -> None:
        CParser.__init__(self, text)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.budget = 2 * len(text) + 1000
        self.faults: list[Fault] = []
        self._size, self._take = len(text), take
        self._lists = set(lists)
        self._depth = 0
        self._given: str | None = None

    def read(self) -> Decoded:
        node = self.get_single_node()
        if node is None:
            return Decoded(None, lambda _path: None)
        value, tree = self._decode(node, ())
        return Decoded(value, partial(find_part, tree), tuple(self.faults))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        opens = isinstance(event, yaml.CollectionStartEvent)
        if opens and self._depth > _DEEPEST:
            raise _too_much(_TOO_DEEP, event)
        if self._depth > _ITEM and not opens:
            return super().compose_node(parent, index)
        plain = opens and event.anchor is None and event.tag is None
        if self._depth == 0 and not plain:
            self._lists.clear()
        elif self._depth == 1 and isinstance(index, yaml.ScalarNode):
            self._given = index.value if plain and index.value in self._lists else None
            self._lists.discard(index.value)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if self._given is not None and isinstance(node, yaml.Node):
            if self._depth == _ITEM and isinstance(parent, yaml.SequenceNode):
                self._give(node, (self._given, index))
                return None
            if self._depth == 1 and isinstance(node, yaml.SequenceNode):
                node.value.clear()
                self._given = None
        return node

    def _give(self, node: yaml.Node, path: Path) -> None:
        value, tree = self._decode(node, path)
        item = Decoded(value, lambda path: find_part(tree, path[2:]), tuple(self.faults))
        self.faults.clear()
        upcoming: Any = self.peek_event()
        self._take(path, item, upcoming.start_mark.index / self._size)

    def _decode(self, node: yaml.Node, path: Path) -> tuple[object, Tree]:
        self.budget -= 1
        if self.budget < 0:
            raise _too_much("its aliases unfold to too much", node)
        mark: Any = node.start_mark
        line: int = mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return self._decode_scalar(node, path), (line, None)
        if len(path) > _DEEPEST:
            raise _too_much(_TOO_DEEP, node)
        is_list = isinstance(node, yaml.SequenceNode)
        if node.tag != _TAG + ("seq" if is_list else "map"):
            self.faults.append(Fault(path, f"the tag {node.tag!r} is not supported"))
        if not is_list:
            value, parts = self._decode_mapping(node, path)
            return value, (line, parts)
        items = [self._decode(one, (*path, index)) for index, one in enumerate(node.value)]
        return [value for value, _ in items], (line, [tree for _, tree in items])

    def _decode_mapping(
        self, node: yaml.Node, path: Path
    ) -> tuple[dict[object, object], dict[str, Tree]]:
        mapping: dict[object, object] = {}
        merged: dict[object, object] = {}
        trees: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(Fault(path, "has a key that is a list or a mapping"))
                continue
            self.budget -= 1
            key = self._decode_scalar(key_node, path)
            step = key if isinstance(key, str) else key_node.value
            here, line = (*path, step), key_node.start_mark.line + 1
            merges = key == "<<" and not key_node.style
            if key in mapping and not merges:
                first, _ = trees.setdefault(step, (line, None))
                hint = f"keep one; the other is on line {first}"
                self.faults.append(Fault(here, "appears twice", hint, line))
                continue
            value, (_, parts) = self._decode(value_node, here)
            trees.setdefault(step, (line, parts))
            if merges:
                merged = self._merge(value, here)
            else:
                mapping[key] = value
        return {**merged, **mapping}, trees

    def _merge(self, value: object, path: Path) -> dict[object, object]:
        """Merge the keys of a mapping, or of a list of mappings, of which earlier ones win."""
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in found):
            self.faults.append(
                Fault(path, "merges a value that is not a mapping", "write the keys out")
            )
            return {}
        return {key: part for one in reversed(found) for key, part in one.items()}

    def _decode_scalar(self, node: yaml.ScalarNode, path: Path) -> object:
        if node.tag == _STR:
            # Copy the text: the node's own text lies among the nodes in memory, and would keep all the pages of a large
            # file's tree from being given back (measured: 145 MB against 67 MB).
            return f"{node.value} "[:-1]
        construct = _SCALARS.get(node.tag)
        if construct is None:
            self.faults.append(Fault(path, f"the tag {node.tag!r} is not supported"))
            return None
        try:
            return construct(node.value)
        except (KeyError, ValueError):
            self.faults.append(Fault(path, f"is no {node.tag.removeprefix(_TAG)}"))
            return None


def _too_much(reason: str, at: yaml.Node | yaml.CollectionStartEvent) -> _TooMuchError:
    mark: Any = at.start_mark
    return _TooMuchError(None, None, reason, mark)


_SCALARS: Final[Mapping[str, Callable[[str], object]]] = {
    f"{_TAG}null": lambda _text: None,
    f"{_TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{_TAG}int": lambda text: int(text, 0 if text.startswith(("0o", "0x")) else 10),
    f"{_TAG}float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    f"{_TAG}binary": lambda text: base64.b64decode("".join(text.split()), validate=True),
}
for _name, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    # Numbers with leading zeros and absurdly long numbers stay text.
    ("int", r"(?:[-+]?(?:0|[1-9][0-9]{0,100})|0o[0-7]{1,100}|0x[0-9a-fA-F]{1,100})$", None),
    (
        "float",
        r"(?:[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan)$",
        None,
    ),
):
    _Loader.add_implicit_resolver(
        _TAG + _name, re.compile(_pattern), _first or list("-+.0123456789")
    )


def parse_yaml(text: str, file: str) -> Decoded:
    """Parse one YAML (or JSON) document of settings; errors name it `file`.

    Raises `ConfigUnreadable`: the document is not YAML; the message has the line; `ConfigInvalid`: keys are duplicate
    or not plain text, or a tag is unknown.
    """
    decoded = decode_yaml(text)
    if isinstance(decoded, Undecodable):
        place = "" if decoded.line is None else f":{decoded.line}"
        raise ConfigUnreadable(
            f"{file}{place} {decoded.reason}",
            hint="indent with blanks, and quote texts that hold a colon, #, * or &",
        )
    if decoded.faults:
        problems = [
            Problem(
                render_path(fault.path) or "configuration",
                fault.reason,
                fault.hint,
                file,
                fault.line or decoded.line_of(fault.path),
            )
            for fault in decoded.faults[:_MAX_PROBLEMS]
        ]
        raise ConfigInvalid(
            f"{file} is ambiguous", problems=sorted(problems, key=lambda one: one.line or 0)
        )
    return decoded


_PLAIN: Final = re.compile(r"(?!(?:null|true|false)$)[a-zA-Z/][a-zA-Z0-9/_.@-]*", re.IGNORECASE)


def render_value(value: object, *, inside: bool = False) -> str:
    """Render a value as YAML on one line; `inside` brackets, texts are quoted."""
    if isinstance(value, Mapping):
        pairs = (
            f"{render_value(key)}: {render_value(one, inside=True)}" for key, one in value.items()
        )
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(render_value(one, inside=True) for one in value) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and (inside or not _PLAIN.fullmatch(value)):
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in quoted)
    return str(value)
