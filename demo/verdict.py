"""Every guest's reads and boots, done side by side, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demo.boot import Boot, boot, judge_boot
from demo.reading import Dialect, Reading, Transport, read
from demo.roster import Guest

__all__ = ["Verdict", "observe"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one guest saw in one dialect.

    Attributes:
        readings: By curl, over each transport.
        boot: By cloud-init.
        boot_faults: What is wrong with `boot`.
    """

    guest: Guest
    dialect: Dialect
    readings: dict[Transport, Reading]
    boot: Boot
    boot_faults: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Everything that is not the guest's own."""
        told = [
            f"{transport.name}: {fault}"
            for transport, reading in self.readings.items()
            for fault in reading.faults
        ]
        return told + [f"cloud-init: {fault}" for fault in self.boot_faults]


def observe(
    guests: Sequence[Guest],
    dialects: Sequence[Dialect],
    *,
    directory: Path,
    unpacked: Path,
    at_once: int,
    done: Callable[[], None],
) -> list[Verdict]:
    """Has every guest read and boot by each of the dialects; `done` is called after each of them."""

    def look(guest: Guest, dialect: Dialect) -> Verdict:
        readings = {
            transport: read(guest, dialect, transport, directory=directory / "reads")
            for transport in Transport
        }
        seen = boot(guest, dialect, unpacked=unpacked, directory=directory / "roots")
        done()
        faults = tuple(judge_boot(guest, dialect, seen))
        return Verdict(guest, dialect, readings, seen, faults)

    pool = ThreadPoolExecutor(at_once)
    try:
        futures: list[Future[Verdict]] = [
            pool.submit(look, guest, dialect) for guest in guests for dialect in dialects
        ]
        return [future.result() for future in futures]
    finally:
        # An interruption must not wait for boots: the caller ends their processes with the lab.
        pool.shutdown(wait=False, cancel_futures=True)
