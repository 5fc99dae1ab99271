"""HAProxy itself accepts every golden configuration."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

_GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "haproxy").glob("*.cfg"))
_MAPS = ("base.map", "overlay.map", "token-keys.map", "short.map", "path-rules.map", "silence.http")


@pytest.mark.root
@pytest.mark.parametrize("golden", _GOLDEN, ids=lambda path: path.stem)
def test_haproxy_accepts_the_golden_file(golden: Path) -> None:
    # Not below pytest's own directory: a socket's path has 107 bytes.
    with TemporaryDirectory(prefix="imdst-") as name:
        place = Path(name)
        (place / "jail").mkdir()
        for one in _MAPS:
            (place / one).touch()
        (place / "unavailable.http").write_text("HTTP/1.1 503 No\r\n\r\n")
        # There are no such namespaces; that HAProxy binds in some is proved wherever a daemon runs.
        text = re.sub(r" namespace \S+", "", golden.read_text())
        (place / "haproxy.cfg").write_text(text.replace("/run/imdsproxy", name))
        done = subprocess.run(
            ["haproxy", "-c", "-f", place / "haproxy.cfg"],  # noqa: S607 - Debian's
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
