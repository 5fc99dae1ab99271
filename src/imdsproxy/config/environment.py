"""`IMDSPROXY_SECTION__FIELD`: the only environment variables that imdsproxy reads."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings.sources.utils import parse_env_vars

from imdsproxy.config.schema import Settings
from imdsproxy.config.words import iterate_settings
from imdsproxy.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENVIRONMENT_PREFIX", "read_environment", "unknown_variables"]

ENVIRONMENT_PREFIX: Final = "IMDSPROXY_"


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
        return parse_env_vars(
            self._environment, self.case_sensitive, self.env_ignore_empty, self.env_parse_none_str
        )


def read_environment(environment: Mapping[str, str]) -> Mapping[str, object]:
    """The settings that `environment` overrides, by section, converted where possible."""
    known = {setting.variable for setting in iterate_settings()}
    given = {name: value for name, value in environment.items() if name in known}
    return _GivenEnvironment(given)() if given else {}


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
