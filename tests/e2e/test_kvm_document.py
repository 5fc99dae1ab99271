"""The document for virtual machines, followed to the letter on a clean machine: from the package to a booted guest."""

import time
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of, find_fault, script_of
from support.packaged_daemon import machine_with_dependencies
from support.packages import build_packages
from support.patience import patience
from support.vm.machine import vm_image

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_PLACE: Final = "/srv/newcomer"
_LOGS: Final = REPOSITORY / ".cache" / "vm-logs"
_PROMISED_S: Final = 300.0


def test_a_newcomer_gets_from_the_package_to_a_booted_guest_as_the_document_says(
    tmp_path: Path,
) -> None:
    image, packages = vm_image(), build_packages()
    blocks = blocks_of(
        REPOSITORY / "docs/tutorials/first-vm.md", "## From the package to a booted guest"
    )
    with machine_with_dependencies(tmp_path, packages) as machine:
        # What the document takes for granted: a directory with a package and an image, and a device for taps.
        machine.run("mkdir", "-p", _PLACE, "/dev/net")
        machine.run("mknod", "/dev/net/tun", "c", "10", "200")
        machine.run("install", "-m", "644", str(packages.deb), f"{_PLACE}/")
        machine.run("ln", "-s", f"{image}/disk.ext4", f"{image}/vmlinuz", _PLACE)
        # Not by standard input: ssh would read the rest of it.
        machine.write("/srv/blocks", script_of(blocks))
        start = time.monotonic()
        command = f"cd {_PLACE} && exec timeout 600 bash -euo pipefail /srv/blocks"
        status, output = machine.attempt("sh", "-c", command, within_s=620)
        took = time.monotonic() - start
        _LOGS.mkdir(parents=True, exist_ok=True)
        console = machine.attempt("cat", f"{_PLACE}/console.log")[1]
        (_LOGS / "document.console.log").write_text(console)
    assert find_fault(blocks, status, output) == "", f"its console: {_LOGS}"
    assert sum(bool(one.printed) for one in blocks) == 2
    assert took < _PROMISED_S * patience()
