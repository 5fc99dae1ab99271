"""The keys of session tokens: the host's own in a file, those of a fleet's instances, and a map of both for HAProxy."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Final

from imdsproxy.app.tickets import report_failure
from imdsproxy.core import tokens
from imdsproxy.core.haproxy.maps import parse_map
from imdsproxy.core.model import InstanceId
from imdsproxy.core.timing import Backoff
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.records import RecordApplier, write_table
from imdsproxy.errors import DataplaneError, Problem, SecretUnreadable
from imdsproxy.host.files import read_secret, write_atomic

_write: Final = partial(write_atomic, mode=0o600, durable=True)


@dataclass(slots=True)
class TokenKeys:
    """The keys in force.

    Args:
        layout: Where they are while settings name no other file; made where it is missing.
        random: So many random bytes.

    Attributes:
        keys: The host's own, the one in force first.
        of_instances: Of a fleet's instances that are here. HAProxy has them once a round of records (`RecordLoop`) has
            called `ensure`, and those that aren't there any more until it calls `sweep`.
        failure: Why a worker may not know the keys in force.
    """

    layout: Layout
    random: Callable[[int], bytes] = field(default=SystemRandom().randbytes, repr=False)
    keys: tuple[tokens.TokenKey, ...] = field(default=(), repr=False)
    of_instances: tokens.InstanceKeys = field(default_factory=dict, repr=False)
    failure: Problem | None = None
    _held: tokens.InstanceKeys = field(default_factory=dict, repr=False)
    _behind: bool = False
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)
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

    def load(self) -> None:
        """Take over the keys of instances that an earlier controller left to HAProxy, until the first `sweep`.

        Their tokens stay good while their source has not reported yet.
        """
        try:
            self._held = tokens.parse_key_map(parse_map(self.layout.token_keys_map.read_text())[1])
        except (OSError, ValueError):
            # It is made again, and the source brings them.
            self._held = {}

    def preload(self) -> None:
        """Have all keys where a HAProxy finds them that is yet to start.

        Raises:
            HostRefused: The file system refuses.
        """
        self._held = _join(self.of_instances, self._held)
        entries = tokens.render_key_map(self.keys, self._held)
        write_table(self.layout.token_keys_map, entries, secret=True)

    def send(self) -> None:
        """Let `run` send the keys to every worker; `confirmed` waits for it."""
        self._confirmed.clear()
        self._changed.set()

    async def confirmed(self) -> None:
        """Return once every worker knows the keys, and every one to come."""
        await self._confirmed.wait()

    async def run(self, applier: RecordApplier) -> None:
        """Send the host's own until cancelled; what fails is kept and tried again, ever more slowly.

        A HAProxy that was there before the controller may have read another map, so it gets them at the start too.
        """
        backoff = Backoff(0.2, 10.0)
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._apply(applier)
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

    def needed(self, is_of_fleet: Callable[[InstanceId], bool]) -> tokens.InstanceKeys:
        """Keys that records in force may need: those that are wanted, and of instances that have not gone yet.

        Args:
            is_of_fleet: Whether the fleet's source has the instance.
        """
        going = {
            instance: keys
            for instance, keys in self._held.items()
            if instance not in self.of_instances and is_of_fleet(instance)
        }
        return {**self.of_instances, **going}

    async def ensure(self, applier: RecordApplier) -> None:
        """Return once every worker knows each key of `of_instances`, and every one to come.

        Raises:
            HostRefused: The file cannot be written; nothing has changed.
            RuntimeUnavailable: HAProxy's master does not answer.
            CommandRefused: A worker refused.
        """
        await self._hold(applier, _join(self.of_instances, self._held))

    async def sweep(self, applier: RecordApplier, needed: tokens.InstanceKeys) -> None:
        """Return once no worker knows a key of an instance that is not in `of_instances`; raises as `ensure`.

        Args:
            applier: Brings them to the workers.
            needed: What `needed` gave before the records were planned that are in force now. They stay as well.
        """
        await self._hold(applier, _join(self.of_instances, needed))

    async def _hold(self, applier: RecordApplier, held: tokens.InstanceKeys) -> None:
        if held == self._held and not self._behind:
            return
        self._behind = True
        await self._apply(applier, held)
        self._behind = False

    async def _apply(self, applier: RecordApplier, held: tokens.InstanceKeys | None = None) -> None:
        # What is sent last is also what was rendered last.
        async with self._sending:
            held = self._held if held is None else held
            entries = tokens.render_key_map(self.keys, held)
            path = self.layout.token_keys_map
            await applier.apply_table(path, entries, secret=True, single=True)
            self._held = held

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


def _join(first: tokens.InstanceKeys, then: tokens.InstanceKeys) -> tokens.InstanceKeys:
    """The keys of both, those in force as `first` has them."""
    both = dict(first)
    for instance, keys in then.items():
        own = first.get(instance, ())
        both[instance] = (*own, *(key for key in keys if key not in own))
    return both


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
