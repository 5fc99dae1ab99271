"""`IMDSPROXY_SECTION__FIELD`: the only environment variables that imdsproxy reads."""

from __future__ import annotations

import contextlib
import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from imdsproxy.config.files import ENVIRONMENT_PREFIX
from imdsproxy.config.schema import Settings
from imdsproxy.config.shape import spot_at
from imdsproxy.config.words import Setting, iterate_settings
from imdsproxy.config.yaml_document import parse_yaml
from imdsproxy.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENVIRONMENT_PREFIX", "read_environment", "unknown_variables"]


class _Overridable(Settings, BaseSettings):
    """The schema with the names that pydantic-settings looks for; never instantiated."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        strict=True,
    )


class _GivenEnvironment(EnvSettingsSource):
    """pydantic-settings' reader of a mapping that is passed in, not of this process's own."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        super().__init__(_Overridable)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        # Its own function for this has moved between the versions that we work with.
        return {
            name.lower(): None if value == self.env_parse_none_str else value
            for name, value in self._environment.items()
        }


def read_environment(
    environment: Mapping[str, str],
) -> tuple[Mapping[str, object], list[Problem]]:
    """The settings that `environment` overrides, by section, converted where possible.

    A mapping is written as JSON, or as the YAML that a file would have; one that is neither is a
    problem, and left out.
    """
    settings = {setting.variable: setting for setting in iterate_settings()}
    mappings = {name for name, setting in settings.items() if isinstance(setting.default, dict)}
    given = {name: value for name, value in environment.items() if name in settings}
    plain = {name: value for name, value in given.items() if name not in mappings}
    values = dict(_GivenEnvironment(plain)()) if plain else {}
    for name in plain:
        _convert(values, settings[name].path)
    problems: list[Problem] = []
    for name in sorted(given.keys() & mappings):
        try:
            # Not pydantic's reading: it takes the last of two equal keys, and NaN.
            _put(values, settings[name].path, parse_yaml(given[name], name).data)
        except ConfigError as error:
            problems.extend(_problems(settings[name], error))
    return values, problems


def _convert(values: dict[str, Any], path: str) -> None:
    """Make of a text what a strict schema takes; pydantic-settings does it itself since 2.10."""
    *sections, last = path.split(".")
    for section in sections:
        values = values[section]
    spot = spot_at(path.split("."))
    if spot is None or not isinstance(values[last], str):
        return
    kind: Any = get_args(spot.kind)[0] if get_origin(spot.kind) is Annotated else spot.kind
    # What is no such thing is left as it is: the schema says so in its own words.
    with contextlib.suppress(ValidationError):
        values[last] = TypeAdapter(kind).validate_python(values[last])


def _problems(setting: Setting, error: ConfigError) -> list[Problem]:
    """Why a mapping's variable is refused; it is one line, so its lines say nothing."""
    if not error.problems:
        hint = f"takes {setting.takes}, as JSON"
        return [Problem(setting.path, error.message, hint, setting.variable)]
    return [
        replace(problem, field=f"{setting.path}.{problem.field}", line=None)
        for problem in error.problems
    ]


def _put(values: dict[str, Any], path: str, value: object) -> None:
    *sections, last = path.split(".")
    for name in sections:
        values = values.setdefault(name, {})
    values[last] = value


def unknown_variables(environment: Mapping[str, str]) -> list[Problem]:
    """Every variable that looks like a setting of ours and is none: a typing error, most likely."""
    known = [setting.variable for setting in iterate_settings()]
    problems = []
    for name in sorted(environment):
        if not name.upper().startswith(ENVIRONMENT_PREFIX) or name in known:
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `imdsproxy config show --origin`"
        problems.append(Problem(name, "no setting has this environment variable", hint=hint))
    return problems
