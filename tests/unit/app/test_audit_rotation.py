"""The file of the audit log under the real logrotate, by the rules that packages bring."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from imdsproxy.app.audit import FileSink

_RULES = Path(__file__).parents[3] / "packaging" / "logrotate" / "imdsproxy"
_PLACE = "/var/log/imdsproxy/audit.log"


def _line(number: int) -> bytes:
    return b'{"number":%d}\n' % number


def test_no_line_is_lost_or_written_twice_when_the_file_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    rules = tmp_path / "rules"
    said = _RULES.read_text()
    assert said.count(_PLACE) == 1
    rules.write_text(said.replace(_PLACE, os.fspath(path)))
    rules.chmod(0o644)
    sink = FileSink(path)
    for number in range(3):
        sink.write(_line(number))
        state = f"--state={tmp_path / 'state'}"
        subprocess.run(["/usr/sbin/logrotate", "--force", state, rules], check=True)
        assert not path.exists()
    sink.write(_line(3))
    sink.close()
    names = ("audit.log", "audit.log.1", "audit.log.2.gz", "audit.log.3.gz")
    assert {one.name for one in tmp_path.glob("audit.log*")} == set(names)
    text = b"".join(
        subprocess.run(["/bin/zcat", "-f", tmp_path / name], check=True, capture_output=True).stdout
        for name in names
    )
    assert text == b"".join(map(_line, (3, 2, 1, 0)))
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names} == {0o640}
