"""HAProxy's answers on its sockets, read into values.

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
    """What `show proc` names: the master, the worker that accepts, and those that drain."""

    master: int
    worker: int | None
    draining: tuple[int, ...] = ()
    reloads: int = 0

    @property
    def workers(self) -> tuple[int, ...]:
        """Every process that may still answer a guest."""
        return (*(() if self.worker is None else (self.worker,)), *self.draining)

    @property
    def pids(self) -> tuple[int, ...]:
        """All of them, the master first."""
        return (self.master, *self.workers)


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's connections now, the most that it may have, and how often one more had to wait."""

    connections: int
    most: int
    reached: int


@dataclass(slots=True)
class WorkerTotals(Generic[_Key]):
    """Adds up counters that begin at 0 with each worker of HAProxy."""

    totals: Counter[_Key] = field(default_factory=Counter)
    _worker: int | None = None
    _before: dict[_Key, int] = field(default_factory=dict)

    def add(self, worker: int, now: Mapping[_Key, int]) -> Counter[_Key]:
        """Take in one worker's counters; by how much each has grown."""
        before = self._before if worker == self._worker else {}
        grown = Counter({key: count - before.get(key, 0) for key, count in now.items()})
        self._worker, self._before = worker, {**before, **now}
        self.totals.update(grown)
        return grown


def parse_processes(text: str) -> Processes | None:
    """The answer of `show proc`; `None` where no master is named in it.

    The table has a header per kind (`# workers`, `# old workers`); a line is
    `PID TYPE RELOADS UPTIME VERSION`. A worker in the first part that was reloaded away is drained too.
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
    """The log of a `reload` that failed, of the master's answer: `Success=0|1`, a ruler, the log; `None` of another."""
    head, _, log = text.partition("\n--\n")
    return None if head.strip() == "Success=1" else log.strip()


def parse_version(text: str) -> tuple[int, int, str] | None:
    """Branch and rest of the version in the first line of `haproxy -v`: 3, 0 and `11-1+deb13u2`."""
    match = _VERSION.search(text)
    return None if match is None else (int(match[1]), int(match[2]), match[3] or "")


def parse_features(text: str) -> frozenset[str]:
    """The features that `haproxy -vv` lists as built in (`+NS` gives `NS`)."""
    for line in text.splitlines():
        if line.startswith("Feature list"):
            return frozenset(word[1:] for word in line.split() if word.startswith("+"))
    return frozenset()


def parse_load(text: str) -> Load | None:
    """The answer of `show info` (`CurrConns`, `Maxconn`, `MaxconnReached`); `None` where one of them is missing."""
    found = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    numbers = [found.get(name, "") for name in ("CurrConns", "Maxconn", "MaxconnReached")]
    if not all(map(_NUMBER.fullmatch, numbers)):
        return None
    return Load(*map(int, numbers))


def parse_stat(text: str, columns: Collection[str] | None = None) -> list[dict[str, str]]:
    """The CSV of `show stat`: one mapping a line, by the header's names; cells hold no commas.

    Args:
        text: HAProxy's answer.
        columns: The only ones to take, where they are there: a line has a hundred, and a thousand networks
            have two thousand lines. `None`: all.
    """
    lines = [line for line in text.splitlines() if line]
    if not lines or not lines[0].startswith("#"):
        return []
    names = lines[0].lstrip("# ").rstrip(",").split(",")
    wanted = [(name, at) for at, name in enumerate(names) if columns is None or name in columns]
    rows = (line.split(",") for line in lines[1:])
    return [{name: row[index] for name, index in wanted if index < len(row)} for row in rows]


def parse_count(row: Mapping[str, str], column: str) -> int:
    """A counter in a line of `show stat`; 0 where the line has none."""
    text = row.get(column, "")
    return int(text) if text.isdigit() else 0


def parse_failure(output: str) -> str:
    """Why HAProxy failed, in one line: its alerts, each once, or all of its output where there are none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    alerts = [found[1] for line in lines if (found := _ALERT.fullmatch(line)) is not None]
    return "; ".join(dict.fromkeys(alerts or lines))


def parse_table(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The answer of `show table`: each key, with its counters and `exp`, the milliseconds until it is forgotten."""
    for line in text.splitlines():
        found = _ENTRY.match(line)
        if found is not None:
            key = re.sub(r"\\(.)", r"\1", found[1])
            yield key, {name: int(number) for name, number in _COUNTER.findall(found[2])}
