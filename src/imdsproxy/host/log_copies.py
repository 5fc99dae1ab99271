"""Copies of detached processes' logs in the log of a container."""

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
    """Copier of files to which others append, and that restart when they grow long (`host.files.limit_log`).

    The files may not exist yet. Present content is not copied; the sink gets whole lines.
    """

    paths: Sequence[Path]
    sink: BinaryIO
    _offsets: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        self._offsets = {path: path.stat().st_size for path in self.paths if path.exists()}

    async def run(self) -> None:
        while True:
            self.copy()
            await asyncio.sleep(_EVERY_S)

    def copy(self) -> None:
        for path in self.paths:
            offset = self._offsets.get(path, 0)
            # A process that was never started has no log.
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < offset:
                    offset = 0
                file.seek(offset)
                lines = b"".join(line for line in file if line.endswith(b"\n"))
                self.sink.write(lines)
                self._offsets[path] = offset + len(lines)
        self.sink.flush()
