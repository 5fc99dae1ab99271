"""Options that are not on the command line: of Neutron's ini files, and of imdsproxy's settings.

What reads them is loaded only where there is something to read: agents start a proxy by the hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

__all__ = ["read_ini_files", "read_settings"]

_SECTION: Final = "namespace_proxy"
_SWITCHES: Final = frozenset(("debug", "use_syslog"))
_OPTIONS: Final = (
    "state_path",  # first: others may refer to it
    "metadata_port",
    "metadata_proxy_socket",
    "metadata_proxy_user",
    "metadata_proxy_group",
    "syslog_log_facility",
    *_SWITCHES,
)
_TRUE: Final = frozenset(("1", "t", "true", "on", "y", "yes"))
_FALSE: Final = frozenset(("0", "f", "false", "off", "n", "no"))


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


def read_ini_files(
    files: Sequence[str], directories: Sequence[str], state_path: str | None, otherwise: str
) -> Mapping[str, object]:
    """The options in [DEFAULT] of Neutron's ini files, a later file's over an earlier one's.

    Args:
        files: Their names.
        directories: Of each the files `*.conf`.
        state_path: The command line's, to which values may refer.
        otherwise: The same where no file has one either.

    Raises:
        ConfigUnreadable: One is not there, or no text.
        ConfigInvalid: One is no ini file, a value makes no sense, or refers to what is not there.
    """
    if not files and not directories:
        return {}
    from imdsproxy.core.neutron_ini import (  # noqa: PLC0415 - as above
        DEFAULT_SECTION,
        decode_ini,
        expand_value,
        find_option,
        parse_ini,
    )

    paths = [Path(name) for name in files]
    try:
        for name in directories:
            # A pattern would take a directory that is not there for an empty one.
            paths += sorted(path for path in Path(name).iterdir() if path.suffix == ".conf")
        parsed = [parse_ini(decode_ini(path.read_bytes(), str(path)), str(path)) for path in paths]
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {error.filename}: {error.strerror}") from error

    values: dict[str, object] = {}

    def look_up(name: str) -> str | None:
        if name == "state_path":
            return str(state_path or values.get(name) or otherwise).replace("$", "$$")
        found = find_option(parsed, [(DEFAULT_SECTION, name)])
        return None if found is None else found.value

    for name in _OPTIONS:
        option = find_option(parsed, [(DEFAULT_SECTION, name)])
        if option is None:
            continue
        try:
            value = expand_value(option.value, look_up)
            values[name] = _decide(value) if name in _SWITCHES else value
        except ValueError as error:
            problem = Problem(option.name, str(error), file=option.file, line=option.line)
            message = "a configuration file makes no sense"
            raise ConfigInvalid(message, problems=(problem,)) from error
    return values


def _decide(value: str) -> bool:
    if value.lower() not in _TRUE | _FALSE:
        raise ValueError(f"{value!r} is neither true nor false")
    return value.lower() in _TRUE
