"""Another umask, as a test begins with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """This process's, for the time of the block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
