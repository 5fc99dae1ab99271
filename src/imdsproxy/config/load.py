"""Loader of settings from one YAML file, the `conf.d/` beside it, and the environment; reports all problems at once.

Later layers win: defaults, the file, `conf.d/*.yaml` in the order of their names, environment. Mappings are merged key
by key, everything else (lists too) is replaced.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from imdsproxy.config import DEFAULT_CONFIG, ENVIRONMENT_PREFIX, find_files, read_each, unreadable
from imdsproxy.config.describe import (
    Place,
    explain_finding,
    iterate_settings,
    place_of,
    render_nodes,
    walk_values,
)
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import Decoded, parse_yaml
from imdsproxy.errors import ConfigError, ConfigInvalid, ConfigUnreadable, Problem

_SCALARS: Final[Mapping[str, TypeAdapter[Any]]] = {
    "boolean": TypeAdapter(bool),
    "integer": TypeAdapter(int),
    "number": TypeAdapter(float),
}
_NULL: Final = "null"
_ORIGIN_COLUMN: Final = 48


@dataclass(frozen=True, slots=True)
class _Layer:
    """Settings of a file or an environment variable; all keys are texts."""

    name: str
    values: Mapping[str, object]
    line_of: Callable[[tuple[str | int, ...]], int | None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and the origin of each.

    Attributes:
        empty: Files without settings, only with comments; a file with `{}` is not empty.
        blank: Empty files without any character but white space, most likely after a failed write. A device
            (`/dev/null`) never counts as blank.
    """

    settings: Settings
    layers: Sequence[_Layer] = ()
    files: tuple[Path, ...] = ()
    empty: frozenset[Path] = frozenset()
    blank: frozenset[Path] = frozenset()

    def origin(self, place: Place) -> str | None:
        """Return the `FILE:LINE`, or the variable, that set the value at a place; `None` for the default."""
        found = _find_origin(self.layers, place)
        return None if found is None else found[0] if found[1] is None else "{}:{}".format(*found)


def load_settings(
    config: Path | None, environment: Mapping[str, str], *, default: Path = DEFAULT_CONFIG
) -> Loaded:
    """Read and check the settings.

    `default`: the file to read if none was named; it may be missing. Raises `ConfigUnreadable`: a file is missing,
    unreadable or not YAML; `ConfigInvalid`: `problems` has every violation of the schema and every unknown variable.
    """
    files = find_files(config, default)
    documents = read_each(files, lambda path: (path, _read(path)), "configuration")
    layers = [
        _Layer(str(path), _with_text_keys(document.value), document.line_of)
        for path, document in documents
        if isinstance(document.value, Mapping)
    ]
    variables, problems = _read_environment(environment)
    layers += variables
    values: dict[str, object] = reduce(_merge, (layer.values for layer in layers), {})
    cause: ValidationError | None = None
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        cause, problems = error, [*_problems(error, layers), *problems]
    if problems:
        count = len(problems)
        raise ConfigInvalid(
            f"the configuration has {count} problem{'s' if count != 1 else ''}",
            problems=problems,
            hint="`imdsproxy config sample` prints every setting with its default",
        ) from cause
    empty = frozenset(path for path, document in documents if document.value is None)
    blank = frozenset(path for path in empty if path.is_file() and not path.read_text().strip())
    return Loaded(settings, layers, tuple(files), empty, blank)


def _read(path: Path) -> Decoded:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    document = parse_yaml(text, str(path))
    if not isinstance(document.value, dict | None):
        raise ConfigUnreadable(
            f"{path} holds no sections", hint="begin with `haproxy:` or another section's name"
        )
    return document


def _with_text_keys(value: Any) -> Any:
    # YAML also allows numbers as keys; the schema refuses them as unknown settings.
    if not isinstance(value, dict):
        return value
    return {str(key): _with_text_keys(part) for key, part in value.items()}


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{key: _merge(old.get(key), part) for key, part in new.items()}}


