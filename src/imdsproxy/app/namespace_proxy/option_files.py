"""Options that are not on the command line: of Neutron's ini files, and of imdsproxy's settings.

What reads them is loaded only where there is something to read: agents start a proxy by the hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

if TYPE_CHECKING:
    from imdsproxy.core.neutron_ini import IniOption

__all__ = ["OptionFiles", "read_settings"]

_TRUE: Final = frozenset(("1", "t", "true", "on", "y", "yes"))
_FALSE: Final = frozenset(("0", "f", "false", "off", "n", "no"))
_SECTION: Final = "namespace_proxy"


def read_settings(
    config: Path | None, environment: Mapping[str, str], *, default: Path | None = None
) -> Mapping[str, object]:
    """What imdsproxy's settings have in the section `namespace_proxy`, by the option's name; without the defaults.

    Args:
        config: The file that was named; without one, the default one, unless the section is not in it at all.
        environment: The process's variables.
        default: In the place of the default file.

    Raises:
        ConfigUnreadable: A file cannot be read.
        ConfigInvalid: Settings break the schema.
    """
    from imdsproxy.config.files import (  # noqa: PLC0415 - as above
        DEFAULT_CONFIG,
        ENVIRONMENT_PREFIX,
        find_files,
        unreadable,
    )

    default = default or DEFAULT_CONFIG
    prefix = f"{ENVIRONMENT_PREFIX}{_SECTION}".upper()
    if config is None and not any(name.upper().startswith(prefix) for name in environment):
        files = find_files(None, default)
        try:
            if not any(_SECTION.encode() in path.read_bytes() for path in files):
                return {}
        except OSError as error:
            raise unreadable(Path(str(error.filename)), error) from error
    from imdsproxy.config.load import load_settings  # noqa: PLC0415 - as above

    loaded = load_settings(config, environment, default=default)
    return loaded.settings.namespace_proxy.model_dump(exclude_unset=True)


class OptionFiles:
    """The options of all files, a later one's over an earlier one's.

    Args:
        files: Their names.
        directories: Of each the files `*.conf`.

    Raises:
        ConfigUnreadable: One is not there, or no text.
        ConfigInvalid: One is no ini file.
    """

    def __init__(self, files: Sequence[str] | None, directories: Sequence[str] | None) -> None:
        self._files: list[Sequence[IniOption]] = []
        paths = [Path(name) for name in files or ()]
        try:
            for name in directories or ():
                # A pattern would take a directory that is not there for an empty one.
                paths += sorted(path for path in Path(name).iterdir() if path.suffix == ".conf")
            for path in paths:
                self._files.append(_read(path))
        except OSError as error:
            raise ConfigUnreadable(f"cannot read {error.filename}: {error.strerror}") from error

    def find(self, name: str) -> IniOption | None:
        """The option of [DEFAULT] that is in force."""
        if not self._files:
            return None
        from imdsproxy.core.neutron_ini import DEFAULT_SECTION, find_option  # noqa: PLC0415 - seldom needed

        return find_option(self._files, [(DEFAULT_SECTION, name)])

    def value(self, name: str, state_path: str | None = None) -> str | None:
        """Its value, with what it refers to in its place.

        Args:
            name: The option's.
            state_path: What `$state_path` is, where the command line or this program says it.

        Raises:
            ConfigInvalid: It refers to what is not there.
        """
        found = self.find(name)
        if found is None:
            return None
        from imdsproxy.core.neutron_ini import expand_value  # noqa: PLC0415 - seldom needed

        def look_up(other: str) -> str | None:
            if other == "state_path" and state_path is not None:
                return state_path.replace("$", "$$")
            referred = self.find(other)
            return None if referred is None else referred.value

        try:
            return expand_value(found.value, look_up)
        except ValueError as error:
            raise _nonsense(found, str(error)) from error

    def decision(self, name: str) -> bool | None:
        """Its value, of an option that is true or false.

        Raises:
            ConfigInvalid: It is neither.
        """
        found, word = self.find(name), (self.value(name) or "").lower()
        if found is None:
            return None
        if word not in _TRUE | _FALSE:
            raise _nonsense(found, f"{found.value!r} is neither true nor false")
        return word in _TRUE


def _read(path: Path) -> Sequence[IniOption]:
    from imdsproxy.core.neutron_ini import decode_ini, parse_ini  # noqa: PLC0415 - seldom needed

    return parse_ini(decode_ini(path.read_bytes(), str(path)), str(path))


def _nonsense(option: IniOption, reason: str) -> ConfigInvalid:
    problem = Problem(option.name, reason, file=option.file, line=option.line)
    return ConfigInvalid("a configuration file makes no sense", problems=(problem,))
