"""`IMDSPROXY_SECTION__FIELD`: the only environment variables that imdsproxy reads."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from imdsproxy.config.describe import Setting, iterate_settings, type_at
from imdsproxy.config.files import ENVIRONMENT_PREFIX
from imdsproxy.config.yaml_document import parse_yaml
from imdsproxy.errors import ConfigError, Problem

_SCALARS: Final[Mapping[str, TypeAdapter[Any]]] = {
    "boolean": TypeAdapter(bool),
    "integer": TypeAdapter(int),
    "number": TypeAdapter(float),
}
_NULL: Final = "null"


def read_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """The settings that `environment` overrides, by section, converted where possible, and what is wrong.

    A mapping or a list is written as JSON, or as the YAML that a file would have.
    """
    settings = {setting.variable: setting for setting in iterate_settings()}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name in sorted(environment.keys() & settings.keys()):
        setting = settings[name]
        try:
            value = _read(environment[name], name, type_at(setting.path.split(".")))
        except ConfigError as error:
            problems.extend(_problems(setting, error))
            continue
        *sections, last = setting.path.split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return values, problems + _unknown(environment, list(settings))


def _read(text: str, name: str, kind: str) -> object:
    if text == _NULL:
        return None
    if kind in {"object", "array"}:
        return parse_yaml(text, name).data
    # What is no such thing is left as it is: the schema has the reason.
    with contextlib.suppress(KeyError, ValidationError):
        return _SCALARS[kind].validate_python(text)
    return text


def _problems(setting: Setting, error: ConfigError) -> list[Problem]:
    """Why a mapping's variable is refused; it is one line, so its lines are of no use."""
    if not error.problems:
        hint = f"takes {setting.takes}, as JSON"
        return [Problem(setting.path, error.message, hint, setting.variable)]
    return [
        replace(problem, field=f"{setting.path}.{problem.field}", line=None)
        for problem in error.problems
    ]


def _unknown(environment: Mapping[str, str], known: list[str]) -> list[Problem]:
    """Every variable with our prefix that is no setting: a typing error, most likely."""
    problems = []
    for name in sorted(environment):
        if not name.upper().startswith(ENVIRONMENT_PREFIX) or name in known:
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `imdsproxy config show --origin`"
        problems.append(Problem(name, "no setting has this environment variable", hint=hint))
    return problems
