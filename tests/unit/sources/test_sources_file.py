"""The file source: a directory read step by step, on a clock of the test's own, and one that is watched."""

import asyncio
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from imdsproxy.host.inotify import Place, Watch
from imdsproxy.model.entities import Instance, InstanceId, NetworkId
from imdsproxy.model.observation import StrandedPort
from imdsproxy.model.records import parse_instance
from imdsproxy.model.records.schema import MAX_PAYLOAD, Findings, Refused
from imdsproxy.sources.file import source as file_source
from imdsproxy.sources.file.record_file import payload_reader
from imdsproxy.sources.file.source import FileSource
from support.source_runs import Heard, running

WEB = InstanceId("web")
NETWORK = "networks:\n- id: n\n  listener: {bridge: br0}\n"


def record(name: str, address: str | None = None, **more: object) -> dict[str, object]:
    ports = [] if address is None else [{"network": "n", "addresses": [address]}]
    return {"id": name, "name": name, "ports": ports, **more}


def instances(*records: object) -> str:
    return json.dumps({"instances": records}, indent=1)


def write(path: Path, text: str | bytes) -> Path:
    """As careful writers do: beside, then renamed."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(text.encode() if isinstance(text, str) else text)
    return beside.rename(path)


class Bench:
    """The directory, its reader, and the time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.kept = path.parent / "last-good.sqlite"
        self.source = FileSource(self.path, self.kept, clock=lambda: self.now)

    def restart(self) -> None:
        """Another process reads the directory."""
        self.source.last_good.save()
        assert self.source.last_good.problem is None
        self.source = FileSource(self.path, self.kept, clock=lambda: self.now)

    def write(self, name: str, text: str | bytes) -> Path:
        return write(self.path / name, text)

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
    def names(self) -> set[str]:
        return set(self.source.everything().instances)


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
    assert bench.source.everything().networks.keys() == {"n"}


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
    assert bench.read(path).keys() == {"a"}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("instances:\n- id: a\n  name: [x\n", ":4: file: is not YAML"),
        (b"instances:\n# \xff\n", ":2: file: is not UTF-8"),
        ("instances: []\ninstances: []\n", ":2: instances: appears twice"),
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
    assert not bench.read()
    assert bench.names == {"a", "b"}
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
- {id: good, name: good, ports: [{network: n, addresses: [10.0.0.5]}]}
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
    - 10.0.0.6
    - 10.0.0.5
