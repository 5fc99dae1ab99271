"""Identity tokens in measurements: settings of issuers, their processes, and a guest's requests for tokens."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bench.etcd import free_port
from bench.guest import Answer, Guest
from bench.place import BenchError, put_in_memory
from bench.procs import end_all, find_by_argument, wait_until
from imdsproxy.issuer.keys import make_key

__all__ = [
    "AUDIENCES",
    "EVERY",
    "IDENTITY_OF_HOST",
    "NAMED",
    "TOKEN_PATH",
    "HubSigner",
    "issuer_settings",
    "open_session",
    "pids_of",
    "request_token",
]

AUDIENCES: Final = ("keystone", "openbao", "kubernetes")
NAMED: Final[Mapping[str, object]] = {"audiences": list(AUDIENCES)}
"""Rules for guests that may request three audiences, whose tokens are fetched ahead."""

EVERY: Final[Mapping[str, object]] = {"audiences": [*AUDIENCES, "*"]}
"""Rules for guests that may request any audience."""

TOKEN_PATH: Final = "/latest/api/identity"  # noqa: S105 - a path
# Accounts that every Debian has.
_ACCOUNTS: Final = {"user": "daemon", "signer_user": "nobody", "supervisor": "spawn"}
IDENTITY_OF_HOST: Final[Mapping[str, object]] = {"enabled": True, **_ACCOUNTS}
"""Section `identity` of a host whose fleet signs."""

_SESSION: Final = "X-aws-ec2-metadata-token"
_ADDRESS: Final = "127.0.0.1"
_MODULE: Final = b"imdsproxy.issuer.serve"
_START_S: Final = 20.0
_OK: Final = 200


def issuer_settings(directory: Path, algorithm: str = "RS256") -> dict[str, object]:
    """Return the section `identity` of a machine that signs, with a certificate for the issuer's documents."""
    listen = f"{_ADDRESS}:{free_port()}"
    url = f"https://{listen}"
    certificate = directory / "issuer.pem"
    certificate.touch(0o600)
    certificate.write_bytes(make_key("ES256", url, datetime.now(UTC)).render())
    return {
        **IDENTITY_OF_HOST,
        "issuer": url,
        "trust_domain": "bench.example",
        "algorithm": algorithm,
        "listen": listen,
        "certificate": str(certificate),
    }


def pids_of(directory: Path) -> Sequence[int]:
    """Return the processes for identity tokens whose files are in a directory."""
    found = []
    for pid in find_by_argument(directory):
        with contextlib.suppress(OSError):
            if _MODULE in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def open_session(guest: Guest) -> str:
    """Return a session token of a guest, as a header.

    Raises:
        BenchError: The guest got none.
    """
    guest.send("/latest/api/token", method="PUT", header=f"{_SESSION}-ttl-seconds: 21600")
    answer = guest.receive()
    if answer.status != _OK:
        raise BenchError(f"a session token: {answer.status}")
    return f"{_SESSION}: {answer.body.decode()}"


def request_token(guest: Guest, session: str, audience: str) -> Answer:
    """Request an identity token as a guest."""
    header = f"{session}\r\nX-imdsproxy-audience: {audience}"
    guest.send(TOKEN_PATH, method="PUT", header=header)
    return guest.receive()


@dataclass(slots=True)
class HubSigner:
    """Signer beside a hub.

    Attributes:
        directory: For keys, socket and log; no process of the hub names it.
    """

    directory: Path
    algorithm: str = "RS256"
    _process: subprocess.Popen[bytes] | None = field(default=None)

    def settings(self) -> dict[str, object]:
        """Return the sections of the hub's settings."""
        self.directory.mkdir()
        put_in_memory(self.directory / "run")
        paths = {"runtime_dir": self.directory / "run", "state_dir": self.directory / "state"}
        return {
            "identity": issuer_settings(self.directory, self.algorithm),
            "paths": {name: str(path) for name, path in paths.items()},
        }

    @property
    def socket(self) -> Path:
        return self.directory / "run/signer.sock"

    @property
    def pid(self) -> int:
        assert self._process is not None  # noqa: S101 - it was started
        return self._process.pid

    @property
    def _seal(self) -> Path:
        return self.directory / "state/identity/keys/seal.key"

    def start(self, config: Path, first: HubSigner) -> None:
        """Start the signer with a hub's settings, and the key that seals of the first signer.

        Raises:
            BenchError: The signer does not start.
        """
        if first is not self:
            self._seal.parent.mkdir(parents=True)
            shutil.copy(first._seal, self._seal)
            shutil.chown(self._seal, "nobody")
        program = str(Path(sys.executable).parent / "imdsproxy")
        with (self.directory / "signer.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--config", str(config), "signer", "--hub"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if not wait_until(lambda: self.socket.exists() and self._seal.exists(), _START_S):
            log_text = (self.directory / "signer.log").read_text()
            raise BenchError(f"the signer does not start: {log_text[-500:]}")

    def kill(self) -> None:
        if self._process is not None:
            end_all([self._process.pid])
            self._process.wait()
            self._process = None
