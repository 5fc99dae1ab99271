"""Process of HAProxy in front of a hub, with an account of its own.

A shell takes the account and waits for the hub's line, because the hub can no longer assign accounts once it has read
etcd. HAProxy ends when the hub closes the pipe to the shell, or is killed: the hub may not send signals to another
account's processes.
"""

import asyncio
import contextlib
import os
import subprocess
from typing import Final

from imdsproxy.errors import HaproxyMissing
from imdsproxy.host.account import Account

_WAIT_FOR_WORD: Final = """
read -r _ || exit 0
exec 3<&0 </dev/null
"$@" 3<&- &
haproxy=$!
{ while read -r _ <&3; do :; done; kill -KILL "$haproxy"; } >/dev/null 2>&1 &
wait "$haproxy"
"""
_LOW_PORTS: Final = ("--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service")
_NO_RIGHTS: Final = ("--inh-caps=-all", "--ambient-caps=-all")
_STOP_S: Final = 5.0


class FrontProcess:
    """Shell that becomes the parent of HAProxy, which binds ports below 1024 if `low_port`; raises `HaproxyMissing`."""

    def __init__(
        self, command: tuple[str, ...], account: Account | None, *, low_port: bool
    ) -> None:
        words = ["/bin/sh", "-c", _WAIT_FOR_WORD, "imdsproxy-front", *command]
        if account is not None:
            rights = _LOW_PORTS if low_port else _NO_RIGHTS
            ids = (f"--reuid={account.user}", f"--regid={account.group}", "--clear-groups")
            words = ["setpriv", *ids, *rights, *words]
        try:
            self._child = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._begun = False
        except OSError as error:
            raise HaproxyMissing(
                f"cannot run {error.filename or words[0]}: {error.strerror}"
            ) from error

    async def begin(self) -> asyncio.StreamReader:
        """Start HAProxy; return the stream of its standard error."""
        assert self._child.stdin is not None  # noqa: S101 - it is a pipe
        self._begun = True
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._child.stderr
        )
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(b"\n")
            self._child.stdin.flush()
        return reader

    def is_over(self) -> bool:
        return self._child.poll() is not None

    async def wait(self) -> int:
        """Wait until HAProxy has ended; return its exit status, 128 and more for a signal."""
        if not self.is_over():
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            pidfd = os.pidfd_open(self._child.pid)
            loop.add_reader(pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        return self._child.wait()

    async def stop(self) -> None:
        self.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self.wait()
        except TimeoutError:
            # If HAProxy has another account, systemd ends the process.
            with contextlib.suppress(PermissionError):
                self._child.kill()

    def close(self) -> None:
        """Close the pipe, so that HAProxy ends or does not start."""
        assert self._child.stdin is not None  # noqa: S101 - it is a pipe
        assert self._child.stderr is not None  # noqa: S101 - as above
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        if not self._begun:
            self._child.stderr.close()