- {id: good, name: again}
""",
    )
    bench.read()
    assert bench.names == {"good"}
    assert bench.source.everything().networks.keys() == {"n"}
    lines = bench.lines
    taken = f"10.0.0.5 in network n belongs to instance good ({path}:9)"
    for wanted in (
        f"{path}:7: networks[1].subnets[0].cidr: ",
        f"{path}:12: instances[1].name: appears twice",
        f"{path}:15: instances[2].user_data_file: there is no file ",
        f"{path}:22: instances[3].ports[0].addresses[1]: {taken}",
        f"{path}:23: instances[4].id: good is also in {path}:9",
    ):
        assert any(line.startswith(wanted) for line in lines), (wanted, lines)
    assert len(lines) == 5


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
    problem = f"{path}: file: is blank: its former records stay in force"
    assert bench.lines[0].startswith(problem)
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
    assert bench.names == {"a"}
    assert ["cannot be read" in line for line in bench.lines] == [True] * 2


def test_what_was_in_force_stays_over_a_restart_with_broken_files_or_none(bench: Bench) -> None:
    bench.write("n.yaml", NETWORK)
    bench.write("x.json", instances(record("a", "10.0.0.5", user_data={"base64": "H4sA/w=="})))
    bench.write("y.json", instances(record("b", "10.0.0.6"), record("c", "10.0.0.7")))
    bench.read()
    before = bench.source.everything().instances
    bench.restart()
    with closing(sqlite3.connect(bench.kept)) as kept, kept:
        # As versions before it read it, to which a host may go back.
        rows = kept.execute("SELECT id, user_data FROM last_good WHERE user_data IS NOT NULL")
        assert rows.fetchall() == [("a", b"\x1f\x8b\x00\xff")]
        # These are passed over.
        for kind, name, text in (
            ("instances", "no-json", "{"),
            ("instances", "deep", "[" * 100_000),
            ("instances", "bad", '{"id": "bad", "ports": 7}'),
            ("routers", "r", "{}"),
        ):
            row = kind, name, "x.json", text, None
            kept.execute("INSERT INTO last_good VALUES (?, ?, ?, ?, ?)", row)
    bench.write("n.yaml", "networks: [")
    bench.write("x.json", b"\xff")
    bench.write("y.json", instances(record("b", "10.0.0.999"), record("c", "10.0.0.8")))
    assert bench.read().keys() == {"c"}
    assert len(bench.lines) == 3
    assert bench.source.everything().networks.keys() == {"n"}
    after = bench.source.everything().instances
    assert {one for one in before if after[one] != before[one]} == {"c"}
    bench.path.rename(bench.path.with_name("away"))
    bench.restart()
    bench.read()
    assert not bench.source.readable
    assert bench.names == {"a", "b", "c"}


def test_what_went_while_stopped_is_gone_and_who_had_an_address_has_it_after_a_restart(
    bench: Bench,
) -> None:
    gone = bench.write("x.json", instances(record("a", "10.0.0.5")))
    bench.write("y.json", instances(record("b", "10.0.0.6"), record("c", "10.0.0.7")))
    bench.read()
    gone.unlink()
    bench.write("y.json", instances(record("c", "10.0.0.7")))
    bench.write("a.json", instances(record("d", "10.0.0.7")))
    bench.restart()
    assert bench.read() == {"a": None, "b": None}
    assert bench.names == {"c"}


def test_a_port_has_the_file_line_and_field_of_its_first_claim_as_its_place(bench: Bench) -> None:
    path = bench.write(
        "x.yaml",
        "instances:\n- {id: db, name: db}\n- id: web\n  name: web\n  ports:\n"
        "  - network: nowhere\n    addresses:\n    - 10.0.0.5\n  - network: beyond\n",
    )
    ports = [StrandedPort("file", WEB, number, NetworkId("nowhere")) for number in range(3)]
    assert bench.source.explain_stranded(ports[0]) == ports[0].problem()
    bench.read()
    assert [bench.source.explain_stranded(port) for port in ports] == [
        ports[0].problem(field="instances[1].ports[0].network", file=str(path), line=8),
        ports[1].problem(field="instances[1].ports[1].network", file=str(path), line=3),
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


# Watched


def put(path: Path, text: str) -> None:
    write(path, instances(record("a", user_data=text)))


def overwrite(path: Path, text: str) -> None:
    """As shells do: cut to nothing, then filled in several writes."""
    with path.open("w") as stream:
        for begin in range(0, len(text), 50):
            stream.write(text[begin : begin + 50])
            stream.flush()


def has(text: str, heard: Heard) -> bool:
    return {key: each.user_data for key, each in heard.inventory.instances.items()} == {
        "a": text.encode()
    }


async def heard_of(heard: Heard, text: str) -> None:
    await heard.until(partial(has, text))


def source_of(directory: Path) -> FileSource:
    return FileSource(directory, directory.parents[1] / "last-good.sqlite")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "records"
    path.mkdir(parents=True)
    return path


async def test_a_file_overwritten_in_place_a_hundred_times_never_loses_its_records(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half a second by default: on a busy machine the one who writes may be held up for longer.
    monkeypatch.setattr(file_source, "_EMPTY_S", 30.0)
    many = [record(f"i{n}") for n in range(50)]
    write(directory / "x.json", instances(*many))
    async with running(source_of(directory)) as heard:
        for turn in range(100):
            overwrite(directory / "x.json", instances(record(f"last{turn}"), *many))
            await asyncio.sleep(0)
        await heard.until(lambda each: "last99" in each.inventory.instances)
        gone = {name for each in heard.observations for name in each.instances_removed}
        assert not gone & {f"i{n}" for n in range(50)}


async def test_a_payload_in_another_directory_is_watched(directory: Path, tmp_path: Path) -> None:
    payload = tmp_path / "later" / "still" / "web.sh"
    named = {"id": "a", "name": "a", "user_data_file": str(payload)}
    write(directory / "x.json", instances(named))
    async with running(source_of(directory)) as heard:
        assert "there is no file" in heard.last.problems[0].reason
        payload.parent.mkdir(parents=True)
        for text in ("one", "two"):
            write(payload, text)
            await heard_of(heard, text)
            assert not heard.last.problems
        await asyncio.to_thread(payload.unlink)
        await heard.until(lambda each: each.last.problems)
        assert has("two", heard)


async def test_a_directory_that_comes_late_goes_is_made_again_or_replaced_is_followed(
    tmp_path: Path,
) -> None:
    directory, other = tmp_path / "not" / "yet", tmp_path / "other"
    async with running(source_of(directory)) as heard:
        (first,) = heard.observations
        assert (first.full, first.in_sync) == (False, False)
        assert "cannot be listed" in first.problems[0].reason
        for text in ("1", "2"):
            await asyncio.to_thread(directory.mkdir, parents=True)
            put(directory / "x.json", text)
            await heard_of(heard, text)
            assert heard.last.in_sync
            assert not heard.last.problems
            put(directory / "x.json", f"{text}.1")
            await heard_of(heard, f"{text}.1")
            shutil.rmtree(directory)
            await heard.until(lambda each: not each.last.in_sync)
            # What was in force stays.
            assert has(f"{text}.1", heard)
        for text in ("3", "4"):
            other.mkdir()
            put(other / "x.json", text)
            if directory.exists():
                directory.rename(tmp_path / "old")
            other.rename(directory)
            await heard_of(heard, text)
        assert [each.full for each in heard.observations].count(True) == 1


async def test_a_memory_that_cannot_be_kept_is_reported(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    put(directory / "x.json", "1")
    source = FileSource(directory, tmp_path / "file" / "last-good.sqlite")
    async with running(source) as heard:
        await heard.until(lambda each: each.last.problems)
        assert heard.last.problems[0].field == "last-good"
        assert has("1", heard)


async def test_files_behind_a_symbolic_link_are_read_again_when_it_or_they_change(
    directory: Path,
) -> None:
    # How Kubernetes updates a mounted ConfigMap: one link to a directory, replaced as a whole.
    for version in ("1", "2"):
        (directory / f"..{version}").mkdir()
        put(directory / f"..{version}" / "x.json", version)
    (directory / "..data").symlink_to("..1")
    (directory / "x.json").symlink_to("..data/x.json")
    async with running(source_of(directory)) as heard:
        assert has("1", heard)
        (directory / "..data.new").symlink_to("..2")
        await asyncio.to_thread((directory / "..data.new").rename, directory / "..data")
        await heard_of(heard, "2")
        put(directory / "..2" / "x.json", "3")
        await heard_of(heard, "3")


async def test_without_inotify_the_directory_is_looked_at_from_time_to_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Watch, _places: object) -> None:
        raise OSError("no inotify instances left")

    monkeypatch.setattr(file_source, "_UNWATCHED_S", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(Watch, "__init__", refuse)
        async with running(source_of(directory)) as heard:
            assert "inotify" in heard.last.problems[0].hint
            assert heard.last.in_sync
            put(directory / "x.json", "1")
            await heard_of(heard, "1")
            patched.undo()
            await heard.until(lambda each: not each.last.problems)


async def test_an_idle_source_uses_next_to_no_time(directory: Path) -> None:
    for number in range(200):
        write(directory / f"{number}.json", instances(record(f"i{number}")))
    async with running(source_of(directory)) as heard:
        used, begin = time.process_time(), time.monotonic()
        await asyncio.sleep(1.0)  # what is measured is that nothing happens for a while
        used, passed = time.process_time() - used, time.monotonic() - begin
        assert used / passed < 0.05
        assert len(heard.observations) == 1


async def test_a_change_just_before_watching_begins_is_seen(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Watch.__init__

    def late(self: Watch, places: Iterable[Place]) -> None:
        put(directory / "x.json", "1")
        begin(self, places)

    monkeypatch.setattr(Watch, "__init__", late)
    async with running(source_of(directory)) as heard:
        await heard_of(heard, "1")


async def test_a_cancelled_source_leaves_no_inotify_behind(directory: Path) -> None:
    def count() -> int:
        links = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        return sum("inotify" in str(link) for link in links)

    before = count()
    async with running(source_of(directory)):
        assert count() > before
    async with asyncio.timeout(30):
        while count() > before:
            await asyncio.sleep(0.01)
