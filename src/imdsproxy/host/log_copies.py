"""What processes of their own sessions log, copied to the log of a container."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

_EVERY_S: Final = 0.5


@dataclass(slots=True)
class LogCopies:
    """Copies of files that others append to, and begin anew when they are long (`host.files.limit_log`).

    Args:
        paths: The files; one that is missing comes later. What they hold by now is not copied.
        sink: Where whole lines are written to.
    """

    paths: Sequence[Path]
    sink: BinaryIO
    _offsets: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        self._offsets = {path: path.stat().st_size for path in self.paths if path.exists()}

    async def run(self) -> None:
        """Copy until cancelled."""
        while True:
            self.copy()
            await asyncio.sleep(_EVERY_S)

    def copy(self) -> None:
        """Copy what has come since the last time."""
        for path in self.paths:
            offset = self._offsets.get(path, 0)
            # A process that was never started has none.
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < offset:
                    offset = 0
                file.seek(offset)
                lines = b"".join(line for line in file if line.endswith(b"\n"))
                self.sink.write(lines)
                self._offsets[path] = offset + len(lines)
        self.sink.flush()
