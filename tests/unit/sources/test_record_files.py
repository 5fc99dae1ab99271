"""What record files hold: YAML and JSON decoded with their lines, large files in a process of their own."""

import asyncio
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from imdsproxy.config.strict_yaml import Decoded, Undecodable, decode_yaml
from imdsproxy.errors import Problem
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.records import Path as PathInFile
from imdsproxy.model.records import Records, parse_records
from imdsproxy.model.records.schema import Findings, LineOf, Refused, render_path
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.file import contents as file_contents
from imdsproxy.sources.file.contents import read_contents
from imdsproxy.sources.file.record_file import decode_json, decode_records, read_records
from imdsproxy.sources.file.source import FileSource
from support.patience import patience
from support.source_runs import DEADLINE_S, running

_COUNT = 3_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    instances: list[dict[str, object]] = [
        {"id": f"vm{number}", "name": "vm", "user_data": "x" * 400} for number in range(_COUNT)
    ]
    instances += [{"id": "bad", "name": ""}, {"name": "nameless"}]
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"instances": instances}, indent=1))
    assert path.stat().st_size > 1024 * 1024
    return path


class _Seen(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, what: str, done: int, of: int) -> None:
        super().note(what, done, of)
        self.seen += [f"{step.what} {step.done} {step.of}" for step in self.steps]


