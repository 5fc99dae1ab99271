"""A directory read step by step, with a clock of the test's own."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from imdsproxy.core.model import Instance, InstanceId, NetworkId
from imdsproxy.core.observation import StrandedPort
from imdsproxy.core.records import parse_instance
from imdsproxy.core.records.schema import MAX_PAYLOAD, Findings, Refused
from imdsproxy.sources.file.record_file import payload_reader
from imdsproxy.sources.file.source import FileSource

WEB = InstanceId("web")
NETWORK = "networks:\n- id: n\n  listener: {bridge: br0}\n"


def record(name: str, address: str, **more: object) -> dict[str, object]:
    ports = [{"network": "n", "addresses": [address]}]
    return {"id": name, "name": name, "ports": ports, **more}


def instances(*records: object) -> str:
    return json.dumps({"instances": records}, indent=1)


class Bench:
    """The directory, its reader, and the time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.kept = path.parent / "last-good.sqlite"
        self.restart()

    def restart(self) -> None:
        """A new process reads the directory."""
        self.source = FileSource(self.path, self.kept, clock=lambda: self.now)

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.path / name
        beside = self.path / f".{name}.tmp"
        beside.write_bytes(text.encode() if isinstance(text, str) else text)
        beside.rename(path)
        return path

    def read(self, *changed: Path) -> dict[InstanceId, Instance | None]:
        """The instances that came, changed or went."""
        found = self.source.read(changed)
        return {**found.instances, **dict.fromkeys(found.instances_removed)}

    def settle(self) -> None:
        """Read until it does not ask to look again; what was found on the way is in force."""
        self.read()
        while self.source.again_s is not None:
            self.now += self.source.again_s
            self.read()

    @property
    def lines(self) -> list[str]:
        return [str(problem) for problem in self.source.problems]

    @property
    def instances(self) -> Mapping[InstanceId, Instance]:
        return self.source.everything().instances

    @property
    def names(self) -> set[str]:
        return set(self.instances)

    @property
    def networks(self) -> set[str]:
        return set(self.source.everything().networks)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "records").mkdir()
    return Bench(tmp_path / "records")


def test_yaml_and_json_files_are_read_and_others_are_not(bench: Bench) -> None:
    bench.write("1.yaml", "\ufeff" + NETWORK)  # a byte order mark is no content
    bench.write("2.yml", "instances:\n- {id: a, name: a}\n")
    bench.write("3.json", instances(record("b", "10.0.0.2")))
    for name in ("4.yaml~", ".5.yaml", ".#6.yaml", "#7.yaml#", "8.txt", "9.yaml.swp", "4913"):
        bench.write(name, "no: [record")
    (bench.path / "directory.d").mkdir()
    bench.write("blank.yaml", " \n")
    bench.settle()
    assert not bench.source.problems
    assert bench.names == {"a", "b"}
    assert bench.networks == {"n"}


def test_only_a_file_that_changed_is_read_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        bench.write(f"{number}.json", instances(record(f"i{number}", f"10.0.0.{number + 1}")))
    bench.read()
    opened: list[str] = []
    real = os.open

    def noted(path: Path, flags: int, mode: int = 0o777) -> int:
        opened.append(Path(path).name)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", noted)
    bench.write("3.json", instances(record("i3", "10.0.0.33")))
    reading = bench.read()
    assert [name for name in opened if name.endswith(".json")] == ["3.json"]
    assert reading.keys() == {"i3"}


def test_a_file_with_an_event_is_read_though_it_looks_the_same(bench: Bench) -> None:
    path = bench.write("x.json", instances(record("a", "10.0.0.5")))
    before = path.stat()
    bench.read()
    path.write_text(instances(record("a", "10.0.0.6")))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    reading = bench.read(path)
    assert reading.keys() == {"a"}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("instances:\n- id: a\n  name: [x\n", ":4: file: is not YAML"),
        (b"instances:\n# \xff\n", ":2: file: is not UTF-8"),
        ("instances: []\ninstances: []\n", ":2: instances: is there twice"),
        ("instance: []\n", ":1: instance: unknown key"),
        ("- id: a\n", ":1: record: expected a mapping"),
    ],
)
def test_a_file_that_cannot_be_read_keeps_all_its_records(
    bench: Bench, text: str | bytes, place: str
) -> None:
    bench.write("x.yaml", instances(record("a", "10.0.0.5"), record("b", "10.0.0.6")))
    bench.read()
    path = bench.write("x.yaml", text)
    reading = bench.read()
    assert bench.names == {"a", "b"}
    assert not reading
    assert any(line.startswith(f"{path}{place}") for line in bench.lines), bench.lines
    bench.write("x.yaml", instances(record("b", "10.0.0.6")))
    assert bench.read() == {"a": None}
    bench.read()
    assert not bench.lines


