"""When a process that does not answer counts as hung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from imdsproxy.host.process import ProcessStat

_SILENT_PROBES: Final = 2
"""Unanswered probes after which a worker that does nothing counts as hung: within four seconds."""

_BUSY_PROBES: Final = 8
"""The same for one that works all the while: on a host that is out of processor time it is only slow."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """What unanswered probes, one after the other, say of a worker.

    Attributes:
        worker: Whom they were for.
        silent: How many there were.
        ticks: Processor time that it had used at the first one.
        stat: How it was at the last one.
    """

    worker: int = 0
    silent: int = 0
    ticks: int = 0
    stat: ProcessStat | None = None

    def after_silence(self, worker: int, stat: ProcessStat | None) -> Doubt:
        """One more probe was not answered."""
        if worker != self.worker or not self.silent:
            return Doubt(worker, 1, 0 if stat is None else stat.ticks, stat)
        return Doubt(worker, self.silent + 1, self.ticks, stat)

    @property
    def hung(self) -> bool:
        """Waiting longer is no use. A worker that has ended is its master's business."""
        if self.stat is None or self.silent < _SILENT_PROBES:
            return False
        # One that waits for a disk can't be ended before the disk answers.
        waits = self.stat.state == "D"
        idle = self.stat.stopped or (self.stat.ticks == self.ticks and not waits)
        return idle or self.silent >= _BUSY_PROBES
