"""HAProxy itself accepts every golden configuration, and its exporter says as much at many networks as at one."""

import re
import subprocess
import urllib.request
from ipaddress import IPv4Address
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from imdsproxy.haproxy.rules.model import Bind, DataplaneSpec
from imdsproxy.model.entities import NetworkId
from support.certificates import make_authority
from support.haproxy_alone import paths_below, run_haproxy
from support.lab import until

pytestmark = pytest.mark.root

_GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "haproxy").glob("*.cfg"))
_EXPORTER = "127.9.255.1:9466"


@pytest.mark.parametrize("golden", _GOLDEN, ids=lambda path: path.stem)
def test_haproxy_accepts_the_golden_file(golden: Path) -> None:
    # Not below pytest's own directory: a socket's path has 107 bytes.
    with TemporaryDirectory(prefix="imdst-") as name:
        paths_below(Path(name))
        for one in ("empty.map", "identity.map", "silence.http"):
            Path(name, one).touch()
        Path(name, "jwks").write_text('{"keys": []}')
        issuer = make_authority(Path(name), "ca").issue("issuer", names=["IP:192.0.2.10"])
        issuer.bundle.rename(Path(name, "issuer.pem"))
        # There are no such namespaces; that HAProxy binds in some is proved wherever a daemon runs.
        text = re.sub(r" namespace \S+", "", golden.read_text()).replace("/run/imdsproxy", name)
        Path(name, "haproxy.cfg").write_text(text)
        done = subprocess.run(
            ["haproxy", "-c", "-f", f"{name}/haproxy.cfg"],  # noqa: S607 - Debian's
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def _series(networks: int) -> list[str]:
    """What HAProxy exports with that many networks."""
    # Nothing else has these addresses, so no port of theirs can be lost to another test.
    binds = tuple(
        Bind(NetworkId(f"net-{number}"), IPv4Address("127.9.0.1") + number, 80)
        for number in range(networks)
    )
    found: list[str] = []

    def read() -> bool:
        try:
            # A guest of the exporter cannot widen what it says.
            url = f"http://{_EXPORTER}/metrics?scope=listener"
            with urllib.request.urlopen(url, timeout=5) as answer:
                found.extend(answer.read().decode().splitlines())
        except OSError:
            return False
        return True

    with TemporaryDirectory(prefix="imdst-") as name:
        spec = DataplaneSpec(binds, paths_below(Path(name)), exporter=_EXPORTER)
        with run_haproxy(spec, Path(name)):
            until(read, what="the exporter's answer")
    return [line for line in found if line and not line.startswith("#")]


def test_the_number_of_series_does_not_grow_with_the_networks() -> None:
    few, many = _series(1), _series(300)
    assert any(line.startswith("haproxy_frontend_http_requests_total") for line in few)
    assert len(many) == len(few)
    assert not [line for line in many if re.search(r"haproxy_listener_|net-\d", line)]
