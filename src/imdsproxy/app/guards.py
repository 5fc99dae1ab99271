"""What operators did about single instances: on disk before it counts, and there after every restart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, cast

from imdsproxy.core.model import InstanceId
from imdsproxy.core.policy import Guard
from imdsproxy.dataplane.records import Writer
from imdsproxy.errors import HostRefused

__all__ = ["GuardFile", "read_guards"]

_FORMAT: Final = 1


@dataclass(slots=True)
class GuardFile:
    """A guard for each instance that an operator did something about.

    Attributes:
        guards: By instance, also those that are gone: one that comes again under its id must not get its old
            tokens back.
    """

    path: Path
    write: Writer
    guards: Mapping[str, Guard] = field(default_factory=dict)

    def load(self) -> None:
        """Read the file; none is no guard.

        Raises:
            HostRefused: It is there and cannot be read. To go on without would make revoked tokens good again.
        """
        self.guards = read_guards(self.path)

    def revoke(self, instance: InstanceId) -> Guard:
        """Revoke the instance's tokens.

        Raises:
            HostRefused: The file system refuses; nothing has changed.
        """
        guard = self.guards.get(instance, Guard())
        return self._keep(instance, replace(guard, epoch=guard.epoch + 1))

    def reopen(self, instance: InstanceId, now: int) -> Guard:
        """Have it boot anew, from `now` (Unix time) on.

        Raises:
            HostRefused: As `revoke`.
        """
        return self._keep(instance, replace(self.guards.get(instance, Guard()), reopened_at=now))

    def _keep(self, instance: InstanceId, guard: Guard) -> Guard:
        guards = {**self.guards, instance: guard}
        shown = {name: [one.epoch, one.reopened_at] for name, one in sorted(guards.items())}
        text = json.dumps({"format": _FORMAT, "instances": shown}, indent=1)
        self.write(self.path, text.encode())
        self.guards = guards
        return guard


def read_guards(path: Path) -> Mapping[str, Guard]:
    """What the file says, by instance; without a file nothing was done.

    Raises:
        HostRefused: It cannot be read, or is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise HostRefused(f"cannot read {path}: {error.strerror}") from error
    try:
        return _parse(data.decode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise HostRefused(
            f"{path} is damaged: {why}",
            hint="it says whose tokens were revoked: from a backup, or remove it together with the token keys",
        ) from error


def _parse(text: str) -> dict[str, Guard]:
    head = cast("dict[str, object]", json.loads(text))
    if head["format"] != _FORMAT:
        raise ValueError(f"it is of format {head['format']}, not {_FORMAT}")
    told = cast("dict[str, list[object]]", head["instances"])
    return {name: _guard(name, *said) for name, said in told.items()}


def _guard(name: str, epoch: object, reopened_at: object) -> Guard:
    if type(epoch) is not int or type(reopened_at) is not int or min(epoch, reopened_at) < 0:
        raise ValueError(f"instance {name} has something else than two numbers")
    return Guard(epoch, reopened_at)
