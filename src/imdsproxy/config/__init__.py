"""Settings: one YAML file and the environment, one strict schema for all rooms; no use of the settings."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

from imdsproxy.errors import ConfigError, ConfigUnreadable, Problem

_T = TypeVar("_T")
DEFAULT_CONFIG: Final = Path("/etc/imdsproxy/imdsproxy.yaml")
ENVIRONMENT_PREFIX: Final = "IMDSPROXY_"


def find_files(config: Path | None, default: Path = DEFAULT_CONFIG) -> list[Path]:
    """Return the file and the files of `conf.d/` beside it, in the order in which they are merged.

    Raises `ConfigUnreadable`: a directory cannot be read.
    """
    main = default if config is None else config
    try:
        mains = [main] if config is not None or main.exists() else []
        extra = sorted(
            path
            for path in (main.parent / "conf.d").glob("*.yaml")
            if not path.name.startswith(".")
        )
    except OSError as error:
        raise unreadable(main, error) from error
    return [*mains, *extra]


def unreadable(path: Path, error: OSError | UnicodeDecodeError) -> ConfigUnreadable:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    hint = "give the right --config" if isinstance(error, FileNotFoundError) else ""
    return ConfigUnreadable(f"cannot read {path}: {reason}", hint=hint)


def read_each(files: Iterable[Path], read: Callable[[Path], _T], field: str) -> list[_T]:
    """Apply `read` to each file, or raise one error that names every file that cannot be used.

    `field` is the field of a problem without a field of its own.
    """
    done: list[_T] = []
    failures: list[ConfigError] = []
    for path in files:
        try:
            done.append(read(path))
        except ConfigError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        problems = [
            problem
            for failure in failures
            for problem in failure.problems or [Problem(field, failure.message)]
        ]
        raise ConfigUnreadable(f"{len(failures)} files cannot be used", problems=problems)
    return done
