"""The keys of session tokens: their file, and the map by which HAProxy looks them up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Final

from imdsproxy.app.tickets import report_failure
from imdsproxy.core.timing import Backoff
from imdsproxy.core.tokens import (
    KEY_BYTES,
    TokenKey,
    TokenKeysUnreadable,
    parse_token_keys,
    render_key_map,
    render_token_keys,
    rotate_token_keys,
)
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.records import RecordApplier
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
        failure: Why a worker may not know the keys in force.
    """

    layout: Layout
    random: Callable[[int], bytes] = field(default=SystemRandom().randbytes, repr=False)
    keys: tuple[TokenKey, ...] = field(default=(), repr=False)
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
            _write(path, render_token_keys((TokenKey(self.random(KEY_BYTES)),)).encode())
        keys = read_token_keys(path)
        changed = keys != self.keys
        self.keys, self._path = keys, path
        if changed:
            self.send()
        return changed

    def write_map(self) -> None:
        """Have HAProxy find the keys when it loads.

        Raises:
            HostRefused: The file system refuses.
        """
        entries = render_key_map(self.keys)
        text = "".join(f"{name} {value}\n" for name, value in entries.items())
        _write(self.layout.token_keys_map, text.encode())

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
                await applier.apply_table(
                    self.layout.token_keys_map, render_key_map(self.keys), self.write_map
                )
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

    def rotate(self) -> TokenKey:
        """Put a fresh key in the file; tokens of those before it are good as long as they would be. Then `send`.

        What is before it is read from the file once more: an operator may have changed it without a reload.

        Raises:
            SecretUnreadable: The file cannot be used; the keys stay as they are.
            HostRefused: The file system refuses; the keys stay as they are.
        """
        fresh = TokenKey(self.random(KEY_BYTES))
        keys = rotate_token_keys(read_token_keys(self.path), fresh)
        _write(self.path, render_token_keys(keys).encode())
        self.keys = keys
        return fresh


def read_token_keys(path: Path) -> tuple[TokenKey, ...]:
    """The keys in a file, the one in force first.

    Raises:
        SecretUnreadable: It is missing, can be read by others, or holds something else.
    """
    try:
        return parse_token_keys(read_secret(path).decode("ascii"))
    except (TokenKeysUnreadable, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, TokenKeysUnreadable) else "it is not ASCII"
        raise SecretUnreadable(
            f"the token keys {path} cannot be used: {why}",
            hint="one key a line: `openssl rand -base64 32`, the one in force first",
        ) from error
