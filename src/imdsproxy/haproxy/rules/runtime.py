"""Parsers for HAProxy's answers on its sockets.

Source: HAProxy management guide, sections 9.3 "Unix Socket commands" and 9.4 "Master CLI".
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

_VERSION: Final = re.compile(r"HAProxy version ([0-9]{1,9})\.([0-9]{1,9})(?:[.-](\S+))?")
_ALERT: Final = re.compile(r"\[ALERT\]\s+(?:(?:\S+\s+)?\(\d+\) : )?(.*)")
_Key = TypeVar("_Key")
_ENTRY: Final = re.compile(r"^0x[0-9a-f]+: key=((?:\\.|[^ \\])*) (.*)$")
_COUNTER: Final = re.compile(r"\b([a-z0-9_]+)(?:\(\d+\))?=(\d+)")
_PROCESS: Final = re.compile(
    r"^(?:(#.*)|[ \t]*([0-9]{1,18})[ \t]+(master|worker)[ \t]+([0-9]{1,18})(?!\S).*)$", re.MULTILINE
)
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes in `show proc`: the master, the worker that accepts, and workers that drain."""

    master: int
    worker: int | None
    draining: tuple[int, ...] = ()
    reloads: int = 0

    @property
    def workers(self) -> tuple[int, ...]:
        return (*(() if self.worker is None else (self.worker,)), *self.draining)

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.master, *self.workers)


@dataclass(frozen=True, slots=True)
class Load:
    """Current connections of a worker, its maximum, and how often connections had to wait because of the maximum."""

    connections: int
    most: int
    reached: int


@dataclass(slots=True)
class WorkerTotals(Generic[_Key]):
    """Sums of counters that begin at 0 with each worker of HAProxy.

    Attributes:
        worker: The last worker whose counters were added; `None` before the first.
    """

    totals: Counter[_Key] = field(default_factory=Counter)
    worker: int | None = None
    _before: dict[_Key, int] = field(default_factory=dict)

    def add(self, worker: int, now: Mapping[_Key, int]) -> Counter[_Key]:
        """Add one worker's counters; return the increase of each."""
        before = self._before if worker == self.worker else {}
        grown = Counter({key: count - before.get(key, 0) for key, count in now.items()})
        self.worker, self._before = worker, {**before, **now}
        self.totals.update(grown)
        return grown


def parse_processes(text: str) -> Processes | None:
    """Parse the answer of `show proc`; `None` if it names no master.

    The table has a header per kind (`# workers`, `# old workers`); a line is `PID TYPE RELOADS UPTIME VERSION`. A
    worker in the first part drains too if a reload has replaced it.
    """
    master, reloads = None, 0
    current: list[int] = []
    draining: list[int] = []
    old = False
    for header, pid, kind, count in _PROCESS.findall(text):
        if header:
            old = "old" in header
        elif kind == "master":
            master, reloads = int(pid), int(count)
        else:
            (draining if old else current).append(int(pid))
    if master is None:
        return None
    worker = current[-1] if current else None
    return Processes(master, worker, (*current[:-1], *draining), reloads)


def parse_reload(text: str) -> str | None:
    """Return the log of a failed `reload` in the master's answer (`Success=0|1`, a ruler, the log), else `None`."""
    head, _, log = text.partition("\n--\n")
    return None if head.strip() == "Success=1" else log.strip()


def parse_version(text: str) -> tuple[int, int, str] | None:
    """Parse the first line of `haproxy -v` into branch and rest of the version: 3, 0 and `11-1+deb13u2`."""
    match = _VERSION.search(text)
    return None if match is None else (int(match[1]), int(match[2]), match[3] or "")


def parse_features(text: str) -> frozenset[str]:
    """Return the features that `haproxy -vv` lists as built in (`+NS` gives `NS`)."""
    for line in text.splitlines():
        if line.startswith("Feature list"):
            return frozenset(word[1:] for word in line.split() if word.startswith("+"))
    return frozenset()


def parse_load(text: str) -> Load | None:
    """Parse the answer of `show info` (`CurrConns`, `Maxconn`, `MaxconnReached`); `None` if a value is missing."""
    found = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    numbers = [found.get(name, "") for name in ("CurrConns", "Maxconn", "MaxconnReached")]
    if not all(map(_NUMBER.fullmatch, numbers)):
        return None
    return Load(*map(int, numbers))


def parse_stat(text: str, columns: Collection[str] | None = None) -> list[dict[str, str]]:
    """Parse the CSV of `show stat`: one mapping per line, by the header's names; cells hold no commas.

    A line has a hundred columns, and a thousand networks have two thousand lines: choose columns.
    """
    lines = [line for line in text.splitlines() if line]
    if not lines or not lines[0].startswith("#"):
        return []
    names = lines[0].lstrip("# ").rstrip(",").split(",")
    wanted = [(name, at) for at, name in enumerate(names) if columns is None or name in columns]
    rows = (line.split(",") for line in lines[1:])
    return [{name: row[index] for name, index in wanted if index < len(row)} for row in rows]


def parse_count(row: Mapping[str, str], column: str) -> int:
    """Return a counter in a line of `show stat`; 0 if the line lacks it."""
    text = row.get(column, "")
    return int(text) if text.isdigit() else 0


def parse_failure(output: str) -> str:
    """Return in one line why HAProxy failed: its alerts, each once, or all of its output if there are no alerts."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    alerts = [found[1] for line in lines if (found := _ALERT.fullmatch(line)) is not None]
    return "; ".join(dict.fromkeys(alerts or lines))


def parse_table(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Parse the answer of `show table`: each key, with its counters and `exp`, the milliseconds until its expiry."""
    for line in text.splitlines():
        found = _ENTRY.match(line)
        if found is not None:
            key = re.sub(r"\\(.)", r"\1", found[1])
            yield key, {name: int(number) for name, number in _COUNTER.findall(found[2])}
