"""A real Prometheus beside a daemon, with the rules that packages bring."""

import contextlib
import json
import math
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import yaml

from support.demonstration import REPOSITORY
from support.guest import Guest, Lost
from support.lab import run, until, within

RULES: Final = REPOSITORY / "packaging/prometheus"
_PROMTOOL: Final = "/usr/bin/promtool"
_PORT: Final = 9090
_EVERY: Final = "200ms"
_START_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule, as its file has it.

    Attributes:
        waits: For how long its expression must hold, as `5m`; empty for no time.
        texts: Its annotations.
    """

    name: str
    severity: str
    waits: str
    runbook: str
    texts: Mapping[str, str]


def alerts(file: Path | None = None) -> list[Alert]:
    """The alerts of a file of rules; without one, of all files."""
    files = sorted(RULES.glob("*.rules.yml")) if file is None else [file]
    found = [yaml.safe_load(each.read_text()) for each in files]
    rules = [rule for each in found for group in each["groups"] for rule in group["rules"]]
    return [
        Alert(
            rule["alert"],
            rule["labels"]["severity"],
            rule.get("for", ""),
            rule["annotations"]["runbook_url"],
            rule["annotations"],
        )
        for rule in rules
    ]


def hasten(rules: str) -> str:
    """The same rules for a test that has seconds: what they look back on, and how long they wait, is short."""
    rules = re.sub(r"^( *for:) .*$", r"\1 300ms", rules, flags=re.MULTILINE)
    return re.sub(r"\[\d+[smhd]\]", "[10s]", rules)


def promtool(*arguments: str, cwd: Path | None = None) -> str:
    """Run it; it must succeed."""
    return run(_PROMTOOL, *arguments, cwd=cwd)


class Prometheus:
    """A server in a namespace; use `open_prometheus`."""

    def __init__(self, namespace: str) -> None:
        self._place = Guest("prometheus", namespace, "", "", (), "lo", port=_PORT)

    def get(self, route: str, **query: object) -> Any:
        """The data of an answer of its API, which must be a success."""
        path = f"/api/v1/{route}?{urlencode(query)}"
        reply = self._place.ask(path, to="127.0.0.1")
        answer = json.loads(reply.body)
        assert answer["status"] == "success", f"{path}: {answer}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def lines(
        self, expression: str, legend: str, over_s: float
    ) -> dict[str, list[tuple[float, float]]]:
        """What a panel of Grafana draws of a query for the last seconds: moments and values by legend."""
        now = time.time()
        window = {"start": now - over_s, "end": now, "step": max(1.0, over_s / 200)}
        found = self.get("query_range", query=expression, **window)["result"]
        lines: dict[str, list[tuple[float, float]]] = {}
        for one in found:
            name = legend
            for label, text in one["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", text)
            lines[name] = [
                (float(at), float(value)) for at, value in one["values"] if value != "NaN"
            ]
        return lines

    def fired(self, within_s: float) -> frozenset[str]:
        """The names of the alerts that have fired in the last seconds, or do now."""
        window = f"[{math.ceil(within_s * 1000)}ms]"
        found = self.query(f'count_over_time(ALERTS{{alertstate="firing"}}{window})')
        return frozenset(one["metric"]["alertname"] for one in found)

    def answers(self) -> bool:
        """Whether it is up."""
        with contextlib.suppress(Lost, OSError):
            return self._place.ask("/-/ready", to="127.0.0.1", timeout_s=1).status == 200
        return False


@contextlib.contextmanager
def open_prometheus(
    namespace: str, directory: Path, jobs: Mapping[str, list[str]]
) -> Iterator[Prometheus]:
    """A server that scrapes and evaluates several times a second.

    Args:
        namespace: Where it runs.
        directory: What it keeps is there; its process ends with all that have this on their command lines.
        jobs: The targets of each job.
    """
    place = directory / "prometheus"
    place.mkdir()
    for file in RULES.glob("*.rules.yml"):
        (place / file.name).write_text(hasten(file.read_text()))
    settings = {
        "global": {"scrape_interval": _EVERY, "scrape_timeout": _EVERY, "evaluation_interval": _EVERY},
        "rule_files": [f"{place}/*.rules.yml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": targets}]}
            for job, targets in jobs.items()
        ],
    }  # fmt: skip
    file, log = place / "prometheus.yml", place / "log"
    file.write_text(yaml.safe_dump(settings))
    words = (
        *within(namespace),
        "/usr/bin/prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={place}/data",
        f"--web.listen-address=127.0.0.1:{_PORT}",
    )
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        one = Prometheus(namespace)
        try:
            until(
                lambda: process.poll() is not None or one.answers(),
                within_s=_START_S,
                what="Prometheus's answer",
            )
            assert process.poll() is None, "Prometheus has ended"
        except AssertionError as error:
            error.add_note(log.read_text()[-3000:])
            raise
        yield one
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
