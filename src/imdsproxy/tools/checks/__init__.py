"""Subject and findings of `imdsproxy check`. Checks change nothing."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from imdsproxy.api.client import AdminClient, read_networks
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.errors import KINDS, ConfigError, ImdsproxyError, SourceUnavailable
from imdsproxy.haproxy.layout import Layout
from imdsproxy.model.entities import Network
from imdsproxy.model.records import Records
from imdsproxy.sources.file.record_file import SUFFIXES, decode_records, payload_reader
from imdsproxy.sources.sqlite.store import read_store

_TEXTS: Final = tomllib.loads(files(__name__).joinpath("findings.toml").read_text("utf-8"))
_EXIT_STATUSES: Final = {kind.__name__: kind.exit_status for kind in KINDS}


@dataclass(frozen=True)
class Subject:
    """Settings to check, and the daemon if it answers.

    Attributes:
        settings: Settings; the defaults if the files are invalid.
        loaded: Settings with their files, or the error of invalid files.
        daemon: Client of the daemon; `None` if it does not run or answer.
        status: Status from the daemon, or the error of the request; `None` if the daemon does not run.
    """

    settings: Settings
    loaded: Loaded | ConfigError
    daemon: AdminClient | None = None
    status: Mapping[str, Any] | ImdsproxyError | None = None

    @property
    def layout(self) -> Layout:
        return Layout.of(self.settings)

    @cached_property
    def networks(self) -> list[Network]:
        """Networks of the daemon; empty without a daemon."""
        return [] if self.daemon is None else read_networks(self.daemon)

    @cached_property
    def in_files(self) -> tuple[list[Records], list[str]]:
        """Records in the record files, and all problems with them; empty if their directory does not exist."""
        source = self.settings.sources.file
        there = source.enabled and source.directory.is_dir()
        return _read_record_files(source.directory) if there else ([], [])

    @cached_property
    def stored(self) -> Records | SourceUnavailable | None:
        """Records in the store, or the error of reading it; `None` if a daemon answers or the store is disabled."""
        if self.daemon is not None or not self.settings.sources.sqlite.enabled:
            return None
        try:
            return read_store(self.settings.store_path)
        except SourceUnavailable as error:
            return error


def _read_record_files(directory: Path) -> tuple[list[Records], list[str]]:
    read: list[Records] = []
    problems: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
            continue
        read.append(decode_records(data, file=str(path), read_file=payload_reader(directory)))
        problems += map(str, read[-1].all_problems)
    return read, problems


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check.

    Attributes:
        exit_status: Exit status of the error that `run` would end with; 0 if `run` would start.
        warning: `run` starts, but an operator should look.
    """

    text: str
    hint: str = ""
    exit_status: int = 0
    warning: bool = False

    @property
    def ok(self) -> bool:
        return self.exit_status == 0


def found(name: str, /, **values: object) -> Finding:
    """Return the finding of this name in findings.toml, with the values filled in."""
    row = _TEXTS[name]
    text, hint = row["text"].format(**values), row.get("hint", "").format(**values)
    status = _EXIT_STATUSES[row["error"]] if "error" in row else 0
    return Finding(text, hint, status, row.get("warning", False))


def refused(error: ImdsproxyError, setting: str = "") -> list[Finding]:
    """Convert an error to findings, one per problem or one for the whole error, prefixed by the setting."""
    place = f"{setting}: " if setting else ""
    if not error.problems:
        return [Finding(f"{place}{error.message}", error.hint, error.exit_status)]
    return [Finding(f"{place}{problem}", "", error.exit_status) for problem in error.problems]
