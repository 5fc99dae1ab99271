"""What a record is made of: keys, each with what it takes. Parser, renderer and JSON Schema are derived from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import Any, Final, Generic, TypeAlias, TypeVar

from imdsproxy.core.records.fields import MAX_TEXT, Field

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
"""What JSON can carry."""

_T = TypeVar("_T")


def _same(value: Any) -> Any:  # noqa: ANN401 - JSON carries it as it is
    return value


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be.

    Attributes:
        parse: Gives the core's value, or `None` once its problems are noted; or raises `FieldError`.
        schema: As JSON Schema; `None` where `tables` are all of it.
        render: From the core's value to JSON.
        tables: The mappings that it may be.
        item: What each item of a list may be.
    """

    parse: Callable[[Field], Any]
    schema: Mapping[str, Json] | None = None
    render: Callable[[Any], Json] = _same
    tables: tuple[Table[Any], ...] = ()
    item: Kind | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a mapping. A null is the same as no key.

    Attributes:
        attribute: The dataclass's, where it has another name.
        required: It must be there.
        only_in_files: The admin API does not take it, and no record is shown with it.
    """

    name: str
    kind: Kind
    help: str = ""
    attribute: str = ""
    required: bool = False
    only_in_files: bool = False

    @property
    def field(self) -> str:
        """The name in the dataclass."""
        return self.attribute or self.name

    @property
    def summary(self) -> str:
        """The first sentence of `help`, which is all that `--help` shows."""
        return self.help.partition(". ")[0].removesuffix(".") + "."


def _no_check(_entries: Mapping[str, Field], _values: dict[str, Any]) -> None:
    pass


class Table(Generic[_T]):
    """A mapping with known keys.

    Attributes:
        name: In the OpenAPI document.
        help: What it is, in one sentence.
        names: Of all keys, in their order.
        required: Of the keys that must be there.
    """

    def __init__(
        self,
        name: str,
        of: type[_T],
        help_text: str,
        *keys: Key,
        make: Callable[..., _T] | None = None,
        check: Callable[[Mapping[str, Field], dict[str, Any]], None] = _no_check,
    ) -> None:
        """Describe a mapping.

        Args:
            name: As of the class.
            of: The dataclass, whose defaults are those of the keys.
            help_text: What it is.
            keys: In the order in which problems are reported and records are shown.
            make: Makes the value, instead of `of`; given the parsed values of those keys that are there.
            check: Refuses what does not go together, and may change values.
        """
        self.name = name
        self.help = help_text
        self.keys = keys
        self.names = tuple(key.name for key in keys)
        self.required = tuple(key.name for key in keys if key.required)
        self._make = make or of
        self._check = check
        self._defaults = {
            one.name: one.default_factory() if one.default_factory is not MISSING else one.default
            for one in fields(of)  # type: ignore[arg-type] # a dataclass
        }

    def default(self, key: Key) -> Any:  # noqa: ANN401 - as the dataclass has it
        """What a missing key stands for; `None` where that is nothing."""
        default = self._defaults[key.field]
        return None if default is MISSING else default

    def parse(self, field: Field) -> _T | None:
        """The value of a mapping."""
        return self.build(field.mapping(self.names, self.required))

    def build(self, entries: Mapping[str, Field]) -> _T | None:
        """The value of a mapping's entries, which are known keys."""
        values: dict[str, Any] = {}
        for key in self.keys:
            if key.name in entries:
                value = entries[key.name].read(key.kind.parse)
                if value is not None:
                    values[key.field] = value
        self._check(entries, values)
        if any(key.required and key.field not in values for key in self.keys):
            return None
        return self._make(**values)

    def render(self, value: _T) -> dict[str, Json]:
        """The value's mapping, without what is its default."""
        return {
            key.name: key.kind.render(found)
            for key in self.keys
            if not key.only_in_files
            and (found := getattr(value, key.field)) != self._defaults[key.field]
        }

    @property
    def kind(self) -> Kind:
        """For a key that holds such a mapping."""
        return Kind(self.parse, render=self.render, tables=(self,))


def list_of(kind: Kind) -> Kind:
    """A list; what is refused is not in it."""

    def parse(field: Field) -> tuple[Any, ...]:
        parsed = (item.read(kind.parse) for item in field.items())
        return tuple(one for one in parsed if one is not None)

    return Kind(parse, render=lambda items: [kind.render(one) for one in items], item=kind)


def choice_of(words: type[StrEnum]) -> Kind:
    """One of some words."""
    listed = [word.value for word in words]
    schema: dict[str, Json] = {"type": "string", "enum": [*listed]}
    return Kind(lambda field: words(field.one_of(listed)), schema, lambda word: str(word.value))


def number_between(lowest: int, highest: int) -> Kind:
    """A whole number within bounds."""
    schema: dict[str, Json] = {"type": "integer", "minimum": lowest, "maximum": highest}
    return Kind(lambda field: field.whole_number(lowest, highest), schema)


SWITCH: Final = Kind(Field.boolean, {"type": "boolean"})
TEXT: Final = Kind(Field.text, {"type": "string", "minLength": 1, "maxLength": MAX_TEXT})
