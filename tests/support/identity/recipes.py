"""Recipes of `identity setup`, as an operator follows them."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.identity.signing import Issuer
from support.lab import run, within
from support.world import World


def recipe_of(world: World, verifier: str) -> str:
    done = world.daemon.command("identity", "setup", verifier)
    assert done.status == 0, done
    return done.out


def run_in(namespace: str, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*within(namespace), "bash", "-eu", "-c", script),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@contextlib.contextmanager
def guarding_haproxy(world: World, issuer: Issuer, recipe: str, directory: Path) -> Iterator[None]:
    """Run HAProxy as the recipe has it, with a service behind it."""
    certificate = directory / "issuer.pem"
    fetch = next(line for line in recipe.splitlines() if line.startswith("curl -sf https"))
    fetch = fetch.replace("/etc/haproxy/issuer.pem", str(certificate))
    fetched = run_in(world.lab.host, fetch.replace("curl", f"curl --cacert {issuer.ca_file}"))
    assert fetched.returncode == 0, fetched
    found = re.search(r"^frontend internal\n(?: .*\n)+", recipe, re.MULTILINE)
    assert found is not None
    frontend = found[0].replace("/etc/haproxy/issuer.pem", str(certificate))
    service = "backend service\n    http-request return status 200 content-type text/plain string welcome\n"
    times = "defaults\n    mode http\n    timeout client 5s\n    timeout server 5s\n    timeout connect 5s\n"
    config = directory / "haproxy.cfg"
    config.write_text(f"{times}{frontend}{service}")
    run("haproxy", "-c", "-f", str(config))
    process = subprocess.Popen((*within(world.lab.host), "haproxy", "-db", "-f", str(config)))
    try:
        yield
    finally:
        process.kill()
        process.wait()


SERVICE: Final = "10.0.0.250"
"""Address of the host by which its bridge's guests reach the service."""


def request_of(recipe: str) -> str:
    """Return the guest's commands, which print the service's status."""
    return (
        recipe.partition("# In a guest:")[2]
        .replace("curl -H", "curl -s -o /dev/null -w '%{http_code}' -H")
        .replace("service.example", SERVICE)
    )
