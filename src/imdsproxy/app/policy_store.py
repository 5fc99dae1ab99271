"""The policies in force: settings, what operators did about single instances, and the keys of session tokens.

What operators did is on disk before it counts, and outlives every restart. The keys are in a file, and in a map by
which HAProxy looks them up.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Final, cast

from imdsproxy.app.tickets import report_failure
from imdsproxy.config.schema import Settings
from imdsproxy.core import tokens
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.policy import OperatorOverride, PolicyBook
from imdsproxy.core.timing import Backoff
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.records import RecordApplier, write_table
from imdsproxy.errors import DataplaneError, HostRefused, Problem, SecretUnreadable
from imdsproxy.host.files import read_secret, write_atomic

_FORMAT: Final = 1
_write: Final = partial(write_atomic, mode=0o600, durable=True)


@dataclass(slots=True)
class TokenKeys:
    """The keys in force.

    Args:
        layout: Where they are while settings name no other file; made where it is missing.
        random: So many random bytes.

    Attributes:
        failure: Why a worker may not know the keys in force.
    """

    layout: Layout
    random: Callable[[int], bytes] = field(default=SystemRandom().randbytes, repr=False)
    keys: tuple[tokens.TokenKey, ...] = field(default=(), repr=False)
    failure: Problem | None = None
    _path: Path | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _confirmed: asyncio.Event = field(default_factory=asyncio.Event)

    def read(self, configured: Path | None) -> bool:
        """Take over the keys of the file; whether they are others than before.

        Raises:
            SecretUnreadable: The file is missing, can be read by others, or holds something else; what was in force
                stays.
            HostRefused: The first key cannot be written.
        """
        path = configured or self.layout.token_keys
        if configured is None and not path.exists():
            first = tokens.TokenKey(self.random(tokens.KEY_BYTES))
            _write(path, tokens.render_token_keys((first,)).encode())
        keys = read_token_keys(path)
        changed = keys != self.keys
        self.keys, self._path = keys, path
        if changed:
            self.send()
        return changed

    def send(self) -> None:
        """Let `run` send the keys to every worker; `confirmed` waits for it."""
        self._confirmed.clear()
        self._changed.set()

    async def confirmed(self) -> None:
        """Return once every worker knows the keys, and every one to come."""
        await self._confirmed.wait()

    async def run(self, applier: RecordApplier) -> None:
        """Send until cancelled; what fails is kept and tried again, ever more slowly.

        A HAProxy that was there before the controller may have read another map, so it gets them at the start too.
        """
        backoff = Backoff(0.2, 10.0)
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                entries = tokens.render_key_map(self.keys)
                await applier.apply_table(self.layout.token_keys_map, entries, secret=True)
            except DataplaneError as error:
                self._changed.set()
                self.failure, delay = report_failure(
                    "tokens.key_file", "token keys not applied", error, backoff
                )
                await asyncio.sleep(delay)
                continue
            backoff.succeed()
            self.failure = None
            if not self._changed.is_set():
                self._confirmed.set()

    @property
    def shared(self) -> Path | None:
        """The file that settings name, since other hosts have it too; `None` where it is this host's own."""
        return None if self._path == self.layout.token_keys else self._path

    @property
    def path(self) -> Path:
        """Where they are."""
        return self._path or self.layout.token_keys

    def rotate(self) -> tokens.TokenKey:
        """Put a fresh key in the file; tokens of those before it are good as long as they would be. Then `send`.

        What is before it is read from the file once more: an operator may have changed it without a reload.

        Raises:
            SecretUnreadable: The file cannot be used; the keys stay as they are.
            HostRefused: The file system refuses; the keys stay as they are.
        """
        fresh = tokens.TokenKey(self.random(tokens.KEY_BYTES))
        keys = tokens.rotate_token_keys(read_token_keys(self.path), fresh)
        _write(self.path, tokens.render_token_keys(keys).encode())
        self.keys = keys
        return fresh


def read_token_keys(path: Path) -> tuple[tokens.TokenKey, ...]:
    """The keys in a file, the one in force first.

    Raises:
        SecretUnreadable: It is missing, can be read by others, or holds something else.
    """
    try:
        return tokens.parse_token_keys(read_secret(path).decode("ascii"))
    except (tokens.TokenKeysUnreadable, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, tokens.TokenKeysUnreadable) else "it is not ASCII"
        raise SecretUnreadable(
            f"the token keys {path} cannot be used: {why}",
            hint="one key a line: `openssl rand -base64 32`, the one in force first",
        ) from error


