"""The one dialect of YAML, for settings and records: YAML 1.2's core schema, no duplicate keys, the line of each part.

Plain words mean what they look like: `no` is text, `52:54:00:12:34:56` is text, `0123` is text.
Only `true` and `false` are booleans, and only decimal, `0o` and `0x` numbers are numbers.
`!!binary` gives bytes; other tags are refused. The merge key `<<` takes the keys of a mapping, or of several, that
are not there (YAML 1.1's, kept because settings use it).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import yaml
from yaml.composer import Composer
from yaml.cyaml import CParser  # type: ignore[attr-defined] # the stubs do not export it
from yaml.resolver import BaseResolver

from imdsproxy.core.records import Fault, Path, render_path
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

_DEEPEST: Final = 100
_ITEM: Final = 2
"""How deep the items of the root's lists are."""

_MAX_PROBLEMS: Final = 100
_TAG: Final = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Text that is not YAML or JSON at all, and where that shows (1-based line)."""

    reason: str
    hint: str = ""
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """Plain values, and what the decoder knows beside them.

    Attributes:
        value: Mappings, lists, text, numbers, booleans, bytes, `None`.
        line_of: The 1-based line of a path, or of its nearest parent that exists.
        faults: Keys that stood twice, tags that are not supported.
    """

    value: object
    line_of: Callable[[Path], int | None]
    faults: tuple[Fault, ...] = ()


Take: TypeAlias = "Callable[[Path, Decoded, float], None]"
"""Takes an item of a list, its path, and how much of the text has been read, from 0 to 1."""


class _Loader(Composer, CParser, BaseResolver):
    """libyaml's parser, ten times as fast as the one in Python, and what a plain word is (YAML 1.2.2 §10.3.2).

    It gives away the items of lists right under the root instead of keeping them. A list that has an anchor or a tag,
    or stands there for the second time, is composed as usual. Nodes are composed in Python: libyaml before 0.2.6 has no
    limit of its own, and composing in C ends the process where a text is nested too deeply.
    """

    def __init__(
        self, text: str, lists: Collection[str], take: Callable[[Path, yaml.Node, float], None]
    ) -> None:
        CParser.__init__(self, text)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._size, self._take = len(text), take
        self._lists = set(lists)
        self._depth = 0
        self._given: str | None = None

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - as PyYAML has it
        event: Any = self.peek_event()
        opens = isinstance(event, yaml.CollectionStartEvent)
        if opens and self._depth > _DEEPEST:
            raise _TooMuchError(f"is nested deeper than {_DEEPEST} levels", event)
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
                upcoming: Any = self.peek_event()
                share = upcoming.start_mark.index / self._size
                self._take((self._given, index), node, share)
                return None
            if self._depth == 1 and isinstance(node, yaml.SequenceNode):
                node.value.clear()
                self._given = None
        return node


for _name, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    # Leading zeros apart, and no number beyond reason: both stay text.
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


def decode_yaml(
    text: str, *, lists: Collection[str] = (), take: Take | None = None
) -> Decoded | Undecodable:
    """The one YAML document in `text`; an empty one is `None`.

    Args:
        text: The document.
        lists: Lists right under its root whose items go to `take` one by one, so that a large text needs little
            memory. They are empty in what is returned, except where an alias may refer to the list itself.
        take: Given each item as soon as it is read. What it got holds only if no `Undecodable` is returned.
    """
    decoder = _Decoder(budget=2 * len(text) + 1000)

    def decode_item(path: Path, node: yaml.Node, share: float) -> None:
        value = decoder.decode(node, path)
        faults, decoder.faults = tuple(decoder.faults), []
        if take is not None:
            take(path, Decoded(value, lambda path: _find_lines(node)(path[2:]), faults), share)

    try:
        node = _Loader(text, () if take is None else lists, decode_item).get_single_node()
        value = None if node is None else decoder.decode(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        return Undecodable(f"is not YAML: {reason}", line=None if mark is None else mark.line + 1)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Undecodable(f"is not YAML: {error.reason}", line=line)
    except UnicodeEncodeError:
        # A variable of the environment may hold bytes that are none.
        return Undecodable("is not YAML: it is no Unicode text")
    except _TooMuchError as error:
        return Undecodable(str(error), line=error.line)
    line_of = (lambda _path: None) if node is None else _find_lines(node)
    return Decoded(value, line_of, tuple(decoder.faults))


def _find_lines(root: yaml.Node) -> Callable[[Path], int | None]:
    pairs: dict[yaml.Node, dict[object, tuple[yaml.Node, yaml.Node]]] = {}

    def pairs_of(node: yaml.MappingNode) -> Mapping[object, tuple[yaml.Node, yaml.Node]]:
        # Settings may have thousands of keys in one mapping, and each is asked for. The first of two alike counts.
        if node not in pairs:
            scalars = (pair for pair in node.value if isinstance(pair[0], yaml.ScalarNode))
            pairs[node] = {pair[0].value: pair for pair in reversed(tuple(scalars))}
        return pairs[node]

    def line_of(path: Path) -> int | None:
        node, line = root, root.start_mark.line + 1
        for step in path:
            if (
                isinstance(node, yaml.SequenceNode)
                and isinstance(step, int)
                and step < len(node.value)
            ):
                node = node.value[step]
                line = node.start_mark.line + 1
            elif isinstance(node, yaml.MappingNode) and step in pairs_of(node):
                key, node = pairs_of(node)[step]
                line = key.start_mark.line + 1
            else:
                break
        return line

    return line_of


class _TooMuchError(Exception):
    """The text unfolds to more than anybody writes: nesting, or aliases of aliases."""

    def __init__(self, reason: str, node: yaml.Node | yaml.CollectionStartEvent) -> None:
        super().__init__(reason)
        mark: Any = node.start_mark
        self.line: int = mark.line + 1


@dataclass(slots=True)
class _Decoder:
    """Values out of nodes.

    Attributes:
        budget: How many nodes may still come. A text without aliases has fewer nodes than
            characters; one whose aliases multiply (the billion laughs) runs out of it.
        faults: What was wrong and went on.
    """

    budget: int
    faults: list[Fault] = field(default_factory=list)

    def decode(self, node: yaml.Node, path: Path) -> object:
        self.budget -= 1
        if self.budget < 0:
            raise _TooMuchError("its aliases unfold to too much", node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if len(path) > _DEEPEST:
            raise _TooMuchError(f"is nested deeper than {_DEEPEST} levels", node)
        if isinstance(node, yaml.SequenceNode):
            self._expect(node, path, "seq")
            return [self.decode(item, (*path, index)) for index, item in enumerate(node.value)]
        self._expect(node, path, "map")
        return self._mapping(node, path)

    def _mapping(self, node: yaml.Node, path: Path) -> dict[object, object]:
        mapping: dict[object, object] = {}
        merged: dict[object, object] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(Fault(path, "has a key that is a list or a mapping"))
                continue
            key = self.decode(key_node, path)
            step = key if isinstance(key, str) else str(key_node.value)
            here = (*path, step)
            if key == "<<" and not key_node.style:
                merged = self._merge(value_node, here)
            elif key in mapping:
                first = next(one for one, _ in node.value if one.value == key_node.value)
                hint = f"keep one; the other is on line {first.start_mark.line + 1}"
                line = key_node.start_mark.line + 1
                self.faults.append(Fault(here, "is there twice", hint, line))
            else:
                mapping[key] = self.decode(value_node, here)
        return {**merged, **mapping}

    def _merge(self, node: yaml.Node, path: Path) -> dict[object, object]:
        """The keys of a mapping, or of a list of them, an earlier one's over a later one's."""
        value = self.decode(node, path)
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in found):
            self.faults.append(Fault(path, "merges what is no mapping", "write the keys out"))
            return {}
        return {key: part for one in reversed(found) for key, part in one.items()}

    def _scalar(self, node: yaml.Node, path: Path) -> object:
        if node.tag == _STR:
            # A copy: the node's own text lies among the nodes in memory, and would keep all the pages
            # of a large file's tree from being given back (measured: 145 MB against 67 MB).
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

    def _expect(self, node: yaml.Node, path: Path, kind: str) -> None:
        if node.tag != _TAG + kind:
            self.faults.append(Fault(path, f"the tag {node.tag!r} is not supported"))


_STR: Final = f"{_TAG}str"


def _int(text: str) -> int:
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _binary(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)


_SCALARS: Final[dict[str, Callable[[str], object]]] = {
    f"{_TAG}null": lambda _text: None,
    f"{_TAG}bool": lambda text: {"true": True, "false": False}[text.lower()],
    f"{_TAG}int": _int,
    f"{_TAG}float": _float,
    f"{_TAG}binary": _binary,
}


def parse_yaml(text: str, file: str) -> Decoded:
    """Parse one YAML (or JSON) document of settings; `file` is only named in what is raised.

    Raises:
        ConfigUnreadable: It is not YAML; the message has the line.
        ConfigInvalid: Keys stand twice or are no plain text, or a tag is unknown.
    """
    decoded = decode_yaml(text)
    if isinstance(decoded, Undecodable):
        place = "" if decoded.line is None else f":{decoded.line}"
        raise ConfigUnreadable(
            f"{file}{place} {decoded.reason}",
            hint=decoded.hint or "indent with blanks, and quote texts that hold a colon, #, * or &",
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


def render_value(value: object) -> str:
    """A default or a value as one would write it in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = (f"{render_value(key)}: {_flow(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(one) for one in value) + "]"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return _quote(value)
    return str(value)


def _flow(value: object) -> str:
    # Beside brackets and commas a text is safe in quotes only.
    return _quote(value) if isinstance(value, str) else render_value(value)


def _quote(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in quoted)


def _escape(letter: str) -> str:
    return f"\\U{ord(letter):08x}"
