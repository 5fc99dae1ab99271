"""Programs that are run for their answer: each has a deadline, and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess

from imdsproxy.errors import HostRefused


async def run_program(
    *arguments: str, deadline_s: float, text: str = "", errors: bool = True
) -> tuple[int, str]:
    """Run a program to its end: its exit status (negative: the signal), and what it wrote.

    It has a process group of its own, which is killed at the deadline, and when this is cancelled.

    Args:
        arguments: Its path or name, and its arguments; no shell is involved.
        deadline_s: Seconds until it is killed.
        text: Its standard input.
        errors: With what it wrote to standard error.

    Raises:
        HostRefused: It did not end in time.
        OSError: It cannot be started.
    """
    # Not asyncio's own: cancelled while it starts a program, that kills the program and not its children.
    process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.to_thread(process.communicate, text.encode(), deadline_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            if process.stdout is not None:
                process.stdout.close()
            raise HostRefused(
                f"{' '.join(arguments)} did not end within {deadline_s:g} s and was killed",
                hint="run it by hand to see what it waits for",
            ) from error
        raise
    return process.returncode, output.decode("utf-8", "replace").strip()