def _find_origin(layers: Sequence[_Layer], place: Place) -> tuple[str, int | None] | None:
    """Return the file, or variable, and the line that set the value at a place; for a mapping, where it begins."""
    origin = None
    for layer in reversed(layers):
        found = _values_on_the_way(layer.values, place)
        if len(found) == len(place):
            origin = layer.name, layer.line_of(tuple(place))
        # Mappings are merged; any other value replaces values of earlier layers.
        if not all(isinstance(one, Mapping) for one in found):
            break
    return origin


def _values_on_the_way(value: Any, place: Place) -> list[object]:
    """Return the values at each step of a place, up to the first missing one."""
    found: list[object] = []
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for step in place:
            value = value[step]
            found.append(value)
    return found


def _read_environment(environment: Mapping[str, str]) -> tuple[list[_Layer], list[Problem]]:
    """Read the variables `IMDSPROXY_SECTION__FIELD`, the only ones for settings; return layers and problems.

    A mapping or a list is written as JSON, or as YAML like in a file.
    """
    layers: list[_Layer] = []
    problems: list[Problem] = []
    ours = sorted(name for name in environment if name.upper().startswith(ENVIRONMENT_PREFIX))
    every = iterate_settings() if ours else ()
    settings = {setting.variable: setting for setting in every if not setting.inner}
    for name in ours:
        setting = settings.get(name)
        if setting is None:
            near = difflib.get_close_matches(name.upper(), settings, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `imdsproxy config show --origin`"
            problems.append(Problem(name, "no setting has this environment variable", hint))
            continue
        try:
            value = _read_variable(environment[name], name, setting.bare["type"])
        except ConfigError as error:
            # The variable has a mapping or a list on one line, so line numbers are of no use.
            inside = [replace(one, line=None) for one in error.problems]
            problems += [replace(one, field=f"{setting.path}.{one.field}") for one in inside] or [
                Problem(setting.path, error.message, f"takes {setting.takes}, as JSON", name)
            ]
            continue
        for step in reversed(setting.path.split(".")):
            value = {step: value}
        layers.append(_Layer(name, _with_text_keys(value)))
    return layers, problems


def _read_variable(text: str, name: str, kind: str) -> Any:
    if text == _NULL:
        return None
    if kind in {"object", "array"}:
        return parse_yaml(text, name).value
    # A value of a wrong type stays as it is: the schema reports the reason.
    with contextlib.suppress(KeyError, ValidationError):
        return _SCALARS[kind].validate_python(text)
    return text


def _problems(error: ValidationError, layers: Sequence[_Layer]) -> Iterator[Problem]:
    details = error.errors()
    # pydantic counts only accepted items: a list whose items are refused is not too short.
    refused = {loc[:depth] for loc in (one["loc"] for one in details) for depth in range(len(loc))}
    for detail in details:
        if detail["type"] == "too_short" and detail["loc"] in refused:
            continue
        place = place_of(detail)
        # The place where the value, or else the section around it, was written.
        around = (_find_origin(layers, place[:depth]) for depth in range(len(place), 0, -1))
        file, line = next(filter(None, around), (None, None))
        yield replace(explain_finding(detail), file=file, line=line)


def render_settings(loaded: Loaded, *, with_origin: bool = False) -> str:
    """Render the settings in force as YAML that loads back equal, optionally with each origin as a comment."""
    lines = []
    for node, line in render_nodes(walk_values(loaded.settings.model_dump(mode="json"))):
        if with_origin and not node.opens:
            lines.append(f"{line.ljust(_ORIGIN_COLUMN)} # {loaded.origin(node.place) or 'default'}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def settings_by_origin(loaded: Loaded) -> dict[str, dict[str, object]]:
    """Return `{path: {"value": …, "origin": …}}` for programs; also for each part of mappings and lists."""
    return {
        node.path: {"value": node.value, "origin": loaded.origin(node.place) or "default"}
        for node in walk_values(loaded.settings.model_dump(mode="json"))
        if not node.setting.fields
    }
