"""Recipe of `identity setup` for HAProxy, as an operator follows it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.certificates import make_authority
from support.identity.signing import Issuer
from support.lab import within
from support.world import World

SERVICE: Final = "10.0.0.250"
"""Address of the host by which its bridge's guests reach the service."""

_CONFIG: Final = """
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 5s
frontend service
    bind 127.0.0.1:8080
    http-request return status 200 content-type text/plain string welcome
"""


def run_in(namespace: str, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*within(namespace), "bash", "-eu", "-c", script),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _script_of(world: World, part: str) -> str:
    words = ("--part", part, "--url", f"https://{SERVICE}:8443")
    done = world.daemon.command("identity", "setup", "haproxy", *words)
    assert done.status == 0, done
    return done.out


@contextlib.contextmanager
def guarding_haproxy(world: World, issuer: Issuer, directory: Path) -> Iterator[str]:
    """Run HAProxy in a directory as the recipe has it, with a service behind it.

    Yields the guest's script, which prints the service's status.
    """
    authority = make_authority(directory, "service-ca")
    own = authority.issue("own", names=[f"IP:{SERVICE}"])
    own.bundle.rename(directory / "service.pem")
    config = directory / "haproxy.cfg"
    config.write_text(_CONFIG)
    script = _script_of(world, "server").replace("/etc/haproxy", str(directory))
    script = script.replace("systemctl reload haproxy", "")
    done = run_in(world.lab.host, script, CURL_CA_BUNDLE=str(issuer.ca_file))
    assert done.returncode == 0, done
    process = subprocess.Popen((*within(world.lab.host), "haproxy", "-db", "-f", str(config)))
    try:
        status = f"curl --cacert {authority.ca_file} -s -o /dev/null -w '%{{http_code}}' -H @-"
        yield _script_of(world, "guest").replace("curl -sSf -H @-", status)
    finally:
        process.kill()
        process.wait()
