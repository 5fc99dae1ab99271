"""Signers beside the hubs of a fleet, and its issuer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.certificates import Authority, make_authority
from support.fleet_world import BesideHub, HubProcess
from support.identity.signing import Issuer
from support.lab import until, within

_PORT: Final = 8443
_ADDRESS: Final = "10.250.0.21"


@dataclass(slots=True)
class Signers(BesideHub):
    """A signer beside each hub; the hubs serve the issuer's documents, whose URL leads to the first.

    Args:
        directory: For the certificate of the documents.
        audiences: Settings by audience.
    """

    directory: Path
    audiences: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _first: Path | None = None
    _authority: Authority | None = None

    @property
    def issuer(self) -> Issuer:
        """As verifiers are configured for it."""
        url = f"https://{_ADDRESS}:{_PORT}"
        ca_file = self.directory / "issuer-ca.crt"
        return Issuer(url, f"{url}/jwks", f"{url}/spiffe-bundle", ca_file)

    def settings(self, hub: HubProcess) -> Mapping[str, Mapping[str, object]]:
        """The section `identity`, and places of the signer's own."""
        if self._authority is None:
            self._authority = make_authority(self.directory, "issuer-ca")
        authority = self._authority
        own = authority.issue(hub.name, names=[f"IP:{_ADDRESS}", f"IP:{hub.address}"])
        return {
            "identity": {
                "enabled": True,
                "issuer": self.issuer.url,
                "trust_domain": "cloud.example",
                "listen": f"{hub.address}:{_PORT}",
                "certificate": str(own.bundle),
                "user": "daemon",
                "signer_user": "nobody",
                "audiences": {name: dict(one) for name, one in self.audiences.items()},
            },
            "paths": {
                "runtime_dir": str(hub.directory / f"{hub.name}.signer"),
                "state_dir": str(hub.directory / f"{hub.name}.keys"),
            },
        }

    def start(self, hub: HubProcess) -> None:
        """Start the hub's signer, with the key that seals of the first one."""
        keys = hub.directory / f"{hub.name}.keys/identity/keys"
        if self._first is None:
            self._first = keys
        elif not keys.exists():
            keys.mkdir(parents=True)
            until((self._first / "seal.key").exists, what="the first signer's key")
            shutil.copy(self._first / "seal.key", keys / "seal.key")
        log = (hub.directory / f"{hub.name}.signer.log").open("ab")
        self.processes[hub.name] = subprocess.Popen(
            (
                *within(hub.namespace),
                *(sys.executable, "-m", "imdsproxy", "--config", str(hub.config)),
                *("signer", "--hub"),
            ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "LANG": "C.UTF-8",
                **({} if hub.clock is None else hub.clock.environment),
            },
        )
        log.close()
        until(
            (hub.directory / f"{hub.name}.signer/signer.sock").exists, what=f"{hub.name}'s signer"
        )

    def kill(self, hub: str) -> None:
        """End the signer of a hub."""
        process = self.processes.pop(hub)
        process.kill()
        process.wait()

    def close(self) -> None:
        """End them."""
        for hub in tuple(self.processes):
            self.kill(hub)
