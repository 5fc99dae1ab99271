"""Ansible's programs, and the playbooks that pages have."""

import re
from pathlib import Path

from support.pinned_venv import pinned_venv


def programs() -> Path:
    """The directory of those that `requirements/ansible.txt` pins."""
    return pinned_venv("ansible") / "bin"


def playbook_of(page: Path) -> str:
    """The one playbook on a page."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (playbook,) = (one for one in blocks if "hosts:" in one)
    return str(playbook)
