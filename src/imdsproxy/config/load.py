"""Settings from one YAML file, the `conf.d/` beside it, and the environment; all problems at once.

Later wins: defaults, the file, `conf.d/*.yaml` in the order of their names, environment. Mappings
are merged key by key, everything else (lists too) is replaced.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import TypeAdapter, ValidationError

from imdsproxy.config.describe import (
    Place,
    Setting,
    explain_finding,
    iterate_settings,
    join_place,
    type_at,
)
from imdsproxy.config.files import (
    DEFAULT_CONFIG,
    ENVIRONMENT_PREFIX,
    find_files,
    read_each,
    unreadable,
)
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import Decoded, parse_yaml
from imdsproxy.errors import ConfigError, ConfigInvalid, ConfigUnreadable, Problem

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_OriginOf: TypeAlias = "Callable[[Place], Origin]"
_SCALARS: Final[Mapping[str, TypeAdapter[Any]]] = {
    "boolean": TypeAdapter(bool),
    "integer": TypeAdapter(int),
    "number": TypeAdapter(float),
}
_NULL: Final = "null"


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
        origins: By path, those of sections and of parts too; what is not there is the default.
        empty: Those of `files` that hold nothing but comments; one that holds `{}` is not empty.
        blank: Those of `empty` without a single character but white space: a write failed, most likely. A device
            (`/dev/null`) is none.
    """

    settings: Settings
    origins: Mapping[str, Origin]
    files: tuple[Path, ...] = ()
    empty: frozenset[Path] = frozenset()
    blank: frozenset[Path] = frozenset()


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
    values: dict[str, object] = {}
    written: dict[str, Origin] = {}
    documents = read_each(files, lambda path: (path, _read(path)), "configuration")
    for path, document in documents:
        data = document.value if isinstance(document.value, Mapping) else {}
        _merge(values, data, written, partial(_origin_in, str(path), document))
    problems = _merge_environment(values, written, environment)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems = [*_problems(error, written), *problems]
        raise _invalid(problems) from error
    if problems:
        raise _invalid(problems)
    empty = frozenset(path for path, document in documents if document.value is None)
    blank = frozenset(path for path in empty if path.is_file() and not path.read_text().strip())
    return Loaded(settings, written, tuple(files), empty, blank)


def _origin_in(file: str, document: Decoded | None, place: Place) -> Origin:
    return Origin(file, None if document is None else document.line_of(tuple(place)))


def _invalid(problems: Sequence[Problem]) -> ConfigInvalid:
    count = len(problems)
    return ConfigInvalid(
        f"the configuration has {count} problem{'s' if count != 1 else ''}",
        problems=problems,
        hint="`imdsproxy config sample` prints every setting with its default",
    )


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


def _merge(
    into: dict[str, object],
    new: Mapping[str, object],
    origins: dict[str, Origin],
    origin_of: _OriginOf,
    place: tuple[str, ...] = (),
) -> None:
    for key, value in new.items():
        name = str(key)  # YAML has numbers as keys too; they are refused as unknown settings
        here = (*place, name)
        old = into.get(name)
        if not (isinstance(value, Mapping) and isinstance(old, Mapping)):
            if name in into:
                _forget(origins, join_place(here))
            _remember(origins, here, value, origin_of)
        if isinstance(value, Mapping):
            target = dict(old) if isinstance(old, dict) else {}
            into[name] = target
            _merge(target, value, origins, origin_of, here)
        else:
            into[name] = value


def _forget(origins: dict[str, Origin], here: str) -> None:
    """What is replaced takes along the origins of its parts."""
    for path in [path for path in origins if path.startswith((f"{here}.", f"{here}["))]:
        del origins[path]


def _remember(origins: dict[str, Origin], here: Place, value: object, origin_of: _OriginOf) -> None:
    """Where `value` is written, and each part of a list; a mapping's parts are merged one by one."""
    origins[join_place(here)] = origin_of(here)
    for index, item in enumerate(value if isinstance(value, list) else ()):
        _remember(origins, (*here, index), item, origin_of)
        for name, part in item.items() if isinstance(item, Mapping) else ():
            _remember(origins, (*here, index, name), part, origin_of)


def _merge_environment(
    values: dict[str, object], origins: dict[str, Origin], environment: Mapping[str, str]
) -> list[Problem]:
    """Merge `IMDSPROXY_SECTION__FIELD`, the only variables that imdsproxy reads; what is wrong with them.

    A mapping or a list is written as JSON, or as the YAML that a file would have.
    """
    ours = sorted(name for name in environment if name.upper().startswith(ENVIRONMENT_PREFIX))
    if not ours:
        return []
    settings = {setting.variable: setting for setting in iterate_settings() if not setting.inner}
    problems: list[Problem] = []
    for name in ours:
        if name not in settings:
            near = difflib.get_close_matches(name.upper(), settings, n=1)
            hint = f"did you mean {near[0]}?" if near else "see `imdsproxy config show --origin`"
            problems.append(Problem(name, "no setting has this environment variable", hint=hint))
            continue
        setting = settings[name]
        steps = setting.path.split(".")
        try:
            value = _read_variable(environment[name], name, type_at(steps))
        except ConfigError as error:
            problems += _problems_of_variable(setting, error)
            continue
        for step in reversed(steps):
            value = {step: value}
        _merge(values, value, origins, partial(_origin_in, name, None))
    return problems


def _read_variable(text: str, name: str, kind: str) -> Any:  # noqa: ANN401 - as it is written
    if text == _NULL:
        return None
    if kind in {"object", "array"}:
        return parse_yaml(text, name).value
    # What is no such thing is left as it is: the schema has the reason.
    with contextlib.suppress(KeyError, ValidationError):
        return _SCALARS[kind].validate_python(text)
    return text


def _problems_of_variable(setting: Setting, error: ConfigError) -> list[Problem]:
    """Why a mapping's variable is refused; it is one line, so its lines are of no use."""
    if not error.problems:
        hint = f"takes {setting.takes}, as JSON"
        return [Problem(setting.path, error.message, hint, setting.variable)]
    return [
        replace(problem, field=f"{setting.path}.{problem.field}", line=None)
        for problem in error.problems
    ]


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
    problem = explain_finding(detail)
    path = problem.field
    while path:
        # Where it, or else the section around it, was written.
        if path in origins:
            return replace(problem, file=origins[path].file, line=origins[path].line)
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return problem