def test_a_large_file_is_read_by_another_process_just_the_same_and_shows_its_progress(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(file_contents, "_APART", sys.maxsize)
        here = read_contents(large, Progress())
    assert len(here.entries["instances"]) == _COUNT + 1
    assert here.nameless["instances"]
    monkeypatch.delattr(file_contents, "read_records")
    progress = _Seen()
    assert read_contents(large, progress) == here
    assert progress.seen[0] == f"reading {large}, percent 0 100"
    assert progress.seen[-1] == f"reading {large}, percent 100 100"
    assert progress.steps == ()


def test_a_reader_that_dies_is_a_problem_of_the_file(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (problem,) = read_contents(large, Progress()).problems
    assert problem.reason == "the process that read it ended with status 1"
    assert problem.file == str(large)


_NETWORK = "{id: n, name: n, listener: {bridge: br0}}"
_DOCUMENTS = {
    "plain": f"networks: [{_NETWORK}]\ninstances:\n- {{id: a, name: a}}\n\n- id: b\n  name: b\n  tags: {{x: y}}\n",
    "an anchor used in another item": "instances:\n- {id: a, name: a, tags: &t {x: y}}\n- {id: b, name: b, tags: *t}\n",
    "a merge from an item": "instances:\n- &b {id: a, name: a}\n- {<<: *b, id: b}\n",
    "an item that is an alias": "instances:\n- &b {id: a, name: a}\n- *b\n",
    "a key twice": "instances:\n- id: a\n  name: a\n  id: b\n- {id: c, name: c}\n",
    "a list twice": "instances: [{id: a, name: a}]\nnetworks: []\ninstances: [{id: b, name: b}]\n",
    "a list with an anchor": "instances: &l [{id: a, name: a}, {id: b, name: b, tags: *l}]\n",
    "a root with an anchor": "&r\ninstances: [{id: a, name: a}, *r]\n",
    "bad records": "instances:\n- 7\n- {id: a, nam: a}\n- [x]\n- ~\n- {name: nameless}\n- {id: b, name: b}\n",
    "no list": "instances: {id: a}\n",
    "null": "instances:\nnetworks: ~\n",
    "an unknown list": "instances: [{id: a, name: a}]\nservers: []\n",
    "two documents": "instances: [{id: a, name: a}]\n---\ninstances: []\n",
    "bad at its end": "instances:\n- {id: a, name: a}\n- {id: b\n",
    "deep": "instances:\n- {id: a, name: a}\n- " + "[" * 500 + "]" * 500,
    "aliases of aliases": "instances:\n- &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"- &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
}


def _decode_as_one_tree(data: bytes) -> tuple[Records, LineOf]:
    decoded = decode_yaml(data.decode())
    if isinstance(decoded, Undecodable):
        problem = Problem("file", decoded.reason, "", "x.yaml", decoded.line)
        return Records(problems=(problem,)), lambda _path: None
    line_of, faults = decoded.line_of, decoded.faults
    return parse_records(decoded.value, Findings("x.yaml", line_of), faults), line_of


@pytest.mark.parametrize("name", _DOCUMENTS)
def test_records_taken_one_by_one_are_those_of_the_whole_document(name: str) -> None:
    data = _DOCUMENTS[name].encode()
    whole, line_of = _decode_as_one_tree(data)
    wanted: list[object] = [
        record if isinstance(record, Refused) else (record, line_of(place))
        for place, record in whole.found
    ]
    found: list[object] = []

    def take(
        place: PathInFile, record: Network | Instance | Refused, line: LineOf, _share: float
    ) -> None:
        found.append(record if isinstance(record, Refused) else (record, line(place)))

    assert read_records(data, file="x.yaml", take=take) == whole.problems
    assert decode_records(data, file="x.yaml") == whole
    assert whole.problems or sorted(map(repr, found)) == sorted(map(repr, wanted))


def test_a_large_yaml_file_is_decoded_without_its_whole_tree() -> None:
    count = 3_000
    listed = "".join(
        f"- {{id: i{number}, name: a, tags: {{some: tag}}}}\n" for number in range(count)
    )
    data = f"networks:\n- {{id: red, listener: {{namespace: red}}}}\ninstances:\n{listed}".encode()
    shares: list[float] = []
    tracemalloc.start()
    try:
        assert not read_records(data, file="x.yaml", take=lambda *taken: shares.append(taken[3]))
        # The whole tree takes 100 times the text, and 9 kB a record.
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    finally:
        tracemalloc.stop()
    assert (len(shares), shares) == (count + 1, sorted(shares))
    assert shares[-1] > 0.99
    steps: list[tuple[int, int]] = []
    decode_records(data, file="x.yaml", note=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == [*range(500, count + 1, 500)]
    assert all(0.75 * count < of < 1.25 * count for _, of in steps)


def test_progress_is_shown_while_many_records_are_compared(large: Path) -> None:
    progress = _Seen()
    FileSource(large.parent, large.with_suffix(".sqlite"), progress=progress).read()
    compared = [one for one in progress.seen if one.startswith("comparing the addresses")]
    assert len(set(compared)) == len(compared) >= _COUNT // 1000
    assert progress.steps == ()


async def test_the_event_loop_goes_on_while_a_large_file_is_read(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, slow = tmp_path / "gate", tmp_path / "python"
    os.mkfifo(gate)
    slow.write_text(f'#!/bin/sh\nread line < {gate}\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    progress = Progress()

    async def count() -> int:
        source = FileSource(large.parent, large.with_suffix(".sqlite"), progress=progress)
        async with running(source) as heard:
            await heard.until(lambda each: each.inventory.in_sync)
            return len(heard.inventory.instances)

    async with asyncio.timeout(DEADLINE_S * patience()), asyncio.TaskGroup() as group:
        counting = group.create_task(count())
        while not progress.steps:
            await asyncio.sleep(0.01)
        assert not counting.done()
        await asyncio.to_thread(gate.write_text, "go\n")
        assert await counting == _COUNT
    assert progress.steps == ()


Decode: TypeAlias = Callable[[str], Decoded | Undecodable]
BOTH: Final[tuple[Decode, ...]] = (decode_yaml, decode_json)


def decoded(text: str) -> Decoded:
    found = decode_yaml(text)
    assert isinstance(found, Decoded), found
    return found


def refused(text: str) -> Undecodable:
    found = decode_yaml(text)
    assert isinstance(found, Undecodable), found
    return found


_TEXTS = "52:54:00:12:34:56 10:20:30:40:50:51 no on Yes 0123 1_000 2024-01-01 = " + "9" * 400
_NUMBERS = {"0": 0, "-7": -7, "0x10": 16, "0o17": 15, "1.10": 1.1, "1e3": 1000.0, "1.": 1.0}
_OTHERS = {"true": True, "False": False, "~": None, "null": None, "": None}


@pytest.mark.parametrize(
    ("plain", "value"),
    [
        *((text, text) for text in _TEXTS.split()),
        *_NUMBERS.items(),
        *_OTHERS.items(),
        (".5", 0.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        (".nan", math.nan),
        ("'7'", "7"),
        ("!!str 7", "7"),
        ("!!binary H4sA/w==", b"\x1f\x8b\x00\xff"),
    ],
)
def test_a_plain_word_is_what_it_looks_like(plain: str, value: object) -> None:
    found = decoded(f"a: {plain}")
    # As text: 1 equals true and 1.0, and NaN not even itself.
    assert repr(found.value) == repr({"a": value})
    assert not found.faults


@pytest.mark.parametrize("decode", BOTH)
def test_a_duplicate_key_is_reported_with_its_path_and_line(decode: Decode) -> None:
    text = '{"a": 1,\n "b": [0, {"c": 1,\n"c": 2}]}'
    found = decode(text)
    assert isinstance(found, Decoded)
    assert found.value == {"a": 1, "b": [0, {"c": 1}]}
    assert [(render_path(fault.path), fault.line) for fault in found.faults] == [("b[1].c", 3)]


@pytest.mark.parametrize("decode", BOTH)
def test_every_part_knows_its_line(decode: Decode) -> None:
    found = decode('{"a":\n {"b": [1,\n2]},\n\n"c": 3}')
    assert isinstance(found, Decoded)
    lines = {
        path: found.line_of(path)
        for path in [(), ("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1), ("c",)]
    }
    assert lines == {(): 1, ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("c",): 5}
    assert found.line_of(("a", "b", 7)) == 2
    assert found.line_of(("a", "missing", "x")) == 1
    assert found.line_of(("c", "x", 0)) == 5


def test_a_merge_key_takes_what_is_not_there_and_an_alias_is_what_it_stands_for() -> None:
    found = decoded(
        "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: *a, y: 3}\nd: {<<: [*a, *b]}\n'<<': *b\n"
    )
    assert not found.faults
    a, b = {"x": 1, "y": 1}, {"y": 2, "z": 2}
    assert found.value == {"a": a, "b": b, "c": {"x": 1, "y": 3}, "d": {**b, **a}, "<<": b}


@pytest.mark.parametrize(
    "value",
    [
        *("!!python/object:os.system {}", "!!set {}", "!mine {}", "!!timestamp x"),
        *("!!int x", "!!bool no", "!!float x", "!!binary H4s"),
    ],
)
def test_a_tag_that_is_unknown_or_does_not_fit_is_reported(value: str) -> None:
    assert decoded(f"a: {value}").faults


def test_aliases_of_themselves_or_of_aliases_are_refused_before_they_fill_the_memory() -> None:
    refused("a: &a [*a]\n")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "aliases" in refused("\n".join(lines)).reason


def test_json_may_be_nested_a_hundred_levels_deep_and_nothing_without_end() -> None:
    depth = 5000
    refused("[" * depth + "]" * depth)
    refused("- " * depth + "x")
    assert isinstance(decode_json('{"a":' * depth + "1" + "}" * depth), Undecodable)
    assert isinstance(decode_json("[" * 102 + "]" * 102), Undecodable)
    assert isinstance(decode_json("[" * 101 + "]" * 101), Decoded)


def test_a_long_text_in_json_takes_little_more_memory_than_its_own() -> None:
    text = json.dumps({"user_data": '#cloud-config\n"' * 100_000})
    tracemalloc.start()
    try:
        assert isinstance(decode_json(text), Decoded)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        *((text, 1) for text in ('{"a" 1}', "{a: 1}", "[1 2]", '["\n"]', '["\\ud8"]', '"a')),
        *((text, 1) for text in ("tru", "01", "{", "[")),
        *((text, 2) for text in ('{"a": 1\n,}', "[1,\n2", "1\n2", "[1,\nNaN]")),
        ("[1,\n" + "9" * 1001 + "]", 2),
        ("9" * 5000, None),
        ("[" * 200_000, None),
    ],
)
def test_what_is_no_json_is_reported_with_its_line(text: str, line: int | None) -> None:
    found = decode_json(text)
    assert isinstance(found, Undecodable)
    assert found.line == line
    assert "not JSON" in found.reason