def test_bad_records_are_refused_one_by_one_with_file_line_and_field(bench: Bench) -> None:
    path = bench.write(
        "x.yaml",
        """\
networks:
- id: n
  listener: {bridge: br0}
- id: m
  listener: {bridge: br1}
  subnets:
  - cidr: 10.0.0.1/24
instances:
- id: good
  name: good
- id: twice
  name: x
  name: y
- id: file
  name: x
  user_data_file: missing.sh
- id: address
  name: x
  ports:
  - network: n
    addresses:
    - 10.0.0.5
    - 10.0.0.999
- id: mac
  name: x
  ports:
  - network: n
    mac: 52:54:00:12:34
- {id: good, name: again}
""",
    )
    bench.read()
    assert bench.names == {"good"}
    assert bench.networks == {"n"}
    lines = bench.lines
    for wanted in (
        f"{path}:7: networks[1].subnets[0].cidr: ",
        f"{path}:13: instances[1].name: is there twice",
        f"{path}:16: instances[2].user_data_file: there is no file ",
        f"{path}:23: instances[3].ports[0].addresses[1]: ",
        f"{path}:28: instances[4].ports[0].mac: ",
        f"{path}:29: instances[5].id: good is also in {path}:9",
    ):
        assert any(line.startswith(wanted) for line in lines), (wanted, lines)
    assert len(lines) == 6


def test_a_refused_newcomer_is_reported_with_file_line_and_field_of_both(bench: Bench) -> None:
    holder = bench.write(
        "z.yaml", "instances:\n- id: a\n  name: a\n  ports: [{network: n, addresses: [10.0.0.5]}]\n"
    )
    bench.read()
    path = bench.write(
        "a.yaml",
        "instances:\n- id: b\n  name: b\n  ports:\n  - network: n\n    addresses:\n"
        "    - 10.0.0.4\n    - 10.0.0.5\n",
    )
    bench.read()
    (line,) = bench.lines
    assert line.startswith(
        f"{path}:8: instances[0].ports[0].addresses[1]: 10.0.0.5 in network n belongs to instance a"
        f" ({holder}:2)"
    )
    assert bench.names == {"a"}


def test_while_an_id_cannot_be_read_none_of_the_files_records_goes(bench: Bench) -> None:
    bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.read()
    bench.write("x.json", instances({"name": "a"}))
    assert not bench.read()
    assert bench.names == {"a"}
    bench.write("x.json", instances(record("b", "10.0.0.6")))
    assert bench.read().keys() == {"a", "b"}


def test_a_file_that_is_gone_for_a_moment_only_keeps_its_records(bench: Bench) -> None:
    path = bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.read()
    path.rename(path.with_name("x.json~"))
    bench.read()
    assert bench.source.again_s is not None
    assert bench.names == {"a"}
    bench.write("x.json", instances(record("a", "10.0.0.5"), record("b", "10.0.0.6")))
    assert bench.read().keys() == {"b"}


def test_a_blank_file_keeps_its_records_and_is_a_problem_after_a_moment(bench: Bench) -> None:
    path = bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.read()
    path.write_bytes(b"")
    bench.read()
    assert bench.source.again_s is not None
    assert bench.names == {"a"}
    path.write_text(instances(record("a", "10.0.0.6")))
    assert bench.read().keys() == {"a"}
    path.write_bytes(b"")
    bench.settle()
    (problem,) = bench.source.problems
    assert (problem.file, problem.reason) == (
        str(path),
        "is blank: the records that it had stay in force",
    )
    assert bench.names == {"a"}
    bench.source.last_good.save()
    bench.restart()
    bench.read()
    assert len(bench.lines) == 1
    assert bench.names == {"a"}
    path.write_text("{}")
    bench.settle()
    assert not bench.names


def test_what_is_no_regular_file_is_reported_and_never_waited_for(bench: Bench) -> None:
    os.mkfifo(bench.path / "pipe.yaml")
    (bench.path / "directory.yaml").mkdir()
    (bench.path / "dangling.yaml").symlink_to(bench.path / "nowhere")
    bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.settle()
    lines = bench.lines
    assert bench.names == {"a"}
    assert len(lines) == 2
    assert all("cannot be read" in line for line in lines)


