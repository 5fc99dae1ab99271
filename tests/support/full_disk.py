"""A disk without room."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be replaced (`host.files.write_atomic`) meanwhile."""
    with patch.object(Path, "replace", side_effect=OSError(errno.ENOSPC, "No space left")):
        yield
