"""The document for virtual machines, followed to the letter on a clean machine: from the package to a booted guest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of, missing_lines
from support.packaged_daemon import machine_with_dependencies
from support.packages import build_packages
from support.patience import patience
from support.systemd_machine import Machine
from support.vm.image import Image, vm_image

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_PAGE: Final = REPOSITORY / "docs/kvm.md"
_HEADING: Final = "## From the package to a booted guest"
_MARK: Final = "@@ block "
_PLACE: Final = "/srv/newcomer"
_LOGS: Final = REPOSITORY / ".cache" / "vm-logs"
_PROMISED_S: Final = 300.0


def _lay(machine: Machine, image: Image, package: Path) -> None:
    """What the document takes for granted: a directory with a package and an image, and a device for taps."""
    machine.run("mkdir", "-p", _PLACE, "/dev/net")
    machine.run("mknod", "/dev/net/tun", "c", "10", "200")
    if image.acceleration() == "kvm":
        machine.run("mknod", "/dev/kvm", "c", "10", "232")
    machine.run("install", "-m", "644", str(package), f"{_PLACE}/")
    for file in (image.disk, image.kernel):
        machine.run("ln", "-s", str(file), _PLACE)


def test_a_newcomer_gets_from_the_package_to_a_booted_guest_as_the_document_says(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    image = vm_image()
    packages = build_packages()
    blocks = blocks_of(_PAGE, _HEADING)
    script = "\n".join(f"echo; echo '{_MARK}{one.line}'\n{one.script}" for one in blocks)
    (tmp_path / "machine").mkdir()
    with machine_with_dependencies(tmp_path / "machine", packages) as machine:
        _lay(machine, image, packages.deb)
        # Not by standard input: ssh would read the rest of it.
        machine.write("/srv/blocks", script)
        start = time.monotonic()
        command = f"cd {_PLACE} && exec timeout 600 bash -euo pipefail /srv/blocks"
        status, text = machine.attempt("sh", "-c", command, within_s=620)
        took = time.monotonic() - start
        _LOGS.mkdir(parents=True, exist_ok=True)
        console = _LOGS / "document.console.log"
        console.write_text(machine.attempt("cat", f"{_PLACE}/console.log")[1])
    request.config.get_terminal_writer().line(f"\ndocs/kvm.md: {took:.0f} s")

    printed = {
        int(part.partition("\n")[0]): part.partition("\n")[2] for part in text.split(_MARK)[1:]
    }
    where = f"{_PAGE.name}, block of line {max(printed, default=0)}; console: {console}"
    assert status == 0, f"{where}\n{text[-3000:]}"
    missing = {
        one.line: (absent, printed[one.line])
        for one in blocks
        if (absent := missing_lines(one, printed[one.line]))
    }
    assert missing == {}
    assert sum(bool(one.printed) for one in blocks) == 2
    assert took < _PROMISED_S * patience()
