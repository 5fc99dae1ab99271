"""Keys of session tokens: the host's own in a file, those of a fleet's instances, and a map of both for HAProxy."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import ClassVar, Final

from imdsproxy.errors import Problem, SecretUnreadable
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.records import RecordApplier, write_table
from imdsproxy.haproxy.rules.maps import parse_map
from imdsproxy.host.files import read_secret, write_atomic
from imdsproxy.model import tokens
from imdsproxy.model.entities import InstanceId
from imdsproxy.reconcile.part import Impact, Part
from imdsproxy.reconcile.reconciler import Reconciler

_write: Final = partial(write_atomic, mode=0o600, durable=True)


@dataclass(slots=True)
class TokenKeys(Part):
    """Token keys in force.

    Args:
        layout: Layout with the default path of the key file, which is created if it is missing.
        random: Source of random bytes; its argument is their number.

    Attributes:
        keys: The host's own keys, the signing key first.
        of_instances: Keys of a fleet's instances on this host. HAProxy gets new ones when a round of records
            (`RecordLoop`) calls `ensure`, and drops obsolete ones at `sweep`.
    """

    impact: ClassVar = Impact.HARMS
    layout: Layout
    random: Callable[[int], bytes] = field(default=SystemRandom().randbytes, repr=False)
    keys: tuple[tokens.TokenKey, ...] = field(default=(), repr=False)
    of_instances: tokens.InstanceKeys = field(default_factory=dict, repr=False)
    _held: tokens.InstanceKeys = field(default_factory=dict, repr=False)
    _behind: bool = False
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    _path: Path | None = None
    _rounds: Reconciler = field(
        default_factory=partial(Reconciler, "tokens.key_file", "token keys not applied", 0.2, 10.0)
    )
    _confirmed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def failure(self) -> Problem | None:
        """Reason why a worker may not know the keys in force."""
        return self._rounds.failure

    def problems(self) -> tuple[Problem | None]:
        return (self.failure,)

    def read(self, configured: Path | None) -> bool:
        """Read the keys from the file; return whether they have changed.

        Raises:
            SecretUnreadable: The file is missing, readable by others, or malformed; the keys in force stay.
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

    def load(self) -> None:
        """Load the keys of instances that an earlier controller gave to HAProxy, until the first `sweep`.

        These instances' tokens stay valid until their source has reported.
        """
        try:
            self._held = tokens.parse_key_map(parse_map(self.layout.token_keys_map.read_text())[1])
        except (OSError, ValueError):
            # The map is written again, and the source reports the keys again.
            self._held = {}

    def preload(self) -> None:
        """Write all keys to the map file, for a HAProxy that has not started yet.

        Raises:
            HostRefused: The file system refuses.
        """
        self._held = _join(self.of_instances, self._held)
        entries = tokens.render_key_map(self.keys, self._held)
        write_table(self.layout.token_keys_map, entries, secret=True)

    def send(self) -> None:
        """Let `run` send the keys to every worker; `confirmed` waits for it."""
        self._confirmed.clear()
        self._rounds.wake()

    async def confirmed(self) -> None:
        """Wait until every worker knows the keys, and the map file has them for future workers."""
        await self._confirmed.wait()

    async def run(self, applier: RecordApplier) -> None:
        """Send the host's own keys until cancelled. Retry failures with backoff.

        A HAProxy that was running before the controller may have read another map, so the keys are also sent at the
        start.
        """
        await self._rounds.run(partial(self._send, applier))

    async def _send(self, applier: RecordApplier) -> None:
        await self._apply(applier)
        if not self._rounds.woken.is_set():
            self._confirmed.set()

    def needed(self, is_of_fleet: Callable[[InstanceId], bool]) -> tokens.InstanceKeys:
        """Return the keys that records in force may need: current ones, and those of departing instances."""
        going = {
            instance: keys
            for instance, keys in self._held.items()
            if instance not in self.of_instances and is_of_fleet(instance)
        }
        return {**self.of_instances, **going}

    async def ensure(self, applier: RecordApplier) -> None:
        """Wait until every current and future worker knows each key of `of_instances`.

        Raises:
            HostRefused: The file cannot be written; nothing has changed.
            RuntimeUnavailable: HAProxy's master does not answer.
            CommandRefused: A worker refused.
        """
        await self._hold(applier, _join(self.of_instances, self._held))

    async def sweep(self, applier: RecordApplier, needed: tokens.InstanceKeys) -> None:
        """Wait until no worker knows a key of an instance that is not in `of_instances`; raises as `ensure`.

        Args:
            needed: Result of `needed` from before the records in force were planned. These keys stay as well.
        """
        await self._hold(applier, _join(self.of_instances, needed))

    async def _hold(self, applier: RecordApplier, held: tokens.InstanceKeys) -> None:
        if held == self._held and not self._behind:
            return
        self._behind = True
        await self._apply(applier, held)
        self._behind = False

    async def _apply(self, applier: RecordApplier, held: tokens.InstanceKeys | None = None) -> None:
        # The lock ensures that the last table rendered is also the last one sent.
        async with self._sending:
            held = self._held if held is None else held
            entries = tokens.render_key_map(self.keys, held)
            path = self.layout.token_keys_map
            await applier.apply_table(path, entries, secret=True, single=True)
            self._held = held

    @property
    def shared(self) -> Path | None:
        """Path of the key file in the settings, which other hosts share; `None` if the keys are this host's own."""
        return None if self._path == self.layout.token_keys else self._path

    @property
    def path(self) -> Path:
        return self._path or self.layout.token_keys

    def rotate(self) -> tokens.TokenKey:
        """Add a fresh signing key to the file; older tokens stay valid until they expire. Call `send` afterwards.

        The older keys are read from the file again: an operator may have changed it without a reload.

        Raises:
            SecretUnreadable: The file cannot be used; the keys stay as they are.
            HostRefused: The file system refuses; the keys stay as they are.
        """
        fresh = tokens.TokenKey(self.random(tokens.KEY_BYTES))
        keys = tokens.rotate_token_keys(read_token_keys(self.path), fresh)
        _write(self.path, tokens.render_token_keys(keys).encode())
        self.keys = keys
        return fresh


def _join(first: tokens.InstanceKeys, then: tokens.InstanceKeys) -> tokens.InstanceKeys:
    """Merge both; an instance's keys in `first` come first."""
    both = dict(first)
    for instance, keys in then.items():
        own = first.get(instance, ())
        both[instance] = (*own, *(key for key in keys if key not in own))
    return both


def read_token_keys(path: Path) -> tuple[tokens.TokenKey, ...]:
    """Read the keys from a file, the signing key first.

    Raises:
        SecretUnreadable: The file is missing, readable by others, or malformed.
    """
    try:
        return tokens.parse_token_keys(read_secret(path).decode("ascii"))
    except (tokens.TokenKeysUnreadable, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, tokens.TokenKeysUnreadable) else "it is not ASCII"
        raise SecretUnreadable(
            f"the token keys {path} cannot be used: {why}",
            hint="one key a line: `openssl rand -base64 32`, the one in force first",
        ) from error
