"""Settings from one YAML file, the `conf.d/` beside it, and the environment; all problems at once.

Later wins: defaults, the file, `conf.d/*.yaml` in the order of their names, environment. Mappings
are merged key by key, everything else (lists too) is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import ValidationError

from imdsproxy.config.describe import explain_finding, iterate_settings
from imdsproxy.config.environment import read_environment
from imdsproxy.config.files import (
    DEFAULT_CONFIG,
    ENVIRONMENT_PREFIX,
    find_files,
    read_each,
    unreadable,
)
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Section
from imdsproxy.config.yaml_document import YamlDocument, parse_yaml
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_OriginOf: TypeAlias = "Callable[[str], Origin]"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a file and line, or an environment variable as `file`."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each came from.

    Attributes:
        origins: By path; what is not there is the default.
        empty: Those of `files` that hold nothing but comments; one that holds `{}` is not empty.
        blank: Those of `empty` without a single character but white space: a write failed, most likely. A device
            (`/dev/null`) is none.
    """

    settings: Settings
    origins: Mapping[str, Origin]
    files: tuple[Path, ...] = ()
    empty: frozenset[Path] = frozenset()
    blank: frozenset[Path] = frozenset()


@dataclass(slots=True)
class _Merged:
    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)


def load_settings(
    config: Path | None, environment: Mapping[str, str], *, default: Path = DEFAULT_CONFIG
) -> Loaded:
    """Read and check the settings.

    Args:
        config: The file that the operator named; `None` takes `default`.
        default: The file that is read when none was named; it may be missing.
        environment: The process's variables; only `IMDSPROXY_*` are looked at.

    Raises:
        ConfigUnreadable: A file is missing, unreadable or not YAML.
        ConfigInvalid: `problems` has every breach of the schema and every unknown variable.
    """
    files = find_files(config, default)
    merged = _Merged()
    documents = read_each(files, lambda path: (path, _read(path)), "configuration")
    for path, document in documents:
        _merge_file(merged, path, document)
    problems = _merge_environment(merged, environment)
    try:
        settings = Settings.model_validate(merged.values)
    except ValidationError as error:
        problems = [*_problems(error, merged.origins), *problems]
        raise _invalid(problems) from error
    if problems:
        raise _invalid(problems)
    leaves = set(_leaves(settings, ""))
    origins = {path: origin for path, origin in merged.origins.items() if path in leaves}
    empty = frozenset(path for path, document in documents if document.data is None)
    blank = frozenset(path for path in empty if path.is_file() and not path.read_text().strip())
    return Loaded(settings, origins, tuple(files), empty, blank)


def _leaves(value: object, path: str) -> Iterator[str]:
    """The paths of all settings; not by the schema, which takes longer than reading the files."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), f"{path}.{name}".lstrip("."))
        return
    yield path
    parts = value.items() if isinstance(value, Mapping) else ()
    named = [(f"{path}.{key}", part) for key, part in parts]
    items = enumerate(value if isinstance(value, tuple) else ())
    for inside, part in [*named, *((f"{path}[{number}]", part) for number, part in items)]:
        if isinstance(part, Section):
            yield from _leaves(part, inside)


def _invalid(problems: Sequence[Problem]) -> ConfigInvalid:
    count = len(problems)
    return ConfigInvalid(
        f"the configuration has {count} problem{'s' if count != 1 else ''}",
        problems=problems,
        hint="`imdsproxy config sample` prints every setting with its default",
    )


def _read(path: Path) -> YamlDocument:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    document = parse_yaml(text, str(path))
    if not isinstance(document.data, dict | None):
        raise ConfigUnreadable(
            f"{path} holds no sections", hint="begin with `haproxy:` or another section's name"
        )
    return document


def _merge_file(merged: _Merged, path: Path, document: YamlDocument) -> None:
    def origin_of(where: str) -> Origin:
        return Origin(str(path), document.lines.get(where))

    data = document.data if isinstance(document.data, Mapping) else {}
    _merge(merged.values, data, "", merged.origins, origin_of)


def _merge(
    into: dict[str, object],
    new: Mapping[str, object],
    prefix: str,
    origins: dict[str, Origin],
    origin_of: _OriginOf,
) -> None:
    for key, value in new.items():
        name = str(key)  # YAML has numbers as keys too; they are refused as unknown settings
        here = f"{prefix}{name}"
        old = into.get(name)
        if not (isinstance(value, Mapping) and isinstance(old, Mapping)):
            _forget(origins, here)
            _remember(origins, here, value, origin_of)
        if isinstance(value, Mapping):
            target = dict(old) if isinstance(old, dict) else {}
            into[name] = target
            _merge(target, value, f"{here}.", origins, origin_of)
        else:
            into[name] = value


def _forget(origins: dict[str, Origin], here: str) -> None:
    """What is replaced takes along the origins of its parts."""
    for path in [path for path in origins if path.startswith((f"{here}.", f"{here}["))]:
        del origins[path]


def _remember(origins: dict[str, Origin], here: str, value: object, origin_of: _OriginOf) -> None:
    """Where `value` is written, and each part of a list; a mapping's parts are merged one by one."""
    origins[here] = origin_of(here)
    for index, item in enumerate(value if isinstance(value, list) else ()):
        _remember(origins, f"{here}[{index}]", item, origin_of)
        for name, part in item.items() if isinstance(item, Mapping) else ():
            _remember(origins, f"{here}[{index}].{name}", part, origin_of)


def _merge_environment(merged: _Merged, environment: Mapping[str, str]) -> list[Problem]:
    if not any(name.upper().startswith(ENVIRONMENT_PREFIX) for name in environment):
        return []
    variables = {setting.path: setting.variable for setting in iterate_settings()}

    def origin_of(where: str) -> Origin:
        while where and where not in variables:
            where = _outside(where)
        return Origin(variables.get(where, "environment"))

    values, problems = read_environment(environment)
    _merge(merged.values, values, "", merged.origins, origin_of)
    return problems


def _problems(error: ValidationError, origins: Mapping[str, Origin]) -> list[Problem]:
    details = error.errors()
    # pydantic counts the items that it took: a list whose items are refused is not too short.
    refused = {loc[:depth] for loc in (one["loc"] for one in details) for depth in range(len(loc))}
    return [
        _problem(detail, origins)
        for detail in details
        if not (detail["type"] == "too_short" and detail["loc"] in refused)
    ]


def _problem(detail: ErrorDetails, origins: Mapping[str, Origin]) -> Problem:
    finding = explain_finding(detail)
    origin = _nearest(finding.field, origins)
    return Problem(
        field=finding.field,
        reason=finding.reason,
        hint=finding.hint,
        file=None if origin is None else origin.file,
        line=None if origin is None else origin.line,
    )


def _nearest(path: str, origins: Mapping[str, Origin]) -> Origin | None:
    """Where `path`, or else the section around it, was written."""
    while path:
        if path in origins:
            return origins[path]
        path = _outside(path)
    return None


def _outside(path: str) -> str:
    """The path of what `path` is a part of; empty at the root."""
    return path[: max(path.rfind("."), path.rfind("["), 0)]
