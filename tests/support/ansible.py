"""Ansible's programs, and the playbooks that pages have."""

import re
from functools import cache
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.lab import run

_MAKE_S: Final = 300


@cache
def programs() -> Path:
    """The directory of those that `requirements/ansible.txt` pins."""
    shell = f". {REPOSITORY}/script/lib.sh; pinned_venv ansible"
    return Path(run("bash", "-c", shell, "script/test", timeout_s=_MAKE_S).strip()) / "bin"


def playbook_of(page: Path) -> str:
    """The one playbook on a page."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (playbook,) = (one for one in blocks if "hosts:" in one)
    return str(playbook)
