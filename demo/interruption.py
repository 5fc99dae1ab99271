"""Signals that end a demonstration: the first unwinds it, so that it cleans up; further ones are ignored."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

__all__ = ["InterruptError", "end_at_signals", "ignore_signals"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptError(Exception):
    """A signal asked the demonstration to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """As a shell reports a program that a signal has ended."""
        return 128 + self.number


def end_at_signals() -> None:
    """Raise `InterruptError` in the main thread at the first signal."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """Let the demonstration clean up undisturbed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    ignore_signals()
    raise InterruptError(number)
