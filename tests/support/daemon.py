"""A whole imdsproxy as an operator runs it, in a directory of its own, on a lab's host.

The three lives are started, killed and adopted through real signals and the real command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import yaml

from imdsproxy.api.client import AdminClient
from imdsproxy.errors import AdminUnavailable, RuntimeUnavailable
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.haproxy.rules.limits import COUNTERS, POLICY_COUNTERS
from support.commands import Command, Forked, run_command, start_controller
from support.lab import NETNS, Lab, RecordMapping, until, within
from support.reaper import processes_of, reap, reap_at_the_end

Shape = Mapping[str, Any]

_PROGRAM: Final = (sys.executable, "-m", "imdsproxy")
_START_S: Final = 20.0
_STOP_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Pids:
    """The processes of the three lives."""

    controller: int
    master: int
    worker: int
    documents: int
    document_workers: tuple[int, ...]

    @property
    def data_plane(self) -> tuple[int, ...]:
        return (self.master, self.worker, self.documents, *self.document_workers)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def instance(
    name: str,
    network: str,
    number: int = 5,
    *,
    mac: str | None = None,
    fields: Mapping[str, object] | None = None,
) -> RecordMapping:
    """The record of a guest that `Lab.guest` plugs in under the same number."""
    return {
        "id": name,
        "name": name,
        "ports": [
            {
                "network": network,
                "mac": mac or f"fa:16:3e:00:{number >> 8:02x}:{number & 255:02x}",
                "addresses": [f"10.0.0.{number}", f"2001:db8::{number:x}"],
            }
        ],
        "user_data": user_data_of(name).decode(),
        **(fields or {}),
    }


def user_data_of(name: str) -> bytes:
    """What no other instance has."""
    return f"#!/bin/sh\necho {name}\n".encode()


@dataclass(slots=True)
class Daemon:
    """One daemon: its directory, its settings, its processes.

    Args:
        lab: Whose host it runs on.
        in_lab: It does; else it runs in the machine's own namespace, where it is to listen to nobody.
        settings: Laid over the settings that every test has.
        program: The words that start it, without options.
        environment: Added to a bare environment.
    """

    lab: Lab
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    program: Sequence[str] = _PROGRAM
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="imdst-")))
    in_lab: bool = True
    process: subprocess.Popen[bytes] | Forked | None = None

    def __post_init__(self) -> None:
        reap_at_the_end(directory=self.directory)
        # The workers of HAProxy and of the document server are other users.
        self.directory.chmod(0o755)
        self.configure(self.settings)

    def configure(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Write the settings file anew."""
        self.settings = settings
        base: dict[str, dict[str, object]] = {
            "paths": {"runtime_dir": str(self.runtime), "state_dir": str(self.state)},
            "haproxy": {"supervisor": "spawn", "hard_stop_after_s": 5},
            "documents": {"supervisor": "spawn"},
            "metrics": {"listen": None, "haproxy_listen": None},
            "host": {"name_prefix": self.lab.prefix},
            "log": {"format": "json"},
            # A guest of these tests asks for more in a second than one that boots does in a day.
            "limits": {"requests_per_s": 25_000, "burst": 1_000_000, "connections": 10_000},
        }
        for section, values in settings.items():
            base[section] = {**base.get(section, {}), **values}
        text = yaml.safe_dump(base, sort_keys=False)
        self.config.write_text(text.replace("{directory}", str(self.directory)))

    def reconfigure(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Write the settings anew, and have the controller take them over, as `imdsproxy reload` does."""
        self.configure(settings)
        self.admin.request("POST", "/v1/reload", body={"allow_dropped": True})

    # Places

    @property
    def config(self) -> Path:
        return self.directory / "imdsproxy.yaml"

    @property
    def runtime(self) -> Path:
        return self.directory / "run"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def log(self) -> Path:
        """What the controllers said, all of them."""
        return self.directory / "controller.log"

    @property
    def admin(self) -> AdminClient:
        return AdminClient(self.runtime / "admin.sock")

    def write_secret(self, name: str, text: str) -> Path:
        """Write a secret down in the directory."""
        file = self.directory / name
        file.write_text(f"{text}\n")
        file.chmod(0o600)
        return file

    def log_entries(self) -> list[Shape]:
        """The controllers' log, entry by entry."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    # Life

    def start(self, *, ready: bool = True, before: Callable[[], None] | None = None) -> Daemon:
        """Start a controller and wait until it says that all is in force; `before` is done in its process first."""
        self.process = self._started(before)
        until(self._answers, within_s=_START_S, what="the daemon's answer")
        if ready:
            self.wait_ready()
        return self

    def _started(
        self, before: Callable[[], None] | None = None
    ) -> subprocess.Popen[bytes] | Forked:
        environment = self._environment()
        if self.program == _PROGRAM and not self.environment:
            namespace = NETNS / self.lab.host if self.in_lab else None
            return start_controller(
                self.config,
                environment=environment,
                log=self.log,
                namespace=namespace,
                before=before,
            )
        assert before is None
        # What changes how an interpreter starts has one of its own.
        where = within(self.lab.host) if self.in_lab else ()
        with self.log.open("ab") as log:
            return subprocess.Popen(
                (*where, *self.program, "--config", str(self.config), "run"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return {**kept, "LANG": "C.UTF-8", **self.environment}

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended: {self.log.read_text()[-3000:]}"
        try:
            self.admin.get("/v1/status")
        except AdminUnavailable:
            return False
        return True

    def wait_ready(self, *, within_s: float = 10.0) -> None:
        seen: dict[str, Any] = {}

        def is_ready() -> bool:
            seen.update(self.status()["readiness"])
            return bool(seen["ready"])

        try:
            until(is_ready, within_s=within_s, what="being ready")
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen}") from error

    def resolver_up(self) -> bool:
        """Whether HAProxy has seen that the controller takes unknown guests' requests."""
        try:
            rows = self.haproxy_rows()
        except RuntimeUnavailable:
            # The master refuses connections for some 30 ms of a reload.
            return False
        return any(row["svname"] == "resolver" and row["status"] == "UP" for row in rows)

    def haproxy_rows(self) -> list[dict[str, str]]:
        """What HAProxy counts: `show stat` of the worker; nothing where there is none."""
        client = MasterClient(self.runtime / "master.sock")

        async def read() -> list[dict[str, str]]:
            worker = (await client.read_processes()).worker
            return [] if worker is None else await client.read_stat(worker)

        return asyncio.run(read())

    def forget_floods(self) -> None:
        """Have HAProxy's worker forget who asked for how much: it refuses more for a while."""
        client = MasterClient(self.runtime / "master.sock")
        fair = self.settings.get("limits", {}).get("enabled", True)
        tables = ("resolver", *((COUNTERS, POLICY_COUNTERS) if fair else ()))

        async def forget() -> str:
            worker = (await client.read_processes()).worker
            if worker is None:
                return "no worker"
            said = [await client.send(worker, f"clear table {table}") for table in tables]
            return "".join(said)

        said = asyncio.run(forget())
        assert not said.strip(), said

    def kill_controller(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the controller, and only it."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(_STOP_S)

    def stop(self) -> None:
        """End everything, as `imdsproxy stop --data-plane` does, whether a controller runs or not."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        if self.processes():
            self.command("stop", "--data-plane")
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)

    def close(self) -> None:
        """End everything and take the directory away; nothing may be left."""
        try:
            self.stop()
            # Workers end a moment after their parents.
            with contextlib.suppress(AssertionError):
                until(lambda: not self.processes(), within_s=2)
            left = self.processes()
        finally:
            reap([self.directory])
            if self.process is not None:
                self.process.wait()
        assert not left, f"still running after stop --data-plane: {left}"

    def processes(self) -> dict[int, str]:
        """Every process that has this directory on its command line or works there."""
        return dict(processes_of([self.directory]))

    # Asking and telling

    def command(
        self, *arguments: str, stdin: str = "", before: Callable[[], None] | None = None
    ) -> Command:
        """Run the command line; `before` is done in its process first."""
        words = ("--config", str(self.config), *arguments)
        return run_command(words, environment=self._environment(), stdin=stdin, before=before)

    def status(self) -> Shape:
        return cast("Shape", self.admin.get("/v1/status"))

    def pids(self) -> Pids:
        """The processes of now."""
        status = self.status()
        documents = status["documents"]["pids"]
        return Pids(
            controller=status["controller"],
            master=status["haproxy"]["master"],
            worker=status["haproxy"]["worker"],
            documents=documents[0],
            document_workers=tuple(documents[1:]),
        )

    def not_served(self) -> dict[str, Shape]:
        """What is reported of listeners, by network; the first entry of each."""
        found: dict[str, Shape] = {}
        for one in self.status()["not_served"]:
            found.setdefault(one["network"], one)
        return found

    def put(
        self, networks: Sequence[RecordMapping] = (), instances: Sequence[RecordMapping] = ()
    ) -> Shape:
        """Add or replace records; returns once the data plane has them."""
        body = {"networks": list(networks), "instances": list(instances)}
        kept = {key: value for key, value in body.items() if value}
        return cast("Shape", self.admin.request("POST", "/v1/records", body=kept))

    def remove_instance(self, name: str) -> Shape:
        return cast("Shape", self.admin.request("DELETE", f"/v1/instances/{name}"))

    def remove_network(self, name: str) -> Shape:
        return cast("Shape", self.admin.request("DELETE", f"/v1/networks/{name}"))

    def explain(self, network: str, address: str) -> Shape:
        query = {"network": network, "address": address}
        return cast("Shape", self.admin.get("/v1/explain", query))
