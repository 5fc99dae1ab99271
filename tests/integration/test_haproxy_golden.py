"""HAProxy itself accepts every golden configuration."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nslinks import haproxy_name

_GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "haproxy").glob("*.cfg"))


@pytest.mark.root
@pytest.mark.parametrize("golden", _GOLDEN, ids=lambda path: path.stem)
def test_haproxy_accepts_the_golden_file(golden: Path, tmp_path: Path) -> None:
    directory = NamespaceDirectory()
    thread = NamespaceThread(directory)
    (tmp_path / "jail").mkdir()
    (tmp_path / "netns").mkdir()
    for name in (
        "base.map",
        "overlay.map",
        "token-keys.map",
        "short.map",
        "path-rules.map",
        "silence.http",
    ):
        (tmp_path / name).touch()
    (tmp_path / "unavailable.http").write_text("HTTP/1.1 503 No\r\n\r\n")
    asyncio.run(thread.create("imdst-golden"))
    try:
        for link in ("imds-1@42", "qrouter-1@43"):
            (tmp_path / "netns" / link).symlink_to(directory.path / "imdst-golden")
        links = str(Path(haproxy_name(tmp_path / "netns", "x")).parent)
        text = golden.read_text().replace("../imdsproxy/netns", links)
        path = tmp_path / "haproxy.cfg"
        path.write_text(text.replace("/run/imdsproxy", str(tmp_path)))
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
