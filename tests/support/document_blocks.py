"""The commands of a document, and what it says that they print.

A block is four blanks deep; a fence of `text` right behind it holds lines of what it prints, each of which may have
`…` for what is different each time.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

_INDENT: Final = "    "
_MARK: Final = "@@ block "


@dataclass(frozen=True, slots=True)
class Block:
    """Commands that are run together.

    Attributes:
        line: Where they begin, from 1.
        script: They, as a shell takes them.
        printed: Lines of their output, in this order.
    """

    line: int
    script: str
    printed: tuple[str, ...] = ()


def section(page: Path, heading: str) -> tuple[int, list[str]]:
    """The lines below a heading as far as the next of its rank, and the number of the first.

    Raises:
        KeyError: There is no such heading.
    """
    lines = page.read_text().splitlines()
    if heading not in lines:
        raise KeyError(heading)
    start = lines.index(heading) + 1
    rank = len(heading) - len(heading.lstrip("#"))
    following = (
        number
        for number, line in enumerate(lines[start:], start)
        if re.match(rf"#{{1,{rank}}} ", line)
    )
    last = next(following, len(lines))
    return start + 1, lines[start:last]


def blocks_of(page: Path, heading: str) -> list[Block]:
    """The blocks below a heading, subordinate headings included."""
    first, lines = section(page, heading)
    found: list[Block] = []
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = lines.index("```", number + 1)
            if lines[number] == "```text" and found:
                block = found[-1]
                found[-1] = Block(block.line, block.script, tuple(lines[number + 1 : end]))
            number = end + 1
        elif lines[number].startswith(_INDENT):
            begin = number
            while number < len(lines) and (
                lines[number].startswith(_INDENT) or (not lines[number] and _goes_on(lines, number))
            ):
                number += 1
            script = "\n".join(line.removeprefix(_INDENT) for line in lines[begin:number])
            found.append(Block(first + begin, script))
        else:
            number += 1
    assert all(one.line < other.line for one, other in pairwise(found))
    return found


def _goes_on(lines: Sequence[str], number: int) -> bool:
    following = lines[number + 1 : number + 2]
    return bool(following) and following[0].startswith(_INDENT)


def script_of(blocks: Iterable[Block]) -> str:
    """All blocks in one script, which marks in its output where each begins."""
    return "\n".join(f"echo; echo '{_MARK}{one.line}'\n{one.script}" for one in blocks)


def find_fault(blocks: Sequence[Block], status: int, output: str) -> str:
    """How a script of blocks that ended with this did not go as its document says; empty when it did.

    Args:
        output: All that it printed, errors too.
    """
    parts = (part.partition("\n") for part in output.split(_MARK)[1:])
    printed = {int(line): text for line, _, text in parts}
    if status != 0:
        return f"the block of line {max(printed, default=0)} ended with {status}:\n{output[-3000:]}"
    return "".join(
        f"the block of line {one.line} did not print {missing}:\n{printed[one.line]}"
        for one in blocks
        if (missing := missing_lines(one, printed[one.line]))
    )


def missing_lines(block: Block, output: str) -> list[str]:
    """What the document says is printed and is not, in this order."""
    missing: list[str] = []
    rest = output
    for line in block.printed:
        words = (r"\s+".join(map(re.escape, part.split())) for part in line.split("…"))
        pattern = ".*?".join(words)
        found = re.search(pattern, rest)
        if found is None:
            missing.append(line)
        else:
            rest = rest[found.end() :]
    return missing
