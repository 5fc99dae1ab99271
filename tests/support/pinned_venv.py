"""Virtual environments that `pinned_venv` of script/lib.sh makes below `.cache`."""

from functools import cache
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.lab import run

_MAKE_S: Final = 300


@cache
def pinned_venv(name: str) -> Path:
    """Return the environment of `requirements/NAME.txt`, which is made first if it is missing or stale."""
    shell = f". {REPOSITORY}/script/lib.sh; pinned_venv {name}"
    return Path(run("bash", "-c", shell, "script/test", timeout_s=_MAKE_S).strip())
