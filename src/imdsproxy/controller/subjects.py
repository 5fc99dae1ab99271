"""Files of subjects of identity tokens: written before a record refers to them, removed when none does any more."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imdsproxy.haproxy.rules.maps import MapState
from imdsproxy.host.files import ensure_directory, remove_file, write_atomic
from imdsproxy.model.policy import subject_of
from imdsproxy.model.subject import Subject

_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o750


@dataclass(slots=True)
class Subjects:
    """Directory with one file for each subject, named by its id.

    Args:
        group: Group that may read the files: that of the processes that give tokens. -1 keeps the present group.
    """

    directory: Path
    group: int = -1
    _known: set[str] = field(default_factory=set)

    def open(self) -> None:
        """Create the directory, and read which subjects it has; raise `HostRefused` if the file system refuses."""
        ensure_directory(self.directory, mode=_DIRECTORY_MODE, owner=(-1, self.group))
        self._known = {path.name for path in self.directory.iterdir() if path.name[0] != "."}

    def ensure(self, wanted: Mapping[str, Subject]) -> None:
        """Write the subjects that have no file yet; raise `HostRefused` if the file system refuses."""
        for name in wanted.keys() - self._known:
            content = wanted[name].render()
            write_atomic(self.directory / name, content, mode=_MODE, owner=(-1, self.group))
            self._known.add(name)

    def replaced(self, values: Iterable[str | None], wanted: Mapping[str, Subject]) -> set[str]:
        """Return the subjects of these map values that are not wanted any more."""
        found = {subject_of(value) for value in values if value}
        return {name for name in found if name} - wanted.keys()

    def sweep(self, state: MapState, names: Collection[str] | None = None) -> None:
        """Remove those of the subjects to which no record in force refers; `None` stands for all that have a file.

        Raises `HostRefused` if the file system refuses.
        """
        candidates = self._known & (self._known if names is None else set(names))
        if not candidates:
            return
        candidates -= {subject_of(value) for _, value in state.entries()}
        for name in candidates:
            path = self.directory / name
            remove_file(path, f"remove the subject {path}")
            self._known.discard(name)


@dataclass(frozen=True, slots=True)
class IdentityReport:
    """Identity tokens on this host.

    Attributes:
        issuer: URL of the issuer; empty in a fleet, whose hubs know it.
        signing_key: Id of the key that signs; `None` in a fleet, or before the signer has answered.
        processes: Pids of the process that answers guests, and of the signer.
        held: Number of tokens that the process holds.
        given: Tokens that it gave, by origin: `held`, or `new`. HAProxy gives most tokens without it.
        refused: Refusals by reason.
    """

    issuer: str
    signing_key: str | None
    processes: tuple[int, ...]
    held: int
    given: dict[str, int]
    refused: dict[str, int]
