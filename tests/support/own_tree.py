"""Which copy of imdsproxy the programs are that tests start."""

import subprocess
import sys
from pathlib import Path

_WHERE = "import imdsproxy; print(*imdsproxy.__path__)"


def foreign_programs(repository: Path) -> str | None:
    """What in the virtual environment runs another copy of the package than this repository's; `None` if nothing does.

    pytest itself finds the package by its `pythonpath`. Programs that tests start find it by the environment's editable
    install, which is another clone's where the environment is.
    """
    python = Path(sys.executable)
    found = subprocess.run(
        [python, "-P", "-c", _WHERE], cwd="/", env={}, capture_output=True, text=True, check=False
    ).stdout.strip()
    if found != str(repository / "src/imdsproxy"):
        return f"{python} imports imdsproxy from {found or 'nowhere'}"
    script = python.with_name("imdsproxy")
    with script.open() as file:
        first = file.readline().strip()
    return None if first == f"#!{python}" else f"{script} begins with {first}"
