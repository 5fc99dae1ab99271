"""HAProxy itself accepts every golden configuration."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.listeners.host import haproxy_name
from support.hostlab import create_namespace

_GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "haproxy").glob("*.cfg"))


@pytest.fixture
def place() -> Iterator[Path]:
    """Not below pytest's own directory: a socket's path has 107 bytes."""
    with TemporaryDirectory(prefix="imdst-") as name:
        yield Path(name)


@pytest.mark.root
@pytest.mark.parametrize("golden", _GOLDEN, ids=lambda path: path.stem)
def test_haproxy_accepts_the_golden_file(golden: Path, place: Path) -> None:
    directory = NamespaceDirectory()
    thread = NamespaceThread(directory)
    (place / "jail").mkdir()
    (place / "netns").mkdir()
    for name in (
        "base.map",
        "overlay.map",
        "token-keys.map",
        "short.map",
        "path-rules.map",
        "silence.http",
    ):
        (place / name).touch()
    (place / "unavailable.http").write_text("HTTP/1.1 503 No\r\n\r\n")
    asyncio.run(create_namespace(thread, "imdst-golden"))
    try:
        for link in ("imds-1@42", "qrouter-1@43"):
            (place / "netns" / link).symlink_to(directory.path / "imdst-golden")
        links = haproxy_name(place / "netns")
        text = golden.read_text().replace("../imdsproxy/netns", links)
        path = place / "haproxy.cfg"
        path.write_text(text.replace("/run/imdsproxy", str(place)))
        done = subprocess.run(
            ["haproxy", "-c", "-f", str(path)],  # noqa: S607 - Debian's
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr
    finally:
        directory.delete("imdst-golden")
        thread.close()