def read_overrides(path: Path) -> Mapping[str, OperatorOverride]:
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


def _parse(text: str) -> dict[str, OperatorOverride]:
    head = cast("dict[str, object]", json.loads(text))
    if head["format"] != _FORMAT:
        raise ValueError(f"it is of format {head['format']}, not {_FORMAT}")
    instances = cast("dict[str, list[object]]", head["instances"])
    return {name: _override(name, *numbers) for name, numbers in instances.items()}


def _override(name: str, epoch: object, reopened_at: object) -> OperatorOverride:
    if type(epoch) is not int or type(reopened_at) is not int or min(epoch, reopened_at) < 0:
        raise ValueError(f"instance {name} has something else than two numbers")
    return OperatorOverride(epoch, reopened_at)


@dataclass(slots=True)
class PolicyStore:
    """Changed by `read`, and by what operators do.

    Attributes:
        overrides: By instance, also those that are gone: one that comes again under its id must not get its old
            tokens back.
    """

    keys: TokenKeys
    overrides: Mapping[str, OperatorOverride] = field(default_factory=dict)
    _book: PolicyBook = field(default_factory=PolicyBook)

    def revoke(self, instance: InstanceId) -> OperatorOverride:
        """Revoke the instance's tokens.

        Raises:
            HostRefused: The file system refuses; nothing has changed.
        """
        override = self.overrides.get(instance, OperatorOverride())
        return self._keep(instance, replace(override, epoch=override.epoch + 1))

    def reopen(self, instance: InstanceId, now: int) -> OperatorOverride:
        """Have it boot anew, from `now` (Unix time) on.

        Raises:
            HostRefused: As `revoke`.
        """
        override = self.overrides.get(instance, OperatorOverride())
        return self._keep(instance, replace(override, reopened_at=now))

    def _keep(self, instance: InstanceId, override: OperatorOverride) -> OperatorOverride:
        overrides = {**self.overrides, instance: override}
        shown = {name: [one.epoch, one.reopened_at] for name, one in sorted(overrides.items())}
        text = json.dumps({"format": _FORMAT, "instances": shown}, indent=1)
        # A revocation that a power cut takes back would make tokens good again.
        _write(self.keys.layout.guards, text.encode())
        self.overrides = overrides
        return override

    def read(self, settings: Settings) -> tuple[bool, bool]:
        """Take over settings, and the keys in the file that they name.

        Returns:
            Whether records have to be compiled again, and whether workers get other keys.

        Raises:
            SecretUnreadable: The keys cannot be used; everything stays as it was.
            HostRefused: The first key cannot be written.
        """
        keys = self.keys.read(settings.tokens.key_file)
        book = settings.policy.book()
        records, self._book = book != self._book, book
        return records, keys

    def open(self, settings: Settings) -> None:
        """Read all of it, with the keys where HAProxy finds them; the first one is made where there is none.

        Raises:
            SecretUnreadable: The keys cannot be used.
            HostRefused: A file cannot be written, or what operators did cannot be read.
        """
        self.read(settings)
        # To go on without what cannot be read would make revoked tokens good again.
        self.overrides = read_overrides(self.keys.layout.guards)
        keys = tokens.render_key_map(self.keys.keys)
        # HAProxy is to find them when it loads.
        write_table(self.keys.layout.token_keys_map, keys, secret=True)

    def for_nobody(self, inventory: Inventory) -> tuple[str, ...]:
        """Sections of settings for a network, project or instance that no source has.

        A name that is mistyped does nothing at all, and what it was to protect stays open.
        """
        book = self._book
        projects: set[str | None] = set()
        if book.projects:
            for instance in inventory.instances.values():
                projects |= {instance.project, *(port.project for port in instance.ports)}
        known: dict[str, Callable[[str], object]] = {
            "networks": lambda one: inventory.knows(NetworkId(one)),
            "projects": projects.__contains__,
            "instances": lambda one: inventory.sources_of_instance(InstanceId(one)),
        }
        named = ((kind, one) for kind in known for one in getattr(book, kind))
        return tuple(f"policy.{kind}.{one}" for kind, one in named if not known[kind](one))

    def book(self) -> PolicyBook:
        """All policy rules except those in records."""
        return replace(self._book, overrides=self.overrides)