def test_what_was_in_force_stays_over_a_restart_with_broken_files(bench: Bench) -> None:
    payload = {"base64": "H4sA/w=="}
    bench.write("n.yaml", NETWORK)
    bench.write("x.json", instances(record("a", "10.0.0.5", user_data=payload)))
    bench.write("y.json", instances(record("b", "10.0.0.6"), record("c", "10.0.0.7")))
    bench.read()
    bench.source.last_good.save()
    assert bench.source.last_good.problem is None
    with closing(sqlite3.connect(bench.kept)) as kept:
        # As versions before it read it, to which a host may go back.
        rows = kept.execute("SELECT id, user_data FROM last_good WHERE user_data IS NOT NULL")
        assert rows.fetchall() == [("a", b"\x1f\x8b\x00\xff")]
    before = bench.instances
    bench.write("n.yaml", "networks: [")
    bench.write("x.json", b"\xff")
    bench.write("y.json", instances(record("b", "10.0.0.999"), record("c", "10.0.0.8")))
    bench.restart()
    reading = bench.read()
    assert len(bench.lines) == 3
    assert bench.networks == {"n"}
    assert bench.instances[InstanceId("a")] == before[InstanceId("a")]
    assert bench.instances[InstanceId("b")] == before[InstanceId("b")]
    assert bench.instances[InstanceId("c")] != before[InstanceId("c")]
    assert reading.keys() == {"c"}


def test_a_directory_that_is_gone_at_a_restart_leaves_what_was_in_force(bench: Bench) -> None:
    bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.read()
    bench.source.last_good.save()
    assert bench.source.last_good.problem is None
    bench.path.rename(bench.path.with_name("away"))
    bench.restart()
    bench.read()
    assert not bench.source.readable
    assert bench.names == {"a"}


def test_a_memory_that_is_damaged_is_reported_and_does_without(bench: Bench) -> None:
    bench.kept.write_bytes(b"no database " * 1000)
    bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.read()
    bench.source.last_good.save()
    assert "not kept over a restart" in str(bench.source.last_good.problem)
    assert bench.names == {"a"}
    bench.kept.unlink()
    bench.source.last_good.save()
    assert bench.source.last_good.problem is None


def test_rows_of_the_memory_that_hold_no_record_are_passed_over(bench: Bench) -> None:
    path = bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.read()
    bench.source.last_good.save()
    with closing(sqlite3.connect(bench.kept)) as kept, kept:
        for kind, name, text in (
            ("instances", "no-json", "{"),
            ("instances", "deep", "[" * 100_000),
            ("instances", "bad", '{"id": "bad", "ports": 7}'),
            ("routers", "r", "{}"),
        ):
            row = kind, name, "x.json", text, None
            kept.execute("INSERT INTO last_good VALUES (?, ?, ?, ?, ?)", row)
    path.write_text("[")
    bench.restart()
    bench.read()
    assert bench.names == {"a"}


def test_a_refusal_says_that_the_version_before_stays(bench: Bench) -> None:
    bench.write("x.json", instances(record("a", "10.0.0.5"), record("b", "10.0.0.6")))
    bench.read()
    bench.write("x.json", instances(record("a", "10.0.0.5"), record("b", "10.0.0.5")))
    assert not bench.read()
    (problem,) = bench.source.problems
    assert (problem.record, problem.field) == ("b", "instances[1].ports[0].addresses[0]")
    assert "10.0.0.5 in network n belongs to instance a" in problem.reason
    assert "the version before it stays in force" in problem.hint


def test_what_went_while_stopped_is_gone_and_who_had_an_address_has_it_after_a_restart(
    bench: Bench,
) -> None:
    gone = bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.write("y.json", instances(record("b", "10.0.0.6"), record("c", "10.0.0.7")))
    bench.read()
    bench.source.last_good.save()
    gone.unlink()
    bench.write("y.json", instances(record("c", "10.0.0.7")))
    bench.write("a.json", instances(record("d", "10.0.0.7")))
    bench.restart()
    assert bench.read() == {"a": None, "b": None}
    assert bench.names == {"c"}


def test_a_port_has_the_file_line_and_field_of_its_first_claim_as_its_place(bench: Bench) -> None:
    path = bench.write(
        "x.yaml",
        """\
instances:
  - id: db
    name: db
  - id: web
    name: web
    ports:
      - network: nowhere
        addresses:
          - 10.0.0.5
      - network: beyond
""",
    )
    ports = [StrandedPort("file", WEB, number, NetworkId("nowhere")) for number in range(3)]
    assert bench.source.explain_stranded(ports[0]) == ports[0].problem()
    bench.read()
    assert [bench.source.explain_stranded(port) for port in ports] == [
        ports[0].problem(field="instances[1].ports[0].network", file=str(path), line=9),
        ports[1].problem(field="instances[1].ports[1].network", file=str(path), line=4),
        ports[2].problem(),
    ]


def test_a_payload_that_is_missing_large_or_no_file_is_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MAX_PAYLOAD + 1)
    findings = Findings(read_file=payload_reader(tmp_path))
    for name in ("missing", "fifo", ".", "large", "large/x", "x" * 300):
        found = parse_instance({"id": "a", "name": "a", "user_data_file": name}, (), findings)
        assert isinstance(found, Refused), name
        assert found.problems[-1].field == "user_data_file"
        assert str(tmp_path) in found.problems[-1].reason
